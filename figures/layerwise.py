"""The two ways to draw any measure of layers: over the epochs, and over the depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import band_of, chosen_epochs, depth_axis, draw_line, epoch_axis, y_axis
from figures.labels import label_of
from figures.settings import Setting
from figures.style import layer_colors, plain, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def over_epochs(ax: Axes, setting: Setting, measure: str) -> None:
    """A line per layer."""
    band = band_of(setting, measure)
    for layer, color in layer_colors(setting).items():
        if layer in band.mean:
            draw_line(ax, band, layer, color=color, label=plain(layer))
    epoch_axis(ax, band.mean.index)
    y_axis(ax, measure)


def over_depth(ax: Axes, setting: Setting, measure: str, epochs: Sequence[int] | None = None, num: int = 5) -> None:
    """A line per epoch: those asked for, else `num`, denser at the start."""
    band = band_of(setting, measure)
    chosen = chosen_epochs(list(band.mean.index), epochs, num, np.geomspace)
    by_depth = band.over_depth(setting.layers)
    for epoch, color in zip(chosen, shades("plasma_r", len(chosen)), strict=True):
        draw_line(ax, by_depth, epoch, color=color, label=f"epoch {epoch}")
    depth_axis(ax, setting.layers)
    y_axis(ax, measure)


def draw_ways(ax: Axes, setting: Setting, measure: str) -> None:
    """The way of each layer from the first epoch (circle) to the last (dot), minimality to the right."""
    x, y = band_of(setting, "dib/minimality").mean, band_of(setting, measure).mean
    for layer, color in layer_colors(setting).items():
        column = layer if layer in y else measure  # sufficiency is one number for all layers
        if layer in x and column in y:
            path = x[[layer]].assign(y=y[column]).dropna().to_numpy()  # (E, 2)
            ax.plot(*path.T, color=color, linewidth=0.8, label=plain(layer))
            ax.plot(*path[:1].T, "o", color=color, markersize=4, markerfacecolor="white")
            ax.plot(*path[-1:].T, "o", color=color, markersize=4)
    ax.set_xlabel(label_of("dib/minimality").text)
    y_axis(ax, measure)
