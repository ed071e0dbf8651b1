"""Layers × epochs of any measure, and tensors × epochs of what was looked at."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import EPOCH_LABEL, MAX_NAMES, band_of, in_units_of, is_wide, limits_of_most, log_ticks, thin
from figures.labels import is_known, label_of, not_measured
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
    """Layers × measured epochs of any measure: one of `Run.measures`, such as nc1/test or dib/minimality.

    Of what was looked at, a star stands for the rows: look/grad-loss-theta-*/norm has a row for each tensor, in network
    order where they were asked for so, and look/grad-loss-theta/*/norm one for each group.

    The colors span what most epochs hold: where a few (the first, as a rule) would take two thirds of the scale, they
    lie beyond its end, which an arrow on the color bar says.
    """
    label = label_of(measure)
    settings = [setting for setting in compare(runs).settings if setting.has(measure)]
    if not settings:
        raise NothingToDraw(not_measured([measure]))
    log = label.log if is_known(measure) else None
    norm, extend = _norm([_layers_of(setting, measure) for setting in settings], log)
    height = max(2.0, 0.14 * min(MAX_NAMES, max(_layers_of(setting, measure).shape[1] for setting in settings)))
    draw = functools.partial(_heat_map, norm=norm)
    figure = grid(runs, label.axis, [measure], draw, share=False, height=height)
    meshes = [mesh for ax in figure.axes for mesh in ax.collections]
    bar = figure.colorbar(meshes[0], ax=figure.axes, label=label.axis, extend=extend, fraction=0.05, aspect=25)
    bar.ax.yaxis.set_major_formatter(in_units_of(label.scale))
    if type(norm).__name__ == "LogNorm":
        ticks = log_ticks(norm.vmin, norm.vmax)
        bar.set_ticks(ticks, labels=[in_units_of(label.scale)(tick) for tick in ticks])
        bar.minorticks_off()
    return figure


def _layers_of(setting: Setting, measure: str) -> DataFrame:
    table = band_of(setting, measure).mean
    return table if "*" in measure else table[[layer for layer in setting.layers if layer in table]]


def _heat_map(ax: Axes, setting: Setting, measure: str, norm: Normalize) -> None:
    """Layers as rows, the first on top; measured epochs as columns of equal width; grey where undefined."""
    table = _layers_of(setting, measure)
    ax.pcolormesh(table.T.to_numpy(float), norm=norm, cmap="cividis")
    epochs = thin(list(enumerate(table.index)), 8)
    layers = thin(list(enumerate(table.columns)), MAX_NAMES)
    ax.set_xticks([i + 0.5 for i, _ in epochs], [str(epoch) for _, epoch in epochs])
    ax.set_yticks([i + 0.5 for i, _ in layers], [plain(layer) for _, layer in layers])
    ax.set(xlabel=EPOCH_LABEL, ylabel="" if "*" in measure else "layer", facecolor="0.85")
    ax.grid(False)
    ax.invert_yaxis()


def _norm(tables: Sequence[DataFrame], log: bool | None) -> tuple[Normalize, str]:
    """One scale of colors for all tables, and at which end values lie beyond it: neither, min, max or both.

    `log`: None for a scale that is logarithmic where values reach over two powers of ten.
    """
    from matplotlib.colors import LogNorm, Normalize

    values = np.concatenate([table.to_numpy(float).ravel() for table in tables] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        raise NothingToDraw("Not measured, or nowhere defined.")
    log = is_wide(values) if log is None else log
    scale = np.log if log and values.min() > 0 else np.asarray
    lows, highs = ([scale(extreme) for extreme in _extremes(tables, which)] for which in ("min", "max"))
    low, high = limits_of_most(lows, highs)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    beyond = extend.get((bool(low > min(lows)), bool(high < max(highs))), "both")
    return (LogNorm(np.exp(low), np.exp(high)) if scale is np.log else Normalize(low, high)), beyond


def _extremes(tables: Sequence[DataFrame], which: str) -> np.ndarray:
    """The lowest (min) or highest (max) value of each epoch."""
    return np.concatenate([getattr(table, which)(axis=1).dropna().to_numpy(float) for table in tables])
