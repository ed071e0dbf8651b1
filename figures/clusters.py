"""Clusters of activations: how they agree with the classes, what was kept of activations, and who resembles whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from figures.axes import MAX_NAMES, chosen_epochs, log_axis, thin
from figures.labels import not_measured
from figures.layerwise import over_epochs
from figures.pages import grid, layer_legend, legend_below, legend_beside, new_page, styled
from figures.runs import SPLITS, Run
from figures.settings import Comparison, Setting, compare
from figures.style import NothingToDraw, layer_colors, plain
from run import arrays
from run.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGREEMENT = ("coverage", "purity", "purity_all", "homogeneity", "ami")
KEPT = ("clusters/directions", "clusters/alignment", "cka")
MAX_MATRICES = 6  # layers whose alignment, or maps, a page shows
MAX_MAPS = 3  # epochs


@styled
def clusters_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How the clusters of every layer agree with the classes, over the epochs: coverage beside purity."""
    measures = [f"clusters/{name}/{split}" for split in reversed(SPLITS) for name in AGREEMENT]
    return grid(runs, "Clusters and classes over epochs", measures, _share_over_epochs, legend=layer_legend)


@styled
def directions_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How many directions hold the energy, how alike the classes' subspaces are, and a layer and the next one."""
    measures = [f"{name}/{split}" for split in reversed(SPLITS) for name in KEPT]
    return grid(runs, "Directions and similarity over epochs", measures, over_epochs, legend=layer_legend)


@styled
def singular_values(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None) -> Figure:
    """The decay of each layer's singular values S_i / S_1, up to the directions kept, at the first and last epoch."""
    split = split or _split(runs, "clusters/directions")
    draw = _Decay(epochs, split)
    title = f"Singular values, {split} set"
    figure = grid(runs, title, [f"clusters/directions/{split}"], draw, height=2.6, legend=layer_legend)
    legend_below(figure, draw.styles())
    return figure


@styled
def alignment_of_classes(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None
) -> Figure:
    """Classes × classes: how alike the subspaces are in which they vary. A row per layer, a column per epoch.

    By default of at most six layers, the last among them, at the first epoch and the last. Means over the runs of one
    setting: of several settings, the first.
    """
    split = split or _split(runs, "clusters/alignment")
    comparison = compare(runs)
    setting = _first_with(comparison, f"clusters/alignment/{split}")
    shown = chosen_epochs(_kept_epochs(setting), epochs, 2, np.linspace)
    layers = thin(
        [layer for layer in setting.layers if _has(setting, shown, f"alignment/{split}/{layer}")], MAX_MATRICES
    )
    if not layers:
        raise NothingToDraw("The run's arrays, clusters.npz, are not there.")
    heading = _heading(comparison, f"Alignment of classes, {split} set", setting)
    figure, axes = new_page(len(layers), len(shown), heading, width=2.6, height=2.1)
    for row, layer in zip(axes, layers, strict=True):
        for ax, epoch in zip(row, shown, strict=True):
            mesh = _matrix(ax, _mean(setting, epoch, f"alignment/{split}/{layer}"))
            ax.set_title(f"{plain(layer)}, epoch {epoch}", loc="left")
            ax.set(xlabel="class" if row is axes[-1] else "", ylabel="class" if ax is row[0] else "")
    figure.colorbar(mesh, ax=axes, label="mean squared cosine of principal angles", fraction=0.05, aspect=30)
    return figure


@styled
def cka_of_layers(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None) -> Figure:
    """Layers × layers: linear CKA, a row per setting (mean over its runs), a column per epoch (first and last)."""
    split = split or _split(runs, "cka")
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if setting.has(f"cka/{split}")]
    shown = {setting: chosen_epochs(_kept_epochs(setting), epochs, 2, np.linspace) for setting in settings}
    settings = [setting for setting in settings if _has(setting, shown[setting], f"cka/{split}")]
    if not settings:
        raise NothingToDraw("The run's arrays, clusters.npz, are not there.")
    lacking = len(comparison.settings) - len(settings)
    num_columns = max(len(shown[setting]) for setting in settings)
    heading = comparison.heading(f"CKA of layers, {split} set", sums_up=False, lacking=lacking)
    figure, axes = new_page(len(settings), num_columns, heading, width=3.6, height=3.4)
    for row, setting in zip(axes, settings, strict=True):
        for ax, epoch in zip(row, shown[setting], strict=False):
            mesh = _matrix(ax, _mean(setting, epoch, f"cka/{split}"), _layers_in(setting, epoch))
            ax.set_title("\n".join(filter(None, [plain(comparison.name(setting), 40), f"epoch {epoch}"])), loc="left")
        for ax in row[len(shown[setting]) :]:
            ax.set_axis_off()
    figure.colorbar(mesh, ax=axes, label="linear CKA, debiased", fraction=0.05, aspect=25)
    return figure


@styled
def tsne_maps(
    runs: Run | Sequence[Run],
    epochs: Sequence[int] | None = None,
    split: str | None = None,
    color: Literal["class", "cluster"] = "class",
) -> Figure:
    """Samples on maps by t-SNE, colored by their class or their cluster. A row per layer, a column per epoch.

    By default of at most six layers, at three epochs. Crosses are samples whose class the network gets wrong; what is
    in no cluster is grey. A picture only: t-SNE keeps neighbours, neither distances nor sizes. Of one run: the first
    that has maps.
    """
    split = split or _split(runs, "clusters/directions")
    comparison = compare(runs)
    run, setting = _first_with_maps(comparison, split)
    kept = [epoch for epoch in run.metrics.index if _file(run, epoch).is_file()]
    shown = chosen_epochs(kept, epochs, MAX_MAPS, np.linspace)
    layers = thin(setting.layers, MAX_MATRICES)
    heading = f"t-SNE by {color}, {split} set · {setting.label} · {run.folder.resolve().name}"
    figure, axes = new_page(len(layers), len(shown), heading, width=2.4, height=2.2)
    for column, epoch in zip(axes.T, shown, strict=True):
        common = [f"{name}/{split}" for name in ("mapped", "labels", "predictions")]
        wanted = common + [f"{name}/{split}/{layer}" for name in ("map", "clusters") for layer in layers]
        found, _ = _read(_file(run, epoch), wanted)
        mapped, labels, predictions = (found[name] for name in common)
        for ax, layer in zip(column, layers, strict=True):
            kinds = labels if color == "class" else found[f"clusters/{split}/{layer}"]
            is_wrong = (labels != predictions)[mapped]
            _map(ax, found[f"map/{split}/{layer}"], kinds[mapped], is_wrong)
            ax.set_title(f"{plain(layer)}, epoch {epoch}", loc="left")
    _kind_legend(figure, color, int(labels.max()) + 1)
    return figure


tsne_maps.variants = {f"tsne_by_{color}": {"color": color} for color in ("class", "cluster")}


def _first_with_maps(comparison: Comparison, split: str) -> tuple[Run, Setting]:
    for setting in comparison.settings:
        for run in setting.runs:
            files = [_file(run, epoch) for epoch in run.metrics.index if _file(run, epoch).is_file()]
            if files and _read(files[-1], (f"mapped/{split}",))[0]:
                return run, setting
    raise NothingToDraw("There are no maps. main.py makes them with --clusters --tsne.")


def _map(ax: Axes, places: np.ndarray, kinds: np.ndarray, is_wrong: np.ndarray) -> None:
    colors = np.array([_kind_color(kind) for kind in kinds])
    ax.scatter(*places[~is_wrong].T, s=3, c=colors[~is_wrong], linewidths=0)
    ax.scatter(*places[is_wrong].T, s=12, c=colors[is_wrong], marker="x", linewidths=0.8)
    ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    ax.grid(False)


def _kind_color(kind: int) -> tuple:
    """A color per class or cluster, twenty of them in turn; grey for what is in no cluster."""
    import matplotlib

    order = (kind % 20) * 2 % 20 + kind % 20 // 10  # the ten strong ones first
    return (0.75, 0.75, 0.75, 1.0) if kind < 0 else matplotlib.colormaps["tab20"](order)


def _kind_legend(figure: Figure, color: str, num_classes: int) -> None:
    from matplotlib.lines import Line2D

    style = {"linestyle": "", "marker": "o", "markersize": 4}
    kinds = range(min(num_classes, MAX_NAMES)) if color == "class" else ()
    handles = [Line2D([], [], color=_kind_color(kind), label=f"class {kind}", **style) for kind in kinds]
    if color == "cluster":
        handles.append(Line2D([], [], color=_kind_color(-1), label="in no cluster", **style))
    handles.append(Line2D([], [], color="0.3", label="wrong", **style | {"marker": "x"}))
    legend_beside(figure, handles)


def _share_over_epochs(ax: Axes, setting: Setting, measure: str) -> None:
    """As other measures, on an axis from 0 to 1: what is near 1 must not look like a course of its own."""
    over_epochs(ax, setting, measure)
    ax.set_ylim(min(-0.03, ax.get_ylim()[0]), 1.03)


class _Decay:
    """Draws the singular values of one setting: dashed at the first of the epochs, else without a break."""

    def __init__(self, epochs: Sequence[int] | None, split: str) -> None:
        self.epochs, self.split = epochs, split
        self.drawn: dict[str, str] = {}

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        shown = chosen_epochs(_kept_epochs(setting), self.epochs, 2, np.linspace)
        for epoch in shown:
            line = "--" if epoch == shown[0] and len(shown) > 1 else "-"
            self.drawn[f"epoch {epoch}"] = line
            for layer, color in layer_colors(setting).items():
                found = _of_runs(setting, epoch, f"singular_values/{self.split}/{layer}")
                if found:
                    S = found[0]  # of the first run: others keep another number of directions
                    ax.plot(np.arange(1, len(S) + 1), S / S[0], line, color=color)
        ax.set_xscale("log")
        log_axis(ax)
        ax.set(xlabel="direction i", ylabel="S_i / S_1")

    def styles(self) -> list:
        from matplotlib.lines import Line2D

        return [Line2D([], [], color="0.3", linestyle=line, label=name) for name, line in self.drawn.items()]


def _matrix(ax: Axes, values: np.ndarray, names: Sequence[str] = ()) -> object:
    """A square of values from 0 to 1, the first row on top; grey where undefined."""
    mesh = ax.pcolormesh(values, vmin=0, vmax=1, cmap="cividis")
    ticks = thin(list(enumerate(names or range(len(values)))), MAX_NAMES if names else 10)
    places, labels = [i + 0.5 for i, _ in ticks], [plain(str(name)) for _, name in ticks]
    ax.set_xticks(places, labels, rotation=90 if names else 0)
    ax.set_yticks(places, labels)
    ax.set(aspect="equal", facecolor="0.85")
    ax.grid(False)
    ax.invert_yaxis()
    return mesh


def _split(runs: Run | Sequence[Run], family: str) -> str:
    """The set of which there is this measure: the test set if there is one."""
    settings = compare(runs).settings
    found = [split for split in reversed(SPLITS) if any(setting.has(f"{family}/{split}") for setting in settings)]
    if not found:
        raise NothingToDraw(not_measured([f"{family}/{split}" for split in reversed(SPLITS)]))
    return found[0]


def _first_with(comparison: Comparison, measure: str) -> Setting:
    return next(setting for setting in comparison.settings if setting.has(measure))


def _heading(comparison: Comparison, what: str, setting: Setting) -> str:
    if comparison.num_settings == 1:
        return comparison.heading(what, sums_up=False)
    return f"{what} · {setting.title}, the first of {comparison.num_settings} settings that has it"


def _file(run: Run, epoch: int) -> Path:
    return run.folder / f"arrays/epoch{epoch:04d}/clusters.npz"


def _kept_epochs(setting: Setting) -> list[int]:
    """The epochs whose arrays some run has."""
    epochs = [epoch for epoch in setting.measured_epochs if any(_file(run, epoch).is_file() for run in setting.runs)]
    if not epochs:
        raise NothingToDraw("The run's arrays, clusters.npz, are not there.")
    return epochs


def _of_runs(setting: Setting, epoch: int, name: str) -> list[np.ndarray]:
    """An array of each run that kept it after this epoch."""
    found = (_read(_file(run, epoch), (name,))[0].get(name) for run in setting.runs if _file(run, epoch).is_file())
    return [array for array in found if array is not None]


def _read(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict]:
    try:
        return arrays.read(path, names)
    except UserError as error:  # damaged: the other figures can still be drawn
        raise NothingToDraw(str(error)) from None


def _has(setting: Setting, epochs: Sequence[int], name: str) -> bool:
    return all(_of_runs(setting, epoch, name) for epoch in epochs)


def _mean(setting: Setting, epoch: int, name: str) -> np.ndarray:
    """The mean over the runs."""
    return np.mean(_of_runs(setting, epoch, name), axis=0)


def _layers_in(setting: Setting, epoch: int) -> list[str]:
    """The names of the layers in a matrix of them."""
    return next(_read(_file(run, epoch), ())[1]["layers"] for run in setting.runs if _file(run, epoch).is_file())
