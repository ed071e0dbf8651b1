"""What a run keeps that is no number in a table: `arrays/epoch0003/MEASURE.npz`, there whole or not at all.

with np.load("lightning_logs/version_0/arrays/epoch0003/rank.npz") as arrays:
    sigma = arrays["singular_values/train/hidden1"]
    settings = json.loads(str(arrays["settings"]))
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from run.errors import UserError
from run.files import write_whole

if TYPE_CHECKING:  # figures read arrays, and need no torch
    from torch import Tensor

SETTINGS = "settings"  # the name under which they lie among the arrays
FOLDER = re.compile(r"epoch(\d{4,})")


class Arrays:
    """The folder `arrays/` of a run; of a resumed one, up to its checkpoint's epoch."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "arrays"

    def write(self, epoch: int | str, measure: str, arrays: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Keep a measure's arrays of this epoch, or of the `average` of networks, and with them how they were made."""
        import torch

        content = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
        about = {**settings, "epoch": epoch, "torch": str(torch.__version__), "numpy": np.__version__}
        buffer = io.BytesIO()
        np.savez(buffer, **content, **{SETTINGS: np.array(json.dumps(about))})
        folder = self.path / (epoch if isinstance(epoch, str) else f"epoch{epoch:04d}")
        try:
            self.path.mkdir(exist_ok=True)  # without its parents: a run's folder that is gone is not made again
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        write_whole(folder / f"{measure}.npz", buffer.getvalue())

    def epochs(self, measure: str) -> list[int]:
        """The epochs of which there are arrays of this measure."""
        return [int(path.parent.name.removeprefix("epoch")) for path in sorted(self.path.glob(f"epoch*/{measure}.npz"))]

    def read(self, epoch: int, measure: str, prefix: str = "") -> dict[str, Tensor]:
        """A measure's arrays of an epoch whose names begin so."""
        import torch

        path = self.path / f"epoch{epoch:04d}" / f"{measure}.npz"
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files if name.startswith(prefix)}

    def drop_after(self, epoch: int | None) -> None:
        """Remove what is newer than the checkpoint from which a run goes on; without one, everything."""
        for folder in self.path.glob("epoch*"):
            match = FOLDER.fullmatch(folder.name)
            if match and (epoch is None or int(match[1]) > epoch):
                shutil.rmtree(folder)


def names(path: str | Path) -> list[str]:
    """The names of the arrays in such a file."""
    return _read(path, lambda file: [name for name in file.files if name != SETTINGS])


def read(path: str | Path, names: Container[str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays in such a file by name (those of these names: else all), and their settings."""

    def arrays_and_settings(file: np.lib.npyio.NpzFile) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        settings = json.loads(str(file[SETTINGS]))
        wanted = [name for name in file.files if name != SETTINGS and (names is None or name in names)]
        return {name: file[name] for name in wanted}, settings

    return _read(path, arrays_and_settings)


def _read(path: str | Path, what: Callable[[np.lib.npyio.NpzFile], Any]) -> Any:
    try:
        with np.load(path, allow_pickle=False) as file:
            return what(file)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # a broken archive answers with a dozen kinds of exceptions
        raise UserError(f"{path} holds no arrays of a run: {' '.join(str(error).split())}") from None
