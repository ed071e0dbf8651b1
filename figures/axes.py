"""Lines and the axes under them: labels, scales, ticks, and what lies outside."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.labels import label_of
from figures.settings import Band, Setting
from figures.style import NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.ticker import Locator

EPOCH_LABEL = "epoch (0: before training)"
MAX_NAMES = 24  # layer names that a legend or an axis holds
MAX_WRITTEN = 36  # values of a matrix that have room for their digits
MAX_MARKED = 30  # points of a line that are marked; more would blur dashes
OUTSIDE = 0.05  # share of the epochs, or one, that an axis may leave outside where they would stretch it threefold
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def band_of(setting: Setting, measure: str) -> Band:
    """A measure's values over the setting's runs: geometric means where its axis is logarithmic."""
    return setting.band(measure, log=label_of(measure).log)


def draw_line(ax: Axes, band: Band, column: str | int, **style: object) -> None:
    """The mean; where runs differ, a band from the lowest to the highest."""
    x = band.mean[column].dropna().index.to_numpy()
    # Without their last digits, as the rounding errors of a constant would fill the whole axis.
    mean, low, high = ([float(f"{value:.9g}") for value in table[column].dropna()] for table in band)
    ax.plot(x, mean, **{"marker": "o" if len(x) <= MAX_MARKED else ""} | style)
    if low != high:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def not_measured_panel(ax: Axes, setting: Setting, measure: str) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
    ax.tick_params(labelbottom=False)
    y_axis(ax, measure)


def y_axis(ax: Axes, measure: str) -> None:
    """Label, unit and scale of a measure."""
    label = label_of(measure)
    ax.set_ylabel(textwrap.fill(label.axis, 30))
    if label.log:
        log_axis(ax)
    if label.scale != 1:
        ax.yaxis.set_major_formatter(in_units_of(label.scale))


def x_axis(ax: Axes, measure: str) -> None:
    label = label_of(measure)
    ax.set_xlabel(label.axis)
    if label.scale != 1:
        ax.xaxis.set_major_formatter(in_units_of(label.scale))


def in_units_of(scale: float) -> Callable[[float, object], str]:
    """Writes the numbers beside ticks: 0.002 in thousandths as 2."""
    return lambda value, position=None: short(value / scale)


def short(value: float) -> str:
    """A number as one writes it: 0.05, −3, 2·10⁻⁷."""
    text = f"{value:.6g}"
    if "e" in text:
        factor, _, exponent = text.partition("e")
        text = f"{'' if factor == '1' else factor + '·'}10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return text.replace("-", "−")


def log_axis(ax: Axes) -> None:
    """A logarithmic y-axis, if there is anything above zero to show on it."""
    if math.isfinite(ax.dataLim.minposy):
        ax.set_yscale("log")
        log_ticks_on(ax.yaxis)


def log_ticks_on(axis: Axis) -> None:
    from matplotlib.ticker import NullFormatter

    axis.set_major_locator(_log_locator()())
    axis.set_major_formatter(in_units_of(1))
    axis.set_minor_formatter(NullFormatter())


@functools.cache
def _log_locator() -> type[Locator]:
    """Ticks that follow the axis wherever its limits go."""
    from matplotlib.ticker import LogLocator

    class FewTicks(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return log_ticks(*sorted((vmin, vmax)))

    return FewTicks


def log_ticks(low: float, high: float) -> list[float]:
    """Two numbers or more between low and high: powers of ten, else their doubles and halves too, else even steps.

    >>> log_ticks(0.5, 2000)
    [1.0, 10.0, 100.0, 1000.0]
    >>> log_ticks(3, 30)
    [5.0, 10.0, 20.0]
    """
    from matplotlib.ticker import MaxNLocator

    low = max(low, 1e-300)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    decades = [float(f"1e{power}") for power in powers if low <= float(f"1e{power}") <= high]
    if len(decades) >= 3:
        return thin(decades, 6)
    between = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    between = [tick for tick in between if low <= tick <= high]
    if len(between) >= 3:
        return between
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def log_if_wide(ax: Axes) -> None:
    """A loss that falls to a hundredth is readable only on a logarithmic axis."""
    if is_wide([value for line in ax.get_lines() for value in line.get_ydata() if value > 0]):
        log_axis(ax)


def is_wide(values: Sequence[float]) -> bool:
    """Whether all values are above zero and the largest is more than a hundred times the smallest."""
    return len(values) > 0 and 0 < 100 * min(values) < max(values)


def limits_of_most(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """What an axis should hold of rows that reach from lows to highs each: all, or all but the few farthest rows.

    At each end one row in twenty may stay outside, one at least, if two thirds of the axis would be theirs alone.
    """
    lows, highs = (sorted(value for value in values if math.isfinite(value)) for values in (lows, highs))
    low, high = lows[0], highs[-1]
    few = max(1, int(OUTSIDE * len(highs)))
    if len(highs) > few + 1:
        if 0 < highs[-1 - few] - low < (high - low) / 3:
            high = highs[-1 - few]
        if 0 < high - lows[few] < (high - low) / 3:
            low = lows[few]
    return low, high


def epoch_axis(ax: Axes, epochs: Sequence[int]) -> None:
    """Epochs at even steps of the logarithm get an axis on which these are even."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(EPOCH_LABEL)
    beside = [line for other in ax.get_shared_x_axes().get_siblings(ax) for line in other.get_lines()]
    epochs = sorted({*epochs, *(epoch for line in beside for epoch in line.get_xdata())})  # one axis of all panels
    if len(epochs) == 1:
        ax.set_xticks(epochs)
    elif len(epochs) > 4 and epochs[len(epochs) // 2] < max(epochs) / 4:
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter("{x:.0f}")
    else:
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def depth_axis(ax: Axes, layers: Sequence[str]) -> None:
    ticks = thin(list(enumerate(layers, start=1)), MAX_NAMES)
    crowded = {"rotation": 90, "fontsize": 7} if sum(map(len, layers)) > 25 else {}
    ax.set_xticks([depth for depth, _ in ticks], [plain(layer) for _, layer in ticks], **crowded)
    ax.set_xlabel("layer, in network order")


def matrix(ax: Axes, values: np.ndarray, rows: Sequence = (), columns: Sequence | None = None) -> object:
    """Values from 0 to 1 as squares, the first row on top, grey where undefined; by default columns as rows.

    Rows and columns without names are counted from 0. Few values are written into their squares.
    """
    mesh = ax.pcolormesh(values, vmin=0, vmax=1, cmap="cividis")
    columns = rows if columns is None else columns
    for axis, names, num in ((ax.yaxis, rows, len(values)), (ax.xaxis, columns, len(values.T))):
        ticks = thin(list(enumerate(names or range(num))), MAX_NAMES if names else 10)
        axis.set_ticks([i + 0.5 for i, _ in ticks], [plain(str(name)) for _, name in ticks])
    ax.tick_params(axis="x", labelrotation=90 if any(isinstance(name, str) for name in columns) else 0)
    ax.set(aspect="equal", facecolor="0.85")
    ax.grid(False)
    ax.invert_yaxis()
    for (i, j), value in np.ndenumerate(values) if values.size <= MAX_WRITTEN else ():
        color = "white" if value < 0.5 else "black"  # of the map's ends, dark and light
        ax.text(j + 0.5, i + 0.5, short(round(value, 2)), ha="center", va="center", color=color, fontsize=7)
    return mesh


def thin(items: list, limit: int) -> list:
    """At most `limit` of the items, at even steps, the last among them."""
    step = max(1, math.ceil(len(items) / limit))
    return items[::-step][::-1]


def spread(items: Sequence, num: int, space: Callable = np.geomspace) -> list:
    """`num` of the items, from the first to the last, in steps that `space` makes: by default denser at the start."""
    positions = space(1, len(items), num).round().astype(int) if items else []
    return [items[position - 1] for position in dict.fromkeys(positions)]


def chosen_epochs(measured: list[int], wanted: Sequence[int] | None, num: int, space: Callable) -> list[int]:
    """The wanted epochs, else `num` of those measured, from the first to the last."""
    if wanted is None:
        return spread(measured, num, space)
    known = [epoch for epoch in wanted if epoch in measured]
    if not known:
        raise NothingToDraw(f"Measured epochs are {', '.join(map(str, thin(measured, 12)))}; not {wanted}.")
    return known
