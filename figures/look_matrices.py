"""What was looked at, as it is: matrices, cosines between groups, Jacobians, and the parameters' path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures import kept, looks
from figures.axes import MAX_NAMES, chosen_epochs, log_axis, thin
from figures.looks import MEASURE, add_title, shown
from figures.pages import epoch_legend, grid, legend_below, new_page, remove, styled
from figures.runs import Run
from figures.settings import Comparison, Setting, compare
from figures.style import NothingToDraw, plain, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_MATRICES = 6  # rows of a page
MAX_PIXELS = 1000  # rows or columns of a matrix that are shown one by one
FEW_OUTSIDE = 0.995  # share of a matrix's values that the colors span
ELONGATED = 3  # from which a matrix is not drawn with square pixels
MAX_EPOCHS = 3
MAX_NAMED = 8  # epochs written beside a path


@styled
def matrices(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """The matrices themselves, as --look-arrays kept them: red above zero, blue below, at the first epoch and the last.

    Of the first run that has any; at most six matrices, each with one scale of colors. Where 0.5% of the values would
    take two thirds of it, they lie beyond its ends. A matrix of more than 1000 rows or columns is shown by the means of
    blocks, which the title says.
    """
    comparison = compare(runs)
    lacking = "No matrix was kept; main.py keeps those it builds with --look hessian --look-arrays."
    setting, found = looks.first_with(comparison.settings, "matrix", lacking)
    found = [name.split("/")[0] for name in found]
    chosen = looks.chosen(found, names, MAX_MATRICES)
    run = next(run for run in setting.runs if kept.epochs_of(run, MEASURE))
    shown_epochs = chosen_epochs(kept.epochs_of(run, MEASURE), epochs, 2, np.linspace)
    maths = looks.maths([setting])
    heading = f"Matrices{looks.left_out(chosen, found)} · {setting.label} · {run.folder.resolve().name}"
    figure, axes = new_page(len(chosen), len(shown_epochs), heading, width=3.4, height=2.9)
    for row, name in zip(axes, chosen, strict=True):
        of_epochs = {
            epoch: kept.read(kept.file_of(run, epoch, MEASURE), (f"{name}/matrix",))[0].get(f"{name}/matrix")
            for epoch in shown_epochs
        }
        of_epochs = {epoch: matrix for epoch, matrix in of_epochs.items() if matrix is not None}
        is_symmetric = name in looks.names([setting], "eig1")
        _row_of_matrices(figure, row, of_epochs, (looks.symmetric if is_symmetric else shown)(name, maths))
    return figure


@styled
def gradient_cosines(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Groups × groups: the cosine between their gradients (or mean activations), first epoch and last.

    Groups that pull the parameters the same way are red, those that pull against each other blue. At most six
    quantities; means over the runs of one setting: of several settings, the first.
    """
    comparison = compare(runs)
    lacking = "There are no cosines between groups; main.py looks at them with --look gradients --look-by class."
    setting, found = looks.first_with(comparison.settings, r"cosines/\w+", lacking)
    chosen = looks.chosen(found, names, MAX_MATRICES)
    shown_epochs = chosen_epochs(kept.epochs(setting, MEASURE), epochs, 2, np.linspace)
    maths = looks.maths([setting])
    heading = _heading(comparison, f"Cosines between groups{looks.left_out(chosen, found)}", setting)
    figure, axes = new_page(len(chosen), len(shown_epochs), heading, width=2.9, height=2.5)
    for row, name in zip(axes, chosen, strict=True):
        for ax, epoch in zip(row, shown_epochs, strict=True):
            mesh = _cosines(ax, setting, epoch, name)
            ax.set_title(f"{shown(name.split('/')[0], maths)}, epoch {epoch}", loc="left")
    figure.colorbar(mesh, ax=axes, label="cosine", fraction=0.05, aspect=30)
    return figure


@styled
def jacobian_singular_values(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """The singular values of each Jacobian: of its mean over samples (line), and of each sample (dashed median, band).

    The band holds the samples from the 10th to the 90th of a hundred. A mean far below the samples says that their
    Jacobians differ in direction.
    """
    comparison = compare(runs)
    found = looks.names(comparison.settings, "sample_spectral")
    if not found:
        raise NothingToDraw("No Jacobian was looked at; main.py looks at one with --look jacobian.")
    draw = _Jacobian(looks.maths(comparison.settings), epochs)
    chosen = looks.chosen(found, names, MAX_MATRICES)
    measures = [f"look/{name}/sample_spectral" for name in chosen]
    options = {"share": False, "sums_up": False, "height": 2.6, "legend": epoch_legend}
    figure = grid(runs, f"Singular values of Jacobians{looks.left_out(chosen, found)}", measures, draw, **options)
    legend_below(figure, _jacobian_styles())
    return figure


@styled
def path(runs: Run | Sequence[Run], names: Sequence[str] | None = None) -> Figure:
    """The way of the parameters in the plane that holds most of it, its two principal components over the epochs.

    From the circle to the dot; the axes say how much of the way's variance they hold. A way of many parameters is
    computed from a random sketch of them, and the title says how exact its distances are. A panel per setting: its
    first run.
    """
    settings = compare(runs).settings
    lacking = "There is no path of the parameters; main.py keeps it with --look theta."
    _, found = looks.first_with(settings, "path", lacking)
    found = [name.split("/")[0] for name in found]
    chosen = looks.chosen(found, names, MAX_MATRICES)
    measures = [f"look/{name}/distance" for name in chosen]
    draw = _Path(looks.maths(settings))
    return grid(
        runs,
        f"Path of the parameters{looks.left_out(chosen, found)}",
        measures,
        draw,
        share=False,
        sums_up=False,
        height=3,
    )


def _heading(comparison: Comparison, what: str, setting: Setting) -> str:
    if comparison.num_settings == 1:
        return comparison.heading(what, sums_up=False)
    return f"{what} · {setting.title}, the first of {comparison.num_settings} settings that has it"


def _row_of_matrices(figure: Figure, row: Sequence[Axes], of_epochs: dict[int, np.ndarray], name: str) -> None:
    """A matrix at several epochs, in colors that mean the same."""
    small = {epoch: block_means(matrix) for epoch, matrix in of_epochs.items()}
    values = np.abs(np.concatenate([matrix.ravel() for matrix, _ in small.values()]))
    values = values[np.isfinite(values)]
    largest = float(values.max(initial=0.0))
    most = float(np.quantile(values, FEW_OUTSIDE)) if values.size else 0.0
    limit = most if 0 < most < largest / 3 else largest or 1.0
    for ax, (epoch, (matrix, (height, width))) in zip(row, small.items(), strict=False):
        rows, columns = of_epochs[epoch].shape
        aspect = "equal" if max(rows, columns) <= ELONGATED * min(rows, columns) else "auto"
        image = ax.imshow(
            matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect=aspect, interpolation="nearest",
            extent=(0, columns, rows, 0),
        )  # fmt: skip
        blocks = f"\nmeans of blocks of {height} × {width}" if height * width > 1 else ""
        ax.set_title(f"{name}, epoch {epoch}, {rows} × {columns}{blocks}", loc="left")
        ax.set_facecolor("0.85")
        ax.grid(False)
        ax.locator_params(integer=True)
        figure.colorbar(image, ax=ax, extend="both" if limit < largest else "neither", fraction=0.05, aspect=20)
    remove(row[len(small) :])


def block_means(matrix: np.ndarray, most: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """A matrix of at most `most` rows and columns: the means of equal blocks, and the size of a block.

    At the end there may be blocks that are smaller.

    >>> block_means(np.array([[1.0, 3.0, 5.0]]), most=2)
    (array([[2., 5.]]), (1, 2))
    """
    sizes = tuple(max(1, math.ceil(n / most)) for n in matrix.shape)
    means = matrix.astype(np.float64)
    for axis, size in enumerate(sizes):
        starts = np.arange(0, matrix.shape[axis], size)
        lengths = np.diff([*starts, matrix.shape[axis]])
        sums = np.add.reduceat(means, starts, axis=axis)
        means = sums / (lengths[:, None] if axis == 0 else lengths)
    return means, sizes


def _cosines(ax: Axes, setting: Setting, epoch: int, name: str) -> object:
    """The mean over the runs, where all have the same groups; else the first run's. Grey where undefined."""
    found = kept.of_runs(setting, epoch, MEASURE, name)
    kind, groups = name.split("/")[-1], kept.settings_of(setting, epoch, MEASURE).get("groups", {})
    alike = [array for array in found if array.shape == found[0].shape and kind != "cluster"] or found[:1]
    values = np.mean(alike, axis=0) if alike else np.full((1, 1), np.nan)
    mesh = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    members = groups.get(kind, []) if isinstance(groups, dict) else []
    members = members if len(members) == len(values) else list(range(len(values)))
    ticks = thin(list(enumerate(str(member).removeprefix(kind) for member in members)), MAX_NAMES // 2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([i for i, _ in ticks], [plain(member) for _, member in ticks])
    ax.set(xlabel=plain(kind), ylabel=plain(kind), facecolor="0.85")
    ax.grid(False)
    return mesh


class _Jacobian:
    """Draws the singular values of a Jacobian against their index, in a color per epoch."""

    def __init__(self, maths: dict[str, str], epochs: Sequence[int] | None) -> None:
        self.maths, self.epochs = maths, epochs

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        name = measure.split("/")[1]
        shown_epochs = chosen_epochs(kept.epochs(setting, MEASURE), self.epochs, MAX_EPOCHS, np.linspace)
        for epoch, color in zip(shown_epochs, shades("plasma", len(shown_epochs)), strict=True):
            of_mean, of_samples = (
                kept.of_runs(setting, epoch, MEASURE, f"{name}/{array}")
                for array in ("singular_values", "sample_singular_values")
            )
            if of_samples:
                low, median, high = np.quantile(np.concatenate(of_samples), (0.1, 0.5, 0.9), axis=0)
                i = np.arange(1, len(median) + 1)
                ax.plot(i, median, "--", color=color, linewidth=1)
                ax.fill_between(i, low, high, color=color, alpha=0.15, linewidth=0)
            if of_mean:
                mean = np.mean(of_mean, axis=0)
                ax.plot(np.arange(1, len(mean) + 1), mean, color=color, label=f"epoch {epoch}", marker=_marker(mean))
        log_axis(ax)
        ax.locator_params(axis="x", integer=True)
        ax.set(xlabel="i", ylabel=r"$\sigma_i$")
        add_title(ax, shown(name, self.maths))


def _marker(values: np.ndarray) -> str:
    return "o" if len(values) <= 30 else ""


def _jacobian_styles() -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color="0.3", label="of the mean Jacobian"),
        Line2D([], [], color="0.3", linestyle="--", label="median over samples"),
        Patch(color="0.3", alpha=0.15, label="10% to 90% of samples"),
    ]


class _Path:
    """Draws the parameters' path of the first run of a setting that kept one."""

    def __init__(self, maths: dict[str, str]) -> None:
        self.maths = maths

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        name = measure.split("/")[1]
        epochs, points, how = _path_of(setting, name)
        if len(points) < 2:
            ax.text(0.5, 0.5, "no two epochs kept", transform=ax.transAxes, ha="center", color="0.4")
            return
        plane, shares = principal_plane(points)
        ax.plot(*plane.T, color="0.5", linewidth=0.8, zorder=1)
        ax.scatter(*plane[1:-1].T, c=shades("plasma", len(points))[1:-1], s=12, zorder=2)
        ax.plot(*plane[:1].T, "o", color="#0072B2", markersize=5, markerfacecolor="white")
        ax.plot(*plane[-1:].T, "o", color="#0072B2", markersize=5)
        for i in dict.fromkeys(np.linspace(0, len(points) - 1, MAX_NAMED).round().astype(int).tolist()):
            ax.annotate(str(epochs[i]), plane[i], (3, 3), textcoords="offset points", fontsize=7)
        labels = [f"component {i} ({share:.1%})" for i, share in enumerate(shares, 1)]
        ax.set(xlabel=labels[0], ylabel=labels[1], aspect="equal", adjustable="datalim")
        add_title(ax, f"{shown(name, self.maths)}, {how}")


def _path_of(setting: Setting, name: str) -> tuple[list[int], np.ndarray, str]:
    """Epochs, points (E, p or a sketch's m), and whether these are exact, of the first run that has any."""
    for run in setting.runs:
        files = {epoch: kept.file_of(run, epoch, MEASURE) for epoch in kept.epochs_of(run, MEASURE)}
        found = {epoch: kept.read(file, (f"{name}/path",)) for epoch, file in files.items()}
        found = {epoch: (arrays[f"{name}/path"], about) for epoch, (arrays, about) in found.items() if arrays}
        if found:
            points = [point for point, _ in found.values()]
            alike = [len(point) == len(points[-1]) for point in points]
            epochs = [epoch for epoch, is_alike in zip(found, alike, strict=True) if is_alike]
            about = found[max(found)][1]
            points = np.stack([found[epoch][0] for epoch in epochs])
            return epochs, points.astype(np.float64), f"{_exactness(points, about)} · {run.folder.resolve().name}"
    return [], np.empty((0, 0)), ""


def _exactness(points: np.ndarray, about: dict) -> str:
    """A sketch of m numbers has distances that are exact to √(2/m): that is how one is told from what is whole."""
    error = about.get("path_error")
    is_sketch = isinstance(error, float) and error > 0 and math.isclose(points.shape[1], 2 / error**2, rel_tol=1e-6)
    return f"from a sketch, distances ± {error:.1%}" if is_sketch else "exact"


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Points (E, p) in the plane of their two principal components (E, 2), and the share of variance of each.

    By the eigenvectors of the centered points' inner products (E × E), as p may be large. Signs are chosen so that the
    last point lies to the right of and above the first.

    >>> principal_plane(np.array([[0.0, 0.0], [0.0, 3.0]]))[1]
    (1.0, 0.0)
    """
    centered = points - points.mean(axis=0)
    values, vectors = np.linalg.eigh(centered @ centered.T)
    values = np.append(values.clip(min=0)[::-1], 0.0)[:2]
    total = float(np.square(centered).sum())
    plane = vectors[:, ::-1][:, :2] * np.sqrt(values)
    plane *= np.where(plane[-1] < plane[0], -1, 1)
    first, second = (float(value / total) if total else math.nan for value in values)
    return plane, (first, second)
