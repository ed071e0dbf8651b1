"""Axes: ticks, units, limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import (
    FIGURES,
    lines,
    load,
    read,
)
from matplotlib.figure import Figure

import plots
from figures.axes import epoch_axis, limits_of_most, log_ticks, short

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_a_layer_that_is_always_far_from_the_others_keeps_its_colors():
    lows, highs = [0.1, 0.2, 0.1, 0.2], [50, 51, 49, 50]
    assert limits_of_most(lows, highs) == (0.1, 51)
    assert limits_of_most([1, 2, 3], [1, 2, 1e6]) == (1, 2)
    assert limits_of_most([5, 1, 1], [5, 1, 1]) == (1, 5)  # else nothing would be left to tell apart
    assert limits_of_most([math.nan, 1], [math.nan, 2]) == (1, 2)


@settings(max_examples=300, deadline=None)
@given(low=st.floats(1e-12, 1e12), ratio=st.floats(1.001, 1e20))
def test_every_logarithmic_axis_has_two_labelled_ticks_or_more(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 12 and len({short(tick) for tick in ticks}) == len(ticks)
    assert all(low <= tick <= low * ratio for tick in ticks)


@pytest.mark.parametrize("values", [(5.0, 5.2), (3.0, 30.0), (1.0, 1.0), (1e-7, 1e4), (0.11, 0.19), (40.0, 90.0)])
def test_log_axes_and_color_bars_of_any_range_are_labelled(run_folder, values):
    table = read(run_folder)
    names = [column for column in table if column.startswith("nc1/")]
    table[names] = np.geomspace(*values, len(table) * len(names)).reshape(len(table), -1)
    table.to_csv(run_folder / "metrics.csv")
    axes = [ax for figure in (plots.nc1_over_epochs, plots.nc1_over_depth) for ax in figure(load(run_folder)).axes]
    axes.append(plots.heat_map(load(run_folder), "nc1/test").axes[-1])
    for ax in axes[:-1] if values[0] == values[1] else axes:
        ax.figure.canvas.draw()
        low, high = sorted(ax.get_ylim())
        shown = [t.get_text() for t, y in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True) if low <= y <= high]
        assert len(set(filter(None, shown))) >= 2


@pytest.mark.parametrize(
    "value, text", [(0.05, "0.05"), (-3, "−3"), (2e-7, "2·10⁻⁷"), (1e9, "10⁹"), (98.00000000001, "98")]
)
def test_numbers_are_written_as_one_writes_them(value, text):
    assert short(value) == text


def test_small_quantities_are_shown_in_their_unit_and_kept_in_nats(run_folder):
    table = read(run_folder)
    table["dib/minimality/avgpool"] = np.linspace(1e-4, 5e-4, 6)
    table.to_csv(run_folder / "metrics.csv")
    figure = plots.minimality_over_epochs(load(run_folder))
    (ax,) = figure.axes
    figure.canvas.draw()
    assert ax.get_ylabel() == "minimality (10⁻³ nats)"
    np.testing.assert_allclose(lines(ax)["avgpool"].get_ydata(), table["dib/minimality/avgpool"])
    for text, tick in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True):
        assert float(text.get_text().replace("−", "-")) == pytest.approx(tick / 1e-3, abs=1e-5)
    assert plots.heat_map(load(run_folder), "dib/minimality").axes[-1].get_ylabel() == "minimality (10⁻³ nats)"


def test_values_that_no_axis_can_show_are_left_out(run_folder):
    table = read(run_folder)
    table["nc1/test/avgpool"] = [0.0, -1.0, np.inf, np.nan, 1e300, 2.0]
    table.to_csv(run_folder / "metrics.csv")
    for figure in FIGURES:
        figure(load(run_folder)).canvas.draw()
    line = lines(plots.nc1_over_epochs(load(run_folder)).axes[1])["avgpool"]
    assert list(line.get_ydata()) == pytest.approx([2.0])


def test_a_panel_of_one_epoch_leaves_the_axis_to_those_that_share_it():
    """Purity is not defined before training where there are no clusters: of one epoch a single value is left."""
    panels = Figure().subplots(3, sharex=True)
    for ax, epochs in zip(panels, ([0, 1], [1], [0, 1]), strict=True):
        ax.plot(epochs, epochs)
        epoch_axis(ax, epochs)
    for ax in panels:
        assert {0, 1} <= {*ax.get_xticks()} and all(tick % 1 == 0 for tick in ax.get_xticks())
