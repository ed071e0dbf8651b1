"""Means over the runs of a sweep, kept as a file beside their folders."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from run.files import write_whole
from run.settings import grouped
from run.tables import UNSUMMED

FIGURES = ("mean", "std", "lowest", "highest")
Found = tuple[tuple[tuple[str, str], ...], int, Path]  # a run's swept flags, its seed and its folder


def last_row(path: Path) -> dict[str, str]:
    """The last epoch of a run, empty cells left out; a row without an epoch sums up others."""
    with open(path, newline="", encoding="utf-8") as file:
        *_, row = (row for row in csv.DictReader(file) if row["epoch"])
    return {name: cell for name, cell in row.items() if cell}


def keep(path: Path, runs: Sequence[Found]) -> None:
    """Write the means of runs that differ in their seed alone: a row for each setting and column.

    Tasks of an array job do so in turn: the last one writes what all have done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        write_whole(path, means_csv(runs))


def means_csv(runs: Sequence[Found]) -> str:
    """Per setting and column of `metrics.csv`: how many seeds, mean, standard deviation (n - 1), lowest, highest."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    swept = [flag for flag, _ in runs[0][0]]
    writer.writerow([*swept, "column", "seeds", *FIGURES])
    for group in grouped((values, (values, folder)) for values, _, folder in runs):
        rows = [last_row(folder / "metrics.csv") for _, folder in group]
        columns = dict.fromkeys(name for row in rows for name in row if not name.startswith(UNSUMMED))
        for column in columns:
            values = [float(row.get(column, "nan")) for row in rows]
            writer.writerow([*(value for _, value in group[0][0]), column, len(values), *figures(values)])
    return text.getvalue()


def figures(values: Sequence[float]) -> list[float | str]:
    """Mean, standard deviation, lowest and highest; empty where there are none, as for a value that is not finite."""
    if not all(map(math.isfinite, values)):
        return [""] * len(FIGURES)
    spread = statistics.stdev(values) if len(values) > 1 else ""
    return [statistics.mean(values), spread, min(values), max(values)]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process of this program writes such a file in this folder."""
    here = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system locks folders
            fcntl.flock(here, fcntl.LOCK_EX)
        yield
    finally:
        os.close(here)
