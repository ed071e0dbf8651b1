"""Decodable information: minimality, its planes with sufficiency and NC1, and how its heads trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import chosen_epochs, draw_line, y_axis
from figures.layerwise import draw_ways, over_epochs
from figures.pages import grid, layer_legend, new_page, styled
from figures.runs import SPLITS, Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw, layer_colors, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def minimality_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How much of a sample's identity can be read from each layer: the mean over digits of H(Y_k) - CE_k."""
    return grid(runs, "Minimality over epochs", ["dib/minimality"], over_epochs)


@styled
def sufficiency_minimality(runs: Run | Sequence[Run]) -> Figure:
    """The way of every layer in the plane of minimality and sufficiency: first epoch circle, last dot."""
    rows = [f"dib/sufficiency/{split}" for split in SPLITS]
    return grid(
        runs, "Sufficiency and minimality, first (○) to last epoch (●)", rows, draw_ways, needs=["dib/minimality"]
    )


@styled
def nc1_against_minimality(runs: Run | Sequence[Run]) -> Figure:
    """The way of every layer in the plane of minimality and NC1: first epoch circle, last dot."""
    rows = [f"nc1/{split}" for split in SPLITS]
    return grid(runs, "NC1 against minimality, first (○) to last epoch (●)", rows, draw_ways, needs=["dib/minimality"])


@styled
def head_losses(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """Cross-entropy of the DIB heads in training, at some epochs (default: first, middle, last).

    Where curves still fall at the right end, more head epochs would read more. Dashed: the entropy of the
    digits, which is the loss of heads that read nothing.
    """
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if setting.head_epochs]
    if not settings:
        raise NothingToDraw("No losses of DIB heads were kept (dib.csv).")
    measured = sorted({epoch for setting in settings for epoch in setting.head_epochs})
    chosen = chosen_epochs(measured, epochs, 3, np.linspace)
    figure, axes = new_page(len(settings), len(chosen), comparison.heading("Training of the DIB heads"))
    for ax, (setting, epoch) in zip(axes.flat, itertools.product(settings, chosen), strict=True):
        _heads(ax, setting, epoch)
        ax.set_title(f"{plain(comparison.name(setting), width=45)}\nepoch {epoch}".lstrip())
        ax.label_outer()
    layer_legend(figure, settings)
    return figure


def _heads(ax: Axes, setting: Setting, epoch: int) -> None:
    """A line per layer over the head epochs, and the entropy of the digits where it is known."""
    band = setting.head_losses(epoch)
    for layer, color in layer_colors(setting).items():
        if layer in band.mean:
            draw_line(ax, band, layer, color=color, label=plain(layer))
    if setting.has("dib/loss", "dib/minimality"):
        entropy = setting.band("dib/loss").mean + setting.band("dib/minimality").mean  # equal for all layers
        value = entropy.mean(axis=1).get(epoch, math.nan)
        ax.axhline(value, linestyle="--", color="0.3", label="entropy of the digits")
    ax.set_xlabel("head epoch")
    y_axis(ax, "dib/loss")
