"""Arrays of a run: whole, with their settings, and none that a resumed run has not made."""

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import SHORT, Run, assert_same_run, finish, signal_at

import datasets
from classifier import Classifier
from run.arrays import Arrays, read
from run.errors import UserError

RUN = Path("lightning_logs/version_0")


def test_arrays_come_back_with_their_settings_and_numpy_alone_opens_them(tmp_path):
    sigma = torch.tensor([3.0, 1.0])
    Arrays(tmp_path).write(3, "rank", {"singular_values/train/conv1": sigma}, {"samples": 7})
    path = tmp_path / "arrays/epoch0003/rank.npz"
    arrays, settings = read(path)
    assert list(arrays) == ["singular_values/train/conv1"] and arrays["singular_values/train/conv1"].tolist() == [3, 1]
    assert settings["samples"] == 7 and settings["epoch"] == 3 and settings["torch"] == torch.__version__
    with np.load(path) as file:
        assert json.loads(str(file["settings"])) == settings


def test_the_same_arrays_are_the_same_bytes_whenever_they_are_written(tmp_path, monkeypatch):
    for name, now in (("a", 1e9), ("b", 2e9)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr("time.time", lambda now=now: now)
        Arrays(tmp_path / name).write(0, "rank", {"x": torch.arange(3)}, {})
    files = [tmp_path / name / "arrays/epoch0000/rank.npz" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("epoch", "left"), [(3, [0, 3]), (0, [0]), (12345, [0, 3, 4, 12345]), (None, [])])
def test_what_is_newer_than_the_checkpoint_is_dropped(tmp_path, epoch, left):
    store = Arrays(tmp_path)
    for each in (0, 3, 4, 12345):
        store.write(each, "rank", {"x": torch.zeros(1)}, {})
    (tmp_path / "arrays/epochs of mine").mkdir()
    store.drop_after(epoch)
    names = {f"epoch{each:04d}" for each in left} | {"epochs of mine"}
    assert {path.name for path in (tmp_path / "arrays").iterdir()} == names


def test_a_file_that_holds_no_arrays_of_a_run_is_one_sentence(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 broken")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    for name in ("broken.npz", "foreign.npz"):
        with pytest.raises(UserError, match=f"{name} holds no arrays of a run"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "none.npz")


def test_a_run_keeps_the_singular_values_behind_its_ranks(in_an_empty_folder):
    status, told = finish(["-e", "1", "--limit", "80", "--rank", "--no-dib", "--no-plots", "--quiet"], Path.cwd())
    assert status == 0, told
    arrays, settings = read(RUN / "arrays/epoch0001/rank.npz")
    assert settings["sets"] == ["train", "test"] and settings["seed"] == 0
    network = Classifier.load_from_checkpoint(RUN / "checkpoints/last.ckpt").network.eval()
    x = 2 * datasets.load("SZT", limit=80).test.inputs.float() - 1
    h = network.feature_extractor(x)["hidden1"].detach().double()
    expected = torch.linalg.svdvals(h - h.mean(0)).numpy()
    np.testing.assert_allclose(arrays["singular_values/test/hidden1"], expected, rtol=1e-6)  # kept in float32


def test_a_killed_run_ends_with_the_arrays_of_an_uninterrupted_one(in_an_empty_folder):
    here = Path.cwd()
    assert finish([*SHORT, "--name", "whole"], here)[0] == 0
    meddle = partial(signal_at, "run.files:os.replace", 23, signal.SIGKILL)  # amid an epoch's files
    Run([*SHORT, "--name", "cut"], here, meddle=meddle).end()
    assert len(list((here / "lightning_logs/cut").glob("arrays/*/rank.npz"))) < 7
    assert finish(["--resume", "lightning_logs/cut"], here)[0] == 0
    assert len(list((here / "lightning_logs/cut").glob("arrays/*/rank.npz"))) == 7
    assert_same_run(here / "lightning_logs/cut", here / "lightning_logs/whole")
