"""Layers × epochs as colors."""

import numpy as np
import pytest
from made_runs import load, make_run, panels, read
from matplotlib.colors import LogNorm

import plots

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def heat_map_limits(folder, measure):
    figure = plots.heat_map(load(folder), measure)
    mesh = panels(figure)[0].collections[0]
    return *mesh.get_clim(), mesh.colorbar.extend


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


def test_one_far_epoch_does_not_take_the_colors_of_a_heat_map(run_folder):
    table = read(run_folder)
    for measure, first in (("dib/minimality", -5.0), ("dib/loss", 80.0), ("nc1/test", 1e9)):
        column = f"{measure}/avgpool"
        assert heat_map_limits(run_folder, measure)[2] == "neither"
        changed = table.copy()
        changed.loc[0, column] = first
        changed.to_csv(run_folder / "metrics.csv")
        low, high, extend = heat_map_limits(run_folder, measure)
        rest = changed[[name for name in changed if name.startswith(f"{measure}/")]].iloc[1:]
        assert extend == ("min" if first < 0 else "max")
        assert low <= rest.min(axis=None) and rest.max(axis=None) <= high < 1e3
        assert (low, high) == pytest.approx((low, high)) and (first < low or first > high)
        table.to_csv(run_folder / "metrics.csv")


def test_heat_maps_of_several_settings_share_their_colors(tmp_path):
    for i, nonlinearity in enumerate(("tanh", "relu")):
        make_run(tmp_path / f"version_{i}", seed=i, nonlinearity=nonlinearity)
    meshes = [ax.collections[0] for ax in panels(plots.heat_map(load(tmp_path), "dib/minimality"))]
    assert meshes[0].get_clim() == meshes[1].get_clim()
