"""The learning-rate range test."""

import numpy as np
import pandas as pd
import pytest
from made_runs import load, make_run

import plots

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


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
