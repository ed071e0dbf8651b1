"""Pages: panels in rows and columns with legends beside them, and the files they are written to."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import UserError
from figures.axes import MAX_NAMES, not_measured, thin
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import STYLE, NothingToDraw, layer_colors, plain

if TYPE_CHECKING:  # matplotlib takes half a second to import, which is done once there is something to draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND_WIDTH = 1.4  # inches


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Gives a figure this module's style, whatever the user's, and a sentence if there is nothing to draw."""

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
    legend: str = "layers",
    **page: object,
) -> Figure:
    """A row of panels per measure that was made, a column per setting. `legend`: layers, panels or none."""
    comparison = compare(runs)
    settings = comparison.settings
    rows = [measure for measure in measures if any(setting.has(measure, *needs) for setting in settings)]
    if not rows:
        raise NothingToDraw(f"Not measured: {', '.join([*measures, *needs])}.")
    figure, axes = new_page(len(rows), len(settings), comparison.heading(title), **page)
    for ax, (measure, setting) in zip(axes.flat, itertools.product(rows, settings), strict=True):
        (draw if setting.has(measure, *needs) else not_measured)(ax, setting, measure)
        if legend == "panels" and ax.get_lines():
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        if page.get("share", True):
            ax.label_outer()
    for ax, setting in zip(axes[0], settings, strict=True):
        ax.set_title(plain(comparison.name(setting), width=45))
    if legend == "layers":
        layer_legend(figure, settings)
    return figure


def new_page(
    num_rows: int, num_columns: int, title: str, *, width: float = 3.2, height: float = 2.3, share: bool = True
) -> tuple[Figure, np.ndarray]:
    """Panels with room for a legend on the right."""
    figure = _new_figure(width * num_columns + LEGEND_WIDTH, height * num_rows + 0.5)
    shared = {"sharex": "col", "sharey": "row"} if share else {}
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **shared)
    letters_per_inch = 13  # of the title
    title = plain(title, width=int(letters_per_inch * width * num_columns))
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure, axes


def sentence(text: str) -> Figure:
    """A figure that only says something."""
    figure = _new_figure(6, 0.6)
    ax = figure.subplots()
    ax.set_axis_off()
    ax.text(0.5, 0.5, plain(text, width=90), ha="center", va="center")
    return figure


def _new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window and to no pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_beside(figure: Figure, handles: Sequence, labels: Sequence[str]) -> None:
    """Beside the panels; the page grows if one column is too short."""
    num_lines = sum(label.count("\n") + 1 for label in labels)
    lines_per_column = int(figure.get_figheight() * 72 / 11)  # points; a line of 7-point letters takes 11
    num_columns = math.ceil(num_lines / lines_per_column)
    figure.set_figwidth(figure.get_figwidth() + (num_columns - 1) * LEGEND_WIDTH)
    figure.legend(handles, labels, loc="outside right upper", ncols=num_columns)


def layer_legend(figure: Figure, settings: Sequence[Setting]) -> None:
    """The colors of the layers, under the name of the setting where networks differ."""
    from matplotlib.lines import Line2D

    networks = {tuple(setting.layers): setting for setting in reversed(settings)}
    entries = []
    for setting in reversed(networks.values()):
        if len(networks) > 1:
            entries.append(Line2D([], [], linestyle="", label=plain(setting.label, width=24)))
        for layer, color in thin(list(layer_colors(setting).items()), MAX_NAMES):
            entries.append(Line2D([], [], color=color, label=plain(layer)))
    legend_beside(figure, entries, [entry.get_label() for entry in entries])


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
