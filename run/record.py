"""What a run writes after every epoch: its row in `metrics.csv` first, its checkpoint second.

A checkpoint's epoch is thereby always in the table; a resumed run drops what is newer than its checkpoint and computes
it again.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from run.errors import UserError
from run.files import same_file, write_whole
from run.loggers import Loggers

if TYPE_CHECKING:
    from run.run_folder import RunFolder

AVERAGE = "average"  # of several networks: what stands in the column `checkpoint`, and the folder of its arrays
FIRST_COLUMNS = ("epoch", "train_loss", "train_acc", "test_loss", "test_acc", "lr")


class RunRecord(Checkpoint):
    """Writes, after all measures of an epoch, its row in `metrics.csv`, then `last.ckpt`, and `best.ckpt` if it is.

    A row holds what the module and the callbacks left in their `values`. Best is the highest `test_acc`, the first
    of equals. Lightning runs a `Checkpoint` after all other callbacks; this one relies on it.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        save_every: int | None = None,
        going_on: Callable[[], None] | None = None,
        loggers: Loggers | None = None,
    ):
        self.folder = folder
        self.loggers = loggers or Loggers(None, folder, {})
        self.save_every = save_every
        self.going_on = going_on  # called when a resumed run has taken in its checkpoint
        self.table = folder.table("metrics.csv", FIRST_COLUMNS)
        self.best = float("-inf")
        epochs = [int(row["epoch"]) for row in self.table.rows()]
        if folder.epoch is not None and epochs != list(range(folder.epoch + 1)):
            raise UserError(f"{self.table.path} does not have every epoch up to {folder.epoch}, its checkpoint's")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.write_row(trainer, pl_module, 0)
        elif self.going_on:
            self.going_on()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.write_row(trainer, pl_module, epoch, time.perf_counter() - self._start)
        names = ["last.ckpt"]
        values = pl_module.values
        if values.get("test_acc", 0.0) > self.best and math.isfinite(values["test_loss"]):
            self.best = values["test_acc"]
            names.append("best.ckpt")
        if self.save_every and epoch % self.save_every == 0:
            names.append(f"epoch{epoch:04d}.ckpt")
        folder = self.folder.path / "checkpoints"
        trainer.save_checkpoint(folder / names[-1])
        if trainer.is_global_zero:
            for name in names[-2::-1]:  # last.ckpt at the end: what a resumed run relies on is then all there
                same_file(folder / names[-1], folder / name)

    def write_row(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        epoch: int,
        seconds: float = 0.0,
        *,
        checkpoint: str | None = None,
    ) -> None:
        """Write what the module and the callbacks found; of several measured networks, which `checkpoint` it is."""
        row = {"epoch": epoch}
        if checkpoint is not None:
            row["checkpoint"] = re.sub(r'[",\r\n]', "_", checkpoint)  # a cell is never quoted
        for source in (pl_module, *trainer.callbacks):
            row |= getattr(source, "values", {})
        times = {name: row.pop(name) for name in list(row) if name.startswith("time/")}
        if epoch > 0:
            row["time/epoch"] = seconds - sum(times.values())  # what training and testing took, without measures
        if trainer.is_global_zero:
            self.table.add(row | times)
            self.loggers.row(epoch, row | times)

    def write_average(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """A row without an epoch for what was found of all networks together, if anything was."""
        if values and trainer.is_global_zero:
            self.table.add({"checkpoint": AVERAGE, **values})

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def rise(epochs: Sequence[int]) -> bool:
    """Whether each epoch is later than the one before, as in a run."""
    return all(before < after for before, after in itertools.pairwise(epochs))


class EpochTable:
    """A CSV file with one or more lines per epoch that is always whole, and from which newer epochs can be dropped.

    The first column is the epoch. Columns stand in the order in which they first came, after `first_columns`.
    """

    def __init__(self, path: Path, first_columns: Iterable[str], *, keep_to: int | None = None):
        self.path = path
        self.columns = list(first_columns)
        self._lines: list[str] = []
        if keep_to is not None and path.exists():
            self._read(keep_to)

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows and write the file."""
        new = list(dict.fromkeys(name for row in rows for name in row if name not in self.columns))
        if new:
            self.columns += new
            self._lines = [line + "," * len(new) for line in self._lines]
        self._lines += [",".join(str(row.get(name, "")) for name in self.columns) for row in rows]
        write_whole(self.path, "\n".join([",".join(self.columns), *self._lines, ""]))

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text by column; empty cells left out."""
        cells = (zip(self.columns, line.split(","), strict=True) for line in self._lines)
        return [{name: value for name, value in row if value} for row in cells]

    def _read(self, keep_to: int) -> None:
        try:
            header, *lines = self.path.read_text(encoding="utf-8").splitlines()
            self.columns = header.split(",")
            self._lines = [line for line in lines if int(line.partition(",")[0]) <= keep_to]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if any(line.count(",") != header.count(",") for line in self._lines):
            raise UserError(f"{self.path} is damaged: not every line has {len(self.columns)} values")
