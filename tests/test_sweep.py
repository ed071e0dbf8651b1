"""Several seeds: a run each, no failure stops the rest, the means are right, an array job shares them out."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import ROOT

from figures.runs import load
from figures.settings import compare
from flags import get_args
from main import main
from run import sweep
from run.slurm import port_of_run
from run.sweep import command
from run.tables import seeds_table

LOGS = Path("lightning_logs")
STARTED_AS = "import sys, main; from run import command; command.argv = lambda: {words}; sys.exit(main.main())"
STAND_IN = """
import os, pathlib, signal, sys, time
argv = sys.argv[1:]
seed = argv[len(argv) - argv[::-1].index("--seed")]
if (pathlib.Path("signal_of") / seed).exists():
    pathlib.Path("begun").touch()
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    time.sleep(30)
if seed == "13":
    signal.raise_signal(signal.SIGKILL)
folder = pathlib.Path("runs") / seed
folder.mkdir(parents=True)
(folder / "metrics.csv").write_text(f"epoch,lr,test_acc,nan\\n0,,0,\\n1,0.1,{seed},nan\\n")
print("training")
print(f"results in {folder}")
os.write(int(os.environ["NOTE_OF_RESULTS"]), bytes(folder))
"""


# What `console.Console` does at a terminal; the bar stays long enough for whoever passes lines on to come late.
WITH_A_BAR = """
from tqdm import tqdm
bar = tqdm(total=3, unit=" steps", leave=False)
for epoch in (1, 2, 3):
    bar.update()
    tqdm.write(f"epoch {epoch}/3", file=sys.stdout)
    sys.stdout.flush()
    bar.refresh()
    time.sleep(0.3)
bar.close()
"""


WAITING = """
import pathlib, time
from run import ranks
ranks.end_with_starter()
pathlib.Path("begun").touch()
time.sleep(60)
"""


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in place of `main.py` that says at once where its results lie, kills itself with seed 13."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(sweep.program, "argv", lambda: [sys.executable, str(program)])


def test_each_seed_has_its_own_run_and_a_failing_one_stops_no_other(tmp_path):
    (LOGS / "mine_seed1" / "checkpoints").mkdir(parents=True)  # taken
    argv = ["-w", "6", "4", "--limit", "200", "-e", "1", "--dib-epochs", "1", "--name", "mine", "--no-plots"]
    line = [sys.executable, ROOT / "main.py", *argv, "--seed", "0", "1", "2"]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 1
    assert "--name: lightning_logs/mine_seed1 exists already" in run.stderr
    assert run.stderr.endswith("main.py: seed 1 failed with exit status 1\nmain.py: of seeds 0 1 2 failed 1\n")
    assert "2 seeds: 0 2" in run.stdout and "nc1/train/hidden1" in run.stdout
    [setting] = compare(load([LOGS / "mine_seed0", LOGS / "mine_seed2"])).settings
    assert [run.hparams["seed"] for run in setting.runs] == [0, 2]


def test_one_seed_is_a_run_as_ever():
    assert get_args(["--seed", "3"]).seed == 3
    assert get_args(["--seed", "3", "1"]).seed == [3, 1]


@pytest.mark.parametrize("argv", [["--seed", "1", "2", "1"], ["--seed"], ["--seed", "1", "x"]])
def test_wrong_seeds_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(argv)
    assert end.value.code == 2 and "argument --seed" in capsys.readouterr().err


def test_seeds_may_stand_in_a_config_file(tmp_path):
    (tmp_path / "flags.yaml").write_text("seed: [4, 5]\nepochs: 3\n")
    assert get_args(["-c", "flags.yaml"]).seed == [4, 5]
    assert get_args(["-c", "flags.yaml", "--seed", "7"]).seed == 7


def test_the_command_of_a_seed_means_that_seed_and_a_name_of_its_own():
    argv = ["-e", "2", "--seed", "0", "1", "--name", "mine"]
    args = get_args(command(argv, "mine", 1)[2:])
    assert (args.seed, args.name, args.epochs) == (1, "mine_seed1", 2)
    assert get_args(command(argv[:-2], None, 1)[2:]).name is None


def test_means_and_deviations_by_hand():
    lines = seeds_table([0, 1, 2], [{"epoch": "1", "a": text, "b": "nan"} for text in ("1", "2", "6")]).splitlines()
    assert lines[0].split() == ["3", "seeds:", "0", "1", "2", "mean", "±", "std", "lowest", "highest"]
    assert lines[1].split() == ["a", "3", "2.646", "1", "6"]  # sqrt((4 + 1 + 9) / 2)
    assert lines[2].split() == ["b", *"––––"]


def test_a_kill_of_one_seed_stops_no_other(stand_in, capfd):
    assert main(["--seed", "1", "13", "4"]) == 1
    told = capfd.readouterr()
    assert "seed 13 failed with exit status 137" in told.err and "of seeds 1 13 4 failed 13" in told.err
    assert [line.split() for line in told.out.splitlines() if line.startswith("test_acc")] == [
        ["test_acc", "2.5", "2.121", "1", "4"]
    ]
    assert "python plots.py runs/1 runs/4" in told.out


def test_with_the_sweep_its_seed_ends(stand_in, tmp_path):
    """The sweep is killed; what it started notices, here by the main module's own watch."""
    code = f"import sys; from run import sweep; sys.exit(sweep.run({[sys.executable, '-c', WAITING]!r}, {{}})[0])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    while not Path("begun").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)  # until the started one, which holds the pipe too, has ended


def at_a_terminal(line):
    """Exit status of a command at a terminal, and the lines that its screen shows at the end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(line[0], line)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))  # else tqdm finds no room for a bar
    told = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(terminal, 65536):
            told += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen(told.decode())


def screen(text):
    """The lines that a terminal shows: a carriage return goes back, and what follows overwrites."""
    lines, row, column = [""], 0, 0
    for word in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", text, re.S):
        if word == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif word == "\r":
            column = 0
        elif word == "\x1b[A":
            row -= 1
        elif word[0] != "\x1b":
            lines[row] = lines[row].ljust(column)[:column] + word + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_at_a_terminal_every_line_stands_whole_and_alone_between_progress_bars(tmp_path):
    program = tmp_path / "with_bars.py"
    program.write_text(STAND_IN.replace('print("training")', WITH_A_BAR))
    code = STARTED_AS.format(words=[sys.executable, str(program)])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    status, lines = at_a_terminal([sys.executable, "-c", code, "--seed", "1", "4"])
    seeds = [
        line
        for i, seed in enumerate((1, 4), 1)
        for line in (f"seed {seed}, {i} of 2", "", *(f"epoch {k}/3" for k in (1, 2, 3)), f"results in runs/{seed}")
    ]
    assert status == 0 and lines[: len(seeds)] == seeds, lines
    assert "2 seeds: 1 4" in "".join(lines) and "steps" not in "".join(lines)  # no bar is left


def test_quiet_says_only_where_results_lie(stand_in, capfd):
    assert main(["--seed", "1", "4", "--quiet"]) == 0
    told = capfd.readouterr()
    assert told.err == "" and [line for line in told.out.splitlines() if line != "training"] == [
        "results in runs/1",
        "results in runs/4",
    ]


def test_a_task_of_an_array_runs_its_seed_alone(stand_in, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert main(["--seed", "1", "4"]) == 0
    assert sorted(os.listdir("runs")) == ["4"]


def test_a_task_without_a_seed_is_told(stand_in, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert main(["--seed", "1", "4"]) == 2
    told = capfd.readouterr().err
    assert "argument --seed: task 2 of the array job has no seed" in told and "--array=0-1 is for 2 seeds" in told
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("env", "ports"),
    [
        ({}, [None, None]),
        ({"MASTER_PORT": "9000"}, ["9101", "9202"]),
        ({"SLURM_JOB_ID": "1230077"}, ["15178", "15279"]),
        ({"MASTER_PORT": "9000", "TORCHELASTIC_USE_AGENT_STORE": "True"}, [None, None]),
    ],
)
def test_the_ranks_of_every_seed_meet_at_a_port_of_its_own(env, ports, monkeypatch):
    for name in ("MASTER_PORT", "SLURM_JOB_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert [port_of_run(number).get("MASTER_PORT") for number in (1, 2)] == ports


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_reaches_the_seed_that_runs_and_ends_the_sweep(number, status, stand_in, tmp_path):
    (tmp_path / "signal_of" / "2").mkdir(parents=True)
    code = STARTED_AS.format(words=sweep.program.argv())
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, "--seed", "1", "2", "3"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=os.environ | slurm)
    deadline = time.monotonic() + 20
    while not Path("begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    _, text = process.communicate(timeout=20)
    assert process.returncode == status and sorted(os.listdir("runs")) == ["1"]
    if number == signal.SIGINT:
        assert text == "main.py: ended by Ctrl-C; finished are seeds 1 of 1 2 3\n"
