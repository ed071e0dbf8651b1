"""One page of the most telling panels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.collapse import equiseparation_over_depth
from figures.layerwise import draw_ways, over_epochs
from figures.pages import layer_legend, new_page, styled
from figures.runs import Run
from figures.settings import compare
from figures.style import NothingToDraw
from figures.training import loss_or_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def summary(runs: Run | Sequence[Run]) -> Figure:
    """One page with the most telling panels of a run, or of several of one setting."""
    comparison = compare(runs)
    setting = comparison.settings[0]
    nc1_over_depth = functools.partial(equiseparation_over_depth, num=3)
    candidates = [
        (loss_or_accuracy, "loss"),
        (loss_or_accuracy, "acc"),
        (over_epochs, "rank/effective/test"),
        (over_epochs, "nc1/train"),
        (over_epochs, "nc1/test"),
        (over_epochs, "dib/minimality"),
        (nc1_over_depth, "nc1/train"),
        (nc1_over_depth, "nc1/test"),
        (draw_ways, "dib/sufficiency/test"),
    ]
    panels = [(draw, measure) for draw, measure in candidates if setting.has(measure)]
    if not panels:
        raise NothingToDraw("No epoch was logged.")
    num_rows, num_columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure, axes = new_page(num_rows, num_columns, comparison.heading("Summary"), share=False)
    for ax, (draw, measure) in zip(axes.flat, panels, strict=False):
        draw(ax, setting, measure)
        if draw in (loss_or_accuracy, nc1_over_depth):
            ax.legend(fontsize=6, frameon=True, edgecolor="none")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    if setting.layers:
        layer_legend(figure, [setting])
    return figure
