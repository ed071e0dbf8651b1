"""Neural collapse: NC1 over epochs and over depth, with the law of equi-separation."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.layerwise import over_depth, over_epochs
from figures.pages import grid, styled
from figures.runs import SPLITS, Run
from figures.settings import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def nc1_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """NC1 of every layer over the epochs, a row per split and a column per setting."""
    return grid(runs, "NC1 over epochs", [f"nc1/{split}" for split in SPLITS], over_epochs)


@styled
def nc1_over_depth(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """NC1 over the layers at some epochs (default: five, denser at the start) and the law of equi-separation.

    Dashed: least-squares fits of log NC1 over depth, with Pearson's r and slope. Dotted: the chance level.
    """
    draw = functools.partial(equiseparation_over_depth, epochs=epochs)
    return grid(runs, "NC1 over depth", [f"nc1/{split}" for split in SPLITS], draw, legend="panels", width=4.5)


def equiseparation_over_depth(ax: Axes, setting: Setting, measure: str, **which: object) -> None:
    """A line per epoch, each with the fit of equi-separation, and the chance level."""
    over_depth(ax, setting, measure, **which)
    for line in ax.get_lines():
        depth, nc1 = line.get_data()
        if len(depth) > 2:  # a line through two points always fits
            r, slope, fit = _equiseparation(depth, nc1)
            line.set_label(f"{line.get_label()}: r = {r:.3f}, slope {slope:.2f}".replace("-", "−"))
            ax.plot(depth, fit, "--", linewidth=0.8, color=line.get_color())
    chance = setting.runs[0].chance_level(measure.removeprefix("nc1/"))
    chance = [chance.get(layer, math.nan) for layer in setting.layers]
    if np.isfinite(chance).any():
        ax.plot(range(1, len(chance) + 1), chance, ":", color="0.3", label="chance level")


def _equiseparation(depth: np.ndarray, nc1: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Pearson's r of log NC1 and depth, the slope of the least-squares line, and that line as NC1."""
    x, z = depth - np.mean(depth), np.log(nc1)
    slope = x @ z / (x @ x)
    spread = math.sqrt((x @ x) * np.sum((z - z.mean()) ** 2))
    return x @ z / spread if spread else math.nan, slope, np.exp(z.mean() + slope * x)
