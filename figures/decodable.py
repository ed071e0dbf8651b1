"""Decodable information: minimality, its planes with sufficiency and NC1, and how its heads trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import chosen_epochs, draw_line, limits_of_most, short, y_axis
from figures.layerwise import both_sets, over_epochs, ways
from figures.pages import color_legend, grid, layer_legend, new_page, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw, layer_colors, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_ALONE = "H(Y_k | Y)"
MARGIN = 0.05  # of an axis, at each end


@styled
def minimality_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How much of a sample's identity, beyond its class, each layer tells: mean over digits of H(Y_k | Y) - CE_k."""
    return grid(runs, "Minimality over epochs", ["dib/minimality"], over_epochs, legend=layer_legend, height=2.6)


@styled
def sufficiency_minimality(runs: Run | Sequence[Run]) -> Figure:
    """The way of every layer in the plane of minimality and sufficiency: first epoch circle, last dot."""
    title = "Sufficiency and minimality, first (○) to last epoch (●)"
    return _plane(runs, title, both_sets("dib/sufficiency"))


@styled
def nc1_against_minimality(runs: Run | Sequence[Run]) -> Figure:
    """The way of every layer in the plane of minimality and NC1: first epoch circle, last dot."""
    title = "NC1 against minimality, first (○) to last epoch (●)"
    return _plane(runs, title, both_sets("nc1"))


def _plane(runs: Run | Sequence[Run], title: str, measures: list[str]) -> Figure:
    return grid(runs, title, measures, ways, needs=["dib/minimality"], legend=layer_legend, height=2.6)


@styled
def head_losses(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """Cross-entropy of the DIB heads in training, at some epochs (default: first, middle, last), a row per setting.

    Where curves still fall at the right end, more head epochs would read more. Dashed: H(Y_k | Y), the loss of heads
    that read no more than the class. An arrow says what lies above the axis: untrained heads, as a rule.
    """
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if setting.head_epochs]
    if not settings:
        raise NothingToDraw("No losses of DIB heads were kept (dib.csv); main.py keeps them with --dib.")
    measured = sorted({epoch for setting in settings for epoch in setting.head_epochs})
    chosen = chosen_epochs(measured, epochs, 3, np.linspace)
    heading = comparison.heading("Training of the DIB heads", lacking=len(comparison.settings) - len(settings))
    figure, axes = new_page(len(settings), len(chosen), heading, height=2.3)
    for row, setting in zip(axes, settings, strict=True):
        for ax, epoch in zip(row, chosen, strict=True):
            if ax is not row[0]:
                ax.sharey(row[0])
            _heads(ax, setting, epoch)
            ax.set_title(f"{plain(comparison.name(setting), width=30)}\nepoch {epoch}".lstrip())
            if ax is not row[0]:
                ax.tick_params(labelleft=False)
                ax.set_ylabel("")
        _leave_out_far_above(row)
    colors = {setting: {plain(layer): color for layer, color in layer_colors(setting).items()} for setting in settings}
    color_legend(figure, colors, others=[line for line in axes[0, 0].get_lines() if line.get_label() == CLASS_ALONE])
    return figure


def _heads(ax: Axes, setting: Setting, epoch: int) -> None:
    """A line per layer over the head epochs, and the loss of heads that read the class alone, where it is known."""
    band = setting.head_losses(epoch)
    for layer, color in layer_colors(setting).items():
        if layer in band.mean:
            draw_line(ax, band, layer, color=color, label=plain(layer))
    if setting.has("dib/loss", "dib/minimality"):
        entropy = setting.band("dib/loss").mean + setting.band("dib/minimality").mean  # equal for all layers
        value = entropy.mean(axis=1).get(epoch, math.nan)
        ax.axhline(value, linestyle="--", color="0.3", label=CLASS_ALONE)
    ax.set_xlabel("head epoch")
    y_axis(ax, "dib/loss")


def _leave_out_far_above(row: Sequence[Axes]) -> None:
    """The y-axis of a row as most head epochs need it; what lies above is said in words, with an arrow."""
    by_epoch: dict[float, list[float]] = {}
    lines = {ax: [line for line in ax.get_lines() if line.get_linestyle() == "-"] for ax in row}
    for line in itertools.chain(*lines.values()):
        for epoch, loss in zip(*line.get_data(), strict=True):
            by_epoch.setdefault(epoch, []).append(loss)
    if not by_epoch:
        return
    levels = [line.get_ydata()[0] for ax in row for line in ax.get_lines() if line not in lines[ax]]
    lows, highs = [min(losses) for losses in by_epoch.values()], [max(losses) for losses in by_epoch.values()]
    _, high = limits_of_most(lows, highs)
    if high == max(highs):
        return
    levels = list(filter(math.isfinite, levels))
    low, high = min([*lows, *levels]), max([high, *levels])
    space = MARGIN * (high - low)
    row[0].set_ylim(low - space, high + space)
    for ax in row:
        above = [loss for line in lines[ax] for loss in line.get_ydata() if loss > high]
        if above:
            text = f"↑ up to {short(float(f'{max(above):.3g}'))}"
            ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", backgroundcolor=(1, 1, 1, 0.7))
