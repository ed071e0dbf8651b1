"""Saved activations: the numbers of the run from its files, files of other programs, and what is none."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from processes import ROOT, finish

from measures import saved
from measures.grouping import Recipe, of_layer
from measures.saved import Saved, main
from run.errors import UserError

FOLDER = Path("lightning_logs/run/arrays/epoch0001")
LINE = ["-e", "1", "--limit", "300", "--clusters", "--save-activations", "--no-dib", "--no-nc", "--no-plots", "--quiet",
        "--min-cluster-size", "20", "--energy", "0.8", "--name", "run", "--layers", "hidden1", "hidden3"]  # fmt: skip


@pytest.fixture(scope="module")
def layer():
    """Three blobs in float32, 90 samples, and their labels."""
    y = torch.arange(90) % 3
    return 9 * torch.eye(3, 6)[y] + torch.randn(90, 6, generator=torch.Generator().manual_seed(0)), y


def figures_told(text):
    """The printed figures by name, up to the table of directions."""
    lines = [line.split() for line in text.partition("\n\n")[0].splitlines()[1:]]
    return {name: float(value) for name, value in lines}


@pytest.mark.parametrize("file_format", ["npz", "mat"])
def test_a_saved_file_gives_the_numbers_of_the_run_bit_for_bit(in_an_empty_folder, file_format):
    status, told = finish([*LINE, "--activations-format", file_format], Path.cwd())
    assert status == 0, told
    file = FOLDER / f"activations/test/hidden3.{file_format}"
    command = [sys.executable, "-m", "measures.clusters", "svd", Path.cwd() / file, "hidden3"]
    done = subprocess.run([*command, "-o", Path.cwd() / "out.npz"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = list(csv.DictReader(Path("lightning_logs/run/metrics.csv").read_text().splitlines()))[-1]
    for name, value in figures_told(done.stdout).items():
        assert str(value) == row[f"clusters/{name}/test/hidden3"], name
    with np.load("out.npz") as again, np.load(FOLDER / "clusters.npz") as kept:
        for name in ("scores", "singular_values", "clusters", "alignment"):
            np.testing.assert_array_equal(again[name], kept[f"{name}/test/hidden3"])
    content = saved.contents(file)
    assert {"activations", "labels", "predictions", "index", "layer", "epoch"} <= content.keys()
    right = np.ravel(content["predictions"]) == np.ravel(content["labels"])
    assert right.mean() == pytest.approx(float(row["test_acc"]), abs=1e-6)


def test_the_same_activations_are_the_same_bytes(tmp_path, layer):
    h, y = layer
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file_format in ("npz", "mat"):
            Saved(tmp_path / name / "arrays", file_format, Recipe()).write(h, y, y, y, "fc", 3, "test")
    files = [sorted(path for path in (tmp_path / name).rglob("fc.*")) for name in ("a", "b")]
    assert len(files[0]) == 2 and [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.parametrize("decomposition", ["svd", "pca"])
def test_a_file_from_elsewhere_with_an_array_per_layer(tmp_path, layer, capsys, decomposition):
    h, y = layer
    scipy.io.savemat(
        tmp_path / "x.mat", {"layer1_0": h.double().numpy().reshape(90, 2, 3), "labels": y.double().numpy()}
    )
    argv = [decomposition, str(tmp_path / "x.mat"), "layer1.0", "--min-cluster-size", "20", "--energy", "0.9"]
    assert main(argv) == 0
    expected, arrays = of_layer(h.double(), y, Recipe(min_cluster_size=20), 3)
    told = capsys.readouterr().out
    assert figures_told(told) == expected and expected["num_clusters"] == 3
    assert told.count("\n") == len(expected) + 3 + len(arrays["singular_values"])
    assert ("variance" in told) == (decomposition == "pca")


def test_what_is_no_such_file_is_one_sentence(tmp_path, layer, capsys):
    h, y = (part.numpy() for part in layer)
    broken = np.where(np.arange(6) == 2, np.nan, h)
    (tmp_path / "text.mat").write_text("no MATLAB here")
    (tmp_path / "text.npz").write_text("no NumPy here")
    np.savez(tmp_path / "x.npz", a=h, b=broken, c=y, labels=y)
    np.savez(tmp_path / "short.npz", a=h, labels=y[1:])
    np.savez(tmp_path / "odd.npz", a=h, labels=y - 0.5)
    np.savez(tmp_path / "none.npz", a=h)
    for name, layer_name, told in (
        ("gone.npz", "a", "there is no such file"),
        ("text.mat", "a", "is no file of MATLAB's"),
        ("text.npz", "a", "is no file of NumPy's"),
        ("x.npz", "z", "has no layer z; it has a, b, c"),
        ("x.npz", "b", "b has values that are infinite or nan"),
        ("x.npz", "c", "c must be numbers, samples × features"),
        ("short.npz", "a", "has 89 labels for 90 samples"),
        ("odd.npz", "a", "labels must be whole numbers"),
        ("none.npz", "a", "has no labels"),
    ):
        assert main(["svd", str(tmp_path / name), layer_name]) == 1
        text = capsys.readouterr().err
        assert told in text and text.count("\n") == 1, text
    assert main(["svd", str(tmp_path / "x.npz"), "a", "--min-cluster-size", "91"]) == 1
    assert "fewer than the 91 of a cluster" in capsys.readouterr().err
    for argv in (["svd", "x.npz"], ["lda", "x.npz", "a"], ["svd", "x.npz", "a", "--energy", "1.5"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_array_too_large_for_a_mat_file_is_refused(tmp_path, layer, monkeypatch):
    monkeypatch.setattr(saved, "MAT_BYTES", 1000)
    h, y = layer
    with pytest.raises(UserError, match="end at 2 GiB"):
        Saved(tmp_path / "arrays", "mat", Recipe()).write(h, y, y, y, "fc", 3, "test")
    assert not list(tmp_path.rglob("*.mat"))
