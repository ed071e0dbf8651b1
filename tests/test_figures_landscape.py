"""Landscapes of the loss, noise on layers, and layers without a channel."""

import numpy as np
import pytest
from made_runs import legend_labels, lines, load, make_run, panels, sentence, title

import plots
from figures.landscape import levels_of

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
MEASURES = ("landscape", "perturb")
FIGURES = (plots.landscape_curves, plots.landscape_maps, plots.perturbation_curves, plots.channel_importance)


@pytest.fixture
def run(tmp_path):
    return load(make_run(tmp_path / "version_0", measures=MEASURES))


def test_every_figure_draws_one_run_seeds_and_settings(tmp_path):
    folders = [
        make_run(tmp_path / f"version_{i}", seed=i % 2, learning_rate=i // 2, measures=MEASURES) for i in range(4)
    ]
    for runs in (load(folders[0]), load(*folders[:2]), load(*folders)):
        for figure in FIGURES:
            drawn = figure(runs)
            drawn.canvas.draw()
            assert sentence(drawn) is None


def test_a_figure_that_lacks_its_measure_names_the_flag(tmp_path):
    for figure, flag in zip(FIGURES, ["--landscape", "--landscape", "--perturb", "--perturb"], strict=True):
        runs = load(make_run(tmp_path / figure.__name__, measures=()))
        assert flag in sentence(figure(runs))


def test_curves_show_the_losses_of_the_first_epoch_and_the_last_on_axes_that_hold_them(run):
    drawn = plots.landscape_curves(run)
    assert legend_labels(drawn)[:2] == ["epoch 0", "epoch 5"]
    first, *_ = panels(drawn)
    alphas = np.linspace(-1, 1, 5)
    np.testing.assert_allclose(lines(first)["epoch 0"].get_ydata(), 2 + 20 * alphas**2 + alphas**4)
    low, high = first.get_ylim()
    assert low < 1.5 and 23 < high < 25


def test_maps_have_a_row_of_losses_per_step_along_the_first_axis_and_the_path_between_them(run):
    *of_epochs, of_path = panels(plots.landscape_maps(run))
    assert [ax.get_title() for ax in of_epochs] == ["epoch 0", "epoch 5"]
    inner = of_epochs[0].collections[0].get_paths()[3].get_extents()
    assert inner.height > 1.5 * inner.width  # curvature is larger along the first, the horizontal one
    np.testing.assert_allclose(of_path.get_lines()[0].get_xydata(), [[-5, 0], [-2, 1], [0, 0]])
    assert [text.get_text() for text in of_path.texts if text.get_text() in ("1", "2", "last")] == ["1", "2", "last"]


def test_losses_that_are_equal_or_infinite_have_no_levels():
    assert len(levels_of(np.ones((3, 3)))) == len(levels_of(np.full((2, 2), np.nan))) == 0
    assert np.isfinite(levels_of(np.array([[1.0, np.inf], [2.0, np.nan]]))).all()


def test_noise_is_drawn_as_the_mean_of_its_draws_for_every_layer(run):
    accuracy, loss, *_ = panels(plots.perturbation_curves(run))
    assert list(lines(accuracy)) == ["input", "layer1.0", "layer1.1", "avgpool"]
    np.testing.assert_allclose(lines(accuracy)["input"].get_ydata(), 0.9 - np.array([0, 0.5, 1, 5]) * 1.5 / 20)
    np.testing.assert_allclose(lines(loss)["input"].get_ydata(), 0.5 + np.array([0, 0.5, 1, 5]) * 1.5 / 20)


def test_channels_are_sorted_by_what_is_lost_without_them(run):
    accuracy, loss, *_ = panels(plots.channel_importance(run))
    for ax in (accuracy, loss):
        np.testing.assert_allclose(lines(ax)["layer1.0"].get_ydata(), [0.02, 0.01, 0, -0.01], atol=1e-12)
    assert "Layers without a channel" in title(plots.channel_importance(run))


def test_epochs_can_be_chosen_and_unknown_ones_are_told(run):
    assert legend_labels(plots.landscape_curves(run, epochs=[5]))[0] == "epoch 5"
    assert "not [3]" in sentence(plots.perturbation_curves(run, epochs=[3]))
