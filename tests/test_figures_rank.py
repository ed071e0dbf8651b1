"""Rank over epochs and depth."""

import numpy as np
import pytest
from made_runs import lines, load, read, sentence

import plots

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_over_depth_shows_first_and_last_epoch_or_those_asked_for(run_folder):
    shown = lines(plots.rank_over_depth(load(run_folder)).axes[0])
    assert (min(shown), max(shown)) == ("epoch 0", "epoch 5")
    assert list(lines(plots.rank_over_depth(load(run_folder), epochs=[2, 4]).axes[0])) == ["epoch 2", "epoch 4"]
    assert "not [77]" in sentence(plots.rank_over_depth(load(run_folder), epochs=[77]))


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
