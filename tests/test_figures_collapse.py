"""NC1 over epochs and depth, equi-separation and chance."""

import numpy as np
import pytest
from made_runs import lines, load, make_run, read

import plots
from measures import neural_collapse

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_nc1_over_epochs_has_a_line_per_layer_and_a_panel_per_set(run_folder):
    figure = plots.nc1_over_epochs(load(run_folder))
    table = read(run_folder)
    for ax, split in zip(figure.axes, ("train", "test"), strict=True):
        assert ax.get_yscale() == "log"
        assert f"{split} set" in ax.get_ylabel()
        for layer, line in lines(ax).items():
            np.testing.assert_allclose(line.get_ydata(), table[f"nc1/{split}/{layer}"])


def test_nc1_over_depth_states_r_and_slope_of_the_fit(tmp_path):
    folder = make_run(tmp_path / "version_0", num_layers=6)
    figure = plots.nc1_over_depth(load(folder), epochs=[5])
    (run,), ax = load(folder), figure.axes[0]
    nc1 = [read(folder)[f"nc1/train/{layer}"].iloc[5] for layer in run.layers]
    r, slope = neural_collapse.equiseparation(nc1)
    (label,) = lines(ax)
    assert label == f"5: {r:.3f}, {slope:.2f}".replace("-", "−")
    assert ax.get_legend().get_title().get_text() == "epoch: r, slope"
    np.testing.assert_allclose(lines(ax)[label].get_ydata(), nc1)
    (fit,) = (line for line in ax.get_lines() if line.get_linestyle() == "--")
    np.testing.assert_allclose(np.diff(np.log(fit.get_ydata())), slope)
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == run.layers


def test_r_is_left_out_where_it_is_not_defined(tmp_path):
    (two,) = load(make_run(tmp_path / "version_0", num_layers=2))
    assert list(lines(plots.nc1_over_depth(two, epochs=[0, 5]).axes[0])) == ["0", "5"]
    constant = make_run(tmp_path / "version_1", num_layers=4)
    table = read(constant)
    table.loc[5, [column for column in table if column.startswith("nc1/")]] = 3.0
    table.to_csv(constant / "metrics.csv")
    assert list(lines(plots.nc1_over_depth(load(constant), epochs=[5]).axes[0])) == ["5: 0.00"]


def test_the_chance_level_is_nc1_under_permuted_labels_in_the_last_epoch_drawn(tmp_path):
    folder = make_run(tmp_path / "version_0", measures=("nc1", "nc1_chance"))
    table = read(folder)
    for epochs, last in ((None, 5), ([0, 3], 3)):
        figure = plots.nc1_over_depth(load(folder), epochs=epochs)
        for ax, split in zip(figure.axes, ("train", "test"), strict=True):
            line = lines(ax)[f"chance, epoch {last}"]
            assert line.get_linestyle() == ":"
            columns = [f"nc1_chance/{split}/{layer}" for layer in ("layer1.0", "layer1.1", "avgpool")]
            np.testing.assert_allclose(line.get_ydata(), table.loc[last, columns].astype(float))
    names = dict(plots.figures(load(folder)))
    assert "heat_map_nc1_test" in names and not [name for name in names if "chance" in name]
    values = plots.heat_map(load(folder), "nc1_chance/test").axes[0].collections[0].get_array()
    np.testing.assert_allclose(values[2], table["nc1_chance/test/avgpool"])


def test_a_run_without_a_chance_level_shows_none_whatever_its_provenance(run_folder):
    (run,) = load(run_folder)
    assert run.provenance["dimensions"] and not any(
        "chance" in label for label in lines(plots.nc1_over_depth(run).axes[0])
    )
