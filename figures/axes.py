"""Lines and the axes under them: labels, scales, ticks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from figures.labels import label_of
from figures.settings import Band, Setting
from figures.style import NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

EPOCH_LABEL = "epoch (0: before training)"
MAX_NAMES = 24  # layer names that a legend or an axis holds
MAX_MARKED = 30  # points of a line that are marked; more would blur dashes


def band_of(setting: Setting, measure: str) -> Band:
    return setting.band(measure, log=label_of(measure).log)


def draw_line(ax: Axes, band: Band, column: str | int, **style: object) -> None:
    """The mean; where runs differ, a band from the lowest to the highest."""
    x = band.mean[column].dropna().index.to_numpy()
    # Without their last digits, as the rounding errors of a constant would fill the whole axis.
    mean, low, high = ([float(f"{value:.9g}") for value in table[column].dropna()] for table in band)
    ax.plot(x, mean, marker="o" if len(x) <= MAX_MARKED else "", **style)
    if low != high:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def y_axis(ax: Axes, measure: str) -> None:
    text, log = label_of(measure)
    ax.set_ylabel(textwrap.fill(text, 32))
    if log:
        log_axis(ax)


def log_axis(ax: Axes) -> None:
    if math.isfinite(ax.dataLim.minposy):  # there is a value above zero
        ax.set_yscale("log")
        log_ticks(ax.yaxis, *ax.get_ylim())


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at powers of ten, and between these where there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def log_if_wide(ax: Axes) -> None:
    """A loss that falls to a hundredth is readable only on a logarithmic axis."""
    values = [value for line in ax.get_lines() for value in line.get_ydata() if value > 0]
    if values and max(values) > 100 * min(values):
        log_axis(ax)


def epoch_axis(ax: Axes, epochs: Sequence[int]) -> None:
    """Epochs at even steps of the logarithm get an axis on which these are even."""
    ax.set_xlabel(EPOCH_LABEL)
    if len(epochs) == 1:
        ax.set_xticks(epochs)
    elif len(epochs) > 4 and sorted(epochs)[len(epochs) // 2] < max(epochs) / 4:
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter("{x:.0f}")
    else:
        ax.locator_params(axis="x", integer=True)


def depth_axis(ax: Axes, layers: Sequence[str]) -> None:
    ticks = thin(list(enumerate(layers, start=1)), MAX_NAMES)
    crowded = {"rotation": 90, "fontsize": 7} if sum(map(len, layers)) > 30 else {}
    ax.set_xticks([depth for depth, _ in ticks], [plain(layer) for _, layer in ticks], **crowded)
    ax.set_xlabel("layer, in network order")


def not_measured(ax: Axes, setting: Setting, measure: str) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
    ax.tick_params(labelbottom=False)
    y_axis(ax, measure)


def thin(items: list, limit: int) -> list:
    """At most `limit` of the items, at even steps, the last among them."""
    step = max(1, math.ceil(len(items) / limit))
    return items[::-step][::-1]


def chosen_epochs(measured: list[int], wanted: Sequence[int] | None, num: int, space: Callable) -> list[int]:
    """The wanted epochs, else `num` of those measured, from the first to the last."""
    if wanted is None:
        positions = space(1, len(measured), num).round().astype(int)
        return [measured[position - 1] for position in dict.fromkeys(positions)]
    known = [epoch for epoch in wanted if epoch in measured]
    if not known:
        raise NothingToDraw(f"Measured epochs are {', '.join(map(str, thin(measured, 12)))}; not {wanted}.")
    return known
