"""Figures of synthetic runs: what is drawn, from which numbers, and that nothing in a folder ends in a traceback."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.colors import LogNorm

import neural_collapse
import plots
from errors import UserError
from figures.runs import Run
from figures.settings import MAX_SETTINGS, compare

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
ROOT = Path(plots.__file__).parent
CLASSES, TRAIN, TEST, DIGITS = 10, 1000, 200, 3
DIGIT_ENTROPY = 2.19
FIGURES = (
    plots.summary,
    plots.training_curves,
    plots.nc1_over_epochs,
    plots.nc1_over_depth,
    plots.heat_map,
    plots.minimality_over_epochs,
    plots.sufficiency_minimality,
    plots.head_losses,
    plots.rank_over_epochs,
    plots.rank_over_depth,
    plots.nc1_against_minimality,
    plots.lr_range_test,
)


def make_run(
    folder,
    num_layers=3,
    num_epochs=5,
    seed=0,
    *,
    measured=None,
    measures=("nc1", "dib", "rank"),
    num_head_epochs=6,
    lr_test=False,
    **flags,
):
    """A run's folder as `main.py` leaves it, with numbers that look like those of a real run."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    layers = [f"layer{i // 2 + 1}.{i % 2}" for i in range(num_layers - 1)] + ["avgpool"]
    measured = range(num_epochs + 1) if measured is None else measured
    noise = np.random.default_rng(seed)
    rows, heads = [], []
    for epoch in range(num_epochs + 1):
        progress = 1 - math.exp(-3 * epoch / max(num_epochs, 1))
        row = _training_row(epoch, progress, noise)
        if epoch in measured:
            for depth, layer in enumerate(layers):
                row |= _measures(layer, depth, progress, measures, noise)
                if "dib" in measures:
                    heads += _head_rows(epoch, layer, row[f"dib/loss/{layer}"], num_head_epochs)
            if "dib" in measures:
                row |= {f"dib/sufficiency/{split}": 2.3 - row[f"{split}_loss"] for split in ("train", "test")}
        rows.append(row)
    write_csv(folder / "metrics.csv", rows)
    if heads:
        write_csv(folder / "dib.csv", heads)
    if lr_test:
        write_csv(folder / "lr_range_test.csv", _lr_test_rows(noise))
    provenance = {
        "num_classes": CLASSES,
        "train_samples": TRAIN,
        "test_samples": TEST,
        "layers": layers,
        "dimensions": {layer: 4096 // 2 ** min(depth, 6) for depth, layer in enumerate(layers)},
    }
    hparams = {"seed": seed, "log_dir": str(folder.parent), "dataset": "MNIST", "model": "ResNet"}
    hparams |= {"nonlinearity": "relu", "learning_rate": 0.01, "epochs": num_epochs}
    hparams |= {"lr_range_test": "train" if lr_test else None, **flags, "provenance": provenance}
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams, sort_keys=False))
    return folder


def _training_row(epoch, progress, noise):
    row = {"epoch": epoch}
    for split, gap in (("train", 0.0), ("test", 0.08)):
        row[f"{split}_loss"] = 2.3 * (1 - progress) + gap * progress + 0.02 * noise.random()
        row[f"{split}_acc"] = 0.1 + 0.88 * progress - gap * progress - 0.01 * noise.random()
    return row


def _measures(layer, depth, progress, measures, noise):
    row = {}
    for split in ("train", "test"):
        if "nc1" in measures:
            row[f"nc1/{split}/{layer}"] = 50 * math.exp(-0.6 * depth * progress + 0.05 * noise.normal())
        if "rank" in measures:
            for i, kind in enumerate(("numerical", "stable", "effective"), start=1):
                row[f"rank/{kind}/{split}/{layer}"] = 900 / 4**i * math.exp(-0.1 * depth * progress)
                row[f"rank/means_{kind}/{split}/{layer}"] = 9 / i
    if "dib" in measures:
        minimality = DIGIT_ENTROPY * 0.4 * math.exp(-0.2 * depth - progress) + 0.01 * noise.random()
        row[f"dib/loss/{layer}"] = DIGIT_ENTROPY - minimality
        row[f"dib/minimality/{layer}"] = minimality
    return row


def _head_rows(epoch, layer, final, num_head_epochs):
    """Digits around the mean `final`; the losses before training lie at the entropy of the digits."""
    for digit in range(DIGITS):
        for head_epoch in range(num_head_epochs + 1):
            falls = (1 - math.exp(-4 * head_epoch / num_head_epochs)) / (1 - math.exp(-4))
            loss = DIGIT_ENTROPY + (final + 0.1 * (digit - 1) - DIGIT_ENTROPY) * falls
            yield dict(epoch=epoch, layer=layer, digit=digit, head_epoch=head_epoch, cross_entropy=loss)


def _lr_test_rows(noise):
    for step, rate in enumerate(np.geomspace(1e-6, 10, 100), start=1):
        smoothed = 2.3 - 2 / (1 + math.exp(-2 * (math.log10(rate) + 3))) + 40 * max(0, math.log10(rate)) ** 2
        yield dict(step=step, lr=rate, loss=smoothed * (1 + 0.1 * noise.normal()), smoothed=smoothed)


def write_csv(path, rows):
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def load(*folders):
    return plots.load(folders, say=lambda sentence: None)


def read(folder):
    return pd.read_csv(folder / "metrics.csv", index_col="epoch")


def rewrite(folder, change):
    """Puts the text of `metrics.csv` through a function."""
    path = folder / "metrics.csv"
    path.write_text(change(path.read_text()))


def change_flags(folder, **flags):
    path = folder / "hparams.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | flags, sort_keys=False))


def title(figure):
    return " ".join(figure.get_suptitle().split())


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def lines(ax):
    """The labelled lines of a panel by their label."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def sentence(figure):
    """What a figure says that draws nothing, else None."""
    (text,) = [text.get_text() for ax in figure.axes if not ax.axison for text in ax.texts] or [None]
    return text


@pytest.fixture
def run_folder(tmp_path):
    return make_run(tmp_path / "version_0")


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


@pytest.mark.parametrize("figure", FIGURES)
def test_a_run_that_died_in_its_first_epoch_is_drawn(tmp_path, figure):
    (run,) = load(make_run(tmp_path / "version_0", num_epochs=0, lr_test=True))
    figure(run).canvas.draw()


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


def test_runs_that_differ_only_in_seed_and_place_are_one_setting(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"version_{seed}", seed=seed, quiet=bool(seed), accelerator=("cpu", "gpu", "auto")[seed])
    (setting,) = compare(load(tmp_path)).settings
    assert setting.title == "ResNet on MNIST (3 runs)"


def test_seeds_whose_range_tests_chose_other_rates_are_one_setting(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"version_{seed}", seed=seed, lr_test=True, learning_rate=0.01 * (seed + 1))
    assert len(compare(load(tmp_path)).settings) == 1


def test_settings_are_labelled_by_the_flags_that_differ(tmp_path):
    for i, (nonlinearity, batch_norm) in enumerate(itertools.product(("tanh", "relu"), (True, False))):
        make_run(tmp_path / f"version_{i}", nonlinearity=nonlinearity, batch_norm=batch_norm, widths=[8, 4])
    labels = [setting.label for setting in compare(load(tmp_path)).settings]
    expected = [f"nonlinearity {n}, {b}" for n in ("tanh", "relu") for b in ("batch-norm", "no batch-norm")]
    assert labels == expected
    titles = [ax.get_title() for ax in plots.nc1_over_epochs(load(tmp_path)).axes[:4]]
    assert titles == expected


def test_labels_of_many_flags_show_as_many_as_tell_all_settings_apart(tmp_path):
    first = dict.fromkeys("abcdef", 1)
    for i, flags in enumerate((first, dict.fromkeys("abcdef", 2), dict.fromkeys("abcdef", 1) | {"e": 2})):
        make_run(tmp_path / f"version_{i}", **flags)
    labels = [setting.label for setting in compare(load(tmp_path)).settings]
    assert labels == [
        "a 1, b 1, c 1, d 1, e 1, 1 more",
        "a 2, b 2, c 2, d 2, e 2, 1 more",
        "a 1, b 1, c 1, d 1, e 2, 1 more",
    ]


def test_runs_without_known_flags_are_not_averaged(tmp_path):
    for version in range(2):
        (make_run(tmp_path / f"version_{version}") / "hparams.yaml").unlink()
    assert len(compare(load(tmp_path)).settings) == 2


def test_what_exceeds_the_colors_is_left_out_and_counted(tmp_path):
    for i in range(MAX_SETTINGS + 2):
        make_run(tmp_path / f"version_{i}", num_epochs=1, learning_rate=10.0**-i)
    figure = plots.training_curves(load(tmp_path))
    assert title(figure).endswith(f"the first {MAX_SETTINGS} of {MAX_SETTINGS + 2} settings")


def test_a_setting_is_drawn_as_the_geometric_mean_of_its_runs_with_a_band_over_their_range(tmp_path):
    folders = [make_run(tmp_path / f"version_{seed}", seed=seed) for seed in range(5)]
    figure = plots.nc1_over_epochs(load(tmp_path))
    assert "(5 runs)" in title(figure)
    values = np.stack([read(folder)["nc1/train/layer1.1"] for folder in folders])
    line = lines(figure.axes[0])["layer1.1"]
    np.testing.assert_allclose(line.get_ydata(), np.exp(np.log(values).mean(axis=0)))
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    np.testing.assert_allclose(band[:, 1].min(), values.min())
    np.testing.assert_allclose(band[:, 1].max(), values.max())


def test_losses_are_averaged_arithmetically(tmp_path):
    folders = [make_run(tmp_path / f"version_{seed}", seed=seed) for seed in range(3)]
    line = lines(plots.training_curves(load(tmp_path)).axes[0])["train"]
    mean = np.mean([read(folder)["train_loss"] for folder in folders], axis=0)
    np.testing.assert_allclose(line.get_ydata(), mean)


def test_a_seed_that_ended_early_is_counted_apart(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"version_{seed}", seed=seed)
    rewrite(tmp_path / "version_2", lambda text: "".join(text.splitlines(True)[:3]))
    assert "3 runs, 2 to epoch 5" in title(plots.training_curves(load(tmp_path)))


def test_training_curves_show_both_sets_and_mark_the_measured_epochs(tmp_path):
    folder = make_run(tmp_path / "version_0", num_epochs=6, measured=(0, 1, 6))
    figure = plots.training_curves(load(folder))
    table = read(folder)
    for ax, quantity in zip(figure.axes, ("loss", "acc"), strict=True):
        for split in ("train", "test"):
            np.testing.assert_allclose(lines(ax)[split].get_ydata(), table[f"{split}_{quantity}"])
        assert list(lines(ax)["measured epoch"].get_xdata()) == [0, 1, 6]
    assert legend_labels(figure) == ["train", "test", "measured epoch"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["cross-entropy (nats)", "accuracy (%)"]


def test_nc1_over_epochs_has_a_line_per_layer_and_a_panel_per_set(run_folder):
    figure = plots.nc1_over_epochs(load(run_folder))
    table = read(run_folder)
    for ax, split in zip(figure.axes, ("train", "test"), strict=True):
        assert ax.get_yscale() == "log"
        assert f"{split} set" in ax.get_ylabel()
        for layer, line in lines(ax).items():
            np.testing.assert_allclose(line.get_ydata(), table[f"nc1/{split}/{layer}"])


def test_nc1_over_depth_states_r_and_slope_of_the_fit_and_draws_the_chance_level(tmp_path):
    folder = make_run(tmp_path / "version_0", num_layers=6)
    figure = plots.nc1_over_depth(load(folder), epochs=[5])
    (run,), ax = load(folder), figure.axes[0]
    nc1 = [read(folder)[f"nc1/train/{layer}"].iloc[5] for layer in run.layers]
    r, slope = neural_collapse.equiseparation(nc1)
    (label,) = (label for label in lines(ax) if label.startswith("epoch 5"))
    assert label == f"epoch 5: r = {r:.3f}, slope {slope:.2f}".replace("-", "−")
    np.testing.assert_allclose(lines(ax)[label].get_ydata(), nc1)
    (fit,) = (line for line in ax.get_lines() if line.get_linestyle() == "--")
    np.testing.assert_allclose(np.diff(np.log(fit.get_ydata())), slope)
    dimensions = [run.provenance["dimensions"][layer] for layer in run.layers]
    chance = [neural_collapse.chance_level(TRAIN, CLASSES, d) for d in dimensions]
    np.testing.assert_allclose(lines(ax)["chance level"].get_ydata(), chance)
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == run.layers


def test_over_depth_shows_first_and_last_epoch_or_those_asked_for(run_folder):
    shown = lines(plots.rank_over_depth(load(run_folder)).axes[0])
    assert (min(shown), max(shown)) == ("epoch 0", "epoch 5")
    assert list(lines(plots.rank_over_depth(load(run_folder), epochs=[2, 4]).axes[0])) == ["epoch 2", "epoch 4"]
    assert "not [77]" in sentence(plots.rank_over_depth(load(run_folder), epochs=[77]))


def test_there_is_no_chance_level_where_classes_outnumber_dimensions(run_folder):
    (run,) = load(run_folder)
    run.provenance["dimensions"]["avgpool"] = CLASSES
    chance = lines(plots.nc1_over_depth(run).axes[0])["chance level"].get_ydata()
    assert np.isnan(chance).tolist() == [False, False, True]


def test_a_heat_map_shows_any_measure_with_the_first_layer_on_top(run_folder):
    table = read(run_folder)
    for layer in ("layer1.0", "layer1.1", "avgpool"):
        table[f"curvature/{layer}"] = np.linspace(-1, 1, 6)
    table["curvature/layer1.1"] = np.nan
    table["nonsense/somewhere"] = 1.0
    table.to_csv(run_folder / "metrics.csv")
    (run,) = load(run_folder)
    assert "curvature" in run.measures and "nonsense" not in run.measures
    figure = plots.heat_map(run, "curvature")
    ax = figure.axes[0]
    values = ax.collections[0].get_array()
    assert values.shape == (3, 6) and np.ma.getmaskarray(values)[1].all()
    assert [text.get_text() for text in ax.get_yticklabels()] == run.layers
    assert ax.yaxis_inverted()
    assert figure.axes[-1].get_ylabel() == "curvature"
    logarithmic = plots.heat_map(run, "nc1/train").axes[0].collections[0]
    assert isinstance(logarithmic.norm, LogNorm)
    np.testing.assert_allclose(logarithmic.get_array()[0], table["nc1/train/layer1.0"])


def test_heat_maps_of_several_settings_share_their_colors(tmp_path):
    for i, nonlinearity in enumerate(("tanh", "relu")):
        make_run(tmp_path / f"version_{i}", seed=i, nonlinearity=nonlinearity)
    meshes = [ax.collections[0] for ax in panels(plots.heat_map(load(tmp_path), "dib/minimality"))]
    assert meshes[0].get_clim() == meshes[1].get_clim()


def test_the_planes_lead_from_the_first_epoch_to_the_last(run_folder):
    table = read(run_folder)
    for figure, measure in (
        (plots.sufficiency_minimality(load(run_folder)), "dib/sufficiency/train"),
        (plots.nc1_against_minimality(load(run_folder)), "nc1/train/avgpool"),
    ):
        path = lines(figure.axes[0])["avgpool"]
        np.testing.assert_allclose(path.get_xdata(), table["dib/minimality/avgpool"])
        np.testing.assert_allclose(path.get_ydata(), table[measure])
        start, end = figure.axes[0].get_lines()[-2:]
        assert start.get_markerfacecolor() == "white" and start.get_xdata()[0] == path.get_xdata()[0]
        assert end.get_xdata()[0] == path.get_xdata()[-1]
        assert figure.axes[1].get_xlabel() == "minimality (nats)"


def test_head_losses_are_means_over_digits_below_the_entropy_of_the_digits(run_folder):
    figure = plots.head_losses(load(run_folder), epochs=[0, 5])
    heads = pd.read_csv(run_folder / "dib.csv")
    heads = heads[(heads["epoch"] == 5) & (heads["layer"] == "avgpool")]
    line = lines(figure.axes[1])["avgpool"]
    np.testing.assert_allclose(line.get_ydata(), heads.groupby("head_epoch")["cross_entropy"].mean())
    entropy = lines(figure.axes[1])["entropy of the digits"].get_ydata()
    np.testing.assert_allclose(entropy, DIGIT_ENTROPY)
    assert [ax.get_title() for ax in figure.axes] == ["epoch 0", "epoch 5"]


def test_a_head_that_diverged_ends_its_layers_line(run_folder):
    heads = pd.read_csv(run_folder / "dib.csv")
    diverged = (heads["layer"] == "avgpool") & (heads["digit"] == 1) & (heads["head_epoch"] >= 3)
    heads.loc[diverged, "cross_entropy"] = np.nan
    heads.to_csv(run_folder / "dib.csv", index=False)
    drawn = lines(plots.head_losses(load(run_folder), epochs=[5]).axes[0])
    assert list(drawn["avgpool"].get_xdata()) == [0, 1, 2]
    assert len(drawn["layer1.0"].get_xdata()) == 7


@pytest.mark.parametrize("class_means", [False, True])
def test_rank_figures_have_a_panel_per_definition(run_folder, class_means):
    table = read(run_folder)
    over_epochs = plots.rank_over_epochs(load(run_folder), "test", class_means)
    over_depth = plots.rank_over_depth(load(run_folder), "test", class_means, epochs=[3])
    for i, kind in enumerate(("numerical", "stable", "effective")):
        columns = [f"rank/{'means_' * class_means}{kind}/test/{layer}" for layer in ("layer1.0", "layer1.1", "avgpool")]
        assert over_epochs.axes[i].get_ylabel().startswith(f"{kind} rank")
        np.testing.assert_allclose(lines(over_epochs.axes[i])["avgpool"].get_ydata(), table[columns[-1]])
        np.testing.assert_allclose(lines(over_depth.axes[i])["epoch 3"].get_ydata(), table[columns].iloc[3])


def test_the_range_test_shows_raw_and_smoothed_loss_and_the_chosen_rate(tmp_path):
    folder = make_run(tmp_path / "version_0", lr_test=True, learning_rate=0.02)
    test = pd.read_csv(folder / "lr_range_test.csv")
    (folder / "metrics.csv").unlink()  # as --lr-range-test only leaves it
    ax = plots.lr_range_test(load(folder)).axes[0]
    raw, smoothed, chosen = ax.get_lines()
    np.testing.assert_allclose(raw.get_ydata(), test["loss"])
    np.testing.assert_allclose(smoothed.get_ydata(), test["smoothed"])
    assert raw.get_linewidth() < smoothed.get_linewidth()
    assert chosen.get_xdata() == [0.02, 0.02] and "0.02 chosen" in chosen.get_label()
    assert ax.get_xscale() == "log"


SUBSETS = [(), ("nc1",), ("dib",), ("rank",), ("nc1", "dib"), ("nc1", "dib", "rank")]


@pytest.mark.parametrize("measures", SUBSETS, ids=" ".join)
@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_works_with_any_measures_and_labels_its_axes(tmp_path, figure, measures):
    (run,) = load(make_run(tmp_path / "version_0", measures=measures))
    drawn = figure(run)
    drawn.canvas.draw()
    if sentence(drawn) is None:
        rows = drawn.axes[0].get_gridspec().nrows
        outer = [ax for ax in panels(drawn) if ax.get_subplotspec().is_last_row() or rows == 1]
        assert all(ax.get_xlabel() for ax in outer)
        assert all(ax.get_ylabel() for ax in panels(drawn) if ax.get_subplotspec().is_first_col())
    else:
        assert sentence(drawn).endswith(".")


@pytest.mark.parametrize("figure", FIGURES)
def test_settings_without_a_measure_have_a_panel_that_says_so(tmp_path, figure):
    make_run(tmp_path / "version_0", measures=("nc1", "dib", "rank"), lr_test=True)
    make_run(tmp_path / "version_1", measures=(), learning_rate=0.1)
    make_run(tmp_path / "version_2", num_layers=5, learning_rate=0.2)
    figure(load(tmp_path)).canvas.draw()


LOOKS = {"short": (3, 1, 1), "long": (3, 200, 1), "deep": (20, 12, 1), "deep and many": (20, 12, 5)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("figure", FIGURES)
def test_nothing_is_cut_off_or_covered_by_the_legend(tmp_path, figure, look):
    num_layers, num_epochs, num_runs = LOOKS[look]
    for seed in range(num_runs):
        make_run(tmp_path / f"version_{seed}", num_layers, num_epochs, seed, lr_test=True)
    drawn = figure(load(tmp_path))
    drawn.canvas.draw()
    page, ink = drawn.get_window_extent(), drawn.get_tightbbox().transformed(drawn.dpi_scale_trans)
    pixel = 1.0  # rounding of the letters' boxes
    assert page.x0 - pixel <= ink.x0 and ink.x1 <= page.x1 + pixel
    assert page.y0 - pixel <= ink.y0 and ink.y1 <= page.y1 + pixel
    for legend, ax in itertools.product(drawn.legends, panels(drawn)):
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())
        assert not legend.get_window_extent().overlaps(drawn._suptitle.get_window_extent())


def test_values_that_no_axis_can_show_are_left_out(run_folder):
    table = read(run_folder)
    table["nc1/test/avgpool"] = [0.0, -1.0, np.inf, np.nan, 1e300, 2.0]
    table.to_csv(run_folder / "metrics.csv")
    for figure in FIGURES:
        figure(load(run_folder)).canvas.draw()
    line = lines(plots.nc1_over_epochs(load(run_folder)).axes[1])["avgpool"]
    assert list(line.get_ydata()) == pytest.approx([2.0])


def test_names_from_outside_are_drawn_as_they_are(tmp_path):
    folder = make_run(tmp_path / "version_0", dataset="/data/$a_$b/数据_100%")
    for name in ("metrics.csv", "dib.csv", "hparams.yaml"):
        path = folder / name
        path.write_text(path.read_text().replace("layer1.0", "_$x").replace("layer1.1", "$\\frac$"))
    for figure in FIGURES:
        drawn = figure(load(folder))
        drawn.canvas.draw()  # warnings are errors in the command line's test; a broken formula raises here
    assert legend_labels(plots.nc1_over_epochs(load(folder)))[0] == r" _\$x"


def test_figures_look_the_same_under_a_dark_style_and_leave_it_alone(run_folder):
    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        figure = plots.training_curves(load(run_folder))
        assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert figure.axes[0].xaxis.label.get_color() == "black"


def command(*args, **options):
    options = {"capture_output": True, "text": True, "timeout": 250} | options
    python = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
    return subprocess.run([*python, ROOT / "plots.py", *map(str, args)], **options)


@pytest.mark.parametrize("file_format", ["png", "pdf", "svg"])
def test_the_command_writes_every_figure_and_prints_its_path(tmp_path, file_format):
    folder = make_run(tmp_path / "version_0", measures=("nc1", "dib"))
    done = command(folder, "-o", tmp_path / "new" / "figures", "--format", file_format)
    assert done.returncode == 0
    paths = sorted(map(Path, done.stdout.split()))
    assert sorted((tmp_path / "new" / "figures").iterdir()) == paths
    assert {path.suffix for path in paths} == {f".{file_format}"}
    assert {"summary", "training_curves", "nc1_over_depth", "head_losses", "heat_map_dib_loss"} <= {
        p.stem for p in paths
    }
    (said,) = done.stderr.splitlines()
    assert said.startswith("plots.py: not measured, so not drawn: lr_range_test, rank_over_epochs_train")


def test_help_and_wrong_flags_are_answered_without_pandas_and_matplotlib():
    code = "import sys, plots; print({'pandas', 'matplotlib', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"
    assert command("--help").returncode == 0
    for wrong in ([], ["--format", "gif", "x"], ["--frmat", "png", "x"]):
        done = command(*wrong)
        assert done.returncode == 2 and "usage:" in done.stderr


def test_drawing_does_not_need_pyplot(run_folder):
    draw = f"plots.summary(plots.load([{str(run_folder)!r}]))"
    code = f"import sys, plots; {draw}; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"


def test_mistakes_are_told_in_one_sentence(tmp_path):
    run = make_run(tmp_path / "version_0", measures=())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for args in ([tmp_path / "empty"], [tmp_path / "missing"], [tmp_path / "file"], [run, "-o", tmp_path / "file"]):
        done = command(*args, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        *_, line = done.stderr.splitlines()
        assert line.startswith("plots.py: error: ") and str(args[-1]) in line


def test_ctrl_c_ends_quietly_and_leaves_no_half_file(tmp_path):
    folder = make_run(tmp_path / "version_0", num_layers=20, num_epochs=50)
    args = [sys.executable, ROOT / "plots.py", folder, "-o", tmp_path / "figures"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == ""
    assert not list((tmp_path / "figures").glob(".*"))


cells = st.one_of(st.floats().map(str), st.integers(-3, 3).map(str), st.text(max_size=5), st.just(""))
names = st.sampled_from(["epoch", "train_loss", "nc1/train/a", "nc1/test/a", "nc1/test/b", "dib/minimality/a"])
columns = st.lists(
    st.one_of(names, st.sampled_from(["dib/loss/b", "rank/stable/train/a", "x/a", "layer"]), st.text(max_size=4))
)
tables = st.tuples(columns, st.lists(st.lists(cells, max_size=8), max_size=5))
texts = st.one_of(
    tables.map(lambda table: "\n".join(map(",".join, [["epoch", *table[0]], *table[1], []])).encode()),
    st.binary(max_size=60),
)
flags = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)
keys = st.sampled_from(["model", "dataset", "learning_rate", "lr_range_test", "seed", "resumed_from", "provenance"])
hparams = st.one_of(
    st.dictionaries(keys, flags).map(lambda value: yaml.safe_dump(value).encode()),
    flags.map(repr).map(str.encode),
    st.binary(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metrics=texts, heads=texts, lr_test=texts, hparams=hparams)
def test_nothing_that_a_folder_holds_ends_in_a_traceback(tmp_path, metrics, heads, lr_test, hparams):
    folder = tmp_path / "version_0"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_bytes(metrics)
    (folder / "dib.csv").write_bytes(heads)
    (folder / "lr_range_test.csv").write_bytes(lr_test)
    (folder / "hparams.yaml").write_bytes(hparams)
    run = Run(folder)
    if not run.why_empty:
        for _, figure in plots.figures(run):
            figure.canvas.draw()
