"""`main.py` that waits at a training step for a signal: `python waiting.py main.py FLAGS`, for `tests/cluster.py`.

The environment says of it: WAIT_AT, the number of the step; WAIT_RANK, the process that waits; WAIT_SEED, the one seed
of a sweep that does; WAIT_TURNS, in how many turns of its job; WAIT_MARKS, a folder in which a file then appears that
is called as the job.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from processes import ROOT, at_call


def wait() -> None:
    (Path(os.environ["WAIT_MARKS"]) / os.environ["SLURM_JOB_ID"]).touch()
    time.sleep(100)


def is_to_wait() -> bool:
    """Whether this process trains a network and is the one meant."""
    turn, seeds = int(os.environ.get("SLURM_RESTART_COUNT") or 0), seeds_of(sys.argv)
    return (
        os.environ.get("SLURM_PROCID") == os.environ.get("WAIT_RANK")
        and turn < int(os.environ.get("WAIT_TURNS", 1))
        and len(seeds) <= 1
        and os.environ.get("WAIT_SEED") in (None, *seeds)
    )


def seeds_of(argv: list[str]) -> list[str]:
    """The words after the last --seed."""
    after = argv[len(argv) - argv[::-1].index("--seed") :] if "--seed" in argv else []
    return after[: next((i for i, word in enumerate(after) if word.startswith("-")), len(after))]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(ROOT)
    sys.executable = os.environ["WAIT_PYTHON"]  # so that a sweep's seeds come by here too
    if is_to_wait():
        at_call("classifier:Classifier.training_step", int(os.environ["WAIT_AT"]), wait)
    runpy.run_path(sys.argv[0], run_name="__main__")
