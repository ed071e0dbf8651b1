"""How alike layers of different runs or epochs are, by linear CKA of the scores that runs keep.

`measures.similarity` compares layers of one network, on activations, with kernels of batches of samples. What runs keep
has few columns, so that here products of these take the kernels' place, of all samples at once.

Letters: N samples, k directions of a layer, S scores (N, k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures import kept_clusters as kept
from figures.axes import MAX_NAMES, chosen_epochs, matrix, thin
from figures.pages import new_page, remove, styled
from figures.runs import Run
from figures.settings import compare
from figures.style import NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 50  # samples that two runs must have in common: of fewer CKA is mostly noise
MAX_OTHERS = 6  # runs that the first one is compared with
MAX_LAYERS = 6  # with a matrix of epochs each
MAX_EPOCHS = 12  # in such a matrix
BAR = "linear CKA of scores, debiased"


class Scores(NamedTuple):
    """Scores (N, k) without their mean, the squared size of each sample (N,), and N (N - 3) HSIC with themselves."""

    S: np.ndarray
    sizes: np.ndarray
    own: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Scores:
        S = scores.astype(np.float64)
        S -= S.mean(0)
        scores = cls(S, np.einsum("ij,ij->i", S, S), math.nan)
        return scores._replace(own=hsic(scores, scores))


def hsic(x: Scores, y: Scores) -> float:
    """N (N - 3) times the unbiased HSIC (Song et al. 2012) of the kernels K = X Xᵀ and L = Y Yᵀ, neither of them made.

    As the mean is gone K1 = 0, so the kernels without their diagonals p, q have the row sums -p, -q, and in

    tr(K̃ L̃) + 1ᵀK̃1 1ᵀL̃1 / ((N - 1)(N - 2)) - 2/(N - 2) 1ᵀK̃L̃1

    tr(K̃ L̃) = ‖XᵀY‖_F² - p·q, 1ᵀK̃1 = -Σp, and 1ᵀK̃L̃1 = p·q.
    """
    n, both = len(x.S), x.sizes @ y.sizes
    sums = x.sizes.sum() * y.sizes.sum()
    return float(np.square(x.S.T @ y.S).sum() - n / (n - 2) * both + sums / ((n - 1) * (n - 2)))


def cka(x: Scores, y: Scores) -> float:
    """Linear CKA, debiased: 1 of a layer with itself, 0 on average for independent ones; nan where one is constant."""
    scale = x.own * y.own
    return hsic(x, y) / math.sqrt(scale) if scale > 0 else math.nan


def cka_matrix(xs: Sequence[Scores], ys: Sequence[Scores]) -> np.ndarray:
    """CKA of every x (a row) with every y (a column)."""
    return np.array([[cka(x, y) for y in ys] for x in xs])


@styled
def cka_between_runs(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None
) -> Figure:
    """Layers × layers: CKA of the first run's layers (rows) with those of each other run, seeds of one setting too.

    A row of the page per run, at most six, a column per epoch: by default the first and the last that both kept. The
    scores of those samples are compared that both runs looked at, in the k directions kept: not all that the
    activations are, but what the heading says of their energy.
    """
    split = split or kept.split_of(runs, "clusters/directions")
    comparison = compare(runs)
    settings = {id(run): setting for setting in comparison.settings for run in setting.runs}
    with_files = [run for setting in comparison.settings for run in setting.runs if kept.kept_epochs([run])]
    pairs, reasons = _pairs(with_files, split)
    shown = [(pair, chosen_epochs(pair.epochs, epochs, 2, np.linspace)) for pair in pairs[:MAX_OTHERS]]
    compared = [(run, epoch) for pair, chosen in shown for run in (pair.first, pair.other) for epoch in chosen]
    heading = [
        f"CKA between runs, {split} set",
        comparison.subject,
        _of_scores(compared, split),
        f"the first {MAX_OTHERS} of {len(pairs)} other runs" if len(pairs) > MAX_OTHERS else "",
        f"{len(reasons)} cannot be compared: {reasons[0]}" if reasons else "",
    ]
    num_columns = max(len(chosen) for _, chosen in shown)
    figure, axes = new_page(len(shown), num_columns, " · ".join(filter(None, heading)), width=3.6, height=3.6)
    for row, (pair, chosen) in zip(axes, shown, strict=True):
        for ax, epoch in zip(row, chosen, strict=False):
            mesh = matrix(ax, pair.cka(epoch), *pair.layers)
            name = plain(comparison.name(settings[id(pair.other)]), 40)
            ax.set_title("\n".join(filter(None, [name, f"epoch {epoch}, {pair.num:,} samples"])), loc="left")
            ax.set(xlabel=plain(_name(pair.other), 40), ylabel=plain(_name(pair.first), 40))
        remove(row[len(chosen) :])
    figure.colorbar(mesh, ax=figure.axes, label=BAR, fraction=0.05, aspect=25)
    return figure


@styled
def cka_between_epochs(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, split: str | None = None
) -> Figure:
    """Epochs × epochs, a panel per layer: CKA of what a layer is after one epoch and after another.

    By default of at most six layers, the last among them, and twelve epochs, denser at the start. Means over the runs
    of one setting: of several settings, the first. Scores are compared, as by `cka_between_runs`.
    """
    split = split or kept.split_of(runs, "clusters/directions")
    comparison = compare(runs)
    setting = next(setting for setting in comparison.settings if setting.has(f"clusters/directions/{split}"))
    shown = chosen_epochs(kept.epochs_of(setting), epochs, MAX_EPOCHS, np.geomspace)
    whole = [run for run in setting.runs if {*shown} <= {*kept.kept_epochs([run])}]
    if len(shown) < 2 or not whole:
        raise NothingToDraw("CKA between epochs needs the arrays of two epochs; main.py keeps them with --clusters.")
    layers = thin(_layers(whole[0], split), MAX_LAYERS)
    of_scores = _of_scores([(run, epoch) for run in whole for epoch in shown], split)
    heading = [comparison.heading_of(setting, f"CKA between epochs, {split} set"), of_scores]
    num_columns = min(3, len(layers))
    num_rows = math.ceil(len(layers) / num_columns)
    figure, axes = new_page(num_rows, num_columns, " · ".join(filter(None, heading)), width=3.4, height=2.8)
    for ax, layer in zip(axes.flat, layers, strict=False):
        mesh = matrix(ax, np.mean([_epoch_by_epoch(run, shown, layer, split) for run in whole], axis=0), shown)
        ax.set(xlabel="epoch", ylabel="epoch" if ax in axes[:, 0] else "")
        ax.set_title(plain(layer), loc="left")
    remove(axes.flat[len(layers) :])
    figure.colorbar(mesh, ax=figure.axes, label=BAR, fraction=0.05, aspect=25)
    return figure


class Pair(NamedTuple):
    """Two runs, the epochs that both kept, layers of each, and where the samples that both looked at are in each."""

    first: Run
    other: Run
    split: str
    epochs: list[int]
    layers: list[list[str]]
    places: list[np.ndarray]

    @property
    def num(self) -> int:
        """How many samples both looked at."""
        return len(self.places[0])

    def cka(self, epoch: int) -> np.ndarray:
        """The first run's layers in rows, the other's in columns."""
        both = zip((self.first, self.other), self.layers, self.places, strict=True)
        with _one_thread():
            xs, ys = (
                [Scores.of(_scores(run, epoch, layer, self.split)[places]) for layer in layers]
                for run, layers, places in both
            )
            return cka_matrix(xs, ys)


def _pairs(runs: Sequence[Run], split: str) -> tuple[list[Pair], list[str]]:
    """The first of the runs with each other one, and why others cannot be compared with it."""
    if not runs:
        raise NothingToDraw(kept.NOT_THERE)
    pairs, reasons = [], []
    for other in runs[1:]:
        try:
            pairs.append(_pair(runs[0], other, split))
        except NothingToDraw as reason:
            reasons.append(str(reason))
    if not pairs:
        too_few = "CKA between runs needs two that kept their arrays; main.py keeps them with --clusters."
        raise NothingToDraw(reasons[0] if reasons else too_few)
    return pairs, reasons


def _pair(first: Run, other: Run, split: str) -> Pair:
    """Refuses runs that did not look at the same samples."""
    both = (first, other)
    names = " and ".join(map(_name, both))
    datasets = [str(run.hparams.get("dataset")) for run in both]
    if datasets[0] != datasets[1]:
        raise NothingToDraw(f"{names} looked at different data, {' and '.join(datasets)}; CKA needs the same samples.")
    epochs = sorted({*kept.kept_epochs([first])} & {*kept.kept_epochs([other])})
    if not epochs:
        raise NothingToDraw(f"{names} kept no epoch in common.")
    samples = [[_array(run, epochs[-1], f"{name}/{split}") for name in ("index", "labels")] for run in both]
    _, *places = np.intersect1d(samples[0][0], samples[1][0], return_indices=True)
    if len(places[0]) < LEAST:
        raise NothingToDraw(
            f"{names} looked at different samples of the {split} set: they have {len(places[0])} in common, and CKA "
            f"needs {LEAST}."
        )
    if not np.array_equal(samples[0][1][places[0]], samples[1][1][places[1]]):
        raise NothingToDraw(f"{names} looked at different data: samples of the same number have different labels.")
    layers = [thin(_layers(run, split), MAX_NAMES) for run in both]
    return Pair(first, other, split, epochs, layers, places)


def _epoch_by_epoch(run: Run, epochs: Sequence[int], layer: str, split: str) -> np.ndarray:
    values = np.empty((len(epochs), len(epochs)))
    with _one_thread():
        scores = [Scores.of(_scores(run, epoch, layer, split)) for epoch in epochs]
        for i, j in itertools.combinations_with_replacement(range(len(epochs)), 2):
            values[i, j] = values[j, i] = cka(scores[i], scores[j])
    return values


def _one_thread() -> AbstractContextManager:
    """Products this small gain nothing from a second thread, and where other processes run wait for it."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def _layers(run: Run, split: str) -> list[str]:
    """The layers whose scores a run kept of this set."""
    layers = kept.read(run, kept.kept_epochs([run])[-1])[1].get("layers", [])
    if not layers:
        raise NothingToDraw(f"{_name(run)} does not say of which layers its arrays are.")
    return layers


def _scores(run: Run, epoch: int, layer: str, split: str) -> np.ndarray:
    return _array(run, epoch, f"scores/{split}/{layer}")


def _array(run: Run, epoch: int, name: str) -> np.ndarray:
    found, _ = kept.read(run, epoch, (name,))
    if name not in found:
        raise NothingToDraw(f"{kept.file_of(run, epoch)} has no {name}.")
    return found[name]


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _of_scores(compared: Sequence[tuple[Run, int]], split: str) -> str:
    """How much of the activations their scores are, of these runs after these epochs."""
    k, energy = (
        [value for run, epoch in compared for value in run.table(f"clusters/{name}/{split}").loc[epoch].dropna()]
        for name in ("directions", "energy")
    )
    if not k or not energy:
        return "of scores"
    return (
        f"of scores in {_span(k)} directions of a layer, which hold {_span([100 * e for e in energy])}% of the energy"
    )


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
