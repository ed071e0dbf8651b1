"""What all figures share: fonts, colors, and text as the font can show it."""

from __future__ import annotations

import functools
import textwrap

import numpy as np

from figures.settings import Setting

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # less yellow, on white
STYLE = {
    "figure.dpi": 120,
    "figure.titlesize": 9,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}


class NothingToDraw(Exception):
    """Says in a sentence what a figure would need."""


def layer_colors(setting: Setting) -> dict[str, tuple]:
    """A color per layer, from light at the input to dark at the output."""
    return dict(zip(setting.layers, shades("viridis_r", len(setting.layers)), strict=True))


def shades(name: str, num: int) -> list[tuple]:
    """Colors at even steps of a perceptually uniform map, without its beginning: too light for white paper."""
    import matplotlib

    return [matplotlib.colormaps[name](position) for position in np.linspace(1, 0.12, num)[::-1]]


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
