"""Measures that nobody registered."""

import numpy as np
import pytest
from made_runs import lines, load, read

import plots

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_what_a_user_measures_is_drawn_without_being_known(run_folder):
    table = read(run_folder)
    for i, layer in enumerate(("layer1.0", "layer1.1", "avgpool")):
        table[f"norm/{layer}"] = np.geomspace(1, 1000, 6) + i
        table[f"curvature/train/{layer}"] = table[f"curvature/test/{layer}"] = np.linspace(-1, 1, 6) + i
    table.to_csv(run_folder / "metrics.csv")
    (run,) = load(run_folder)
    drawn = dict(plots.figures(run))
    assert {"heat_map_norm", "norm_over_epochs", "heat_map_curvature_train", "curvature_over_epochs"} <= set(drawn)
    (ax,) = drawn["norm_over_epochs"].axes
    np.testing.assert_allclose(lines(ax)["avgpool"].get_ydata(), table["norm/avgpool"])
    assert (ax.get_ylabel(), ax.get_yscale()) == ("norm", "log")
    assert [ax.get_ylabel() for ax in drawn["curvature_over_epochs"].axes] == [
        "curvature, train set",
        "curvature, test set",
    ]
