"""Neural collapse: NC1 over epochs and over depth, with its chance level and the law of equi-separation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures.axes import band_of
from figures.labels import not_measured
from figures.layerwise import both_sets, over_depth, over_epochs
from figures.pages import grid, layer_legend, new_page, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def nc1_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """NC1 of every layer over the epochs, a row per split and a column per setting."""
    return grid(runs, "NC1 over epochs", both_sets("nc1"), over_epochs, legend=layer_legend)


@styled
def nc1_over_depth(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """NC1 over the layers at some epochs (default: five, denser at the start): a row per setting, a column per split.

    Dashed: least-squares fits of log NC1 over depth, with Pearson's r and the slope beside each epoch: the law of
    equi-separation says r = −1, but only a slope says how much is separated. Dotted: NC1 of the last of these epochs
    under permuted labels, where the run measured it.
    """
    comparison = compare(runs)
    settings = comparison.settings
    measures = [measure for measure in both_sets("nc1") if any(setting.has(measure) for setting in settings)]
    if not measures:
        raise NothingToDraw(not_measured(both_sets("nc1")))
    figure, axes = new_page(len(settings), len(measures), comparison.heading("NC1 over depth"), width=4.8, height=2.1)
    same_layers = len({tuple(setting.layers) for setting in settings}) == 1
    for ax, (setting, measure) in zip(axes.flat, itertools.product(settings, measures), strict=True):
        if ax is not axes[0, 0]:
            ax.sharey(axes[0, 0])
        if setting.has(measure):
            equiseparation_over_depth(ax, setting, measure, epochs)
            fit_legend(ax, loc="upper left", bbox_to_anchor=(1, 1.05), handlelength=1.3)
        else:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
        name = plain(comparison.name(setting), width=40)
        ax.set_title(f"{name}\n{measure.removeprefix('nc1/')} set".lstrip(), loc="left")
        ax.set_ylabel("NC1 = tr(Σ_W Σ_B⁺)" if ax in axes[:, 0] else "")
        if same_layers and ax not in axes[-1]:
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
    return figure


def equiseparation_over_depth(
    ax: Axes, setting: Setting, measure: str, epochs: Sequence[int] | None = None, num: int = 5
) -> None:
    """A line per epoch, each with the fit of equi-separation, and the chance level of the last of them.

    Of a constant r is not defined, and left out.
    """
    over_depth(ax, setting, measure, epochs, num)
    for line in ax.get_lines():
        line.set_label(line.get_label().removeprefix("epoch "))
        depth, nc1 = line.get_data()
        if len(depth) > 2:  # a line through two points always fits
            r, slope, fit = _equiseparation(depth, nc1)
            numbers = [f"{r:.3f}" if math.isfinite(r) else "", f"{round(slope, 2) + 0.0:.2f}"]  # never −0.00
            line.set_label(f"{line.get_label()}: {', '.join(filter(None, numbers))}".replace("-", "−"))
            ax.plot(depth, fit, "--", linewidth=0.8, color=line.get_color())
    _chance_level(ax, setting, measure.removeprefix("nc1/"), epochs)


def _chance_level(ax: Axes, setting: Setting, split: str, epochs: Sequence[int] | None) -> None:
    """NC1 of the same activations under permuted labels: of the last epoch drawn, if it was measured then."""
    drawn = band_of(setting, f"nc1/{split}").mean.index
    last = max(epoch for epoch in epochs or drawn if epoch in drawn)
    chance = band_of(setting, f"nc1_chance/{split}")
    if last in chance.mean.index:
        depths = chance.over_depth(setting.layers)
        line = depths.mean[last].dropna()
        ax.plot(line.index, line, color="0.3", linestyle=":", label=f"chance, epoch {last}")


def fit_legend(ax: Axes, **style: object) -> None:
    """The panel's epochs with what was fitted to them."""
    fitted = any(":" in label for label in ax.get_legend_handles_labels()[1])
    ax.legend(title="epoch: r, slope" if fitted else "epoch", alignment="left", **style)


def _equiseparation(depth: np.ndarray, nc1: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Pearson's r of log NC1 and depth, the slope of the least-squares line, and that line as NC1."""
    x, z = depth - np.mean(depth), np.log(nc1)
    slope = x @ z / (x @ x)
    spread = math.sqrt((x @ x) * np.sum((z - z.mean()) ** 2))
    return x @ z / spread if spread else math.nan, slope, np.exp(z.mean() + slope * x)
