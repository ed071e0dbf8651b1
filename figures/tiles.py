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
CAPTION, LETTERS = 0.13, 128  # height of its line, and how many are in it
DPI = 150
ALERT = "#B03000"


class Cell(NamedTuple):
    """Tiles (H, W, 3) that belong together, with values from 0 to 1, and what stands above them."""

    tiles: Sequence[np.ndarray]
    title: str = ""
    is_marked: bool = False


class Panel(NamedTuple):
    """Cells of equally many tiles, and what is said beside and below them.

    Tiles are `size` inches wide at least; where cells fill a row, as wide as the page allows.
    """

    cells: Sequence[Cell]
    label: str
    caption: str
    size: float = 0.42

    @property
    def between(self) -> float:
        """The space between cells."""
        return BETWEEN_CELLS if self.cells[0].title else BETWEEN_TILES

    @property
    def num_columns(self) -> int:
        width = self._width_of(self.size)
        return max(1, min(len(self.cells), int((PAGE_WIDTH - MARGIN + self.between) / (width + self.between))))

    @property
    def tile_size(self) -> float:
        """Width of a tile."""
        num, columns = len(self.cells[0].tiles), self.num_columns
        free = PAGE_WIDTH - MARGIN - (columns - 1) * self.between - columns * (num - 1) * BETWEEN_TILES
        return max(self.size, min(free / (columns * num), 1.3 * self.size))

    @property
    def cell_size(self) -> tuple[float, float]:
        """Width and height."""
        height, width, _ = self.cells[0].tiles[0].shape
        has_titles = any(cell.title for cell in self.cells)
        return self._width_of(self.tile_size), self.tile_size * height / width + TITLE * has_titles

    @property
    def height(self) -> float:
        return -(-len(self.cells) // self.num_columns) * (self.cell_size[1] + BETWEEN_TILES)

    def _width_of(self, size: float) -> float:
        """Of a cell with tiles of this size."""
        num = len(self.cells[0].tiles)
        return num * size + (num - 1) * BETWEEN_TILES


def page_of_tiles(heading: str, panels: Sequence[Panel]) -> Figure:
    """Panels below each other."""
    captions = sum(0.2 + CAPTION * (plain(panel.caption, LETTERS).count("\n") + 1) for panel in panels)
    figure = bare_figure(PAGE_WIDTH, 0.28 + captions + sum(panel.height for panel in panels), DPI)
    figure.suptitle(plain(heading, width=110), x=0.01, horizontalalignment="left")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[panel.height for panel in panels])[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel)
    return figure


def _draw(ax: Axes, panel: Panel) -> None:
    (width, height), size = panel.cell_size, panel.tile_size
    for i, cell in enumerate(panel.cells):
        row, column = divmod(i, panel.num_columns)
        left, bottom = column * (width + panel.between), (row + 1) * (height + BETWEEN_TILES) - BETWEEN_TILES
        for j, tile in enumerate(cell.tiles):
            x, top = left + j * (size + BETWEEN_TILES), bottom - size * tile.shape[0] / tile.shape[1]
            shrinks = tile.shape[1] > size * DPI
            ax.imshow(tile, extent=(x, x + size, bottom, top), interpolation="auto" if shrinks else "nearest")
        if cell.title:
            title = plain(shortened(cell.title, int((width + panel.between / 2) / LETTER)))
            ax.text(left, bottom - height + TITLE - 0.02, title, fontsize=FONT, va="bottom",
                    color=ALERT if cell.is_marked else "black")  # fmt: skip
    ax.set(xlim=(0, PAGE_WIDTH - MARGIN), ylim=(panel.height, 0), aspect="equal", anchor="NW", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_ylabel(plain(panel.label, 40))
    ax.set_xlabel(plain(panel.caption, LETTERS), loc="left")


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
