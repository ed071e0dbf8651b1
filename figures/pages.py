"""Pages: panels in rows and columns with legends beside them, and the files they are written to.

A page is as wide as a reader's screen shows at full size; more settings make it longer.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import MAX_NAMES, not_measured_panel, thin
from figures.labels import not_measured
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import STYLE, NothingToDraw, layer_colors, plain
from run.errors import UserError

if TYPE_CHECKING:  # matplotlib takes half a second to import, which is done once there is something to draw
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE_WIDTH = 8.3  # inches: 830 pixels, as wide as GitHub shows a picture
LEGEND_WIDTH = 1.3  # inches
COLUMNS = 3  # of settings
LETTERS_PER_INCH = 13  # of a title
LINE = 12  # points that a line of a legend takes
TEX = re.compile(r"\\[a-z]+|[{}$^_]")  # what takes no room


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Gives a figure the program's style, whatever the user's, and a sentence if there is nothing to draw."""

    @functools.wraps(draw)
    def styled(*args: object, **kwargs: object) -> Figure:
        from matplotlib import style

        with style.context(["default", STYLE]):
            try:
                return draw(*args, **kwargs)
            except NothingToDraw as nothing:
                return sentence(str(nothing))

    return styled


def grid(
    runs: Run | Sequence[Run],
    title: str,
    measures: Sequence[str],
    draw: Callable[[Axes, Setting, str], None],
    *,
    needs: Sequence[str] = (),
    legend: Callable[[Figure, dict[Axes, Setting]], None] | None = None,
    share: bool = True,
    sums_up: bool = True,
    height: float = 2.0,
) -> Figure:
    """A row of panels per measure that was made, a column per setting; what exceeds three columns goes on below.

    `share`: a measure has one y-axis, a setting one x-axis. `sums_up`: lines are means over runs. `legend` comes last.
    """
    comparison = compare(runs)
    settings = comparison.settings
    rows = [measure for measure in measures if any(setting.has(measure, *needs) for setting in settings)]
    if not rows:
        raise NothingToDraw(not_measured([*measures, *needs]))
    num_columns = min(len(settings), COLUMNS)
    num_blocks = math.ceil(len(settings) / num_columns)
    heading = comparison.heading(title, sums_up=sums_up)
    figure, axes = new_page(num_blocks * len(rows), num_columns, heading, height=height)
    blocks = axes.reshape(num_blocks, len(rows), num_columns).swapaxes(1, 2).reshape(-1, len(rows))
    for panels, setting in zip(blocks, settings, strict=False):
        panels[0].set_title(plain(comparison.name(setting), width=30))
        for i, (ax, measure) in enumerate(zip(panels, rows, strict=True)):
            if share:
                _share(ax, panels[0], blocks[0, i])
            (draw if setting.has(measure, *needs) else not_measured_panel)(ax, setting, measure)
            if share:
                _label_outer(ax, is_left=ax in axes[:, 0], is_last=i == len(rows) - 1)
    remove(blocks[len(settings) :].flat)
    if legend:
        legend(figure, {ax: setting for panels, setting in zip(blocks, settings, strict=False) for ax in panels})
    return figure


def _share(ax: Axes, above: Axes, beside: Axes) -> None:
    if ax is not above:
        ax.sharex(above)
    if ax is not beside:
        ax.sharey(beside)


def _label_outer(ax: Axes, *, is_left: bool, is_last: bool) -> None:
    """Labels at the left of a page and under each setting alone."""
    if not is_last:
        ax.tick_params(labelbottom=False)
        ax.set_xlabel("")
    if not is_left:
        ax.tick_params(labelleft=False)
        ax.set_ylabel("")


def remove(axes: Sequence[Axes]) -> None:
    for ax in axes:
        ax.remove()


def new_page(
    num_rows: int, num_columns: int, title: str, *, width: float = 3.6, height: float = 2.0
) -> tuple[Figure, np.ndarray]:
    """Panels, each `width` inches wide or as wide as the page allows, with room for a legend on the right."""
    page_width = min(PAGE_WIDTH, width * num_columns + LEGEND_WIDTH)
    figure = bare_figure(page_width, height * num_rows + 0.5)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    title = plain(title, width=int(LETTERS_PER_INCH * (page_width - LEGEND_WIDTH)))
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure, axes


def sentence(text: str) -> Figure:
    """A figure that only says something."""
    figure = bare_figure(6, 0.6)
    ax = figure.subplots()
    ax.set_axis_off()
    ax.text(0.5, 0.5, plain(text, width=90), ha="center", va="center")
    return figure


def bare_figure(width: float, height: float, dpi: int | None = None) -> Figure:
    """A figure that belongs to no window and to no pyplot, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_beside(figure: Figure, handles: Sequence[Artist]) -> None:
    """On the right, in two columns if one is too short; then the page grows."""
    labels = [handle.get_label() for handle in handles]
    points = LINE * sum(label.count("\n") + 1 for label in labels)
    room = 72 * figure.get_figheight() - 30
    num_columns = 1 if points <= room else 2
    figure.set_figwidth(min(PAGE_WIDTH, figure.get_figwidth() + (num_columns - 1) * LEGEND_WIDTH))
    figure.set_figheight(max(figure.get_figheight(), (points / num_columns + 30) / 72))
    figure.legend(handles, labels, loc="outside right upper", ncols=num_columns)


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Under the panels, in as many columns as the page has room for; the page grows by its height."""
    labels = [handle.get_label() for handle in handles]
    longest = max((len(TEX.sub("", line)) for label in labels for line in label.split("\n")), default=1)
    num_columns = max(1, int(figure.get_figwidth() * LETTERS_PER_INCH / (longest + 8)))
    num_lines = math.ceil(sum(label.count("\n") + 1 for label in labels) / num_columns) + 1
    figure.set_figheight(figure.get_figheight() + num_lines * LINE / 72)
    figure.legend(handles, labels, loc="outside lower left", ncols=num_columns)


def layer_legend(figure: Figure, panels: dict[Axes, Setting]) -> None:
    """The colors of the layers, under the name of the setting where networks differ."""
    colors = {setting: thin(list(layer_colors(setting).items()), MAX_NAMES) for setting in panels.values()}
    color_legend(figure, {setting: dict(of_layers) for setting, of_layers in colors.items()})


def epoch_legend(figure: Figure, panels: dict[Axes, Setting]) -> None:
    """The colors of the epochs, under the name of the setting where epochs differ."""
    colors: dict[Setting, dict[str, object]] = {}
    for ax, setting in panels.items():
        lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
        colors.setdefault(setting, {}).update((line.get_label(), line.get_color()) for line in lines)
    color_legend(figure, colors)


def color_legend(figure: Figure, colors: dict[Setting, dict[str, object]], others: Sequence[Artist] = ()) -> None:
    """What the colors mean, once for all settings of which they mean the same; then the other lines."""
    from matplotlib.lines import Line2D

    kinds = {tuple(of_setting.items()): setting for setting, of_setting in reversed(colors.items()) if of_setting}
    entries = []
    for kind, setting in reversed(kinds.items()):
        if len(kinds) > 1:
            entries.append(Line2D([], [], linestyle="", label=plain(setting.label, width=24)))
        entries += [Line2D([], [], color=color, label=plain(name)) for name, color in kind]
    legend_beside(figure, [*entries, *others])


def write(figure: Figure, path: Path) -> Path:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(unfinished, format=path.suffix[1:])
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return path
