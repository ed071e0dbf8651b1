"""Reading a run's folder, whatever it holds."""

import math
import os
import time

import pandas as pd
import pytest
import yaml
from made_runs import change_flags, legend_labels, lines, load, make_run, read, rewrite

import plots
from figures.runs import Run
from run.errors import UserError

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_layers_stand_in_network_order_not_alphabetically(tmp_path):
    folder = make_run(tmp_path / "version_0", num_layers=20)
    columns = read(folder).sort_index(axis=1)
    columns.to_csv(folder / "metrics.csv")
    layers = yaml.safe_load((folder / "hparams.yaml").read_text())["provenance"]["layers"]
    assert sorted(layers) != layers
    (run,) = load(folder)
    assert run.layers == layers
    assert legend_labels(plots.nc1_over_epochs(run)) == layers


def test_without_hparams_layers_keep_the_order_of_the_columns(run_folder):
    (run_folder / "hparams.yaml").unlink()
    (run,) = load(run_folder)
    assert run.layers == ["layer1.0", "layer1.1", "avgpool"]
    assert "hparams.yaml" in run.notes[0]


def test_a_last_line_without_an_end_is_left_out_and_said(run_folder):
    rewrite(run_folder, lambda text: text[:-5])
    said = []
    (run,) = plots.load([run_folder], say=said.append)
    assert list(run.metrics.index) == [0, 1, 2, 3, 4]
    assert said == [f"{run_folder / 'metrics.csv'} has damaged lines, which are left out: 1."]


def test_damaged_lines_and_cells_spare_the_others(run_folder):
    def damage(text):
        header, *rows = text.splitlines()
        rows[1] = rows[1].partition(",")[0] + ",oops"
        rows[2] += ",1,2,3"
        rows[3] = rows[3].replace(",", ",oops", 1)
        return "\n".join([header, *rows, ""])

    before = read(run_folder)
    rewrite(run_folder, damage)
    (run,) = load(run_folder)
    assert list(run.metrics.index) == [0, 3, 4, 5]
    assert "left out: 2." in run.notes[0]
    assert math.isnan(run.metrics["train_loss"][3])
    pd.testing.assert_series_equal(run.metrics.loc[4], before.loc[4])


def test_rows_of_one_epoch_become_one(run_folder):
    rewrite(run_folder, lambda text: text + "5,0.25" + "," * (text.partition("\n")[0].count(",") - 1) + "\n")
    before = read(run_folder)
    (run,) = load(run_folder)
    assert run.metrics["train_loss"][5] == 0.25
    assert run.metrics["nc1/test/avgpool"][5] == before["nc1/test/avgpool"].iloc[5]


@pytest.mark.parametrize("content", ["", "epoch,train_loss\n", "epoch,train_loss", "train_loss\n0.1\n", "\n\n"])
def test_a_run_that_died_before_its_first_row_is_skipped_with_a_reason(tmp_path, content):
    make_run(tmp_path / "version_0")
    dead = make_run(tmp_path / "version_1")
    (dead / "metrics.csv").write_text(content)
    (tmp_path / "version_2").mkdir()
    said = []
    runs = plots.load([tmp_path], say=said.append)
    assert [run.folder.name for run in runs] == ["version_0"]
    assert f"{dead} is skipped: its metrics.csv has no epoch." in said
    assert f"{tmp_path / 'version_2'} is skipped: it has no metrics.csv." in said


def test_a_folder_of_runs_means_all_of_them_in_natural_order(tmp_path):
    for version in (10, 2, 1):
        make_run(tmp_path / f"version_{version}", seed=version)
    make_run(tmp_path / "named")
    assert [run.folder.name for run in load(tmp_path)] == ["named", "version_1", "version_2", "version_10"]
    assert len(load(tmp_path, tmp_path / "named", tmp_path / "version_1")) == 4
    assert len(plots.load(str(tmp_path / "named"))) == 1


def test_without_paths_the_newest_run_that_is_not_empty_is_loaded(tmp_path):
    for version, age in enumerate((300, 100, 200, 50)):
        for path in make_run(tmp_path / f"version_{version}").iterdir():
            os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "version_3" / "metrics.csv").unlink()
    said = []
    (run,) = plots.load(log_dir=tmp_path, say=said.append)
    assert run.folder.name == "version_1"
    assert said == [f"{tmp_path / 'version_3'} is skipped: it has no metrics.csv."]


def test_folders_without_runs_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load(tmp_path / "missing")
    with pytest.raises(UserError, match="no run to draw in"):
        load(tmp_path)


def test_hparams_cannot_run_code(run_folder, tmp_path):
    (run_folder / "hparams.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    (run,) = load(run_folder)
    assert not (tmp_path / "made").exists()
    assert "is damaged" in run.notes[0]


@pytest.mark.parametrize("source", ["{parent}", "{parent}/checkpoints/last.ckpt", "/moved/version_0"])
def test_a_resumed_run_and_its_parent_are_one_curve(tmp_path, source):
    parent = make_run(tmp_path / "version_0", num_epochs=8, seed=1)
    child = make_run(tmp_path / "version_1", num_epochs=10, seed=2)
    change_flags(child, resumed_from=source.format(parent=parent))
    rewrite(child, lambda text: "".join(line for line in text.splitlines(True) if line[:2] not in ("0,", "1,", "2,")))
    said = []
    (run,) = plots.load([tmp_path], say=said.append)
    first, second = read(parent)["test_loss"], read(child)["test_loss"]
    assert list(run.metrics["test_loss"]) == [*first.loc[:2], *second.loc[3:10]]
    assert [sentence for sentence in said if "goes on in" in sentence]
    loss = lines(plots.training_curves(run).axes[0])["test"]
    assert list(loss.get_xdata()) == list(range(11))
    assert run.head_epochs == list(range(11))


def test_runs_that_name_each_other_or_nobody_as_parent_are_drawn(tmp_path):
    for version, source in enumerate(("version_1", "version_0", "nowhere")):
        change_flags(make_run(tmp_path / f"version_{version}"), resumed_from=source)
    runs = [Run(tmp_path / f"version_{version}") for version in range(3)]
    assert all(len(run.metrics) == 6 for run in runs)
    assert "first epochs" in runs[2].notes[0]


def test_layers_are_those_that_the_run_wrote_down_whatever_measured_them(tmp_path):
    folder = make_run(tmp_path / "version_0", measures=())
    table = read(folder)
    table["norm/test/avgpool"] = table["norm/test/layer1.0"] = 1.0
    table.to_csv(folder / "metrics.csv")
    (run,) = load(folder)
    assert run.layers == ["layer1.0", "avgpool"] and run.measures == ["norm/test"]


def test_a_layer_that_is_called_as_a_statistic_has_no_part_in_what_was_looked_at(run_folder):
    table = read(run_folder)
    table = table.rename(columns=lambda name: name.replace("/avgpool", "/norm"))
    table["look/grad-loss-theta/norm"] = 1.0
    table.to_csv(run_folder / "metrics.csv")
    provenance = yaml.safe_load((run_folder / "hparams.yaml").read_text())["provenance"]
    change_flags(run_folder, provenance=provenance | {"layers": ["layer1.0", "layer1.1", "norm", "zeros"]})
    (run,) = load(run_folder)
    assert run.layers == ["layer1.0", "layer1.1", "norm"]
    assert run.looks == ["look/grad-loss-theta/norm"]
    assert not [measure for measure in run.measures if measure.startswith("look")]


def test_a_star_stands_for_what_columns_have_in_its_place(run_folder):
    table = read(run_folder)
    for name in ("theta", "theta-b.weight", "theta-a.bias", "f-a"):
        table[f"look/grad-loss-{name}/norm"] = 1.0
        table[f"look/grad-loss-{name}/class0/norm"] = 2.0
    table.to_csv(run_folder / "metrics.csv")
    (run,) = load(run_folder)
    assert list(run.table("look/grad-loss-theta-*/norm")) == ["b.weight", "a.bias"]
    assert list(run.table("look/grad-loss-theta/*/norm")) == ["class0"]
