"""The turns of a SLURM job that is queued again whenever its time is up: too short ones must not go on for ever.

A turn that leaves nothing to go on from is noted beside the runs, by its number. After `FEW` of them in a row the next
one is refused: by every process of the job alike, as all read the same notes and nobody writes any by then.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from run import ranks, slurm
from run.errors import Interrupted, UserError

FEW = 3


@contextmanager
def turn(log_dir: str) -> Iterator[None]:
    """Inside, a job's turn goes on. One that follows a few fruitless ones is refused; a fruitless one is noted."""
    if slurm.job_id() is None:
        yield
        return
    before = _fruitless_until_now(log_dir)
    if before >= FEW:
        raise UserError(
            f"the last {FEW} turns of job {slurm.job_id()} ran out of time before an epoch was done, so it is not "
            "started again: give sbatch a --time in which the start and an epoch fit"
        )
    try:
        yield
    except Interrupted as error:
        if error.number == signal.SIGUSR1 and not error.has_advanced and not ranks.name_by_environment():
            error.advice += (
                f"; this turn did no epoch: after {FEW} such turns the job ends, this is number {before + 1}"
            )
            _note(log_dir)
        raise


def forget(log_dir: str | Path) -> None:
    """There is something new to go on from: what was noted before does not count any more."""
    if slurm.job_id() is not None:
        with suppress(OSError):
            _notes(log_dir).unlink(missing_ok=True)


def _fruitless_until_now(log_dir: str) -> int:
    """How many turns just before this one were fruitless, without a gap."""
    try:
        noted = set(_notes(log_dir).read_text().split())
    except OSError:
        return 0
    num = 0
    while str(_number() - num - 1) in noted:
        num += 1
    return num


def _note(log_dir: str) -> None:
    with suppress(OSError):  # the run ends in any case, and has a better sentence for that
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        with open(_notes(log_dir), "a") as notes:
            notes.write(f"{_number()}\n")


def _notes(log_dir: str | Path) -> Path:
    return Path(log_dir) / f".turns_of_job_{slurm.job_id()}"


def _number() -> int:
    """This turn's, counted from 0."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)
