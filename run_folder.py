"""The folder a run leaves behind: made so that no two runs share it, filled so that a kill at any moment spares it.

Every file is written beside its place and renamed into it: a reader finds the old file or the new one, whole.
After each epoch the row of `metrics.csv` comes first and the checkpoint second, so a checkpoint's epoch is always
in the table; a resumed run drops what is newer than its checkpoint and computes it again.
"""

import fcntl
import io
import math
import os
import pickle
import platform
import shlex
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

import slurm
from errors import Interrupted, UserError, WrongFlag
from flags import why_of_one_length
from ranks import ALONE, LOST, Ranks, is_lost_rank

FIRST_COLUMNS = ("epoch", "train_loss", "train_acc", "test_loss", "test_acc", "lr")


class RunFolder:
    """A run's folder, this run's alone while the `with` block lasts. Of several ranks the first one writes.

    `checkpoint` is the file to go on from and `epoch` its epoch; both None for a new run. `before` is the content of
    a resumed run's `hparams.yaml`.
    """

    def __init__(
        self, path: Path, before: Mapping[str, Any] | None = None, *, is_ours: bool = True, is_new: bool = False
    ):
        self.path = path
        self.before = before
        self.is_ours = is_ours  # to write in
        self.is_new = is_new  # and may hold no run
        self.checkpoint: Path | None = None
        self.epoch: int | None = None
        last = path / "checkpoints" / "last.ckpt"
        if last.exists():
            self.checkpoint, self.epoch = last, read_checkpoint(last)["epoch"] + 1

    @classmethod
    def new(cls, log_dir: str | Path, name: str | None = None) -> "RunFolder":
        """A folder without a run: `name`, or the next free `version_X`. Whoever enters it first has it.

        One of that name may be there if nothing of a run is in it: a run that is killed before it begins leaves such.
        """
        log_dir = Path(log_dir)
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            path = _next_version(log_dir) if name is None else log_dir / name
            if not path.exists():
                path.mkdir(exist_ok=True)
            if not holds_no_run(path):
                raise _taken(path)
        except OSError as error:
            raise UserError(f"--log-dir: cannot make a run's folder in {log_dir}: {error.strerror}") from None
        return cls(path, is_new=True)

    @classmethod
    def of(cls, args: Namespace, ranks: Ranks = ALONE) -> "RunFolder":
        """The folder that the flags mean: a new one, or the one to go on with. All ranks get the first one's."""
        if ranks.is_first:
            folder = cls.resumed(args.resume) if args.resume else cls.new(args.log_dir, args.name)
            ranks.advice = folder.advice
            ranks.from_first((folder.path, folder.epoch))
            return folder
        path, epoch = ranks.from_first((Path(), None))
        folder = cls.resumed(path, is_ours=False) if args.resume else cls(path, is_ours=False)
        if folder.epoch != epoch:
            raise UserError(f"--log-dir: {path} does not hold the same checkpoint on every machine: they must share it")
        return folder

    @classmethod
    def resumed(cls, path: str | Path, *, is_ours: bool = True) -> "RunFolder":
        """The folder of a run that ended early. Without a checkpoint yet it starts anew, in the same place."""
        hparams = yaml.safe_load((Path(path) / "hparams.yaml").read_text(encoding="utf-8"))
        return cls(Path(path), hparams, is_ours=is_ours)

    def __enter__(self) -> "RunFolder":
        if not self.is_ours:
            return self
        try:
            self._lock = open(self.path / ".lock", "w")  # a killed process loses its lock, so none is ever stale
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = not self.is_new or holds_no_run(self.path)  # else another run of that name was faster
            if is_free:
                remove_leftovers(self.path)
        except BlockingIOError:
            is_free = False
        except OSError as error:
            raise UserError(f"cannot write in {self.path}: {error.strerror}") from None
        if not is_free:
            self._lock.close()
            going_on = UserError(f"--resume: the run in {self.path} is still going on: stop it first")
            raise _taken(self.path) if self.is_new else going_on
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not self.is_ours:
            return
        self._lock.close()
        if isinstance(error, Interrupted):
            error.advice = self.advice
        elif isinstance(error, RuntimeError) and is_lost_rank(error):
            raise UserError(LOST + self.advice) from error

    @property
    def advice(self) -> str:
        """How to take up a run that ended early."""
        return f"; `python main.py --resume {shlex.quote(str(self.path))}` goes on"

    def refuse_other_length(self, args: Namespace) -> None:
        """Refuse `--epochs` with which this run, resumed, would not become what a run of that many epochs is."""
        if args.epochs < self.epoch:
            raise WrongFlag(
                f"argument -e/--epochs: the run in {self.path} has done {self.epoch} epochs already, more than "
                f"{args.epochs}: ask for at least as many"
            )
        planned = self.before.get("epochs", args.epochs)
        reason = why_of_one_length(args, planned, self.epoch)
        if reason:
            raise WrongFlag(
                f"argument -e/--epochs: the run in {self.path} was begun for {planned} epochs, and {reason}: going on, "
                f"it would not become a run of {args.epochs}; start a new run with -e {args.epochs}"
            )

    def table(self, name: str, first_columns: Iterable[str]) -> "EpochTable":
        """A CSV file of this run; of a resumed one, up to its checkpoint's epoch."""
        return EpochTable(self.path / name, first_columns, keep_to=self.epoch)

    def write_hparams(self, flags: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """`hparams.yaml`: the flags, and under `provenance` what is no flag; a resumed run remembers when it was."""
        if not self.is_ours:
            return
        about = provenance() | dict(facts)
        if self.before is not None:
            before = self.before.get("provenance", {})
            resumed = before.get("resumed")
            about["resumed"] = [*(resumed if isinstance(resumed, list) else []), about["started"]]
            about["started"] = before.get("started")
        content = yaml.safe_dump({**flags, "provenance": about}, sort_keys=False, allow_unicode=True)
        write_whole(self.path / "hparams.yaml", content)


def holds_no_run(folder: Path) -> bool:
    """Whether there is nothing in a folder but what a run leaves that is killed before its `hparams.yaml` is there."""
    return folder.is_dir() and all(
        path.name == ".lock" or fnmatchcase(path.name, ".hparams.yaml.*.tmp") for path in folder.iterdir()
    )


def _taken(path: Path) -> UserError:
    return UserError(f"--name: {path} exists already: choose another, or --resume it")


def _next_version(log_dir: Path) -> Path:
    taken = [path.name.removeprefix("version_") for path in log_dir.glob("version_*")]
    version = max((int(number) for number in taken if number.isdecimal()), default=-1) + 1
    while True:
        folder = log_dir / f"version_{version}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run was faster
            version += 1


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, read as data: one that holds code is refused and nothing of it runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint of this program: it holds more than numbers and names") from None
    except Exception as error:  # torch answers broken files with a dozen kinds of exceptions
        raise UserError(f"{path} is no checkpoint, or not a whole one: {' '.join(str(error).split())[:150]}") from None
    parts = {"state_dict": dict, "hyper_parameters": dict, "epoch": int}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in parts.items()):
        raise UserError(f"{path} is no checkpoint of this program: it has no {', '.join(parts)}")
    return content


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content so that at any moment the old or the new one is there, whole."""
    beside = _beside(path)
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):  # where writing fails, so may this
            beside.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise


def _beside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def same_file(path: Path, other: Path) -> None:
    """Let a second name mean the file that is there under the first, which is never written into, only replaced."""
    beside = _beside(other)
    try:
        os.link(path, beside)
        os.replace(beside, other)
    except OSError:  # not every file system knows links
        write_whole(other, path.read_bytes())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left beside the files of a folder that is ours alone."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()


def provenance() -> dict[str, Any]:
    """With what a run is made: versions, commit, time."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "lightning": lightning.__version__,
        "git_commit": _git_commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **({"slurm_job": slurm.job_id()} if slurm.job_id() else {}),
    }


def _git_commit() -> str | None:
    """The checkout's commit, with a `+` where files differ from it."""
    # In a container the checkout is mounted, of an owner whom git does not trust by itself.
    git = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout: an image, which may know, or an archive
        return os.environ.get("GIT_COMMIT") or None
    return commit + ("+" if changed.stdout.strip() else "")


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


def save_whole(path: Path, content: Any) -> None:
    """`torch.save` into a file that is there whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        path.parent.mkdir(exist_ok=True)  # without its parents: a run's folder that is gone is not made again
    except OSError as error:
        raise UserError(f"cannot make {path.parent}: {error.strerror}") from error
    write_whole(path, buffer.getvalue())


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, there whole or not at all (its own pass through another disk), read as data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_whole(Path(path), checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(path)


class RunRecord(Checkpoint):
    """Writes, after all measures of an epoch, its row in `metrics.csv`, then `last.ckpt`, and `best.ckpt` if it is.

    A row holds what the module and the callbacks left in their `values`. Best is the highest `test_acc`, the first
    of equals. Lightning runs a `Checkpoint` after all other callbacks; this one relies on it.
    """

    def __init__(self, folder: RunFolder, *, save_every: int | None = None, going_on: Callable[[], None] | None = None):
        self.folder = folder
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

    def write_row(self, trainer: Trainer, pl_module: LightningModule, epoch: int, seconds: float = 0.0) -> None:
        row = {"epoch": epoch}
        for source in (pl_module, *trainer.callbacks):
            row |= getattr(source, "values", {})
        times = {name: row.pop(name) for name in list(row) if name.startswith("time/")}
        if epoch > 0:
            row["time/epoch"] = seconds - sum(times.values())  # what training and testing took, without measures
        if trainer.is_global_zero:
            self.table.add(row | times)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
