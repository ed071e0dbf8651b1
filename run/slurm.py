"""A SLURM job that runs out of time: asks for another turn, and in that one goes on with its own run.

    #SBATCH --signal=SIGUSR1@90
    srun python main.py …

Lightning's handler for this signal is not used: it works only while the Trainer does, saves in the middle of an
epoch, after which numbers differ, and leaves it to the user to find the run's folder again. Here the run ends in
its last whole epoch, and the requeued job, which runs the same command, takes it up from there.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, TypeVar

from run.errors import WrongFlag

if TYPE_CHECKING:  # the program starts with this module and must be quick to listen to signals
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Run = TypeVar("Run")

PORT_STEP = 101  # between runs of one job
ASKED_BY_SCRIPT = "REQUEUED_BY_SCRIPT"  # the job whose script asks for another turn itself when a run ends with 138
INTERACTIVE = ("bash", "interactive")  # names of jobs in which somebody sits at the terminal, as Lightning has it


def time_out_signals() -> list[int]:
    """The signals that mean a lack of time: SIGUSR1 within a batch job, elsewhere none."""
    is_batch_job = job_id() is not None and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
    return [signal.SIGUSR1] if is_batch_job else []


def job_id() -> str | None:
    """The job's number; within an array each task has one of its own."""
    return os.environ.get("SLURM_JOB_ID") or None


def started_several() -> bool:
    """Whether this is one of several tasks of an `srun`, in a batch job or typed into an allocation of `salloc`."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in os.environ


def own_share(runs: Sequence[Run]) -> list[Run]:
    """Of several runs those of this task, if it is one of an array job; else all of them.

    Task i has run i. Where fewer tasks than runs are counted from 0 on, it has every n-th from there, n the tasks.
    """
    number = os.environ.get("SLURM_ARRAY_TASK_ID")
    if not number:
        return list(runs)
    if int(number) >= len(runs):
        raise WrongFlag(
            f"argument --seed: task {number} of the array job has no seed: tasks count from 0, so --array=0-"
            f"{len(runs) - 1} is for {len(runs)} seeds, those of every --sweep counted"
        )
    first, last, num = (os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "COUNT"))
    counts_from_0 = first == "0" and num is not None and last == str(int(num) - 1)
    return list(runs[int(number) :: int(num)]) if counts_from_0 else [runs[int(number)]]


def port_of_run(number: int) -> dict[str, str]:
    """An environment in which the ranks of the job's next run meet at a place of their own.

    Else one that is late would be taken for one of a later run, or the other way round.
    """
    is_of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_of_agent or not (job_id() or "MASTER_PORT" in os.environ):
        return {}
    first = os.environ.get("MASTER_PORT") or 15000 + int(job_id()[-4:])  # as Lightning has it
    return {"MASTER_PORT": str(int(first) + PORT_STEP * number)}


def requeue() -> str:
    """Ask SLURM to start this job again, unless its script does; what came of it, in a sentence.

    To be called deaf to SIGTERM, as then `scontrol` is, too: SLURM sends it to all processes once it has agreed, or
    when another process of the job has ended, and whoever asked would not hear the answer or not even be heard.
    """
    import subprocess

    job = job_id()
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if os.environ.get(ASKED_BY_SCRIPT) == job_id():
        return f"its script asks SLURM to start job {job} again, which then goes on"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"SLURM cannot be asked to start job {job} again: scontrol: {error.strerror}"
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        return f"SLURM was asked to start job {job} again, but {killer} ended scontrol before it had an answer"
    if done.returncode != 0:
        return f"SLURM refuses to start job {job} again: {' '.join(done.stderr.split())}"
    return f"SLURM starts job {job} again, which then goes on"


def run_to_go_on_with(flags: Mapping[str, Any]) -> Path | None:
    """The folder of the run that this job began with these flags, if the job was requeued since."""
    if job_id() is None or os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return None
    from pathlib import Path

    searched = flags["lr_range_test"] and "learning_rate"  # the rate in the run's folder is the one found
    expected = {name: value for name, value in flags.items() if name != searched}
    for folder in Path(flags["log_dir"]).glob("*/"):
        stored = _hparams(folder)
        provenance = stored.pop("provenance", {})
        is_of_this_job = provenance.get("slurm_job") == job_id() and "measured" not in provenance
        stored.pop(searched, None)
        if is_of_this_job and stored == expected:
            return folder
    return None


def is_measurement(folder: Path) -> bool:
    """Whether a folder holds what `--measure` found, and no run to go on with."""
    return "measured" in _hparams(folder).get("provenance", {})


def _hparams(folder: Path) -> dict[str, Any]:
    """A run's flags and provenance; nothing where they cannot be read: that is then no run of this job."""
    import yaml

    try:
        content = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("provenance", {}), dict) else {}
