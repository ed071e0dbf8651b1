"""Loss and accuracy while a network trains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.axes import draw_line, epoch_axis, log_if_wide, y_axis
from figures.pages import legend_below, legend_beside, new_page, styled
from figures.runs import SPLITS, Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, plain, setting_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = ("loss", "acc")
BOTH = {"train": "--", "test": "-"}  # of two sets in one panel
MAX_STROKES = 50  # more would be a bar


@styled
def training_curves(runs: Run | Sequence[Run]) -> Figure:
    """Loss and accuracy over epochs, a color per setting; strokes at the bottom mark the epochs that were measured.

    Train dashed, test solid; of more settings than there are colors the two sets have panels of their own, so that
    colors and dashes tell the settings apart. Without strokes every epoch was measured, or more than fifty were.
    """
    comparison = compare(runs)
    settings = comparison.settings
    if not any(setting.has(quantity) for setting in settings for quantity in QUANTITIES):
        raise NothingToDraw("Neither loss nor accuracy was logged.")
    sets = [SPLITS] if len(settings) <= len(OKABE_ITO) else [(split,) for split in SPLITS]
    figure, axes = new_page(len(sets), 2, comparison.heading("Training"), height=2.4)
    for ax, (splits, quantity) in zip(axes.flat, itertools.product(sets, QUANTITIES), strict=True):
        bare = {"marker": ""} if len(sets) > 1 else {}  # points would hide the dashes
        for setting, style in zip(settings, setting_styles(settings), strict=True):
            loss_or_accuracy(ax, setting, quantity, splits, comparison.name(setting), **style, **bare)
        if len(sets) > 1:
            ax.set_title(f"{splits[0]} set")
        if quantity == "loss":
            loss_axis(ax, *(run for setting in settings for run in setting.runs))
        mark_measured(ax, settings)
    handles = [handle for handle in axes[0, 0].get_legend_handles_labels()[0] if handle.get_label()]
    (legend_beside if len(settings) == 1 else legend_below)(figure, handles)
    return figure


def loss_or_accuracy(
    ax: Axes,
    setting: Setting,
    quantity: str,
    splits: Sequence[str] = SPLITS,
    name: str = "",
    **style: object,
) -> None:
    """Of both sets train dashed, test solid; of a single one as `style` has it."""
    band = setting.band(quantity)
    style = {"color": OKABE_ITO[0], "linestyle": "-"} | style
    for split in splits:
        if split in band.mean:
            both = {"linestyle": BOTH[split]} if len(splits) > 1 else {}
            label = plain(", ".join(filter(None, [name, split if both else ""])), width=40)
            draw_line(ax, band, split, label=label, **style | both)
    epoch_axis(ax, band.mean.index)
    if quantity == "loss":
        loss_axis(ax, *setting.runs)
        log_if_wide(ax)
    else:
        y_axis(ax, quantity)


def loss_axis(ax: Axes, *runs: Run) -> None:
    """Label of the loss with which these runs were trained, if it is one and the same."""
    losses = {str(run.hparams.get("loss", "cross-entropy")) for run in runs}
    y_axis(ax, {"cross-entropy": "loss", "mse": "loss mse"}.get(" ".join(losses), "losses"))


def mark_measured(ax: Axes, settings: Sequence[Setting]) -> None:
    """Strokes at the measured epochs, if these are some of all."""
    epochs = sorted({epoch for setting in settings for epoch in setting.measured_epochs})
    trained = {epoch for setting in settings for run in setting.runs for epoch in run.metrics.index}
    where = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    if epochs and len(epochs) <= MAX_STROKES and trained - {*epochs}:
        ax.plot(epochs, [0] * len(epochs), "|", color="0.3", markersize=4, label="measured epoch", **where)
