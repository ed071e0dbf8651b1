"""The planes of DIB, and the training of its heads."""

import numpy as np
import pandas as pd
import pytest
from made_runs import DIGIT_ENTROPY, legend_labels, lines, load, make_run, read

import plots

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


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
        assert figure.axes[1].get_xlabel() == "minimality (10⁻³ nats)"


@pytest.mark.parametrize("figure", [plots.sufficiency_minimality, plots.nc1_against_minimality])
def test_long_ways_are_thinned_denser_at_the_start_with_an_arrow_for_each_step(tmp_path, figure):
    folder = make_run(tmp_path / "version_0", num_epochs=200)
    way = lines(figure(load(folder)).axes[0])["avgpool"]
    table = read(folder)["dib/minimality/avgpool"]
    epochs = [int(np.flatnonzero(table == x)[0]) for x in way.get_xdata()]
    assert len(epochs) <= 9 and (epochs[0], epochs[-1]) == (0, 200)
    assert all(np.diff(np.diff(epochs)) >= 0)
    arrows = [text for text in figure(load(folder)).axes[0].texts if text.arrow_patch]
    assert len(arrows) == 3 * (len(epochs) - 1)


def test_head_losses_are_means_over_digits_below_the_entropy_of_the_digits(run_folder):
    figure = plots.head_losses(load(run_folder), epochs=[0, 5])
    heads = pd.read_csv(run_folder / "dib.csv")
    heads = heads[(heads["epoch"] == 5) & (heads["layer"] == "avgpool")]
    line = lines(figure.axes[1])["avgpool"]
    np.testing.assert_allclose(line.get_ydata(), heads.groupby("head_epoch")["cross_entropy"].mean())
    entropy = lines(figure.axes[1])["H(Y_k | Y)"].get_ydata()
    assert legend_labels(figure)[-1] == "H(Y_k | Y)"
    np.testing.assert_allclose(entropy, DIGIT_ENTROPY)
    assert [ax.get_title() for ax in figure.axes] == ["epoch 0", "epoch 5"]


def test_untrained_heads_do_not_take_the_axis_and_are_said_to_lie_above_it(run_folder):
    heads = pd.read_csv(run_folder / "dib.csv")
    heads.loc[heads["head_epoch"] == 0, "cross_entropy"] += 40
    heads.to_csv(run_folder / "dib.csv", index=False)
    for ax in plots.head_losses(load(run_folder)).axes:
        low, high = ax.get_ylim()
        assert 0 < low < high < 2.5
        assert [text.get_text() for text in ax.texts] == ["↑ up to 42.2"]
        for line in lines(ax).values():
            assert all(low <= loss <= high for loss in line.get_ydata()[1:])


def test_a_head_that_diverged_ends_its_layers_line(run_folder):
    heads = pd.read_csv(run_folder / "dib.csv")
    diverged = (heads["layer"] == "avgpool") & (heads["digit"] == 1) & (heads["head_epoch"] >= 3)
    heads.loc[diverged, "cross_entropy"] = np.nan
    heads.to_csv(run_folder / "dib.csv", index=False)
    drawn = lines(plots.head_losses(load(run_folder), epochs=[5]).axes[0])
    assert list(drawn["avgpool"].get_xdata()) == [0, 1, 2]
    assert len(drawn["layer1.0"].get_xdata()) == 7
