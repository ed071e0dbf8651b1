"""The promises of `test_robustness.py`, tried long enough to be believed: `make torture`, about ten minutes.

pytest does not collect this file by itself. Each test prints its result, "40 of 40 …".
"""

import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import (
    ROOT,
    SHORT,
    Run,
    assert_same_run,
    finish,
    kill_and_resume,
    moments,
    signal_at,
    timed_whole_run,
)

LOGS = Path("lightning_logs")
CIFARNET = [
    *("-m", "CIFARNet", "-d", "images", "-b", "16", "-e", "4", "--dib-layers", "pool", "--dib-epochs", "1"),
    *("--no-plots", "--quiet"),
]
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the run `whole`, on the MLP, and how long it took."""
    folder = tmp_path_factory.mktemp("mlp")
    return folder, timed_whole_run(SHORT, folder)


@pytest.fixture(scope="module")
def whole_cifarnet(tmp_path_factory):
    """The same for a network with batch norm, augmented images, look-ahead and averaged views."""
    folder = tmp_path_factory.mktemp("cifarnet")
    pixels = np.random.default_rng(0)
    for split, num in (("train", 24), ("test", 6)):
        for brightness, name in enumerate(("dark", "light")):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(num):
                image = pixels.integers(100 * brightness, 100 * brightness + 120, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / "images" / split / name / f"{i}.png")
    return folder, timed_whole_run(CIFARNET, folder)


def count(what, attempts):
    """Try all, print how many went well and what the first failure was, and fail if there is one."""
    failures = []
    for attempt in attempts:
        try:
            attempt()
        except AssertionError as failure:
            failures.append(failure)
    print(f"\n{len(attempts) - len(failures)} of {len(attempts)} {what}", flush=True)
    assert not failures, failures[0]


def test_killed_at_random_moments(whole):
    folder, duration = whole
    epochs = []
    attempts = [
        partial(lambda i, moment: epochs.extend(kill_and_resume(SHORT, folder, f"cut{i}", [moment])), i, moment)
        for i, moment in enumerate(moments(60, duration, seed=0))
    ]
    count("kills of an MLP resumed identically", attempts)
    print("rows in the table at the kill:", {n: epochs.count(n) for n in sorted(set(epochs))})


def test_killed_at_random_moments_with_images(whole_cifarnet):
    folder, duration = whole_cifarnet
    attempts = [
        partial(kill_and_resume, CIFARNET, folder, f"cut{i}", [moment])
        for i, moment in enumerate(moments(20, duration, seed=0))
    ]
    count("kills of a CIFARNet resumed identically", attempts)


def test_killed_again_and_again(whole):
    folder, duration = whole
    draw = random.Random(0)
    attempts = [
        partial(kill_and_resume, SHORT, folder, f"often{i}", [draw.uniform(0, duration / 2) for _ in range(8)])
        for i in range(5)
    ]
    count("runs killed eight times each end identically", attempts)


def test_killed_around_every_write(whole):
    """Before a file's flush, before its renaming and after it, for each file that a run writes."""
    folder, _ = whole
    resumed = []

    def attempt(call, number, after):
        run = folder / LOGS / f"{call[-5:]}{number}{after}"
        meddle = partial(signal_at, call, number, signal.SIGKILL, after)
        status, _ = finish([*SHORT, "--name", run.name], folder, meddle=meddle)
        if not (run / "hparams.yaml").exists():  # killed in the first write: there is no run yet to resume
            assert number == 1 and not (run / "metrics.csv").exists()
            return
        if status == -signal.SIGKILL:  # else the run does not write so often
            assert finish(["--resume", str(run)], folder)[0] == 0
            resumed.append(run)
        assert_same_run(run, folder / LOGS / "whole")

    places = [
        ("run.files:os.fsync", False),
        ("run.files:os.replace", False),
        ("run.files:os.replace", True),
    ]
    attempts = [partial(attempt, call, number, after) for call, after in places for number in range(1, 41)]
    count("runs, killed around a write or without that many, end identically", attempts)
    print(f"{len(resumed)} of them were killed and resumed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_random_moments(number, whole):
    folder, duration = whole
    waited = []

    def attempt(i, moment):
        run = folder / LOGS / f"signal{number}_{i}"
        started = Run([*SHORT, "--name", run.name], folder)
        started.wait((run / "hparams.yaml").exists)
        time.sleep(moment)
        start = time.monotonic()
        started.send(number)
        status, text = started.end()
        waited.append(time.monotonic() - start)
        assert status in (128 + number, 0) and text.count("\n") == 1, text
        assert finish(["--resume", str(run)], folder)[0] == 0
        assert_same_run(run, folder / LOGS / "whole")

    attempts = [partial(attempt, i, moment) for i, moment in enumerate(moments(40, duration, seed=2))]
    count(f"runs ended by {number.name} resumed identically", attempts)
    print(f"the slowest end took {max(waited):.2f} s")


def test_ctrl_c_at_random_moments_of_the_start(tmp_path):
    """A real start, with all imports. What the interpreter itself does in its first moments is out of our hands."""

    def attempt(moment):
        command = [sys.executable, ROOT / "main.py", *SHORT]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.15 + moment)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=30)
        assert process.returncode in (130, 0) and "Traceback" not in text and text.count("\n") <= 1, text

    count("starts interrupted end in one sentence", [partial(attempt, moment) for moment in moments(25, 6, seed=3)])


def test_ten_at_once(whole, tmp_path):
    runs = [Run(SHORT, tmp_path) for _ in range(10)]
    ended = [run.end() for run in runs]
    folders = sorted((tmp_path / LOGS).iterdir())
    assert len(folders) == 10 and all(status == 0 for status, _ in ended)
    count(
        "runs started at once are whole and equal",
        [partial(assert_same_run, f, whole[0] / LOGS / "whole") for f in folders],
    )
