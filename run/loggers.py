"""Lightning's loggers, for who asks for one with `--logger`: they get what `metrics.csv` gets.

That file stays what counts. They are not the Trainer's own, which would show steps where this shows epochs.
"""

from __future__ import annotations

import importlib
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run.errors import UserError
from run.files import write_whole

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from run.run_folder import RunFolder

MODULES = {"tensorboard": ("torch.utils.tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of these will do


def refuse_missing(names: Sequence[str] | None) -> None:
    """Say, while there is no folder yet, what has to be installed."""
    for name in names or ():
        if not any(map(_is_there, MODULES[name])):
            raise UserError(f"--logger {name}: {name} is not installed; `pip install {name}` does it")


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


class Loggers:
    """The loggers of a run; none in a process that writes nothing.

    One that cannot begin is an error. One that fails later is left out, with a warning: the run goes on without it.
    """

    def __init__(self, names: Sequence[str] | None, folder: RunFolder, flags: Mapping[str, Any]):
        self._loggers: dict[str, Logger] = {}
        for name in (names or ()) if folder.is_ours else ():
            try:
                logger = {"tensorboard": _tensorboard, "wandb": _wandb}[name](folder)
                logger.log_hyperparams(dict(flags))
            except Exception as error:  # whatever a service or its library answers
                raise UserError(f"--logger {name} cannot begin: {_in_a_line(error)}") from error
            self._loggers[name] = logger

    def row(self, epoch: int, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row of `metrics.csv`."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._each(lambda logger: (logger.log_metrics(numbers, step=epoch), logger.save()))

    def figure(self, path: Path, epoch: int) -> None:
        """Pass on a figure in a PNG file, under its name."""
        self._each(lambda logger: _show(logger, path, epoch))

    def close(self) -> None:
        """Leave everything written."""
        self._each(lambda logger: logger.finalize("success"))

    def _each(self, do: Callable[[Logger], object]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                do(logger)
            except Exception as error:  # whatever a service or its library answers
                del self._loggers[name]
                warnings.warn(f"--logger {name} is left out from here on: {_in_a_line(error)}", stacklevel=3)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _tensorboard(folder: RunFolder) -> Logger:
    """Files for TensorBoard in the run's folder; what a killed run wrote after its checkpoint is taken back."""
    from lightning.pytorch.loggers import TensorBoardLogger

    purge = {} if folder.epoch is None else {"purge_step": folder.epoch + 1}
    return TensorBoardLogger(folder.path, name="", version="tensorboard", default_hp_metric=False, **purge)


def _wandb(folder: RunFolder) -> Logger:
    """A run of W&B by the folder's name, the same one when it is resumed; its variables say in which project."""
    from lightning.pytorch.loggers import WandbLogger

    kept = folder.path / "wandb" / "id"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        write_whole(kept, uuid.uuid4().hex[:12])
    return WandbLogger(name=folder.path.resolve().name, save_dir=folder.path, id=kept.read_text())


def _show(logger: Logger, path: Path, epoch: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(path.stem, [str(path)], step=epoch)
        return
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB"))  # (height, width, 3)
    logger.experiment.add_image(path.stem, pixels, epoch, dataformats="HWC")
