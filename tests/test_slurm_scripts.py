"""The job scripts, run as SLURM would run them: what the program gets, how the job ends, and what Lightning sees.

sbatch itself is `job`: it reads the #SBATCH lines and sets the variables that follow from them.
"""

import itertools
import os
import re
import subprocess

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.environments import SLURMEnvironment
from processes import finish
from stand_ins import ROOT, StandIns, tool

from flags import get_args
from run import slurm
from run.errors import UserError
from run.grid import points
from run.presets import PRESETS
from run.trainer import new_trainer

SCRIPTS = ["array.sh", "container.sh", "run.sh"]
FLAGS = ["-m", "ResNet", "-d", "CIFAR10", "--log-dir", "a b/*"]
EVERY_RANK = """
while [ "${1#--}" != "$1" ]; do shift; done
status=0
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    export SLURM_PROCID=$rank SLURM_LOCALID=$((rank % SLURM_NTASKS_PER_NODE))
    export SLURM_NODEID=$((rank / SLURM_NTASKS_PER_NODE))
    "$@" || status=$?
done
exit $status
"""


@pytest.fixture
def cluster(tmp_path):
    """A node's programs: srun starts every rank in turn, main.py ends with STATUS, a container runs what it gets."""
    programs = StandIns(tmp_path)
    programs.add("srun", EVERY_RANK)
    programs.add("python", "exit ${STATUS:-0}")
    programs.add("apptainer", 'shift 3; exec "$@"')
    programs.add("scontrol")
    return programs


def directives(script):
    """The #SBATCH lines in force."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (ROOT / "slurm" / script).read_text(), re.M))


def job(cluster, script, *words, task=None, env=None, **options):
    """What `sbatch OPTIONS slurm/SCRIPT WORDS` comes to on the first node; of an array, one task."""
    options = directives(script) | {name.replace("_", "-"): str(value) for name, value in options.items()}
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    env = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_NODELIST": f"node[1-{nodes}]" if nodes > 1 else "node1",
        **({} if task is None else {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": str(task)}),
        **(env or {}),
    }
    return cluster.run("bash", ROOT / "slurm" / script, *words, cwd=ROOT, **env)


def received(cluster):
    """The flags that main.py got, in each of its processes."""
    calls = [call["argv"] for call in cluster.calls("python")]
    assert all(argv[0] == "main.py" for argv in calls)
    return [argv[1:] for argv in calls]


# The scripts themselves


@pytest.mark.parametrize("script", [*(f"slurm/{name}" for name in SCRIPTS), ".ci/run"])
def test_shellcheck_finds_nothing(script):
    done = subprocess.run([tool("shellcheck"), ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_there_are_no_other_scripts_and_all_are_strict():
    assert sorted(path.name for path in (ROOT / "slurm").iterdir()) == SCRIPTS
    assert all("\nset -euo pipefail\n" in (ROOT / "slurm" / name).read_text() for name in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_is_warned_with_the_programs_signal_may_be_queued_again_and_keeps_its_log(script, monkeypatch):
    asked = directives(script)
    assert asked["signal"] == "SIGUSR1@90" and asked.keys() >= {"requeue"} and asked["open-mode"] == "append"
    assert "/" not in asked["output"]  # a folder that is not there ends a job without a word
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", asked["job-name"])
    assert [number.name for number in slurm.time_out_signals()] == ["SIGUSR1"]


def test_all_scripts_ask_for_the_same_resources():
    run, container, array = map(directives, ("run.sh", "container.sh", "array.sh"))
    assert run == container
    assert run == {name: value for name, value in array.items() if name != "array"} | {"output": run["output"]}


# What the program gets


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_reach_the_program_word_for_word_and_are_ones_it_knows(script, cluster):
    done = job(cluster, script, *FLAGS, task=0)
    assert done.returncode == 0, done.stderr
    (argv,) = received(cluster)
    assert argv[-len(FLAGS) - 4 :] == [*FLAGS, "--devices", "1", "--num-nodes", "1"]
    args = get_args(argv)
    assert (args.model, args.log_dir, args.devices, args.num_nodes) == ("ResNet", "a b/*", 1, 1)
    (call,) = cluster.calls("srun")
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=4"} < set(call["argv"])


def test_the_container_keeps_slurms_variables_and_may_lie_elsewhere(cluster):
    job(cluster, "container.sh")
    job(cluster, "container.sh", env={"IMAGE": "/a b/x.sif"})
    calls = cluster.calls("apptainer")
    assert [call["argv"][:5] for call in calls] == [
        ["run", "--nv", "master_thesis.sif", "python", "main.py"],
        ["run", "--nv", "/a b/x.sif", "python", "main.py"],
    ]
    assert cluster.calls("python")[0]["env"]["SLURM_NTASKS"] == "1"


def test_the_array_measures_every_layer_of_every_seed_once(cluster, monkeypatch):
    first, last = map(int, directives("array.sh")["array"].split("-"))
    pairs = []
    for task in range(first, last + 1):
        assert job(cluster, "array.sh", *FLAGS, task=task).returncode == 0
        argv = received(cluster)[-1]
        args = get_args(argv)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        (point,) = slurm.own_share(points(args.sweep, args.seed))
        run = get_args(point.argv(argv, args.name))
        pairs.append((run.seed, *run.dib_layers))
    seeds = sorted({seed for seed, _ in pairs})
    assert len(seeds) == 3 and len({*pairs}) == len(pairs)
    assert sorted(pairs) == sorted(itertools.product(seeds, PRESETS[("ResNet",)]["dib_layers"]))


def test_an_array_too_long_and_a_job_that_is_no_array_start_nothing(cluster):
    done = job(cluster, "array.sh", *FLAGS, task=12)
    assert done.returncode == 2 and "task 12 has no pair: there are 3 seeds × 4 layers" in done.stderr
    done = job(cluster, "array.sh", *FLAGS)
    assert done.returncode != 0 and "with --array" in done.stderr
    assert cluster.calls() == []


# How the job ends


@pytest.mark.parametrize("status", [0, 1, 2, 130, 137, 138, 143])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_programs_status_is_the_jobs_and_only_out_of_time_asks_for_another_turn(script, status, cluster):
    task = 5 if script == "array.sh" else None
    assert job(cluster, script, *FLAGS, task=task, env={"STATUS": str(status)}).returncode == status
    asked = [call["argv"] for call in cluster.calls("scontrol")]
    assert asked == ([["requeue", "77" if task is None else "70_5"]] if status == 138 else [])


@pytest.mark.parametrize("script", ["container.sh", "run.sh"])
def test_a_task_of_an_array_asks_for_itself_not_for_the_whole_array(script, cluster):
    assert job(cluster, script, *FLAGS, task=5, env={"STATUS": "138"}).returncode == 138
    assert [call["argv"] for call in cluster.calls("scontrol")] == [["requeue", "70_5"]]


def test_the_program_knows_that_the_script_asks_and_both_scripts_end_alike(cluster):
    for script in SCRIPTS:
        job(cluster, script, *FLAGS, task=0)
    assert {call["env"][slurm.ASKED_BY_SCRIPT] for call in cluster.calls("python")} == {"77"}
    ends = {(ROOT / "slurm" / name).read_text().partition("|| status=$?")[2] for name in ("run.sh", "container.sh")}
    assert len(ends) == 1 and "requeue" in ends.pop()


# What Lightning sees


@pytest.fixture
def as_rank(monkeypatch):
    """Take on the environment of one of main.py's processes; Lightning then keeps ranks in two global places."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def become(call):
        for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
            monkeypatch.delenv(name)
        for name, value in call["env"].items():
            if name.startswith("SLURM_"):
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "15077")
        return get_args([*call["argv"][1:], "--accelerator", "cpu"])

    return become


@pytest.mark.parametrize("script", ["run.sh", "container.sh"])
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_lightning_takes_every_task_for_one_of_its_processes(script, nodes, per_node, cluster, as_rank):
    job(cluster, script, *FLAGS, nodes=nodes, ntasks_per_node=per_node)
    calls = cluster.calls("python")
    assert len(calls) == nodes * per_node
    for rank, call in enumerate(calls):
        args = as_rank(call)
        assert SLURMEnvironment.detect()
        seen = SLURMEnvironment()
        assert (seen.world_size(), seen.global_rank()) == (len(calls), rank)
        assert (seen.node_rank(), seen.local_rank()) == divmod(rank, per_node)
        seen.validate_settings(args.devices, args.num_nodes)  # raises where they do not match
        assert slurm.job_id() == "77"
    trainer = new_trainer(args)  # of the last rank
    assert (trainer.world_size, trainer.num_nodes, trainer.num_devices) == (len(calls), nodes, per_node)
    assert trainer.global_rank == rank


def test_the_jobs_tasks_decide_on_devices_and_nodes_whatever_the_flags_say(cluster, as_rank):
    job(cluster, "run.sh", *FLAGS, "--devices", "3", "--num-nodes", "5", nodes=2, ntasks_per_node=4)
    args = as_rank(cluster.calls("python")[0])
    assert (args.devices, args.num_nodes) == (4, 2)


def test_ntasks_without_ntasks_per_node_is_refused_with_what_to_set(cluster, as_rank, monkeypatch):
    job(cluster, "run.sh", *FLAGS)
    args = as_rank(cluster.calls("python")[0])
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="--ntasks-per-node=2"):
        new_trainer(args)


@pytest.mark.parametrize("name", ["interactive", "bash"])
def test_several_tasks_typed_into_an_allocation_are_one_run_too(name, cluster, as_rank, monkeypatch):
    job(cluster, "run.sh", *FLAGS, ntasks_per_node=2, env={"SLURM_JOB_NAME": name, "SLURM_STEP_NUM_TASKS": "2"})
    for rank, call in enumerate(cluster.calls("python")):
        args = as_rank(call)
        trainer = new_trainer(args)
        assert (trainer.world_size, trainer.global_rank, trainer.local_rank) == (2, rank, rank)
    args.devices = 1
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    with pytest.raises(UserError, match="--ntasks-per-node=2"):
        new_trainer(args)


def test_a_single_task_typed_into_an_allocation_starts_its_processes_itself(cluster, as_rank):
    job(cluster, "run.sh", *FLAGS, env={"SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "1"})
    args = as_rank(cluster.calls("python")[0])
    args.devices = 2
    assert new_trainer(args).strategy.launcher is not None and not SLURMEnvironment.detect()


@pytest.mark.parametrize("quiet", [True, False])
def test_a_run_where_srun_is_at_hand_says_nothing_of_it(quiet, cluster, tmp_path):
    argv = ["-e", "1", "--no-dib", "--no-plots", "--lr-range-test", *["--quiet"] * quiet]
    status, text = finish(argv, tmp_path, env={"PATH": f"{cluster.folder}:{os.environ['PATH']}"})
    assert status == 0 and "srun" not in text
    assert text.endswith("results in lightning_logs/version_0\n") and (text.count("\n") == 1) == quiet
    assert cluster.calls() == []
