"""Nothing lost, nothing wrong: each test breaks something for real and looks at what is left.

Runs are processes of their own (`processes.py`) wherever something is killed, interrupted or forbidden to them.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import (
    ROOT,
    SHORT,
    Run,
    as_nobody,
    assert_same_run,
    columns_without_times,
    finish,
    interrupt_in_a_destructor,
    kill_and_resume,
    leftovers,
    limit_memory,
    moments,
    press_often,
    signal_at,
    timed_whole_run,
)

import flags
import main
from classifier import Classifier
from flags import get_args
from measures import heads, neural_collapse
from measures.layers import matching
from run import presets, ranks, slurm
from run.checkpoints import read_checkpoint
from run.epochs import epochs_to_measure, why_of_one_length
from run.errors import Interrupted, UserError, WrongFlag, is_out_of_memory
from run.record import EpochTable, RunRecord
from run.run_folder import RunFolder

LOGS = Path("lightning_logs")
TINY = ["-e", "2", "--dib-epochs", "1", "--no-plots", "--quiet"]
EXACT = ["--precision", "64-true"]  # where two orders of computing are compared: no processor rounds enough to be seen
FUZZ = settings(  # the fixtures hold no state that an example changes
    max_examples=int(os.environ.get("FUZZ", "60")), deadline=None, suppress_health_check=list(HealthCheck)
)


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the run `whole` that nothing disturbed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, timed_whole_run(SHORT, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two epochs that ended."""
    folder = tmp_path_factory.mktemp("finished")
    assert finish([*TINY, "--name", "run"], folder)[0] == 0
    return folder / LOGS / "run"


def told(capsys):
    """The last line on stderr, which must be the program's sentence."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith("main.py: ")
    return text.splitlines()[-1]


def make_images(root):
    """Two classes of 32 × 32 grey images that differ in brightness."""
    pixels = np.random.default_rng(0)
    for split, num in (("train", 24), ("test", 6)):
        for brightness, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                image = pixels.integers(100 * brightness, 100 * brightness + 120, (32, 32), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i}.png")


def snapshot(folder):
    """Every file below with its content: what a refused command may not change."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


# Killed


def test_a_run_killed_at_random_moments_and_resumed_equals_one_never_interrupted(whole):
    folder, duration = whole
    for i, moment in enumerate(moments(4, duration, seed=1)):
        kill_and_resume(SHORT, folder, f"killed{i}", [moment])


def test_a_run_killed_again_and_again_gets_to_its_end(whole):
    folder, duration = whole
    kill_and_resume(SHORT, folder, "killed_often", [duration * share for share in (0.5, 0.2, 0.3)])


def test_a_run_in_float64_killed_and_resumed_equals_one_never_interrupted(tmp_path):
    """Its weights would not be the same after a detour through float32."""
    line = [*TINY, *EXACT, "-e", "3", "--no-dib"]
    assert finish([*line, "--name", "whole"], tmp_path)[0] == 0
    meddle = partial(signal_at, "classifier:Classifier.training_step", 20, signal.SIGKILL)  # in epoch 2
    assert finish([*line, "--name", "cut"], tmp_path, meddle=meddle)[0] == -signal.SIGKILL
    assert finish(["--resume", "lightning_logs/cut"], tmp_path)[0] == 0
    assert_same_run(LOGS / "cut", LOGS / "whole")


def test_gradient_descent_on_the_squared_error_killed_and_resumed_equals_one_never_interrupted(tmp_path):
    line = [*TINY, "-e", "6", "--no-dib", "--loss", "mse", "-b", "all", "--optimizer", "sgd", "--momentum", "0"]
    assert finish([*line, "--name", "whole"], tmp_path)[0] == 0
    meddle = partial(signal_at, "classifier:Classifier.training_step", 4, signal.SIGKILL)
    assert finish([*line, "--name", "cut"], tmp_path, meddle=meddle)[0] == -signal.SIGKILL
    assert finish(["--resume", "lightning_logs/cut"], tmp_path)[0] == 0
    assert_same_run(LOGS / "cut", LOGS / "whole")
    hparams = yaml.safe_load((LOGS / "cut/hparams.yaml").read_text())
    assert (hparams["loss"], hparams["batch_size"]) == ("mse", "all")
    content = read_checkpoint(LOGS / "cut/checkpoints/last.ckpt")
    assert content["hyper_parameters"]["loss"] == "mse" and content["global_step"] == 6  # a step an epoch


def test_a_run_from_before_there_were_losses_goes_on_with_the_cross_entropy(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    last = run / "checkpoints/last.ckpt"
    content = read_checkpoint(last)
    del content["hyper_parameters"]["loss"]
    torch.save(content, last)
    text_in_hparams("loss: cross-entropy\n", "")(last)
    assert "\nloss:" not in (run / "hparams.yaml").read_text()
    assert Classifier.load_from_checkpoint(last, weights_only=True).hparams.loss == "cross-entropy"
    assert main.main(["--resume", "run"]) == 0
    assert status_of(["--resume", "run", "--loss", "mse"]) == 2
    assert "a resumed run keeps its loss=cross-entropy" in told(capsys)


WRITING = [
    ("run.files:os.fsync", 3, False),  # the second row of metrics.csv or dib.csv: not yet on the disk
    ("run.files:os.replace", 5, False),  # on the disk, but not in its place
    ("run.files:os.replace", 6, True),  # in its place, and nothing after it
    ("run.checkpoints:torch.save", 3, True),
]


@pytest.mark.parametrize(("call", "number", "after"), WRITING)
def test_a_run_killed_while_it_writes_equals_one_never_interrupted(call, number, after, whole):
    folder, _ = whole
    run = folder / LOGS / f"{call.rpartition('.')[2]}{number}{after}"
    meddle = partial(signal_at, call, number, signal.SIGKILL, after)
    assert finish([*SHORT, "--name", run.name], folder, meddle=meddle)[0] == -signal.SIGKILL
    assert finish(["--resume", str(run)], folder)[0] == 0
    assert_same_run(run, folder / LOGS / "whole")


def test_what_a_killed_writer_left_is_removed_by_the_next_start(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in (".metrics.csv.123.tmp", "checkpoints/.last.ckpt.123.tmp"):
        (run / name).write_text("half")
    with RunFolder.resumed(run):
        assert leftovers(run) == []
    assert (run / "metrics.csv").exists() and (run / "checkpoints/last.ckpt").exists()


# Interrupted


PHASES = {
    "data": ("main:load_data", 1),
    "range test": ("run.lr_range_test:RisingRate.on_train_batch_end", 40),
    "training": ("classifier:Classifier.training_step", 20),
    "NC1": ("measures.neural_collapse:projected_variation", 3),
    "DIB": ("measures.heads:Heads.step", 30),
    "checkpoint": ("run.checkpoints:torch.save", 3),
    "table": ("run.files:os.fsync", 6),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_at_once_in_every_phase(phase, number, status, tmp_path):
    line = [*SHORT, "--lr-range-test"] if phase == "range test" else SHORT
    ended, text = finish(line, tmp_path, meddle=partial(signal_at, *PHASES[phase], number))
    assert time.time() - float(Path("signalled").read_text()) < 5
    assert ended == status, text
    assert text.count("\n") == 1 and text.startswith("main.py: ended by ")
    assert leftovers(tmp_path) == []
    if phase == "data":
        assert not LOGS.exists()
    else:
        assert "`python main.py --resume lightning_logs/version_0` goes on" in text


def test_an_interrupted_run_resumed_as_it_says_equals_one_never_interrupted(whole):
    folder, _ = whole
    meddle = partial(signal_at, *PHASES["DIB"], signal.SIGINT)
    assert finish([*SHORT, "--name", "cut"], folder, meddle=meddle)[0] == 130
    assert finish(["--resume", "lightning_logs/cut"], folder)[0] == 0
    assert_same_run(folder / LOGS / "cut", folder / LOGS / "whole")


def test_a_run_interrupted_in_its_range_test_makes_it_again_when_resumed(tmp_path):
    line = [*TINY, "--lr-range-test"]
    assert finish([*line, "--name", "whole"], tmp_path)[0] == 0
    meddle = partial(signal_at, *PHASES["range test"], signal.SIGINT)
    assert finish([*line, "--name", "cut"], tmp_path, meddle=meddle)[0] == 130
    assert finish(["--resume", "lightning_logs/cut"], tmp_path)[0] == 0
    assert_same_run(LOGS / "cut", LOGS / "whole")


@pytest.mark.parametrize("meddle", [press_often, interrupt_in_a_destructor])
def test_further_signals_are_harmless_and_one_that_gets_lost_comes_again(meddle, tmp_path):
    """Pressed three times, then while all is torn down; or while an object is destroyed, where Python drops it."""
    status, text = finish([*SHORT, "-e", "5000"], tmp_path, meddle=meddle)
    assert status == 130
    *before, last = text.splitlines()
    assert last == "main.py: ended by Ctrl-C; `python main.py --resume lightning_logs/version_0` goes on"
    # A run that goes on for some epochs before it is interrupted may have heads to warn of.
    assert all(line.startswith("main.py: warning: DIB heads trained too short") for line in before)


def test_ctrl_c_while_torch_is_imported_is_one_sentence_too():
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *TINY], stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=20)
    assert process.returncode == 130 and text == "main.py: ended by Ctrl-C\n"


SLURM = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name which notes what it is asked for."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    return {**SLURM, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def test_a_job_short_of_time_is_requeued_and_goes_on_in_its_folder(whole, tmp_path, scontrol):
    other = finish([*SHORT, "--seed", "1"], tmp_path, env=scontrol)  # of the same job, and not to be mixed up with it
    assert other[0] == 0
    meddle = partial(signal_at, *PHASES["training"], signal.SIGUSR1)
    status, text = finish(SHORT, tmp_path, meddle=meddle, env=scontrol)
    assert status == 128 + signal.SIGUSR1
    assert "ended by SIGUSR1" in text and "SLURM starts job 77 again" in text and text.count("\n") == 2
    assert Path("asked").read_text() == "requeue 77\n"
    assert finish(SHORT, tmp_path, env=scontrol | {"SLURM_RESTART_COUNT": "1"})[0] == 0
    assert_same_run(LOGS / "version_1", whole[0] / LOGS / "whole")
    assert sorted(path.name for path in LOGS.iterdir()) == ["version_0", "version_1"]
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_a_job_that_was_not_requeued_or_another_one_starts_anew(tmp_path):
    for env in (SLURM, SLURM, SLURM | {"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "1"}):
        assert finish(TINY, tmp_path, env=env)[0] == 0
    assert len(list(LOGS.iterdir())) == 3


def test_a_requeue_that_fails_is_said(tmp_path, scontrol):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Invalid job' >&2\nexit 1\n")
    meddle = partial(signal_at, *PHASES["training"], signal.SIGUSR1)
    status, text = finish(SHORT, tmp_path, meddle=meddle, env=scontrol)
    assert status == 138 and "goes on" in text and "SLURM refuses to start job 77 again: Invalid job" in text


def test_the_request_and_its_answer_outlive_what_slurm_ends_the_job_with(tmp_path, scontrol):
    """SIGTERM, to all processes of a job: of one that is queued again, or of which another process has left."""
    program = tmp_path / "bin" / "scontrol"
    program.write_text(f'#!/bin/sh\nkill -TERM $$ $PPID\nsleep 0.2\necho "$@" >> {tmp_path}/asked\n')
    meddle = partial(signal_at, *PHASES["training"], signal.SIGUSR1)
    status, text = finish(SHORT, tmp_path, meddle=meddle, env=scontrol)
    assert status == 138 and "SLURM starts job 77 again" in text and text.count("\n") == 2
    assert Path("asked").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("lines", "env", "said"),
    [
        (
            "kill -KILL $$",
            {},
            "SLURM was asked to start job 77 again, but SIGKILL ended scontrol before it had an answer",
        ),
        ("exit 1", {slurm.ASKED_BY_SCRIPT: "77"}, "its script asks SLURM to start job 77 again, which then goes on"),
        ("exit 0", {slurm.ASKED_BY_SCRIPT: "76"}, "SLURM starts job 77 again, which then goes on"),
    ],
)
def test_what_became_of_the_request_is_said_as_it_is(lines, env, said, scontrol, monkeypatch):
    (Path(scontrol["PATH"].partition(":")[0]) / "scontrol").write_text(f"#!/bin/sh\n{lines}\n")
    for name, value in {**scontrol, **env}.items():
        monkeypatch.setenv(name, value)
    assert slurm.requeue() == said


def test_where_there_is_no_scontrol_that_is_said(monkeypatch):
    for name, value in {**SLURM, "PATH": ""}.items():
        monkeypatch.setenv(name, value)
    assert slurm.requeue() == "SLURM cannot be asked to start job 77 again: scontrol: No such file or directory"


ENDING = """
import atexit, sys, time
from run.ending import status_of

status = status_of(lambda: {status})
atexit.register(time.sleep, 2)
print("ending", flush=True)
sys.exit(status)
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_lack_of_time_after_the_end_changes_no_status(status):
    line = [sys.executable, "-c", ENDING.format(status=status)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ | SLURM, **pipes)
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == status


# Not allowed to write


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_disk_that_fills_up_ends_the_run_and_spares_what_is_there(whole, small_disk, tmp_path):
    run = small_disk / "logs" / "run"
    started = Run([*SHORT, "--log-dir", str(small_disk / "logs"), "--name", "run"], tmp_path)
    started.wait((run / "checkpoints/last.ckpt").exists)
    fill(small_disk)
    status, text = started.end()
    assert status == 1 and text.count("\n") == 1
    assert f"cannot write {run}" in text and "No space left on device" in text
    assert leftovers(run) == []
    (small_disk / "filler").unlink()
    assert finish(["--resume", str(run)], tmp_path)[0] == 0
    assert_same_run(run, whole[0] / LOGS / "whole")


def test_a_full_disk_is_one_sentence_from_the_start(small_disk, tmp_path):
    fill(small_disk)
    status, text = finish([*TINY, "--log-dir", str(small_disk)], tmp_path)
    assert status == 1 and text.count("\n") == 1 and "No space left on device" in text and str(small_disk) in text


def test_a_read_only_disk_is_one_sentence(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, text = finish([*TINY, "--log-dir", str(small_disk / "logs")], tmp_path)
    assert status == 1 and text.count("\n") == 1
    assert f"--log-dir: cannot make a run's folder in {small_disk / 'logs'}: Read-only file system" in text


def test_a_run_whose_folder_is_deleted_says_so_and_does_not_bring_it_back(tmp_path):
    run = LOGS / "version_0"
    started = Run(SHORT, tmp_path)
    started.wait((run / "checkpoints/last.ckpt").exists)
    run.rename("gone")  # at one stroke: a deletion file by file would race with the run
    status, text = started.end()
    assert status == 1 and text.count("\n") == 1
    assert f"cannot write {run}" in text and "No such file or directory" in text
    assert not run.exists()


def test_permission_lost_in_mid_run_spares_what_is_there(whole, tmp_path):
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:  # nobody must be able to get here
        if not os.stat(folder).st_mode & 0o001 and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o001)
    run = LOGS / "run"
    started = Run([*SHORT, "--name", "run"], tmp_path, meddle=partial(as_nobody, tmp_path))
    started.wait((run / "checkpoints/last.ckpt").exists)
    run.chmod(0o555)
    status, text = started.end()
    assert status == 1 and text.count("\n") == 1
    assert f"cannot write {run}" in text and "Permission denied" in text
    (run / ".lock").chmod(0o444)
    status, text = finish(["--resume", str(run)], tmp_path, meddle=partial(as_nobody, tmp_path))
    assert (status, text) == (1, f"main.py: cannot write in {run}: Permission denied\n")
    run.chmod(0o755)
    (run / ".lock").chmod(0o644)
    status, text = finish(["--resume", str(run)], tmp_path, meddle=partial(as_nobody, tmp_path))
    assert status == 0, text
    assert_same_run(run, whole[0] / LOGS / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_standard_output_is_one_sentence(finished):
    with open("/dev/full", "w") as full:
        done = warm.run([sys.executable, ROOT / "main.py", "--list-layers"], stdout=full, stderr=warm.PIPE)
    assert (done.returncode, done.stderr) == (1, "main.py: standard output: No space left on device\n")


# Numbers go wrong


def broken_from(epoch, step, monkeypatch):
    """The loss is nan from this step of this epoch on."""
    training_step = Classifier.training_step

    def broken(self, batch, batch_idx):
        loss = training_step(self, batch, batch_idx)
        if (self.current_epoch + 1, batch_idx + 1) >= (epoch, step):
            size, _, correct = self._tally["train"].pop()
            loss = loss * float("nan")
            self._tally["train"].append((size, loss.detach(), correct))
        return loss

    monkeypatch.setattr(Classifier, "training_step", broken)


@pytest.mark.parametrize("measures", [[], ["--no-nc", "--no-dib"]])
def test_a_nan_loss_keeps_the_last_good_checkpoint_and_says_where_it_came(measures, capsys, monkeypatch):
    broken_from(3, 4, monkeypatch)
    assert main.main([*TINY, *measures, "-e", "5", "--schedule", "constant", "--warmup", "0", "-lr", "0.01"]) == 1
    sentence = told(capsys)
    assert "loss became nan in epoch 3, step 4 of 14, at a learning rate of 0.01:" in sentence
    assert "--learning-rate" in sentence and "--keep-going" in sentence
    run = LOGS / "version_0"
    assert [row[0] for row in columns_without_times(run / "metrics.csv")[1:]] == ["0", "1", "2"]
    assert read_checkpoint(run / "checkpoints/last.ckpt")["epoch"] == 1
    for name in ("last", "best"):
        state = read_checkpoint(run / f"checkpoints/{name}.ckpt")["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())


def test_weights_broken_by_the_last_step_of_an_epoch_are_not_saved(capsys, monkeypatch):
    """No training loss has shown it yet, and no measure looks: the test loss does."""
    broken_from(3, 14, monkeypatch)
    monkeypatch.setattr(Classifier, "_refuse_broken_loss", lambda self: None)
    assert main.main([*TINY, "-e", "5", "--no-nc", "--no-dib"]) == 1
    assert "the test loss became nan after epoch 3" in told(capsys)
    assert read_checkpoint(LOGS / "version_0/checkpoints/last.ckpt")["epoch"] == 1


def test_a_real_divergence_stops_the_run_and_with_keep_going_does_not(capsys):
    line = [*TINY, "-lr", "1e30", "--optimizer", "sgd", "-nl", "relu", "--rank"]
    assert main.main([*line, "--name", "stopped"]) == 1
    assert "in epoch 1, step " in told(capsys)
    assert not (LOGS / "stopped/checkpoints").exists()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main.main([*line, "--name", "went_on", "--keep-going"]) == 0
    rows = columns_without_times(LOGS / "went_on/metrics.csv")
    assert [row[0] for row in rows[1:]] == ["0", "1", "2"] and rows[2][1] == "nan"
    assert any("epoch 1: Activations are infinite or nan in layer" in str(warning.message) for warning in warned)
    assert not (LOGS / "went_on/checkpoints/best.ckpt").exists()  # no epoch was any good
    assert (LOGS / "went_on/checkpoints/last.ckpt").exists()


def test_infinite_activations_end_a_measure_with_layer_and_epoch(capsys, monkeypatch):
    network = Classifier("MLP", [12], 2).network
    extract = type(network).feature_extractor

    def infinite(self, x):
        h = extract(self, x)
        return h | {"hidden3": h["hidden3"] + torch.inf}

    monkeypatch.setattr(type(network), "feature_extractor", infinite)
    assert main.main([*TINY, "--no-dib"]) == 1
    assert "epoch 0: Activations are infinite or nan in layer hidden3" in told(capsys)


def test_a_range_test_that_diverges_to_nan_in_an_epochs_last_step_goes_on(capsys, monkeypatch):
    """With one step per epoch every step is an epoch's last."""
    assert main.main([*TINY, "-b", "4096", "--lr-range-test", "only", "--optimizer", "sgd", "-nl", "relu"]) in (0, 1)
    assert "loss became" not in capsys.readouterr().err


# Out of memory


def numbers(row):
    return [float(cell or 0) for cell in row]


def test_a_measure_short_of_memory_goes_on_in_smaller_batches_to_the_same_numbers(monkeypatch):
    line = [*TINY, *EXACT, "--no-dib", "--rank"]
    assert main.main([*line, "--name", "enough"]) == 0
    extract = type(Classifier("MLP", [12], 2).network).feature_extractor

    def scarce(self, x):
        if len(x) > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return extract(self, x)

    monkeypatch.setattr(type(Classifier("MLP", [12], 2).network), "feature_extractor", scarce)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main.main([*line, "--name", "scarce"]) == 0
    told = [str(warning.message) for warning in warned if "Out of memory" in str(warning.message)]
    assert sorted(text.partition(":")[0] for text in told) == ["Out of memory in nc1", "Out of memory in rank"]
    enough, scarce = (columns_without_times(LOGS / name / "metrics.csv") for name in ("enough", "scarce"))
    for row, expected in zip(enough[1:], scarce[1:], strict=True):
        assert numbers(row) == pytest.approx(numbers(expected), rel=1e-9)  # products of other sizes round differently


def test_dib_short_of_memory_goes_on_with_less_cache_to_the_same_numbers(monkeypatch):
    line = [*TINY, *EXACT, "--no-nc"]
    assert main.main([*line, "--name", "enough"]) == 0
    keep = heads.Samples.keep

    def scarce(self, layers):
        if self.num_bytes(layers) > 200_000:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        keep(self, layers)

    monkeypatch.setattr(heads.Samples, "keep", scarce)
    with pytest.warns(UserWarning, match="Out of memory in dib") as warned:
        assert main.main([*line, "--cache-gb", "0.001", "--name", "scarce"]) == 0
    assert len([warning for warning in warned if "Out of memory" in str(warning.message)]) == 1
    enough, scarce = (columns_without_times(LOGS / name / "metrics.csv") for name in ("enough", "scarce"))
    for row, expected in zip(enough[1:], scarce[1:], strict=True):
        assert numbers(row) == pytest.approx(numbers(expected), abs=1e-8)  # nats; as above, and Adam enlarges it


def test_a_measure_for_which_no_batch_is_small_enough_is_one_sentence(capsys, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(neural_collapse, "nc1_of_labelings", exhausted)
    with pytest.warns(UserWarning, match="Out of memory in nc1"):
        assert main.main([*TINY, "--no-dib"]) == 1
    assert "epoch 0: out of memory in the measure nc1" in told(capsys)


def test_out_of_memory_in_training_names_the_batch_size_and_what_to_try(capsys, monkeypatch):
    def exhausted(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Classifier, "training_step", exhausted)
    assert main.main([*TINY, "-b", "100"]) == 1
    assert "--batch-size than 100" in told(capsys)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_run_that_reaches_its_memory_limit_in_training_is_one_sentence(tmp_path):
    """Weights and gradients fit into 400 MB, Adam's averages, 128 MB each, do not."""
    line = ["-w", "5600", "5600", "-e", "1", "--no-nc", "--no-dib", "--no-plots", "--quiet"]
    status, text = finish(line, tmp_path, meddle=partial(limit_memory, 400_000_000))
    assert status == 1 and text.count("\n") == 1, text
    assert "out of memory" in text and "--batch-size" in text


def test_a_network_that_no_memory_holds_is_one_sentence(capsys):
    assert main.main([*TINY, "-w", "10000000", "10000000"]) == 1
    assert "out of memory" in told(capsys)
    assert not LOGS.exists()


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))


# Another number of epochs


CONSTANT = ["--schedule", "constant", "--warmup", "0"]


def status_of(argv):
    """Exit status, however the program ends."""
    try:
        return main.main(argv)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("network", ["MLP", "CIFARNet"])
def test_a_run_that_goes_on_to_more_epochs_equals_one_of_that_length(network, tmp_path):
    """Where the rate does not depend on the length; CIFARNet stops training its whitening after one epoch in each."""
    line = ["-m", network, *CONSTANT, "--no-plots", "--quiet", "--dib-epochs", "1"]
    if network == "CIFARNet":
        make_images(Path("images"))
        line += ["-d", "images", "-b", "16", "--no-lookahead", "--whiten-epochs", "1", "--no-dib"]
    assert finish([*line, "-e", "4", "--name", "whole"], tmp_path)[0] == 0
    assert finish([*line, "-e", "2", "--name", "run"], tmp_path)[0] == 0
    status, text = finish(["--resume", "lightning_logs/run", "-e", "4"], tmp_path)
    assert status == 0, text
    assert_same_run(LOGS / "run", LOGS / "whole")
    assert yaml.safe_load((LOGS / "run/hparams.yaml").read_text())["epochs"] == 4


def test_a_run_that_is_told_to_stop_where_it_was_cut_is_one_of_that_length(tmp_path):
    line = [*TINY, *CONSTANT]
    assert finish([*line, "--name", "whole"], tmp_path)[0] == 0
    meddle = partial(signal_at, "run.record:RunRecord.on_train_epoch_start", 3, signal.SIGKILL)
    assert finish([*line, "-e", "9", "--name", "run"], tmp_path, meddle=meddle)[0] == -signal.SIGKILL
    assert finish(["--resume", "lightning_logs/run", "-e", "2"], tmp_path)[0] == 0
    assert_same_run(LOGS / "run", LOGS / "whole")
    assert yaml.safe_load((LOGS / "run/hparams.yaml").read_text())["epochs"] == 2


OTHER_LENGTHS = {
    "cosine": ([], "--schedule cosine"),
    "linear": (["--schedule", "linear", "--warmup", "0"], "--schedule linear"),
    "warmup": (["--schedule", "constant"], "--warmup"),
    "lookahead": ([*CONSTANT, "--lookahead"], "--lookahead"),
    "log": ([*CONSTANT, "--measure-at", "log:2", "-e", "3"], "--measure-at"),
    "last epoch": ([*CONSTANT, "--measure-every", "2", "-e", "3"], "--measure-every"),
}


@pytest.mark.parametrize("case", OTHER_LENGTHS)
def test_a_run_that_would_not_become_one_of_that_length_is_refused(case, capsys, tmp_path):
    words, reason = OTHER_LENGTHS[case]
    line = [*TINY, "--no-dib", *words]
    assert main.main([*line, "--name", "run"]) == 0
    capsys.readouterr()
    before = snapshot(tmp_path)
    assert main.main(["--resume", "lightning_logs/run", "-e", "7"]) == 2
    sentence = told(capsys)
    assert "argument -e/--epochs" in sentence and reason in sentence and "start a new run with -e 7" in sentence
    assert snapshot(tmp_path) == before


def test_the_epochs_measured_may_differ_later_on():
    """What decides is what is done: epoch 4 is measured by both, and 2 was not the last one."""
    args = get_args([*CONSTANT, "-e", "8", "--measure-every", "2"])
    assert why_of_one_length(args, planned=5, done=4) == "" and why_of_one_length(args, planned=5, done=5) != ""


@pytest.mark.parametrize("words", [[], CONSTANT])
def test_fewer_epochs_than_are_done_are_refused_and_nothing_changes(words, capsys, tmp_path):
    assert main.main([*TINY, *words, "--no-dib"]) == 0
    capsys.readouterr()
    before = snapshot(tmp_path)
    assert main.main(["--resume", "last", "-e", "1"]) == 2
    assert "argument -e/--epochs" in told(capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("words", [[], ["-e", "2"]])
def test_a_finished_run_is_said_to_be_finished_and_stays_as_it_is(words, finished, capsys, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = snapshot(run)
    assert main.main(["--resume", "run", *words]) == 0
    text = capsys.readouterr().out
    assert "the run is finished: it has done its 2 epochs" in text and text.endswith("results in run\n")
    assert snapshot(run) == before


def test_a_checkpoint_that_cannot_be_taken_in_leaves_hparams_as_they_are(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    text_in_hparams("epochs: 2", "epochs: 3")(run / "checkpoints/last.ckpt")
    before = (run / "hparams.yaml").read_bytes()

    def broken(*_):
        raise UserError("the optimizer's state does not fit")

    monkeypatch.setattr(RunRecord, "load_state_dict", broken)
    assert main.main(["--resume", "run"]) == 1
    assert (run / "hparams.yaml").read_bytes() == before


# The folders of measurements and of runs killed early


def test_a_measurement_is_no_run_to_resume(finished, capsys, tmp_path):
    shutil.copytree(finished, LOGS / "run")
    assert main.main(["--measure", "lightning_logs/run/checkpoints/last.ckpt", "--no-dib", "--quiet"]) == 0
    measurement = LOGS / "version_0"  # in a folder of its own, though the run had a name
    before = snapshot(measurement)
    assert status_of(["--resume", str(measurement)]) == 2
    assert f"{measurement} holds what --measure found" in told(capsys)
    assert main.main(["--resume", "last", "--quiet"]) == 0
    assert capsys.readouterr().out == "results in lightning_logs/run\n"
    shutil.rmtree(LOGS / "run")
    assert status_of(["--resume", "last"]) == 2
    assert "there is no run in lightning_logs to go on with" in told(capsys)
    assert snapshot(measurement) == before


def test_a_measurement_may_have_a_name_and_takes_none_that_is_taken(finished, capsys):
    shutil.copytree(finished, LOGS / "run")
    line = ["--measure", "lightning_logs/run/checkpoints/last.ckpt", "--no-dib", "--quiet"]
    assert main.main([*line, "--name", "again"]) == 0
    assert (LOGS / "again/metrics.csv").exists()
    assert main.main([*line, "--name", "run"]) == 1
    assert "run exists already" in told(capsys)


def test_a_job_does_not_go_on_with_its_measurement(monkeypatch):
    for name, value in {**SLURM, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    run_flags = flags.flags_of_run(get_args(TINY))
    for name, more in (("a", {"measured": "x.ckpt"}), ("b", {})):
        (LOGS / name).mkdir(parents=True)
        provenance = {"slurm_job": "77", **more}
        (LOGS / name / "hparams.yaml").write_text(yaml.safe_dump(run_flags | {"provenance": provenance}))
    assert slurm.run_to_go_on_with(run_flags) == LOGS / "b"
    shutil.rmtree(LOGS / "b")
    assert slurm.run_to_go_on_with(run_flags) is None


def test_a_named_run_killed_before_it_began_can_be_started_again(tmp_path):
    line = [*TINY, "--no-dib", "--name", "run"]
    meddle = partial(signal_at, "run.files:os.replace", 1, signal.SIGKILL)
    assert finish(line, tmp_path, meddle=meddle)[0] == -signal.SIGKILL
    assert (LOGS / "run").exists() and not (LOGS / "run/hparams.yaml").exists()
    status, text = finish(line, tmp_path)
    assert status == 0, text
    assert leftovers(LOGS) == []


# Bad files


def edited(path, **changes):
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) and name != "state_dict" else value
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_network(path):
    network = Classifier("MLP", [12], 2, widths=[3, 3])
    edited(path, state_dict=network.state_dict())


def text_in_hparams(old, new):
    def change(path):
        hparams = path.parent.parent / "hparams.yaml"
        hparams.write_text(hparams.read_text().replace(old, new))

    return change


def in_table(change):
    return lambda path: change(path.parent.parent / "metrics.csv")


# What is done to a run's last.ckpt (or beside it), the status, and what the sentence names.
BAD_RUNS = {
    "checkpoint truncated": (truncated, 1, "last.ckpt is no checkpoint, or not a whole one"),
    "checkpoint empty": (lambda path: path.write_bytes(b""), 1, "last.ckpt is no checkpoint"),
    "checkpoint is text": (lambda path: path.write_text("hello"), 1, "last.ckpt is no checkpoint"),
    "checkpoint is a folder": (lambda path: (path.unlink(), path.mkdir()), 1, "last.ckpt"),
    "checkpoint is a list": (lambda path: torch.save([1], path), 1, "no state_dict"),
    "checkpoint of weights alone": (lambda path: edited(path, optimizer_states=None, loops=None), 1, "no loops"),
    "checkpoint without slow weights": (lambda path: edited(path, slow_weights=None), 1, "slow_weights"),
    "checkpoint of another network": (other_network, 1, "another network"),
    "checkpoint of another seed": (lambda path: edited(path, hyper_parameters={"seed": 3}), 1, "differ in seed"),
    "checkpoint of other widths": (lambda path: edited(path, hyper_parameters={"widths": [3]}), 1, "differ in widths"),
    "checkpoint whose epoch is text": (lambda path: edited(path, epoch="two"), 1, "epoch"),
    "checkpoint ahead of the table": (lambda path: edited(path, epoch=7), 1, "metrics.csv does not have every epoch"),
    "table missing": (in_table(Path.unlink), 1, "metrics.csv does not have every epoch"),
    "table empty": (in_table(lambda path: path.write_text("")), 1, "metrics.csv cannot be read"),
    "table of bytes": (in_table(lambda path: path.write_bytes(b"\xff\xfe")), 1, "metrics.csv cannot be read"),
    "table without a row": (
        in_table(lambda path: path.write_text("".join(path.read_text().splitlines(True)[:2]))), 1, "every epoch"),
    "table with a row twice": (
        in_table(lambda path: path.write_text(path.read_text() + path.read_text().splitlines(True)[-1])), 1,
        "every epoch"),
    "table cut in a row": (
        in_table(lambda path: path.write_text(path.read_text()[:-200])), 1, "metrics.csv is damaged"),
    "hparams.yaml of a newer version": (
        text_in_hparams("model:", "new_flag: 3\nmodel:"), 2, "hparams.yaml: unknown key 'new_flag'"),
    "hparams.yaml with a value of a newer version": (
        text_in_hparams("optimizer: adam", "optimizer: muon"), 2, "hparams.yaml: argument --optimizer"),
    "hparams.yaml cut off": (
        lambda path: truncated(path.parent.parent / "hparams.yaml"), (1, 2), "hparams.yaml"),
    "hparams.yaml of objects": (
        text_in_hparams("seed: 0", "seed: !!python/object/apply:os.mkdir [hacked]"), 2, "hparams.yaml is not plain"),
    "hparams.yaml that is a list": (
        lambda path: (path.parent.parent / "hparams.yaml").write_text("- 1"), 2, "--resume"),
    "hparams.yaml whose provenance is a number": (
        lambda path: (path.parent.parent / "hparams.yaml").write_text("provenance: 3"), 2, "provenance"),
    "hparams.yaml missing": (lambda path: (path.parent.parent / "hparams.yaml").unlink(), 2, "no hparams.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_with_a_bad_file_is_not_resumed_and_nothing_in_it_changes(case, finished, capsys, tmp_path):
    damage, status, names = BAD_RUNS[case]
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run / "checkpoints" / "last.ckpt")
    before = snapshot(tmp_path)
    try:
        ended = main.main(["--resume", "run", "-e", "4"])
    except SystemExit as end:
        ended = end.code
    text = capsys.readouterr().err
    assert ended in (status if isinstance(status, tuple) else (status,)), text
    assert names in text and text.startswith("main.py: ") and text.count("\n") == 1
    assert snapshot(tmp_path) == before


BAD_TO_MEASURE = {
    "truncated": (truncated, "not a whole one"),
    "of another network than it says": (other_network, "another network than it says"),
    "of an unknown model": (lambda path: edited(path, hyper_parameters={"model": "Transformer"}), "Transformer"),
    "with an unknown flag": (lambda path: edited(path, hyper_parameters={"new_flag": 1}), "new_flag"),
    "with an unknown loss": (lambda path: edited(path, hyper_parameters={"loss": "hinge"}), "'hinge' is none of"),
    "with impossible widths": (lambda path: edited(path, hyper_parameters={"widths": "wide"}), "another network"),
    "of other classes": (lambda path: edited(path, hyper_parameters={"num_classes": 3}), "3 classes"),
}


@pytest.mark.parametrize("case", BAD_TO_MEASURE)
def test_a_bad_checkpoint_is_not_measured(case, finished, capsys, tmp_path):
    damage, names = BAD_TO_MEASURE[case]
    shutil.copyfile(finished / "checkpoints/last.ckpt", "last.ckpt")
    damage(Path("last.ckpt"))
    before = snapshot(tmp_path)
    assert main.main(["--measure", "last.ckpt"]) == 1
    sentence = told(capsys)
    assert "last.ckpt" in sentence and names in sentence
    assert snapshot(tmp_path) == before


BAD_PLACES = [
    (["--name", "n" * 300], 2, "--name"),
    (["--log-dir", "l" * 300], 1, "--log-dir"),
    (["--log-dir", "a_file"], 1, "a_file"),
    (["--log-dir", "a_file/below"], 1, "a_file/below"),
    (["--name", "run", "--log-dir", "."], 1, "--name"),
    (["--resume", "a_file"], 2, "--resume"),
    (["--measure", "run"], 1, "run"),
    (["-e", "1000001"], 2, "--epochs"),
    (["--measure-at", "log:99999999999"], 2, "--measure-at"),
    (["--name", "a\0b"], 2, "--name"),
    (["--layers", "\udc80"], 2, "--layers"),
    (["-d", "run"], 1, "train"),
]


@pytest.mark.parametrize(("words", "status", "names"), BAD_PLACES, ids=[repr(case[0])[:40] for case in BAD_PLACES])
def test_a_place_that_does_not_do_is_one_sentence_and_leaves_nothing(words, status, names, capsys, tmp_path):
    Path("a_file").write_text("")
    Path("run/checkpoints").mkdir(parents=True)
    before = snapshot(tmp_path)
    try:
        ended = main.main([*TINY, *words])
    except SystemExit as end:
        ended = end.code
    text = capsys.readouterr().err
    assert ended == status and names in text and text.startswith("main.py: ") and text.count("\n") == 1
    assert snapshot(tmp_path) == before


# Few samples, extreme numbers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of two classes with four training and three test images, named by the images' size."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for size in (1, 8, 12, 25):
        for split, num in (("train", 4), ("test", 3)):
            for name in ("a", "b"):
                (folder / f"{size}" / split / name).mkdir(parents=True)
                for i in range(num):
                    pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
                    Image.fromarray(pixels.numpy()).save(folder / f"{size}" / split / name / f"{i}.png")
    return folder


TOO_FEW = [
    ("--limit 20 -b 1 --batch-norm", "--batch-size", "at least 2"),
    ("--limit 1 --batch-norm", "1 training sample(s) (--limit)", "at least 2"),
    ("--limit 3 --devices 2 --batch-norm", "--devices", "at least 4"),
    ("--limit 1 --devices 2", "--limit", "at least 2"),
    ("-m ResNet -d 1 -b 1", "--batch-size", "at least 2"),
    ("-m ResNet -d 8 --limit 1", "--limit", "at least 2"),
    ("-m ResNet -d 8 --limit 3 --devices 2", "--devices", "at least 4"),
    ("-m ResNet -d 1 --tta", "--tta", "2 × 2"),
    ("--tta", "--tta", "2 × 2"),
    ("--layers hiden3", "--layers", "perhaps hidden3"),
]


@pytest.mark.parametrize(("line", "names", "allows"), TOO_FEW, ids=[case[0] for case in TOO_FEW])
def test_what_cannot_be_trained_is_refused_in_a_sentence_before_there_is_a_folder(
    line, names, allows, pictures, capsys, monkeypatch
):
    monkeypatch.chdir(pictures)
    argv = [*TINY, "--no-dib", "--accelerator", "cpu", "--log-dir", "logs", *line.split()]
    try:
        ended = main.main(argv)
    except SystemExit as end:
        ended = end.code
    text = capsys.readouterr().err
    assert ended == 2 and names in text and allows in text and text.startswith("main.py: ") and text.count("\n") == 1
    assert not Path("logs").exists()


ENOUGH = [
    ("{}", 1), ("{} --batch-norm", 2), ("{} -b 1", 3), ("-d 8 {}", 1), ("-d 1 {} --batch-norm", 2),
    ("-m MNISTNet -d 12 {}", 1), ("-m CIFARNet -d 25 {}", 1), ("-m CIFARNet -d 25 {} -b 1", 3),
    ("-m ResNet -d 8 {}", 2), ("-m ResNet -d 12 {} -b 1", 1),
]  # fmt: skip


@pytest.mark.parametrize(("line", "limit"), ENOUGH)
def test_the_fewest_samples_that_are_not_refused_train_and_are_measured(
    line, limit, pictures, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(pictures)
    line = line.format(f"--limit {limit}").split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NC1 is not defined for one class
        ended = main.main([*TINY, "-e", "1", "--no-dib", "--log-dir", str(tmp_path / "logs"), *line])
    assert ended == 0, capsys.readouterr().err


def test_more_processes_than_cpus_can_serve_are_refused_where_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num = ranks.PROCESSES_PER_CPU * os.cpu_count() + 1
    assert main.main([*TINY, "--devices", str(num), "-b", "100000"]) == 2
    assert f"--devices: {num} processes are too many" in told(capsys)
    assert not LOGS.exists()


EXTREME = {
    "smallest": "-lr 1e-320 --dib-lr 1e-320 --weight-decay 1e-320 --warmup 1e-320 --start-factor 0 --betas 0 0 "
    "--label-smoothing 1e-320 --bias-lr-scale 1e-6 --cache-gb 1e-320 --batch-norm",
    "largest": "-lr 1e30 --dib-lr 1e30 --weight-decay 1e30 --warmup 1 --bias-lr-scale 1e6 --cache-gb 1e9 "
    "-b 1000000000 --dib-batch-size 1000000000 --save-every 1000000000 --batch-norm",
    "largest of sgd": "-lr 1e30 --weight-decay 1e30 --optimizer sgd --momentum 0.9999999999999999 --dib-optimizer sgd",
    "beyond float32": "-lr 1e30 --betas 0.9999999999999999 0.9999999999999999",
}


@pytest.mark.parametrize("case", EXTREME)
def test_the_most_extreme_numbers_end_in_a_result_or_a_sentence(case, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heads diverge
        status = main.main([*TINY, "--limit", "50", *EXTREME[case].split()])
    assert status == 0 or (status == 1 and told(capsys))
    if case == "beyond float32":
        assert status == 1


# Nobody reads


@pytest.mark.parametrize(("line", "status"), [("--list-layers", 0), (" ".join([*TINY, "--no-dib"]), 1)])
def test_a_pipe_that_nobody_reads_ends_quietly(line, status):
    """Who reads a list has seen enough; a run that was cut short says so."""
    reader, writer = os.pipe()
    os.close(reader)
    done = warm.run([sys.executable, ROOT / "main.py", *line.split()], stdout=writer, stderr=warm.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, "main.py: standard output: Broken pipe\n" * status)


@pytest.mark.parametrize("line", ["--list-layers", " ".join([*TINY, "--no-dib"])])
def test_a_closed_standard_output_changes_nothing_else(line):
    done = warm.run([sys.executable, ROOT / "main.py", *line.split()], stdout=warm.CLOSED, stderr=warm.PIPE)
    assert (done.returncode, done.stderr) == (0, "")


# At the same time


def test_runs_started_at_once_in_one_folder_are_whole_and_equal(tmp_path, whole):
    runs = [Run(SHORT, tmp_path) for _ in range(3)]
    assert [run.end()[0] for run in runs] == [0, 0, 0]
    folders = sorted(LOGS.iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    for folder in folders:
        assert_same_run(folder, whole[0] / LOGS / "whole")


def test_a_run_that_is_still_going_on_is_not_resumed(tmp_path):
    running = Run([*SHORT, "-e", "500"], tmp_path)
    running.wait((LOGS / "version_0/checkpoints/last.ckpt").exists)
    status, text = finish(["--resume", "last"], tmp_path)
    assert (status, text) == (
        1,
        "main.py: --resume: the run in lightning_logs/version_0 is still going on: stop it first\n",
    )
    running.send(signal.SIGKILL)
    running.end()


# The same bytes


def test_a_run_repeated_gives_the_same_bytes_with_as_many_threads(whole):
    """With two threads sums are taken in another order than with one, so that runs differ in their last digits."""
    folder, _ = whole
    assert finish([*SHORT, "--name", "again"], folder)[0] == 0
    assert_same_run(folder / LOGS / "again", folder / LOGS / "whole")
    line = [*TINY, *EXACT]
    assert finish([*line, "--name", "one", "--threads", "1"], folder)[0] == 0
    for name in ("two", "two_again"):
        assert finish([*line, "--name", name, "--threads", "2"], folder)[0] == 0
    assert_same_run(folder / LOGS / "two_again", folder / LOGS / "two")
    one, two = (columns_without_times(folder / LOGS / name / "metrics.csv") for name in ("one", "two"))
    for row, expected in zip(one[1:], two[1:], strict=True):
        assert numbers(row) == pytest.approx(numbers(expected), rel=1e-9, abs=1e-9)


# Any bytes


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["MLP", "log:5", "1e-3"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)
NAMES = st.sampled_from(sorted(set(presets.DEFAULTS) - {"config"})) | st.text(max_size=8)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "run.yaml"


@pytest.fixture
def args_or_sentence(capsys):
    """Reads a command line: all flags, or None after exactly one sentence."""

    def read(argv):
        capsys.readouterr()
        try:
            args = get_args(argv)
        except SystemExit as end:
            text = capsys.readouterr().err
            assert end.code == 2 and text.startswith("main.py: error: ") and text.count("\n") == 1
            return None
        assert set(vars(args)) == set(presets.DEFAULTS)
        return args

    return read


@FUZZ
@given(content=st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_yaml_mapping_is_a_config_or_refused_in_a_sentence(content, config, args_or_sentence):
    config.write_text(yaml.safe_dump(content))
    args_or_sentence(["-c", str(config)])


@FUZZ
@given(content=st.binary(max_size=200) | st.text(alphabet="-:[]{}&*!#|>'\"\n ab1.,", max_size=80).map(str.encode))
@example(content=b"widths: &a [*a]")
@example(content=b"a: &a [x, x]\nb: &b [*a, *a]\nwidths: [*b, *b]")
@example(content=b"epochs: " + b"9" * 5000)
@example(content=b"[" * 3000)
@example(content=b'name: "\\ud800"')
@example(content=b'name: "\\0"')
@example(content=b"epochs: 1_0\nepochs: 0x10")
@example(content=b"? [a]\n: 1")
def test_any_bytes_are_a_config_or_refused_in_a_sentence(content, config, args_or_sentence):
    config.write_bytes(content)
    args_or_sentence(["-c", str(config)])


@FUZZ
@given(
    patterns=st.lists(st.text(max_size=8) | st.from_regex(r"(log:)?[0-9]{1,9}", fullmatch=True), min_size=1, max_size=4)
)
@example(patterns=["log:٣"])
@example(patterns=["²"])
def test_any_epoch_patterns_give_epochs_of_the_run_or_are_refused(patterns, args_or_sentence):
    args = args_or_sentence(["-e", "50", "--measure-at", *patterns])
    if args and args.measure_at:
        assert epochs_to_measure(args) <= set(range(51))


@FUZZ
@given(patterns=st.lists(st.text(alphabet="hiden12*?[]!-^\\.", max_size=12), min_size=1, max_size=3))
@example(patterns=["[z-a]"])
@example(patterns=["*" * 12 + "!"])
def test_any_layer_patterns_choose_layers_in_order_or_are_refused(patterns):
    layers = ["hidden1", "hidden2", "features.1.0", "avgpool"]
    try:
        chosen = matching(patterns, layers, "--layers")
    except WrongFlag as error:
        assert "--layers" in str(error)
    else:
        assert chosen and chosen == [layer for layer in layers if layer in chosen]


@FUZZ
@given(data=st.data())
def test_a_checkpoint_with_any_flipped_or_missing_bytes_is_read_as_data_or_refused(data, finished, config):
    content = bytearray((finished / "checkpoints/last.ckpt").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, 100]))]
    path = config.with_name("fuzzed.ckpt")
    path.write_bytes(content)
    try:
        assert isinstance(read_checkpoint(path)["epoch"], int)
    except UserError as error:
        assert "fuzzed.ckpt" in str(error)


@FUZZ
@given(content=st.binary(max_size=100) | st.text(alphabet='epoch,0123456789.\n\r"', max_size=60).map(str.encode))
@example(content=b"epoch,a\n0,1,2\n")
@example(content=b"epoch\n\n")
def test_any_bytes_are_a_table_to_go_on_with_or_refused(content, config):
    path = config.with_name("metrics.csv")
    path.write_bytes(content)
    try:
        table = EpochTable(path, ("epoch",), keep_to=3)
    except UserError as error:
        assert "metrics.csv" in str(error)
    else:
        table.rows()


def test_the_first_signal_decides_the_status():
    number = Interrupted(signal.SIGTERM)
    assert number.status == 143 and str(number) == "ended by SIGTERM"
    assert Interrupted(signal.SIGINT).status == 130
