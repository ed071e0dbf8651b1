"""Rank of activations and of class means, by three definitions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.labels import RANKS
from figures.layerwise import over_depth, over_epochs
from figures.pages import epoch_legend, grid, layer_legend, styled
from figures.runs import SPLITS, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def rank_over_epochs(runs: Run | Sequence[Run], split: str = "train", class_means: bool = False) -> Figure:
    """Numerical, stable and effective rank of every layer's activations, or class means, over the epochs."""
    return grid(runs, *_rank_rows("epochs", split, class_means), over_epochs, legend=layer_legend)


@styled
def rank_over_depth(
    runs: Run | Sequence[Run],
    split: str = "train",
    class_means: bool = False,
    epochs: Sequence[int] | None = None,
) -> Figure:
    """Numerical, stable and effective rank of activations, or class means, over the layers at some epochs."""
    draw = functools.partial(over_depth, epochs=epochs)
    return grid(runs, *_rank_rows("depth", split, class_means), draw, legend=epoch_legend)


def _rank_rows(over: str, split: str, class_means: bool) -> tuple[str, list[str]]:
    """Title and measures of a rank figure."""
    title = f"Rank of {'class means' if class_means else 'activations'} over {over}"
    return title, [f"rank/{'means_' if class_means else ''}{kind}/{split}" for kind in RANKS]


def _variants(name: str) -> dict[str, dict[str, object]]:
    """File name → arguments, for each set and for activations and class means."""
    return {
        f"{name}{'_class_means' * class_means}_{split}": {"split": split, "class_means": class_means}
        for split in SPLITS
        for class_means in (False, True)
    }


rank_over_epochs.variants = _variants("rank_over_epochs")
rank_over_depth.variants = _variants("rank_over_depth")
