"""Arrays of clusters that runs keep, `arrays/epoch0003/clusters.npz`, as figures ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from figures import kept
from figures.labels import not_measured
from figures.runs import SPLITS, Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw

MEASURE = "clusters"
NOT_THERE = "The run's arrays, clusters.npz, are not there; main.py keeps them with --clusters."


def split_of(runs: Run | Sequence[Run], family: str, lacking: str = "") -> str:
    """The set of which there is this measure: the test set if there is one. `lacking` says that there is none."""
    settings = compare(runs).settings
    found = [split for split in reversed(SPLITS) if any(setting.has(f"{family}/{split}") for setting in settings)]
    if not found:
        raise NothingToDraw(lacking or not_measured([f"{family}/{split}" for split in reversed(SPLITS)]))
    return found[0]


def file_of(run: Run, epoch: int) -> Path:
    return kept.file_of(run, epoch, MEASURE)


def kept_epochs(runs: Sequence[Run]) -> list[int]:
    """The epochs whose arrays some of the runs have."""
    return sorted({epoch for run in runs for epoch in kept.epochs_of(run, MEASURE)})


def epochs_of(setting: Setting) -> list[int]:
    """The same of a setting that must have some."""
    return kept.epochs(setting, MEASURE)


def read(run: Run, epoch: int, names: Sequence[str] = ()) -> tuple[dict[str, np.ndarray], dict]:
    """Those arrays that are there, and how all of them were made."""
    return kept.read(file_of(run, epoch), names)


def of_runs(setting: Setting, epoch: int, name: str) -> list[np.ndarray]:
    """An array of each run that kept it after this epoch."""
    return kept.of_runs(setting, epoch, MEASURE, name)


def mean(setting: Setting, epoch: int, name: str) -> np.ndarray:
    """The mean over the runs."""
    return np.mean(of_runs(setting, epoch, name), axis=0)


def have(setting: Setting, epochs: Sequence[int], name: str) -> bool:
    return all(of_runs(setting, epoch, name) for epoch in epochs)


def layers_in(setting: Setting, epoch: int) -> list[str]:
    """The names of the layers in a matrix of them."""
    return kept.settings_of(setting, epoch, MEASURE)["layers"]
