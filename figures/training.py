"""Loss and accuracy while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.axes import draw_line, epoch_axis, log_if_wide, y_axis
from figures.pages import legend_beside, new_page, styled
from figures.runs import SPLITS, Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def training_curves(runs: Run | Sequence[Run]) -> Figure:
    """Loss and accuracy over epochs, a color per setting; strokes at the bottom mark the measured epochs."""
    comparison = compare(runs)
    if not any(setting.has(quantity) for setting in comparison.settings for quantity in ("loss", "acc")):
        raise NothingToDraw("Neither loss nor accuracy was logged.")
    figure, axes = new_page(1, 2, comparison.heading("Training"), share=False)
    for ax, quantity in zip(axes.flat, ("loss", "acc"), strict=True):
        for setting, color in zip(comparison.settings, OKABE_ITO, strict=False):
            loss_or_accuracy(ax, setting, quantity, color, name=comparison.name(setting))
        _mark_measured(ax, comparison.settings)
    legend_beside(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def loss_or_accuracy(ax: Axes, setting: Setting, quantity: str, color: str = OKABE_ITO[0], name: str = "") -> None:
    """Loss or accuracy: train dashed, test solid."""
    from matplotlib.ticker import PercentFormatter

    band = setting.band(quantity)
    for split, linestyle in zip(SPLITS, ("--", "-"), strict=True):
        if split in band.mean:
            label = plain(f"{name}, {split}" if name else split, width=30)
            draw_line(ax, band, split, color=color, linestyle=linestyle, label=label)
    epoch_axis(ax, band.mean.index)
    y_axis(ax, quantity)
    if quantity == "acc":
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    else:
        log_if_wide(ax)


def _mark_measured(ax: Axes, settings: Sequence[Setting]) -> None:
    epochs = sorted({epoch for setting in settings for epoch in setting.measured_epochs})
    where = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    if epochs:
        ax.plot(epochs, [0] * len(epochs), "|", color="0.3", markersize=4, label="measured epoch", **where)
