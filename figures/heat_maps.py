"""Layers × epochs of any measure."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import EPOCH_LABEL, MAX_NAMES, band_of, log_ticks, thin
from figures.labels import label_of
from figures.pages import grid, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from pandas import DataFrame


@styled
def heat_map(runs: Run | Sequence[Run], measure: str = "nc1/test") -> Figure:
    """Layers × measured epochs of any measure: one of `Run.measures`, such as nc1/test or dib/minimality."""
    label = label_of(measure)
    settings = [setting for setting in compare(runs).settings if setting.has(measure)]
    norm = _norm([band_of(setting, measure).mean for setting in settings], label.log)
    draw = functools.partial(_heat_map, norm=norm)
    height = max(2.3, 0.14 * min(MAX_NAMES, max(len(setting.layers) for setting in settings)))
    figure = grid(runs, label.text, [measure], draw, legend="none", share=False, height=height)
    meshes = [mesh for ax in figure.axes for mesh in ax.collections]
    colorbar = figure.colorbar(meshes[0], ax=figure.axes, label=label.text)
    if label.log:
        log_ticks(colorbar.ax.yaxis, norm.vmin, norm.vmax)
    return figure


def _heat_map(ax: Axes, setting: Setting, measure: str, norm: Normalize) -> None:
    """Layers as rows, the first on top; measured epochs as columns of equal width; grey where undefined."""
    table = band_of(setting, measure).mean
    table = table[[layer for layer in setting.layers if layer in table]]
    ax.pcolormesh(table.T.to_numpy(float), norm=norm, cmap="cividis")
    epochs = thin(list(enumerate(table.index)), 8)
    layers = thin(list(enumerate(table.columns)), MAX_NAMES)
    ax.set_xticks([i + 0.5 for i, _ in epochs], [str(epoch) for _, epoch in epochs])
    ax.set_yticks([i + 0.5 for i, _ in layers], [plain(layer) for _, layer in layers])
    ax.set(xlabel=EPOCH_LABEL, ylabel="layer", facecolor="0.85")
    ax.grid(False)
    ax.invert_yaxis()


def _norm(tables: Sequence[DataFrame], log: bool) -> Normalize:
    """One scale of colors for all tables."""
    from matplotlib.colors import LogNorm, Normalize

    values = np.concatenate([table.to_numpy(float).ravel() for table in tables] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        raise NothingToDraw("Not measured, or nowhere defined.")
    return (LogNorm if log else Normalize)(values.min(), values.max())
