"""What all figures share: fonts, colors, and text as the font can show it."""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np

from figures.settings import Setting

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58200", "#3A97CF", "#000000")  # two darker, on white
STYLE = {
    "figure.dpi": 100,
    "figure.titlesize": 9,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (-3, 5),
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}


class NothingToDraw(Exception):
    """Says in a sentence what a figure would need."""


def layer_colors(setting: Setting) -> dict[str, tuple]:
    """A color per layer, from light at the input to dark at the output."""
    return dict(zip(setting.layers, shades("viridis", len(setting.layers)), strict=True))


def shades(name: str, num: int) -> list[tuple]:
    """Colors from light to dark at even steps of a perceptually uniform map, none too light for white paper."""
    import matplotlib

    lightest = {"viridis": 0.65, "plasma": 0.70}[name]
    return [matplotlib.colormaps[name](position) for position in np.linspace(0, lightest, num)[::-1]]


def kind_color(kind: int) -> tuple:
    """A color per class or cluster, twenty of them in turn; grey for what is in no cluster."""
    import matplotlib

    order = (kind % 20) * 2 % 20 + kind % 20 // 10  # the ten strong ones first
    return (0.75, 0.75, 0.75, 1.0) if kind < 0 else matplotlib.colormaps["tab20"](order)


def setting_styles(settings: Sequence[Setting]) -> list[dict[str, object]]:
    """Color and dashes per setting, no two alike.

    Many settings get a color per value of the flag that takes the most values, light to dark if these are numbers;
    dashes tell apart what shares a color.
    """
    if len(settings) <= len(OKABE_ITO):
        colors = list(OKABE_ITO[: len(settings)])
    else:
        by_flag = list(zip(*(setting.values for setting in settings), strict=True)) or [range(len(settings))]
        values = max(by_flag, key=lambda values: len(set(values)))
        levels = list(dict.fromkeys(values))
        if all(isinstance(level, float) for level in levels):
            of_level = dict(zip(sorted(levels), shades("viridis", len(levels)), strict=True))
        else:
            of_level = {level: OKABE_ITO[i % len(OKABE_ITO)] for i, level in enumerate(levels)}
        colors = [of_level[value] for value in values]
    used: Counter = Counter()
    styles = []
    for color in colors:
        styles.append({"color": color, "linestyle": _dashes(used[color])})
        used[color] += 1
    return styles


def _dashes(i: int) -> object:
    """The i-th way to break a line: not at all, dashes, dots, a dash and one dot, a dash and two dots, …"""
    return ["-", (0, (5, 1.5)), (0, (1, 1))][i] if i < 3 else (0, (5, 1, *(1, 1) * (i - 2)))


def plain(text: str, width: int = 200) -> str:
    """Text from outside, wrapped, without mathematics and letters that the font lacks."""
    letters = _letters()
    text = "".join(letter if ord(letter) in letters else "?" for letter in text).replace("$", r"\$")
    text = textwrap.fill(text, width, break_on_hyphens=False)
    return " " + text if text.startswith("_") else text  # an underscore hides a label from the legend


@functools.cache
def _letters() -> frozenset[int]:
    """The letters of matplotlib's own font."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
