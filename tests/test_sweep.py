"""Sweeps: a run each, no failure stops the rest, the same command goes on, means are right, array jobs share out."""

import csv
import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from made_runs import change_flags
from processes import ROOT

from figures.runs import load
from figures.settings import compare
from flags import get_args
from main import main
from run import sweep
from run.earlier import EarlierRuns, can_go_on, is_finished
from run.grid import points
from run.kept_means import last_row, means_csv
from run.listed import Listed
from run.presets import flags_of_run
from run.run_folder import RunFolder
from run.slurm import own_share, port_of_run
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


def argv_of(argv, stem, **wanted):
    """The command line of the one run that is wanted among those of a command."""
    args = get_args(argv)
    (point,) = [p for p in points(args.sweep or [], args.seed) if dict((*p.values, ("seed", p.seed))) == wanted]
    return point.argv(argv, stem)


def test_the_command_of_a_seed_means_that_seed_and_a_name_of_its_own():
    argv = ["-e", "2", "--seed", "0", "1", "--name", "mine"]
    args = get_args(argv_of(argv, "mine", seed=1))
    assert (args.seed, args.name, args.epochs) == (1, "mine_seed1", 2)
    assert get_args(argv_of(argv[:-2], None, seed=1)).name is None


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
        assert text == "main.py: ended by Ctrl-C; finished are seeds 1 of 1 2 3; the same command goes on\n"


# Sweeps over other flags


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A program in place of `main.py` that leaves a run's folder as that does: what came out is learning rate + seed.

    A file `stop` ends it, after its first epoch, by a kill.
    """
    program = tmp_path / "training.py"
    program.write_text(TRAINING)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sweep.program, "argv", lambda: [sys.executable, str(program)])
    monkeypatch.setattr(sweep.program, "commit", lambda: "c0ffee" * 6)

    def calls():
        return [shlex.split(line) for line in Path("calls").read_text().splitlines()] if Path("calls").exists() else []

    return calls


TRAINING = """
import os, pathlib, shlex, signal, sys, yaml
from flags import get_args
from run.presets import flags_of_run
with open("calls", "a") as file:
    file.write(shlex.join(sys.argv[1:]) + "\\n")
args = get_args(sys.argv[1:])
logs = pathlib.Path(args.log_dir)
folder = pathlib.Path(args.resume or logs / (args.name or f"version_{len(list(logs.glob('version_*')))}"))
folder.mkdir(parents=True, exist_ok=bool(args.resume))
facts = {"git_commit": "c0ffee" * 6, "started": "2026-01-01T00:00:00+00:00"}
(folder / "hparams.yaml").write_text(yaml.safe_dump(flags_of_run(args) | {"provenance": facts}))
score = args.learning_rate + args.seed
(folder / "metrics.csv").write_text(f"epoch,test_acc,x\\n0,0,\\n1,{score},\\n")
if pathlib.Path("stop").exists():
    pathlib.Path("stop").unlink()
    signal.raise_signal(signal.SIGKILL)
(folder / "metrics.csv").write_text(f"epoch,test_acc,x\\n0,0,\\n1,0.5,\\n2,{score},3\\n")
(folder / "checkpoints").mkdir()
os.write(int(os.environ["NOTE_OF_RESULTS"]), bytes(folder))
"""
GRID = ["-e", "2", "--sweep", "learning-rate", "0.5", "0.25", "--seed", "0", "1", "4"]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_runs_once_and_the_means_of_each_setting_are_kept(training, capfd):
    assert main([*GRID, "--name", "g"]) == 0
    names = [f"g_learning-rate{rate}_seed{seed}" for rate in ("0.5", "0.25") for seed in (0, 1, 4)]
    assert sorted(path.name for path in LOGS.iterdir()) == sorted([*names, "g_means.csv"])
    assert [hparams(LOGS / name, "learning_rate", "seed") for name in names] == [
        [rate, seed] for rate in (0.5, 0.25) for seed in (0, 1, 4)
    ]
    rows = [row for row in rows_of(LOGS / "g_means.csv") if row["column"] == "test_acc"]
    assert [[row["learning-rate"], row["seeds"]] for row in rows] == [["0.5", "3"], ["0.25", "3"]]
    for row, rate in zip(rows, (0.5, 0.25), strict=True):
        figures = [float(row[name]) for name in ("mean", "std", "lowest", "highest")]
        assert figures == [pytest.approx(rate + 5 / 3), pytest.approx((13 / 3) ** 0.5), rate, rate + 4]
    told = capfd.readouterr().out
    assert "learning-rate 0.25, seed 4, 6 of 6" in told and "means in lightning_logs/g_means.csv" in told
    assert [line.split()[:5] for line in told.splitlines() if line.startswith("MLP")] == [
        ["MLP", "SZT", rate, "3", "3"] for rate in ("0.5", "0.25")
    ]


def hparams(folder, *names):
    content = yaml.safe_load((folder / "hparams.yaml").read_text())
    return [content[name] for name in names]


@pytest.mark.parametrize("name", [[], ["--name", "g"]])
def test_the_same_command_skips_what_is_done_and_goes_on_with_what_was_killed(training, capfd, name):
    Path("stop").touch()  # the first one is killed, the others finish
    assert main([*GRID, *name]) == 1
    assert len(training()) == 6 and "learning-rate 0.5, seed 0 failed with exit status 137" in capfd.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in LOGS.glob("*/metrics.csv")}
    assert main([*GRID, *name, "--threads", "1", "--note", "again"]) == 0
    (line,) = training()[6:]
    killed = "g_learning-rate0.5_seed0" if name else "version_0"
    assert line == ["--resume", f"lightning_logs/{killed}", "--note=again", "--threads=1"]
    changed = {path.parent.name for path, time_ in before.items() if path.stat().st_mtime_ns != time_}
    assert changed == {killed} and len(before) == 6
    told = capfd.readouterr().out
    assert told.count("done already in lightning_logs/") == 5 and f"goes on in lightning_logs/{killed}" in told
    (means,) = LOGS.glob("*_means.csv")
    assert {row["seeds"] for row in rows_of(means)} == {"3"}
    more = [word for word in GRID if word != "4"]
    assert main([*more, "5", *name]) == 0  # another seed joins the others, in the same file
    assert len(training()) == 9 and list(LOGS.glob("*_means.csv")) == [means]


def test_what_goes_on_elsewhere_and_what_cannot_go_on_without_loss_is_left_alone(training, capfd):
    assert main(["-e", "2", "--seed", "0", "1", "4"]) == 0
    folder = LOGS / "version_1"
    lines = (folder / "metrics.csv").read_text().splitlines()
    with RunFolder(folder):
        assert main(["-e", "2", "--seed", "0", "1", "4"]) == 0
        assert "seed 1, 2 of 3: goes on in lightning_logs/version_1, in another process" in capfd.readouterr().out
    change_flags(folder, epochs=3)  # of three epochs two are done, and no checkpoint is left to go on from
    change_flags(LOGS / "version_0", epochs=3)
    (LOGS / "version_0" / "checkpoints" / "last.ckpt").write_text("of an epoch")
    earlier = EarlierRuns(LOGS).find(flags_of_run(get_args(["-e", "3", "--seed", "0"])))
    assert earlier.folder == LOGS / "version_0" and not is_finished(earlier, {}) and can_go_on(earlier)
    earlier = EarlierRuns(LOGS).find(flags_of_run(get_args(["-e", "3", "--seed", "1"])))
    assert earlier is None and (folder / "metrics.csv").read_text().splitlines() == lines


def test_a_run_killed_between_its_last_row_and_its_last_checkpoint_is_not_finished(training):
    assert main(["-e", "2", "--seed", "0", "1"]) == 0
    folder = LOGS / "version_0"
    assert is_finished(Listed(folder), {})
    (folder / "checkpoints" / "last.ckpt").touch()
    assert is_finished(Listed(folder), {})
    os.utime(folder / "checkpoints" / "last.ckpt", (1, 1))
    assert not is_finished(Listed(folder), {})
    (folder / "checkpoints" / "last.ckpt").touch()
    assert not is_finished(Listed(folder), {"slot_update": True})  # which comes last


def test_runs_by_another_commit_are_said_to_be(training, capfd, monkeypatch):
    assert main(["-e", "2", "--seed", "0", "1"]) == 0
    monkeypatch.setattr(sweep.program, "commit", lambda: "decaf" * 8)
    assert main(["-e", "2", "--seed", "0", "1"]) == 0
    assert "done already in lightning_logs/version_0 (by commit c0ffeec0f; this is decafdeca)" in capfd.readouterr().out


def test_tasks_of_an_array_share_the_runs_out_and_the_last_one_keeps_the_means_of_all(training, monkeypatch):
    for name, value in {"MIN": "0", "MAX": "3", "COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    for task in range(4):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert main([*GRID, "--name", "g"]) == 0
    assert len(training()) == 6
    assert {row["seeds"] for row in rows_of(LOGS / "g_means.csv")} == {"3"}
    assert own_share(list(range(6))) == [3]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert own_share(list(range(6))) == [1, 5]
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")  # some tasks submitted again have their own runs
    assert own_share(list(range(6))) == [1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--sweep", "lerning-rate", "1"], "argument --sweep: there is no flag 'lerning-rate', perhaps learning-rate"),
        (["--sweep", "learning-rate"], "argument --sweep: learning-rate has no values: --sweep learning-rate VALUE…"),
        (["--sweep", "lr", "0.1", "-lr", "0.2"], "learning-rate is given as --learning-rate, too"),
        (["--sweep", "lr", "1", "--sweep", "learning_rate", "2"], "argument --sweep: learning-rate comes twice"),
        (["--sweep", "lr", "1", "1"], "argument --sweep: learning-rate 1 comes twice"),
        (["--sweep", "lr", "0.01", "1e-2"], "learning-rate 0.01, seed 0 and learning-rate 1e-2, seed 0 are the same"),
        (["--sweep", "lr", "0.1", "fast"], "argument -lr/--learning-rate: 'fast' is not a number"),
        (["--sweep", "batch-norm", "yes", "perhaps"], "batch-norm is a switch, yes or no, not 'perhaps'"),
        (["--sweep", "seed", "1", "2"], "for several seeds give --seed several values"),
        (["--sweep", "log-dir", "a", "b"], "argument --sweep: --log-dir is one for all runs"),
        (["--sweep", "model", "MLP", "ResNet"], "argument -m/--model: ResNet needs images"),
    ],
)
def test_wrong_sweeps_are_refused_before_anything_runs(training, capfd, words, text):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2 and text in capfd.readouterr().err and not training() and not LOGS.exists()


def test_flags_of_several_words_switches_and_models_can_be_swept():
    argv = ["--sweep", "widths", "5 4", "6", "--sweep", "batch-norm", "yes", "no", "-d", "MNIST"]
    args = get_args(argv_of(argv, "n", widths="5 4", **{"batch-norm": "no"}, seed=0))
    assert (args.widths, args.batch_norm, args.name) == ([5, 4], False, "n_widths5-4_batch-normno_seed0")
    assert args.sweep is None
    # The bare command's data have no images: what is refused is what no run asks for.
    argv = ["-m", "MNISTNet", "--sweep", "dataset", "MNIST", "FashionMNIST"]
    assert get_args(argv).dataset == "MNIST"
    assert get_args(argv_of(argv, None, dataset="FashionMNIST", seed=0)).dataset == "FashionMNIST"


def test_means_leave_out_the_row_that_sums_up_other_rows(tmp_path):
    """As `--measure A.ckpt B.ckpt` leaves it: the average has no epoch, and its checkpoint is no number."""
    (tmp_path / "metrics.csv").write_text("epoch,test_acc,checkpoint,y\n1,0.5,a.ckpt,\n2,0.75,b.ckpt,\n,,average,7\n")
    assert last_row(tmp_path / "metrics.csv") == {"epoch": "2", "test_acc": "0.75", "checkpoint": "b.ckpt"}
    lines = means_csv([((), seed, tmp_path) for seed in (0, 1)]).splitlines()
    assert lines == ["column,seeds,mean,std,lowest,highest", "test_acc,2,0.75,0.0,0.75,0.75"]
