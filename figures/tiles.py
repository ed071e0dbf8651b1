"""Pages of tiles: images and gradients side by side, in cells with a title each.

Places on a page are in inches, from its upper left corner downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures.pages import PAGE_WIDTH, bare_figure
from figures.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN = 0.45  # of a page, left and right together, for the label beside the tiles
BETWEEN_TILES, BETWEEN_CELLS = 0.025, 0.14
TITLE = 0.15  # height of a cell's title
LETTER = 0.052  # width of a title's letter, on average
FONT = 6.5
DPI = 150
ALERT = "#B03000"


class Cell(NamedTuple):
    """Tiles (H, W, 3) that belong together, with values from 0 to 1, and what stands above them."""

    tiles: Sequence[np.ndarray]
    title: str = ""
    is_marked: bool = False


class Panel(NamedTuple):
    """Cells of equally many tiles, and what is said beside and below them; tiles are `size` inches wide."""

    cells: Sequence[Cell]
    label: str
    caption: str
    size: float = 0.42

    @property
    def cell_size(self) -> tuple[float, float]:
        """Width and height in inches."""
        num, (height, width, _) = len(self.cells[0].tiles), self.cells[0].tiles[0].shape
        has_titles = any(cell.title for cell in self.cells)
        return num * self.size + (num - 1) * BETWEEN_TILES, self.size * height / width + TITLE * has_titles

    @property
    def num_columns(self) -> int:
        between = BETWEEN_CELLS if self.cells[0].title else BETWEEN_TILES
        return max(1, min(len(self.cells), int((PAGE_WIDTH - MARGIN + between) / (self.cell_size[0] + between))))

    @property
    def height(self) -> float:
        return -(-len(self.cells) // self.num_columns) * (self.cell_size[1] + BETWEEN_TILES)


def page_of_tiles(heading: str, panels: Sequence[Panel]) -> Figure:
    """Panels below each other."""
    captions = 0.35 * len(panels)
    figure = bare_figure(PAGE_WIDTH, 0.3 + captions + sum(panel.height for panel in panels), DPI)
    figure.suptitle(plain(heading, width=110), x=0.01, horizontalalignment="left")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[panel.height for panel in panels])[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel)
    return figure


def _draw(ax: Axes, panel: Panel) -> None:
    width, height = panel.cell_size
    between = BETWEEN_CELLS if panel.cells[0].title else BETWEEN_TILES
    for i, cell in enumerate(panel.cells):
        row, column = divmod(i, panel.num_columns)
        left, bottom = column * (width + between), (row + 1) * (height + BETWEEN_TILES) - BETWEEN_TILES
        for j, tile in enumerate(cell.tiles):
            x = left + j * (panel.size + BETWEEN_TILES)
            top = bottom - panel.size * tile.shape[0] / tile.shape[1]
            shrinks = tile.shape[1] > panel.size * DPI
            ax.imshow(tile, extent=(x, x + panel.size, bottom, top), interpolation="auto" if shrinks else "nearest")
        if cell.title:
            title = plain(shortened(cell.title, int((width + between / 2) / LETTER)))
            ax.text(left, bottom - height + TITLE - 0.02, title, fontsize=FONT, va="bottom",
                    color=ALERT if cell.is_marked else "black")  # fmt: skip
    ax.set(xlim=(0, PAGE_WIDTH - MARGIN), ylim=(panel.height, 0), aspect="equal", anchor="NW", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_ylabel(plain(panel.label, 40))
    ax.set_xlabel(plain(panel.caption, 125), loc="left")


def shortened(text: str, num: int) -> str:
    """A text of at most so many letters.

    >>> shortened("automobile", 6)
    'autom…'
    """
    return text if len(text) <= num else text[: max(1, num - 1)] + "…"


def gradient_tile(g: np.ndarray) -> np.ndarray:
    """A gradient (channels, H, W) as g / (2 max|g|) + ½, (H, W, 3): grey where it is zero."""
    largest = np.abs(g).max()
    return in_color(g / (2 * largest) + 0.5 if largest > 0 else np.full_like(g, 0.5))


def image_tile(image: np.ndarray) -> np.ndarray:
    """An image (channels, H, W) in bytes; one of other numbers from its lowest to its highest."""
    if image.dtype == np.uint8:
        return in_color(image / 255)
    low, high = image.min(), image.max()
    return in_color((image - low) / (high - low) if high > low else np.full_like(image, 0.5))


def in_color(values: np.ndarray) -> np.ndarray:
    """(channels, H, W) → (H, W, 3): what has not three channels is their mean, in grey."""
    values = values if len(values) == 3 else np.repeat(values.mean(0, keepdims=True), 3, axis=0)
    return values.transpose(1, 2, 0)
