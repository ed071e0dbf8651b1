"""What there is already of a run that is about to begin: a folder with the same flags, finished, going on or killed."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from run.listed import DONE, RUNNING, Listed
from run.presets import DEFAULTS, FREE_ON_RESUME
from run.settings import in_words

# A run of more epochs is another one.
FREE = {name for name in FREE_ON_RESUME if name != "epochs"}


class EarlierRuns:
    """The runs in a folder by their flags. Each is read once, and looked at anew whenever it is asked for."""

    def __init__(self, log_dir: str | Path):
        self.log_dir = Path(log_dir)
        self._folders: dict[Hashable, list[Path]] = {}
        self._known: set[str] = set()

    def find(self, flags: Mapping[str, Any]) -> Listed | None:
        """The run with these flags: one that is finished, else one that goes on, else the newest that can go on."""
        self._read()
        runs = [Listed(folder) for folder in self._folders.get(identity(flags), ())]
        finished = [run for run in runs if is_finished(run, flags)]
        going_on = [run for run in runs if run.state == RUNNING]
        killed = sorted((run for run in runs if can_go_on(run)), key=lambda run: run.started, reverse=True)
        return next(iter([*finished, *going_on, *killed]), None)

    def _read(self) -> None:
        """Take in what is new; a folder without `hparams.yaml` will be looked at again."""
        names = os.listdir(self.log_dir) if self.log_dir.is_dir() else []
        for name in sorted({*names} - self._known):
            folder = self.log_dir / name
            run = Listed(folder) if (folder / "hparams.yaml").is_file() else None
            if run is not None:
                self._known.add(name)
            if run is not None and run.flags and "measured" not in run.facts:
                self._folders.setdefault(identity(run.flags), []).append(folder)


def identity(flags: Mapping[str, Any]) -> Hashable:
    """What two runs share exactly if one is a repetition of the other. A range test's rate is not known before."""
    flags = DEFAULTS | dict(flags)
    ignored = FREE | ({"learning_rate"} if flags["lr_range_test"] else set())
    return tuple(sorted((name, in_words(name, value)) for name, value in flags.items() if name not in ignored))


def is_finished(run: Listed, flags: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do of what the flags ask for.

    A row is written before its checkpoint, and slots are updated after both: a kill may come between.
    """
    if flags.get("slot_update") and not (run.folder / "slot_update.json").exists():
        return False
    checkpoint, table = run.folder / "checkpoints" / "last.ckpt", run.folder / "metrics.csv"
    if run.state != DONE or not checkpoint.exists():  # someone may have made room
        return run.state == DONE
    return checkpoint.stat().st_mtime_ns >= table.stat().st_mtime_ns


def can_go_on(run: Listed) -> bool:
    """Whether taking it up loses nothing: without a checkpoint it would begin anew, and replace what it wrote."""
    return (run.folder / "checkpoints" / "last.ckpt").exists() or (run.epoch or 0) <= 1
