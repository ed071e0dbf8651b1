"""Saved activations: the numbers of the run from its files, files of other programs, and what is none."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import warm
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
    command = [sys.executable, "-m", "measures.clusters", "svd", file, "hidden3", "-o", "out.npz"]
    done = warm.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    page = Path("plots/test_epoch0001_hidden3_svd.png")
    assert done.stdout.endswith(f"figures in {page}\n") and page.read_bytes().startswith(b"\x89PNG")
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
    assert main([*argv, "--figures", str(tmp_path / "here" / "figures")]) == 0
    assert [path.name for path in (tmp_path / "here/figures").iterdir()] == [f"layer1.0_{decomposition}.png"]
    expected, arrays = of_layer(h.double(), y, Recipe(min_cluster_size=20), 3)
    told = capsys.readouterr().out
    assert figures_told(told) == expected and expected["num_clusters"] == 3
    assert told.count("\n") == len(expected) + 5 + len(arrays["singular_values"])
    assert ("variance" in told) == (decomposition == "pca")


def test_without_figures_none_are_drawn(tmp_path, layer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    h, y = (part.numpy() for part in layer)
    np.savez("x.npz", a=h, labels=y)
    assert main(["svd", "x.npz", "a", "--min-cluster-size", "20", "--no-figures"]) == 0
    assert "figures in" not in capsys.readouterr().out and not Path("plots").exists()


@pytest.mark.parametrize(
    ("name", "layer_name", "told"),
    [
        ("gone.npz", "a", "gone.npz: there is no such file"),
        ("gone.mat", "a", "gone.mat: there is no such file"),
        (".", "a", "is a folder: give the file of a layer"),
        ("text.mat", "a", "text.mat is no file of MATLAB's: "),
        ("text.npz", "a", "text.npz is no file of NumPy's"),
        ("array.npy", "a", "array.npy is no file of NumPy's, .npz"),
        ("cut.npz", "a", "cut.npz is no file of NumPy's"),
        ("objects.npz", "a", "objects.npz is no file of NumPy's"),
        ("x.npz", "z", "x.npz has no layer z; it has conv1, a, b, c"),
        ("x.npz", "conv2", "x.npz has no layer conv2, perhaps conv1"),
        ("run.npz", "hiden", "run.npz has no layer hiden, perhaps hidden"),
        ("x.npz", "b", "x.npz: b has values that are infinite or nan"),
        ("x.npz", "c", "x.npz: c must be numbers, samples × features; it is int64 of shape (90,)"),
        ("short.npz", "a", "short.npz has 89 labels for 90 samples"),
        ("half.npz", "a", "half.npz: labels must be whole numbers from 0 to 9999"),
        ("negative.npz", "a", "negative.npz: labels must be whole numbers from 0 to 9999"),
        ("large.npz", "a", "large.npz: labels must be whole numbers from 0 to 9999"),
        ("words.npz", "a", "words.npz: labels must be whole numbers from 0 to 9999"),
        ("none.npz", "a", "none.npz has no labels"),
        ("other.npz", "a", "other.npz: its recipe is not that of a run"),
        ("few.npz", "a", "There are 19 samples, fewer than the 50 of a cluster"),
        ("same.npz", "a", "All samples have the same activations"),
        ("dead.npz", "a", "No feature's mean size exceeds the threshold 0"),
    ],
)
def test_what_is_no_such_file_is_one_sentence(tmp_path, layer, capsys, name, layer_name, told):
    h, y = (part.numpy() for part in layer)
    contents = {
        "x": {"conv1": h, "a": h, "b": np.where(np.arange(6) == 2, np.nan, h), "c": y, "labels": y},
        "run": {"activations": h, "layer": "hidden", "labels": y},
        "short": {"a": h, "labels": y[1:]},
        "half": {"a": h, "labels": y + 0.5},
        "negative": {"a": h, "labels": y - 1},
        "large": {"a": h, "labels": np.where(y == 2, 10**12, y)},
        "words": {"a": h, "labels": y.astype(str)},
        "none": {"a": h},
        "other": {"a": h, "labels": y, "recipe": '{"layers": 3}'},
        "few": {"a": h[:19], "labels": y[:19]},
        "same": {"a": np.ones_like(h), "labels": y},
        "dead": {"a": np.zeros_like(h), "labels": y},
        "objects": {"a": np.array([{}]), "labels": y},
    }
    stem = name.partition(".")[0]
    if stem in contents:
        np.savez(tmp_path / name, **contents[stem])
    elif stem == "text":
        (tmp_path / name).write_text("neither MATLAB nor NumPy here")
    elif stem == "array":
        np.save(tmp_path / name, h)
    elif stem == "cut":
        np.savez(tmp_path / name, a=h, labels=y)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    assert main(["svd", str(tmp_path / name), layer_name]) == 1
    out, text = capsys.readouterr()
    assert told in text and text.count("\n") == 1 and text.startswith("measures.clusters: error: ") and not out, text


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (["--energy", "1.5"], 2, "argument --energy: '1.5' is not a number above 0 and below 1"),
        (["--energy", "0"], 2, "argument --energy: '0' is not a number above 0 and below 1"),
        (["--min-cluster-size", "1"], 2, "argument --min-cluster-size: '1' is not a whole number of at least 2"),
        (["--max-directions", "0"], 2, "argument --max-directions: '0'"),
        (["--act-threshold", "nan"], 2, "argument --act-threshold: 'nan'"),
        (["--filter-class", "-1"], 2, "argument --filter-class"),
        (["--figures"], 2, "argument --figures: expected one argument"),
        (["--enrgy", "0.5"], 2, "unknown flag --enrgy, perhaps --energy"),
        (["more"], 2, "'more' belongs to no flag"),
        (["--min-cluster-size", "91"], 1, "There are 90 samples, fewer than the 91 of a cluster"),
        (["--filter-class", "7"], 1, "There is no sample of class 7"),
        (["--act-threshold", "50"], 1, "No feature's mean size exceeds the threshold 50"),
        (["-o", "nowhere/x.npz", "--no-figures"], 1, "cannot write nowhere/x.npz"),
        (["--figures", "x.npz"], 1, "cannot write x.npz/a_svd.png"),
    ],
)
def test_a_wrong_flag_is_one_sentence(tmp_path, layer, capsys, monkeypatch, flags, status, told):
    monkeypatch.chdir(tmp_path)
    h, y = (part.numpy() for part in layer)
    np.savez("x.npz", a=h, labels=y)
    argv = ["svd", "x.npz", "a", *flags]
    if status == 2:
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2
    else:
        assert main(argv) == 1
    text = capsys.readouterr().err
    assert told in text and text.count("\n") == 1, text


@pytest.mark.parametrize("argv", [[], ["svd", "x.npz"], ["lda", "x.npz", "a"]])
def test_a_missing_word_or_another_decomposition_is_one_sentence(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert capsys.readouterr().err.count("\n") == 1


def test_an_array_too_large_for_a_mat_file_is_refused(tmp_path, layer, monkeypatch):
    monkeypatch.setattr(saved, "MAT_BYTES", 1000)
    h, y = layer
    with pytest.raises(UserError, match="end at 2 GiB"):
        Saved(tmp_path / "arrays", "mat", Recipe()).write(h, y, y, y, "fc", 3, "test")
    assert not list(tmp_path.rglob("*.mat"))
