"""The ways to draw any measure of layers: over the epochs, over the depth, and against minimality."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import band_of, chosen_epochs, depth_axis, draw_line, epoch_axis, log_if_wide, spread, x_axis, y_axis
from figures.labels import is_known
from figures.pages import grid, layer_legend, styled
from figures.runs import SPLITS, Run
from figures.settings import Setting
from figures.style import layer_colors, plain, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_STEPS = 8  # of a way that is drawn with arrows
MAX_POINTED = 8  # layers whose steps all have heads; of more layers the first step alone


@styled
def measure_over_epochs(runs: Run | Sequence[Run], measure: str) -> Figure:
    """Any measure over the epochs, a line per layer: `measure` is one of `Run.measures`, with its set or without."""
    return grid(runs, f"{plain(measure)} over epochs", [measure, *both_sets(measure)], over_epochs, legend=layer_legend)


def both_sets(measure: str) -> list[str]:
    return [f"{measure}/{split}" for split in SPLITS]


def over_epochs(ax: Axes, setting: Setting, measure: str) -> None:
    """A line per layer."""
    band = band_of(setting, measure)
    for layer, color in layer_colors(setting).items():
        if layer in band.mean:
            draw_line(ax, band, layer, color=color, label=plain(layer))
    epoch_axis(ax, band.mean.index)
    y_axis(ax, measure)
    if not is_known(measure) and band.mean.min().min() > 0:
        log_if_wide(ax)


def share_over_epochs(ax: Axes, setting: Setting, measure: str) -> None:
    """As other measures, on an axis from 0 to 1: what is near 1 must not look like a course of its own."""
    over_epochs(ax, setting, measure)
    ax.set_ylim(min(-0.03, ax.get_ylim()[0]), 1.03)


def over_depth(ax: Axes, setting: Setting, measure: str, epochs: Sequence[int] | None = None, num: int = 5) -> None:
    """A line per epoch: those asked for, else `num`, denser at the start."""
    band = band_of(setting, measure)
    chosen = chosen_epochs(list(band.mean.index), epochs, num, np.geomspace)
    by_depth = band.over_depth(setting.layers)
    for epoch, color in zip(chosen, shades("plasma", len(chosen)), strict=True):
        draw_line(ax, by_depth, epoch, color=color, label=f"epoch {epoch}")
    depth_axis(ax, setting.layers)
    y_axis(ax, measure)


def ways(ax: Axes, setting: Setting, measure: str) -> None:
    """The way of each layer from the first epoch (circle) to the last (dot), minimality to the right.

    Arrows lead over a few epochs, denser at the start: all of them would be a knot.
    """
    x, y = band_of(setting, "dib/minimality").mean, band_of(setting, measure).mean
    for layer, color in layer_colors(setting).items():
        column = layer if layer in y else measure  # sufficiency is one number for all layers
        if layer in x and column in y:
            points = x[[layer]].assign(y=y[column]).dropna().to_numpy()  # (E, 2)
            points = np.array(spread(list(points), MAX_STEPS + 1)).reshape(-1, 2)
            ax.plot(*points.T, color=color, linewidth=0.8, label=plain(layer))
            steps = list(itertools.pairwise(points))
            for start, end in steps if len(setting.layers) <= MAX_POINTED else steps[:1]:
                _arrow_head(ax, start, end, color)
            ax.plot(*points[:1].T, "o", color=color, markersize=4, markerfacecolor="white")
            ax.plot(*points[-1:].T, "o", color=color, markersize=4)
    x_axis(ax, "dib/minimality")
    y_axis(ax, measure)


def _arrow_head(ax: Axes, start: np.ndarray, end: np.ndarray, color: object) -> None:
    """A head at the end of a step. It lies where the step does: the layout need not mind it, which takes long."""
    style = {"arrowstyle": "-|>,head_width=0.25,head_length=0.5", "color": color, "linewidth": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style, annotation_clip=False).set_in_layout(False)
