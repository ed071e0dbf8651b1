"""What runs keep beside their tables, `arrays/epoch0003/MEASURE.npz`: of one run, or of all runs of a setting."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from figures.runs import Run
from figures.settings import Setting
from figures.style import NothingToDraw
from run import arrays
from run.errors import UserError


def file_of(run: Run, epoch: int, measure: str) -> Path:
    """A measure's file of an epoch: in the run's folder, or in that of the run which it resumed."""
    files = [folder / f"arrays/epoch{epoch:04d}/{measure}.npz" for folder in (run.folder, *run.ancestors)]
    return next((file for file in files if file.is_file()), files[0])


def has_file(run: Run, epoch: int, measure: str) -> bool:
    return file_of(run, epoch, measure).is_file()


def epochs_of(run: Run, measure: str) -> list[int]:
    """The epochs whose arrays a run has."""
    return [epoch for epoch in run.metrics.index if has_file(run, epoch, measure)]


def epochs(setting: Setting, measure: str) -> list[int]:
    """The epochs whose arrays some run has."""
    found = sorted({epoch for run in setting.runs for epoch in epochs_of(run, measure)})
    if not found:
        raise NothingToDraw(f"The run's arrays, {measure}.npz, are not there.")
    return found


def of_runs(setting: Setting, epoch: int, measure: str, name: str) -> list[np.ndarray]:
    """An array of each run that kept it after this epoch."""
    files = [file_of(run, epoch, measure) for run in setting.runs if has_file(run, epoch, measure)]
    found = (read(file, (name,))[0].get(name) for file in files)
    return [array for array in found if array is not None]


def settings_of(setting: Setting, epoch: int, measure: str) -> dict[str, Any]:
    """How the first of the runs made its arrays of an epoch."""
    return next(read(file_of(run, epoch, measure), ())[1] for run in setting.runs if has_file(run, epoch, measure))


def names_in(path: Path) -> list[str]:
    """The names of the arrays in a file."""
    try:
        return arrays.names(path)
    except UserError as error:
        raise NothingToDraw(str(error)) from None


def read(path: Path, names: Container[str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and their settings."""
    try:
        return arrays.read(path, names)
    except UserError as error:  # damaged: the other figures can still be drawn
        raise NothingToDraw(str(error)) from None
