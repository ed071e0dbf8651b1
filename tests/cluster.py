"""The job scripts and the program on a real SLURM: `make test-cluster`, where there is one to start.

pytest does not collect this file by itself. All jobs are submitted at once, and SLURM runs as many as its nodes hold.
A job that is to be signalled waits for that at a training step, so that the signal comes where a test wants it.
"""

import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from processes import ROOT, assert_same_run
from slurm_cluster import Cluster, directory_of, missing, until

NUM_LATE = 10
PATIENCE = 800  # seconds; on two idle cores all jobs together take a fraction of it
FLAGS = ["-e", "4", "--rank", "--no-dib", "--save-every", "2", "--no-plots", "--accelerator", "cpu", "--quiet"]
IN_EPOCH_3 = {"WAIT_AT": "33"}  # 14 steps each
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# What somebody may write who does not know of other turns: there the program asks for one itself.
OWN_SCRIPT = """#!/usr/bin/env bash
exec srun --kill-on-bad-exit=1 python main.py "$@" --devices "$SLURM_NTASKS_PER_NODE" --num-nodes "$SLURM_NNODES"
"""
EITHER_SCRIPT = OWN_SCRIPT.replace("\n", '\n((SLURM_ARRAY_TASK_ID % 2)) && exec bash slurm/run.sh "$@"\n', 1)
PROGRAMS = {
    "python": f'exec {sys.executable} {ROOT}/tests/waiting.py "$@"',
    # A busy controller: its answer takes longer than SLURM gives the processes that are left.
    "scontrol": f'[ "$1" = requeue ] && sleep 1\nexec {directory_of("scontrol")}/scontrol "$@"',
    # Like apptainer it runs what it gets in a session of its own and passes signals on, and there is no SLURM inside.
    "apptainer": """shift 3
PATH={inside}:/bin setsid "$@" &
for name in USR1 TERM; do trap "kill -$name $!" $name; done
status=129
while [ $status -gt 128 ] && kill -0 $! 2> /dev/null; do wait $!; status=$?; done
exit $status""",
}
pytestmark = pytest.mark.timeout(900)
if lacking := missing():
    why = f"a SLURM cannot be started without {', '.join(lacking)} (on Debian: slurm-wlm)"
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A cluster and the numbers of all jobs, by what they are; `folder` holds their runs and what they print."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "marks").mkdir()
    env = environment(folder)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        threading.Thread(target=signal_who_waits, args=(cluster, folder / "marks"), daemon=True).start()
        yield SimpleNamespace(cluster=cluster, folder=folder, env=env, **submitted(cluster, folder, env))


def signal_who_waits(cluster, marks):
    """Tell every job once in each turn that its time is up, a second after one of its processes began to wait.

    In that second the others come to where they wait for it.
    """
    while True:
        for mark in marks.iterdir():
            mark.unlink()
            threading.Timer(1, cluster.signal, [mark.name]).start()
        time.sleep(0.1)


def submitted(cluster, folder, env):
    """Submit all jobs; their numbers."""
    own, either = folder / "own.sh", folder / "either.sh"
    own.write_text(OWN_SCRIPT)
    either.write_text(EITHER_SCRIPT)

    def submit(name, script, *words, wait=None, **options):
        """In the folder `name` lies the run, in `name.out` or, of an array, `nameTASK.out` what the job prints."""
        options = {"nodes": 1, "ntasks-per-node": 1, "cpus-per-task": 1, "mem": "1G", "chdir": ROOT} | {
            "output": folder / (f"{name}%a.out" if "array" in options else f"{name}.out"),
            "open-mode": "append",
            **options,
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        line = [*flags, "--requeue", script, *FLAGS, "--log-dir", folder / name, *words]
        return cluster.submit(*line, env=env | (IN_EPOCH_3 | wait if wait else {}))

    run, container = "slurm/run.sh", "slurm/container.sh"
    first, second = {"WAIT_RANK": "0"}, {"WAIT_RANK": "1"}
    return {
        "short": submit("short", run, wait=first | {"WAIT_AT": "1", "WAIT_TURNS": "99"}),
        "late": submit("late", either, wait=second, nodes=2, array=f"0-{NUM_LATE - 1}", **{"gpus-per-node": 1}),
        "nodes": submit("nodes", run, wait=first, nodes=2),
        "task": submit("task", run, "--seed", "0", "1", wait=first, array="1"),
        "sweep": submit("sweep", own, "--seed", "1", "2", wait=first | {"WAIT_SEED": "2"}),
        "container": submit("container", container, "--seed", "2", wait=first),
        "whole_nodes": submit("whole_nodes", run, nodes=2),
        "whole_1": submit("whole_1", run, "--seed", "1"),
        "whole_2": submit("whole_2", run, "--seed", "2"),
    }


def environment(folder):
    """What jobs find: this Python, which waits where it is told to, and stand-ins for what is not at hand."""
    (folder / "inside").mkdir()
    for name, lines in PROGRAMS.items():
        path = folder / ("inside" if name == "python" else "bin") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{lines.replace('{inside}', str(folder / 'inside'))}\n")
        path.chmod(0o755)
    return {
        "PATH": f"{folder}/bin:{folder}/inside:{directory_of('srun')}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}/tests",
        "OMP_NUM_THREADS": "1",
        "WAIT_MARKS": f"{folder}/marks",
        "WAIT_PYTHON": f"{folder}/inside/python",
    }


def ended(jobs, name):
    """Wait until a job is over; its state, what SLURM knows of it, and what it printed."""
    number = getattr(jobs, name)
    if name == "task":
        number += "_1"
    about = {}

    def is_over():
        about.update(jobs.cluster.job(number))
        return about["JobState"] in OVER

    until(is_over, PATIENCE, lambda: (about, jobs.cluster.log()))
    [output] = jobs.folder.glob(f"{name}*.out")
    return about["JobState"], int(about["Restarts"]), output.read_text()


def whole_run(jobs, name):
    """The folder of a run that nobody disturbed."""
    state, restarts, text = ended(jobs, name)
    assert (state, restarts) == ("COMPLETED", 0), text
    [run] = (jobs.folder / name).glob("version_*")
    return run


def test_no_job_is_lost_when_one_of_its_processes_is_late(jobs):
    """The first is then in a collective, out of which it comes when the other has left and SLURM ends the rest."""
    ends = {}

    def all_are_known():
        for task in set(range(NUM_LATE)) - set(ends):
            about = jobs.cluster.job(f"{jobs.late}_{task}")
            if int(about["Restarts"]) or about["JobState"] in OVER:
                ends[task] = int(about["Restarts"])
                jobs.cluster.ask("scancel", f"{jobs.late}_{task}", check=False)
        return len(ends) == NUM_LATE

    until(all_are_known, PATIENCE, lambda: (ends, jobs.cluster.log()))
    texts = [path.read_text() for path in sorted(jobs.folder.glob("late*.out"))]
    assert list(ends.values()) == [1] * NUM_LATE, texts
    for text in texts:
        assert text.count("main.py: ended by SIGUSR1") == 1 and "refuses" not in text, text
        assert len(re.findall("SLURM starts job|its script asks SLURM to start job", text)) == 1, text


@pytest.mark.parametrize(("name", "whole"), [("nodes", "whole_nodes"), ("task", "whole_1"), ("container", "whole_2")])
def test_a_job_that_was_signalled_and_requeued_ends_as_one_that_was_not(name, whole, jobs):
    state, restarts, text = ended(jobs, name)
    assert (state, restarts) == ("COMPLETED", 1), text
    assert text.count("main.py: ended by SIGUSR1") == text.count("its script asks SLURM to start job") == 1, text
    assert "refuses" not in text and "cannot be asked" not in text
    [run] = (jobs.folder / name).glob("version_*")
    assert_same_run(run, whole_run(jobs, whole))


def test_a_sweep_is_requeued_by_one_request_and_goes_on_with_the_seed_that_ran(jobs):
    state, restarts, text = ended(jobs, "sweep")
    assert (state, restarts) == ("COMPLETED", 1), text
    assert text.count("SLURM starts job") == 1 and "refuses" not in text and "failed" not in text, text
    runs = sorted((jobs.folder / "sweep").glob("version_*"))
    assert len(runs) == 2
    for run, whole in zip(runs, ("whole_1", "whole_2"), strict=True):
        assert_same_run(run, whole_run(jobs, whole))


def test_a_job_whose_turns_are_too_short_ends_after_a_few(jobs):
    state, restarts, text = ended(jobs, "short")
    assert (state, restarts) == ("FAILED", 3), text
    assert text.count("this turn did no epoch") == 3 and "so it is not started again" in text, text


def test_tasks_typed_into_an_allocation_are_one_run(jobs):
    words = ["python", "main.py", *FLAGS, "--log-dir", jobs.folder / "typed", "--devices", "2"]
    line = ["salloc", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=1G", "srun", *words]
    env = jobs.cluster.env | jobs.env
    done = subprocess.run([*map(str, line)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout.count("results in") == 1, done.stderr
    [run] = (jobs.folder / "typed").iterdir()
    assert "device: 2 × CPU" in (run / "hparams.yaml").read_text(encoding="utf-8")
