"""Arrays of clusters that runs keep, `arrays/epoch0003/clusters.npz`, as figures ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from figures.labels import not_measured
from figures.runs import SPLITS, Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw
from run import arrays
from run.errors import UserError

NOT_THERE = "The run's arrays, clusters.npz, are not there."


def split_of(runs: Run | Sequence[Run], family: str) -> str:
    """The set of which there is this measure: the test set if there is one."""
    settings = compare(runs).settings
    found = [split for split in reversed(SPLITS) if any(setting.has(f"{family}/{split}") for setting in settings)]
    if not found:
        raise NothingToDraw(not_measured([f"{family}/{split}" for split in reversed(SPLITS)]))
    return found[0]


def file_of(run: Run, epoch: int) -> Path:
    return run.folder / f"arrays/epoch{epoch:04d}/clusters.npz"


def kept_epochs(runs: Sequence[Run]) -> list[int]:
    """The epochs whose arrays some of the runs have."""
    return sorted({epoch for run in runs for epoch in run.metrics.index if file_of(run, epoch).is_file()})


def epochs_of(setting: Setting) -> list[int]:
    """The same of a setting that must have some."""
    epochs = kept_epochs(setting.runs)
    if not epochs:
        raise NothingToDraw(NOT_THERE)
    return epochs


def read(run: Run, epoch: int, names: Sequence[str] = ()) -> tuple[dict[str, np.ndarray], dict]:
    """Those arrays that are there, and how all of them were made."""
    try:
        return arrays.read(file_of(run, epoch), names)
    except UserError as error:  # damaged: the other figures can still be drawn
        raise NothingToDraw(str(error)) from None


def of_runs(setting: Setting, epoch: int, name: str) -> list[np.ndarray]:
    """An array of each run that kept it after this epoch."""
    found = (read(run, epoch, (name,))[0].get(name) for run in setting.runs if file_of(run, epoch).is_file())
    return [array for array in found if array is not None]


def mean(setting: Setting, epoch: int, name: str) -> np.ndarray:
    """The mean over the runs."""
    return np.mean(of_runs(setting, epoch, name), axis=0)


def have(setting: Setting, epochs: Sequence[int], name: str) -> bool:
    return all(of_runs(setting, epoch, name) for epoch in epochs)


def layers_in(setting: Setting, epoch: int) -> list[str]:
    """The names of the layers in a matrix of them."""
    return next(read(run, epoch)[1]["layers"] for run in setting.runs if file_of(run, epoch).is_file())
