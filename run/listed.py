"""A run's folder as a table of many needs it: its flags, where it stands, and any value that it left, read in haste.

Imports nothing heavy, and of `metrics.csv` takes apart only the cells that are asked for: a thousand runs are read in a
few seconds. Whatever is damaged or missing is left out, and said in a sentence.
"""

from __future__ import annotations

import fcntl
import functools
import math
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from run.errors import UserError
from run.settings import setting_of

RUN_FILES = ("metrics.csv", "hparams.yaml", "lr_range_test.csv")
RUNNING, DONE, EARLY, MEASURED = STATES = ("running", "done", "ended early", "measured")
OWN = ("name", "folder", "state", "epoch", "last", "best", "started")  # what a run has beside flags, facts and columns


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else those in it that are, or should be, by their name."""
    if is_run(path):
        return [path]
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a folder: give the folder of a run, such as lightning_logs/version_0") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    names = [name for name in names if is_run(path / name) or name.startswith("version_")]
    return [path / name for name in sorted(names, key=natural)]


def is_run(folder: Path) -> bool:
    """Whether a folder holds any file of a run."""
    # os.path.isfile, unlike Path.is_file, is False for names that no file can have
    return any(os.path.isfile(folder / name) for name in RUN_FILES)


def natural(name: str) -> list[tuple[str, int]]:
    """Sorts version_2 before version_10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def last_written(folder: Path) -> float:
    """When any of a run's files was written last, in seconds since 1970."""
    return max((path.stat().st_mtime for path in map(folder.joinpath, RUN_FILES) if path.exists()), default=0)


class Rows:
    """The undamaged lines of a CSV file without quotes: those with an end, and with as many cells as the header."""

    def __init__(self, text: str):
        header, *lines = text.replace("\r", "").split("\n")[:-1] or [""]
        self.columns = header.split(",") if header else []
        self.lines = [line for line in lines if line.count(",") == header.count(",")]
        self.num_damaged = len(lines) - len(self.lines) + (not text.endswith("\n") and bool(text))

    def cells(self, column: str) -> Iterator[str]:
        """What stands in a column, from the last line to the first; nothing where there is no such column."""
        if column in self.columns:
            i = self.columns.index(column)
            yield from (line.split(",", i + 1)[i] for line in reversed(self.lines))

    def last(self, column: str) -> float | str | None:
        """The last cell that is not empty."""
        cell = next(filter(None, self.cells(column)), None)
        return None if cell is None else as_number(cell)

    def numbers(self, column: str) -> list[float]:
        """The finite numbers of a column, the first one first."""
        numbers = [as_number(cell) for cell in self.cells(column)][::-1]
        return [number for number in numbers if isinstance(number, float) and math.isfinite(number)]


def as_number(text: str) -> float | str:
    """The number that a text is, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


class Listed:
    """A run in a table: `flags`, `facts` (its provenance), `rows` of `metrics.csv`; `notes` say what cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes: list[str] = []
        hparams = self._hparams()
        facts = hparams.pop("provenance", {})
        self.facts: dict[str, Any] = facts if isinstance(facts, dict) else {}
        self.flags = hparams
        self.rows = self._rows()

    def _hparams(self) -> dict[str, Any]:
        import yaml

        path = self.folder / "hparams.yaml"
        try:
            # libyaml is ten times as fast, and not everywhere
            content = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except OSError as error:
            self.notes.append(f"{path} cannot be read ({error.strerror}): the run's flags are unknown.")
            return {}
        except (yaml.YAMLError, ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            self.notes.append(f"{path} is damaged: the run's flags are unknown.")
            return {}
        return content

    def _rows(self) -> Rows:
        path = self.folder / "metrics.csv"
        try:
            rows = Rows(path.read_bytes().decode(errors="replace"))
        except FileNotFoundError:
            return Rows("")
        except OSError as error:
            self.notes.append(f"{path} cannot be read ({error.strerror}).")
            return Rows("")
        if rows.num_damaged:
            self.notes.append(f"{path} has damaged lines, which are left out: {rows.num_damaged}.")
        return rows

    @functools.cached_property
    def setting(self) -> dict[str, Any]:
        """The flags that make its setting; of a run whose flags are unknown, which equals no other, its folder."""
        return setting_of(self.flags) or {"folder": str(self.folder)}

    @functools.cached_property
    def epoch(self) -> int | None:
        """The last epoch in its table."""
        epochs = self.rows.numbers("epoch")
        return int(max(epochs)) if epochs else None

    @property
    def epochs(self) -> int | None:
        """How many epochs it is to have."""
        epochs = self.flags.get("epochs")
        return epochs if isinstance(epochs, int) else None

    @functools.cached_property
    def state(self) -> str:
        """One of `STATES`, or nothing where its flags are unknown."""
        if is_held(self.folder):
            return RUNNING
        if self.epochs is None:
            return ""
        if "measured" in self.facts:
            measured = self.facts["measured"]
            wanted = len(measured) if isinstance(measured, list) else 1
            return MEASURED if len(self.rows.numbers("epoch")) >= wanted else EARLY
        if self.flags.get("lr_range_test") == "only":
            return DONE if (self.folder / "lr_range_test.csv").exists() else EARLY
        return DONE if self.epoch is not None and self.epoch >= self.epochs else EARLY

    @functools.cached_property
    def started(self) -> str:
        """When it was begun, in a form that sorts; of a run that did not write it down, when it wrote last."""
        try:
            began = datetime.fromisoformat(self.facts["started"])
        except (KeyError, TypeError, ValueError):
            began = datetime.fromtimestamp(last_written(self.folder))
        return began.astimezone().isoformat(sep=" ", timespec="seconds")

    @functools.cached_property
    def accuracies(self) -> list[float]:
        """On the test set, after every epoch."""
        return self.rows.numbers("test_acc")

    def names(self) -> set[str]:
        """All that it can be asked for."""
        flags = {str(name) for name in (*self.flags, *self.facts)}
        return {*OWN, *flags, *filter(None, self.rows.columns)}

    def value(self, name: str) -> Any:
        """What it has under a name: one of `OWN`, a flag, a column's last value, or a fact; None if nothing."""
        if name in ("state", "epoch", "started"):
            return getattr(self, name)
        if name in ("name", "folder"):  # the flag --name is part of it
            return str(self.folder) if name == "folder" else self.folder.resolve().name
        if name in ("last", "best"):
            return (self.accuracies[-1] if name == "last" else max(self.accuracies)) if self.accuracies else None
        if name.replace("-", "_") in self.flags:
            return self.flags[name.replace("-", "_")]
        in_table = self.rows.last(name)
        return self.facts.get(name) if in_table is None else in_table


def is_held(folder: Path) -> bool:
    """Whether a process is writing in a run's folder: it holds the lock there as long as it lives."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none was ever made, or this is no file system that knows locks
        return False
    return False
