"""`--measure` of several checkpoints: a row for each, in one folder in which nothing takes another's place."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import figures.runs
import main
from classifier import Classifier, SavedNetworks
from measures.rank import Rank
from run.arrays import read
from run.checkpoints import checkpoints_in
from run.errors import UserError

TINY = ["-e", "3", "--dib-epochs", "1", "--limit", "300", "--rank", "--no-plots", "--quiet"]
AGAIN = ["--quiet", "--no-plots", "--name", "again"]
LOGS = Path("lightning_logs")

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two runs that differ in the seed, `seed0` with a checkpoint of every epoch."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    assert main.main([*TINY, "--save-every", "1", "--name", "seed0"]) == 0
    assert main.main([*TINY, "--seed", "1", "--name", "seed1"]) == 0
    os.chdir(here)
    return folder / LOGS


@pytest.fixture
def runs(trained, tmp_path):
    """The same, in this test's folder."""
    for run in trained.iterdir():
        shutil.copytree(run, tmp_path / run.name)


def rows_of(folder):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def measured(row):
    return {name: value for name, value in row.items() if "/" in name and not name.startswith("time/")}


def status_of(argv):
    try:
        return main.main(argv)
    except SystemExit as end:
        return end.code


def checkpoint(run, name="last"):
    return f"{run}/checkpoints/{name}.ckpt"


def test_several_checkpoints_give_a_row_each_with_the_numbers_that_the_run_gave(runs):
    files = [checkpoint("seed0", name) for name in ("epoch0001", "epoch0003")]
    assert main.main(["--measure", *files, *AGAIN]) == 0
    rows, before = rows_of(LOGS / "again"), rows_of("seed0")
    assert [row["epoch"] for row in rows] == ["1", "3"] and [row["checkpoint"] for row in rows] == files
    for row, of_run in zip(rows, (before[1], before[3]), strict=True):
        assert measured(row) == measured(of_run) and row["test_loss"] == of_run["test_loss"]
    assert sorted(path.name for path in (LOGS / "again/arrays").iterdir()) == ["epoch0001", "epoch0003"]
    assert {row.partition(",")[0] for row in (LOGS / "again/dib.csv").read_text().splitlines()[1:]} == {"1", "3"}
    assert yaml.safe_load((LOGS / "again/hparams.yaml").read_text())["provenance"]["measured"] == files


def test_a_runs_folder_stands_for_every_checkpoint_that_it_keeps_in_order_of_epochs(runs):
    torch.save({"hidden1/0": {}}, "seed0/checkpoints/dib_epoch0001.ckpt")  # heads, no network
    assert main.main(["--measure", "seed0", "--no-dib", *AGAIN]) == 0
    rows = rows_of(LOGS / "again")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["checkpoint"] for row in rows] == [checkpoint("seed0", f"epoch000{i}") for i in (1, 2, 3)]


def test_a_folder_with_one_checkpoint_is_measured_as_that_checkpoint(runs):
    os.remove(checkpoint("seed1", "best"))
    for name, what in (("folder", "seed1"), ("again", checkpoint("seed1"))):
        assert main.main(["--measure", what, "--no-dib", *AGAIN[:-1], name]) == 0
    one, two = (rows_of(LOGS / name) for name in ("folder", "again"))
    assert measured(one[0]) == measured(two[0]) and "checkpoint" not in one[0] and len(one) == 1
    hparams = [yaml.safe_load((LOGS / name / "hparams.yaml").read_text()) for name in ("folder", "again")]
    assert hparams[0]["provenance"]["measured"] == hparams[1]["provenance"]["measured"] == checkpoint("seed1")


def test_networks_of_one_epoch_leave_their_files_in_folders_of_their_own(runs):
    """And the numbers are those of their runs: heads and chance levels depend on epoch and seed."""
    files = [checkpoint("seed0"), checkpoint("seed1")]
    assert main.main(["--measure", *files, *AGAIN]) == 0
    again = LOGS / "again"
    for i, (run, row) in enumerate(zip(("seed0", "seed1"), rows_of(again), strict=True)):
        assert row["epoch"] == "3" and measured(row) == measured(rows_of(run)[-1])
        arrays, settings = read(again / f"checkpoint000{i}/arrays/epoch0003/rank.npz")
        of_run, _ = read(f"{run}/arrays/epoch0003/rank.npz")
        assert settings["seed"] == i and arrays.keys() == of_run.keys()
        assert all(np.array_equal(arrays[name], of_run[name]) for name in arrays)
        lines = [line for line in Path(run, "dib.csv").read_text().splitlines() if line.startswith(("epoch", "3,"))]
        assert (again / f"checkpoint000{i}/dib.csv").read_text().splitlines() == lines
    assert not (again / "arrays").exists() and not (again / "dib.csv").exists()
    assert figures.runs.Run(again).notes == [f"{again} holds several networks of one epoch: the last of them is drawn."]


def test_where_there_is_nothing_but_the_table_no_empty_folders_stay(runs, capsys):
    files = [checkpoint("seed1"), checkpoint("seed0", "epoch0001")]
    assert main.main(["--measure", *files, "--no-dib", "--no-rank", "--name", "again"]) == 0
    assert sorted(path.name for path in (LOGS / "again").iterdir()) == [".lock", "hparams.yaml", "metrics.csv"]
    told = capsys.readouterr().out
    assert f"1 of 2: {files[0]}, epoch 3" in told and f"2 of 2: {files[1]}, epoch 1" in told
    assert "after epoch 1, at best" in told and "→" not in told  # the last row alone


def edited(path, state_dict=None, **hparams):
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] |= hparams
    if "widths" in hparams or "batch_norm" in hparams:
        content["state_dict"] = Classifier(**content["hyper_parameters"]).state_dict()
    torch.save(content, path)


UNLIKE = {
    "widths": (lambda path: edited(path, widths=[3, 3]), "differ in widths"),
    "non-linearity": (lambda path: edited(path, nonlinearity="relu"), "differ in nonlinearity"),
    "batch norm": (lambda path: edited(path, batch_norm=True), "differ in batch_norm"),
    "loss": (lambda path: edited(path, loss="mse"), "differ in loss"),
    "classes": (lambda path: edited(path, num_classes=3), "3 classes"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a whole one"),
    "missing": (Path.unlink, "there is no such checkpoint"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_checkpoint_that_does_not_go_with_the_first_is_named_before_anything_is_measured(case, runs, capsys):
    damage, reason = UNLIKE[case]
    last = Path(checkpoint("seed1"))
    damage(last)
    assert main.main(["--measure", checkpoint("seed0"), str(last), *AGAIN]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"main.py: {last} ") or told.startswith(f"main.py: {last}:")
    assert reason in told and told.count("\n") == 1
    assert not LOGS.exists()


def test_networks_of_other_shapes_are_unlike_though_their_settings_agree():
    """As of a stem that was chosen by the size of the images in one run, and by a flag in the other."""
    wide, deep = (Classifier("MLP", [12], 2, widths=widths) for widths in ([8, 8], [8, 8, 8]))
    deep.hparams.widths = wide.hparams.widths
    with pytest.raises(UserError, match="differ in the shapes of their weights"):
        SavedNetworks._refuse_other(wide, deep)


def test_the_same_file_twice_and_folders_without_checkpoints_are_refused(runs, capsys):
    Path("empty").mkdir()
    lines = {
        "seed0/checkpoints/../checkpoints/last.ckpt comes twice": [
            checkpoint("seed0"),
            "seed0/checkpoints/../checkpoints/last.ckpt",
        ],
        "epoch0002.ckpt comes twice": [checkpoint("seed0", "epoch0002"), "seed0"],
        "empty is no run's folder with checkpoints": ["empty"],
    }
    for reason, names in lines.items():
        assert main.main(["--measure", *names, *AGAIN]) == 1
        told = capsys.readouterr().err
        assert reason in told and told.startswith("main.py: --measure: ") and told.count("\n") == 1
    assert not LOGS.exists()


def test_runs_on_other_data_are_refused_unless_the_command_says_on_which_to_measure(runs, capsys):
    hparams = Path("seed1/hparams.yaml")
    hparams.write_text(hparams.read_text().replace("limit: 300", "limit: null"))
    line = ["--measure", "seed0", "seed1", "--no-dib", "--no-rank", *AGAIN]
    assert status_of(line) == 2
    told = capsys.readouterr().err
    assert "the run in seed0 has --limit 300, that in seed1 --limit None" in told and told.count("\n") == 1
    assert main.main([*line, "--limit", "200"]) == 0
    assert yaml.safe_load((LOGS / "again/hparams.yaml").read_text())["provenance"]["train_samples"] == 200


def test_a_measure_of_all_networks_together_has_a_row_and_arrays_of_its_own(runs, monkeypatch):
    seen = []

    def weights(self, trainer, pl_module, epoch):
        seen.append((pl_module.source, epoch))
        return {"weight": pl_module.network.output.bias[0].item()}

    def mean_weight(self, trainer, modules):
        assert all(not module.training for module in modules) and not torch.is_grad_enabled()
        biases = torch.stack([module.network.output.bias for module in list(modules)])
        self.arrays, self.settings = {"biases": biases}, {"networks": len(modules)}
        return {"weight": biases[:, 0].mean().item()}

    monkeypatch.setattr(Rank, "measure", weights)
    monkeypatch.setattr(Rank, "measure_average", mean_weight)
    files = [checkpoint("seed0"), checkpoint("seed1")]
    assert main.main(["--measure", *files, "--no-nc", "--no-dib", *AGAIN]) == 0
    assert seen == [(files[0], 3), (files[1], 3)]
    *each, average = rows_of(LOGS / "again")
    assert average["checkpoint"] == "average" and average["epoch"] == average["test_loss"] == ""
    assert float(average["weight"]) == pytest.approx(np.mean([float(row["weight"]) for row in each]), rel=1e-6)
    arrays, settings = read(LOGS / "again/arrays/average/rank.npz")
    assert arrays["biases"].shape == (2, 2) and settings["networks"] == 2 and settings["epoch"] == "average"
    assert float(average["time/rank"]) > 0
    assert main.main(["--measure", files[0], "--no-nc", "--no-dib", *AGAIN[:-1], "alone"]) == 0
    assert len(rows_of(LOGS / "alone")) == 1  # one network has no average


def test_without_a_measure_of_all_together_there_is_no_such_row(runs):
    assert main.main(["--measure", "seed0", "--no-dib", *AGAIN]) == 0
    assert "average" not in (LOGS / "again/metrics.csv").read_text()


def test_a_comma_in_a_path_splits_no_cell(runs):
    shutil.copytree("seed1", 'a,"b')
    files = [checkpoint("seed0"), checkpoint('a,"b')]
    assert main.main(["--measure", *files, "--no-dib", "--no-rank", *AGAIN]) == 0
    assert [row["checkpoint"] for row in rows_of(LOGS / "again")] == [files[0], checkpoint("a__b")]
    assert yaml.safe_load((LOGS / "again/hparams.yaml").read_text())["provenance"]["measured"] == files


def test_a_checkpoint_that_a_run_replaces_meanwhile_is_not_taken_for_that_of_its_epoch(runs):
    files = checkpoints_in(["seed0"])
    networks = SavedNetworks(files, (12,), 2)
    shutil.copyfile(checkpoint("seed0", "epoch0002"), checkpoint("seed0", "epoch0001"))
    with pytest.raises(UserError, match=r"epoch0001\.ckpt was replaced meanwhile"):
        networks[0]
