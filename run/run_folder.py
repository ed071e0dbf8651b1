"""The folder a run leaves behind: made so that no two runs share it, filled so that a kill at any moment spares it.

Every file is written beside its place and renamed into it: a reader finds the old file or the new one, whole.
"""

import fcntl
import shlex
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import yaml

from run import command, turns
from run.arrays import Arrays
from run.checkpoints import read_checkpoint
from run.epochs import why_of_one_length
from run.errors import Interrupted, UserError, WrongFlag
from run.files import remove_leftovers, stamp, write_whole
from run.provenance import provenance
from run.ranks import ALONE, LOST, Ranks, is_lost_rank
from run.record import EpochTable, rise

GLANCE = 0.1  # seconds: more than who looks at a lock takes for it


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
        self.arrays = Arrays(path)
        self.checkpoint: Path | None = None
        self.epoch: int | None = None
        self._last = path / "checkpoints" / "last.ckpt"
        if self._last.exists():
            self.checkpoint, self.epoch = self._last, read_checkpoint(self._last)["epoch"] + 1

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
            _lock(self._lock)
            is_free = not self.is_new or holds_no_run(self.path)  # else another run of that name was faster
            self._begun_at = stamp(self._last)
            if is_free:
                remove_leftovers(self.path)
                self.arrays.drop_after(self.epoch)
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
        has_advanced = stamp(self._last) != self._begun_at
        if has_advanced:
            turns.forget(self.path.parent)
        self._lock.close()
        if isinstance(error, Interrupted):
            error.advice, error.has_advanced = self.advice, has_advanced
        elif isinstance(error, RuntimeError) and is_lost_rank(error):
            raise UserError(LOST + self.advice) from error

    @property
    def advice(self) -> str:
        """How to take up a run that ended early."""
        return f"; `{command.LINE} --resume {shlex.quote(str(self.path))}` goes on"

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

    @contextmanager
    def places(self, epochs: Sequence[int]) -> Iterator[list["RunFolder"]]:
        """Where the files of networks of these epochs lie: all here, or, where epochs do not rise, each in its own.

        Files are named by their epoch: those of two networks would take each other's place.
        """
        if rise(epochs):
            yield [self] * len(epochs)
            return
        paths = [self.path / f"checkpoint{i:04d}" for i in range(len(epochs))]
        for path in paths:
            if self.is_ours:
                path.mkdir()
        yield [RunFolder(path, is_ours=self.is_ours) for path in paths]
        for path in paths:
            if self.is_ours:
                with suppress(OSError):  # there are files in it
                    path.rmdir()

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


def _lock(file: IO) -> None:
    """Be the one who writes in a folder; an error if another one is.

    Who only looks whether there is one holds the lock himself for a moment, so it is tried twice.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(GLANCE)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
