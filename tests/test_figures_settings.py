"""Runs grouped into settings: labels, means and bands, and none left out."""

import itertools

import numpy as np
import pytest
from made_runs import (
    command,
    legend_labels,
    lines,
    load,
    make_run,
    panels,
    read,
    rewrite,
    title,
)

import plots
from figures.settings import MAX_SETTINGS, compare

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def distinct(line):
    """What an eye tells a line by."""
    return line.get_color(), line.get_linestyle(), str(line._unscaled_dash_pattern)


def test_runs_that_differ_only_in_seed_and_place_are_one_setting(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"version_{seed}", seed=seed, quiet=bool(seed), accelerator=("cpu", "gpu", "auto")[seed])
    (setting,) = compare(load(tmp_path)).settings
    assert setting.title == "ResNet on MNIST (3 runs)"


def test_seeds_whose_range_tests_chose_other_rates_are_one_setting(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"version_{seed}", seed=seed, lr_test=True, learning_rate=0.01 * (seed + 1))
    assert len(compare(load(tmp_path)).settings) == 1


def test_runs_of_which_one_also_keeps_activations_or_maps_are_one_setting(tmp_path):
    make_run(tmp_path / "version_0", seed=0, tsne=False, save_activations=False, activations_format="npz")
    make_run(tmp_path / "version_1", seed=1, tsne=True, save_activations=True, activations_format="mat")
    assert len(compare(load(tmp_path)).settings) == 1


def test_settings_are_labelled_by_the_flags_that_differ(tmp_path):
    for i, (nonlinearity, batch_norm) in enumerate(itertools.product(("tanh", "relu"), (True, False))):
        make_run(tmp_path / f"version_{i}", nonlinearity=nonlinearity, batch_norm=batch_norm, widths=[8, 4])
    labels = [setting.label for setting in compare(load(tmp_path)).settings]
    expected = [f"nonlinearity {n}, {b}" for n in ("tanh", "relu") for b in ("batch-norm", "no batch-norm")]
    assert labels == expected
    titles = [" ".join(ax.get_title().split()) for ax in plots.nc1_over_epochs(load(tmp_path)).axes]
    assert [title for title in titles if title] == expected


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


@pytest.mark.parametrize("num_settings", [7, 8, 12, 30])
def test_no_setting_is_dropped_and_no_two_look_alike(tmp_path, num_settings):
    for i in range(num_settings):
        make_run(tmp_path / f"version_{i}", num_epochs=1, measures=("nc1",), learning_rate=2.0**-i)
    runs = load(tmp_path)
    names = [f"learning-rate {2.0**-i}" for i in range(num_settings)]
    curves = plots.training_curves(runs)
    drawn = [line for label, line in lines(curves.axes[0]).items() if "train" in label or num_settings > 7]
    assert len(drawn) == len({distinct(line) for line in drawn}) == num_settings
    assert all(any(name in label for label in legend_labels(curves)) for name in names)
    over_epochs = plots.nc1_over_epochs(runs)
    assert {" ".join(ax.get_title().split()) for ax in panels(over_epochs)} - {""} == set(names)
    assert len(panels(over_epochs)) == 2 * num_settings
    assert len(panels(plots.nc1_over_depth(runs))) == 2 * num_settings
    assert len(panels(plots.heat_map(runs))) == num_settings


def test_more_settings_than_a_page_holds_are_counted_in_the_figure_and_on_stderr(tmp_path):
    for i in range(MAX_SETTINGS + 2):
        make_run(tmp_path / f"version_{i}", num_layers=2, num_epochs=0, measures=(), learning_rate=2.0**-i)
    said = f"the first {MAX_SETTINGS} of {MAX_SETTINGS + 2} settings; give fewer runs to see the others"
    assert title(plots.training_curves(load(tmp_path))).endswith(said)
    done = command(tmp_path, "-o", tmp_path / "figures")
    assert done.returncode == 0 and f"plots.py: every figure shows {said}" in done.stderr


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
