"""One page of the most telling panels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.collapse import equiseparation_over_depth, fit_legend
from figures.layerwise import over_epochs, share_over_epochs, ways
from figures.pages import layer_legend, new_page, remove, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw
from figures.training import loss_or_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

nc1_over_depth = functools.partial(equiseparation_over_depth, num=3)
PANELS = {
    "Loss": (loss_or_accuracy, "loss"),
    "Accuracy": (loss_or_accuracy, "acc"),
    "Effective rank": (over_epochs, "rank/effective/test"),
    "NC1 in training, train set": (over_epochs, "nc1/train"),
    "NC1 in training, test set": (over_epochs, "nc1/test"),
    "Minimality": (over_epochs, "dib/minimality"),
    "NC1 over depth, train set": (nc1_over_depth, "nc1/train"),
    "NC1 over depth, test set": (nc1_over_depth, "nc1/test"),
    "Clusters: coverage": (share_over_epochs, "clusters/coverage/test"),
    "Clusters: purity": (share_over_epochs, "clusters/purity/test"),
    "Clusters: purity, noise as wrong": (share_over_epochs, "clusters/purity_all/test"),
    "From first (○) to last epoch (●)": (ways, "dib/sufficiency/test"),
}
COLUMNS = 3


@styled
def summary(runs: Run | Sequence[Run]) -> Figure:
    """One page with the most telling panels of a run, or of several of one setting: of more settings, the first."""
    comparison = compare(runs)
    setting = comparison.settings[0]
    panels = {title: (draw, _of_some_set(setting, measure)) for title, (draw, measure) in PANELS.items()}
    panels = {title: (draw, measure) for title, (draw, measure) in panels.items() if setting.has(measure)}
    if not panels:
        raise NothingToDraw("No epoch was logged.")
    num_rows, num_columns = math.ceil(len(panels) / COLUMNS), min(COLUMNS, len(panels))
    first = f"Summary of the first of {comparison.num_settings} settings, {setting.title}"
    heading = comparison.heading("Summary" if comparison.num_settings == 1 else first)
    figure, axes = new_page(num_rows, num_columns, heading, height=2.3)
    for ax, (title, (draw, measure)) in zip(axes.flat, panels.items(), strict=False):
        draw(ax, setting, measure)
        ax.set_title(title)
        if draw is loss_or_accuracy:
            ax.legend()
        if draw is nc1_over_depth:
            fit_legend(ax, fontsize=7, title_fontsize=7, frameon=True, edgecolor="none", framealpha=0.8)
    remove(axes.flat[len(panels) :])
    if setting.layers:
        layer_legend(figure, {axes[0, 0]: setting})
    return figure


def _of_some_set(setting: Setting, measure: str) -> str:
    """Clusters of the train set where none are looked for in the test set, which they are by default."""
    of_train = measure.replace("/test", "/train")
    return of_train if measure.startswith("clusters/") and not setting.has(measure) else measure
