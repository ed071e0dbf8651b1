"""What was looked at, over the epochs: spectra, eigenvalues, and every other statistic."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from figures import kept, looks
from figures.axes import (
    MAX_NAMES,
    band_of,
    chosen_epochs,
    draw_line,
    epoch_axis,
    is_wide,
    log_axis,
    log_ticks_on,
    thin,
)  # fmt: skip
from figures.densities import NEAR_ZERO, SMOOTHING, Density, DensityAxes, ticks_around_zero
from figures.labels import OF_LOOKS
from figures.looks import MEASURE, add_title, shown
from figures.pages import COLUMNS, epoch_legend, grid, legend_below, legend_beside, new_page, remove, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, plain, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 8  # quantities of a page
MAX_EPOCHS = 3
FAR_APART = 20  # the largest of several quantities over the least, from which lines would lie flat at the bottom
ROUNDING = 1e-14  # of the largest eigenvalue: what is below is none
NO_HESSIAN = "No Hessian or kernel was looked at; main.py looks at one with --look hessian."


@styled
def spectra(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """The density of each Hessian's and kernel's eigenvalues: where most lie, and how far the few large ones lie off.

    At three epochs by default. λ is on an axis that is logarithmic but near zero, and density on a logarithmic one;
    strokes on top are the largest eigenvalues themselves. What was solved exactly is a histogram; else the line is the
    mean over random probes (and runs), smoothed, and the band reaches from the lowest probe to the highest.
    """
    comparison = compare(runs)
    found, more = _rows(comparison.settings, "eig1", names, NO_HESSIAN)
    draw = _Spectra(comparison.settings, found, epochs)
    title = f"Spectral densities{more} · bins, or Gaussians' width: {SMOOTHING} decades of λ"
    return grid(runs, title, draw.measures, draw, share=False, height=2.3, legend=epoch_legend)


@styled
def eigenvalues_over_epochs(runs: Run | Sequence[Run], names: Sequence[str] | None = None) -> Figure:
    """The largest eigenvalues of each Hessian and kernel, light to dark from the largest on, and the least (dashed)."""
    comparison = compare(runs)
    found, more = _rows(comparison.settings, "eig1", names, NO_HESSIAN)
    draw = _Eigenvalues(looks.maths(comparison.settings))
    figure = grid(runs, f"Eigenvalues over epochs{more}", [f"look/{name}/eig1" for name in found], draw)
    legend_beside(figure, draw.handles())
    return figure


@styled
def look_over_epochs(runs: Run | Sequence[Run], statistics: Sequence[str] | None = None) -> Figure:
    """Each statistic of what was looked at, a line per quantity: norms, traces, ranks, the way of the parameters.

    Families of many, such as the gradients of all tensors, are left to `heat_map`.
    """
    comparison = compare(runs)
    settings = comparison.settings
    lines = _lines(settings)
    kinds = [kind for kind in statistics or looks.statistics(settings) if set(looks.names(settings, kind)) & set(lines)]
    if not kinds:
        raise NothingToDraw("Nothing was looked at; main.py looks at gradients, for one, with --look gradients.")
    left_out = len(looks.names(settings)) - len(lines)
    title = "What was looked at, over epochs" + (f" ({left_out} tensors or layers: see heat maps)" if left_out else "")
    draw = _Statistics(lines)
    if len(settings) > 1:
        figure = grid(runs, title, [f"look/*/{kind}" for kind in kinds], draw)
    else:
        figure, axes = new_page(math.ceil(len(kinds) / COLUMNS), COLUMNS, comparison.heading(title), height=1.9)
        for ax, kind in zip(axes.flat, kinds, strict=False):
            draw(ax, settings[0], f"look/*/{kind}")
        remove(axes.flat[len(kinds) :])
    legend_below(figure, draw.handles(looks.maths(settings), looks.names(settings, "eig1")))
    return figure


@styled
def ntk_spectrum(
    runs: Run | Sequence[Run], epochs: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """The eigenvalues λ_i of each neural tangent kernel against i, both on logarithmic axes, a color per epoch.

    A straight line is a power law. A line per run; what rounding left below zero is not shown.
    """
    comparison = compare(runs)
    found = [name for name in looks.names(comparison.settings, "eig1") if name.startswith("grad-")]
    if not found:
        raise NothingToDraw("No kernel was looked at; main.py looks at one with --look ntk.")
    draw = _Decay(looks.maths(comparison.settings), epochs)
    chosen = looks.chosen(found, names, MAX_ROWS)
    measures = [f"look/{name}/eig1" for name in chosen]
    options = {"share": False, "sums_up": False, "height": 2.6, "legend": epoch_legend}
    return grid(runs, f"Neural tangent kernels{looks.left_out(chosen, found)}", measures, draw, **options)


def _rows(
    settings: Sequence[Setting], statistic: str, wanted: Sequence[str] | None, lacking: str
) -> tuple[list[str], str]:
    """The quantities to draw, the wanted ones or at most eight, and what a heading says of the others."""
    found = looks.names(settings, statistic)
    if not found:
        raise NothingToDraw(lacking)
    chosen = looks.chosen(found, wanted, MAX_ROWS)
    return chosen, looks.left_out(chosen, found) if wanted is None else ""


def _name(measure: str) -> str:
    return measure.split("/")[1]


class _Spectra:
    """Draws densities of eigenvalues; the axes of a quantity are the same in all settings."""

    def __init__(self, settings: Sequence[Setting], names: Sequence[str], epochs: Sequence[int] | None) -> None:
        self.maths = looks.maths(settings)
        self.found: dict[tuple[Setting, str], dict[int, Density]] = {}
        for setting in settings:
            if any(kept.epochs_of(run, MEASURE) for run in setting.runs):
                shown_epochs = chosen_epochs(kept.epochs(setting, MEASURE), epochs, MAX_EPOCHS, np.linspace)
                for name in names:
                    densities = {epoch: Density.of(setting, epoch, name) for epoch in shown_epochs}
                    self.found[setting, name] = {epoch: d for epoch, d in densities.items() if d.probes}
        self.measures = [f"look/{name}/eig1" for name in names if self._all_of(name)]
        if not self.measures:
            raise NothingToDraw("The run's arrays, look.npz, are not there; main.py keeps them with --look.")

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        name = _name(measure)
        axis, of_epochs = DensityAxes(self._all_of(name)), self.found.get((setting, name), {})
        for i, (epoch, color) in enumerate(zip(of_epochs, shades("plasma", len(of_epochs)), strict=True)):
            of_epochs[epoch].draw(ax, axis, color, f"epoch {epoch}")
            top = _top(setting, epoch, name)
            level = np.full(len(top), 0.97 - 0.05 * i)
            ax.plot(top, level, "|", color=color, transform=ax.get_xaxis_transform(), markersize=5, label="_top")
        axis.set_on(ax)
        how = next(iter(of_epochs.values())).how if of_epochs else "not measured"
        add_title(ax, f"{looks.symmetric(name, self.maths)}, {how}")

    def _all_of(self, name: str) -> list[Density]:
        return [density for (_, of), by_epoch in self.found.items() if of == name for density in by_epoch.values()]


def _top(setting: Setting, epoch: int, name: str) -> list[float]:
    """The largest eigenvalues themselves, of all runs."""
    rows = [run.table(f"look/{name}/eig*") for run in setting.runs]
    return [value for table in rows if epoch in table.index for value in table.loc[epoch].dropna()]


class _Eigenvalues:
    """Draws the largest eigenvalues and the least ones of a quantity over the epochs."""

    def __init__(self, maths: dict[str, str]) -> None:
        self.maths = maths
        self.num = {"eig": 0, "min": 0}

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        name = _name(measure)
        top, least = (setting.band(f"look/{name}/{kind}*") for kind in self.num)
        self.num = {"eig": max(self.num["eig"], top.mean.shape[1]), "min": max(self.num["min"], least.mean.shape[1])}
        for column, color in zip(top.mean, shades("viridis", top.mean.shape[1])[::-1], strict=True):
            draw_line(ax, top, column, color=color)
        for column in least.mean:
            draw_line(ax, least, column, color="0.45", linestyle="--")
        epoch_axis(ax, top.mean.index)
        _scale(ax, top.mean.to_numpy(float), least.mean.to_numpy(float))
        ax.set_ylabel(looks.symmetric(name, self.maths))

    def handles(self) -> list:
        from matplotlib.lines import Line2D

        colors = list(enumerate(shades("viridis", self.num["eig"])[::-1], 1))
        styles = [Line2D([], [], color=color, label=f"$\\lambda_{{{i}}}$") for i, color in thin(colors, 8)]
        least = Line2D([], [], color="0.45", linestyle="--", label="least")
        return styles + ([least] if self.num["min"] else [])


def _scale(ax: Axes, top: np.ndarray, least: np.ndarray) -> None:
    """Logarithmic where the largest eigenvalues are wide apart, but near zero if there is anything below it."""
    largest = top[np.isfinite(top) & (top > 0)]
    if is_wide(list(largest)):
        if min(np.nanmin(top), np.nanmin(least, initial=np.inf)) > NEAR_ZERO * largest.max():
            log_axis(ax)
        else:
            ax.set_yscale("asinh", linear_width=NEAR_ZERO * largest.max())
            ticks_around_zero(ax.yaxis, NEAR_ZERO * largest.max(), largest.max())


class _Statistics:
    """Draws a statistic of several quantities, each in a color of its own."""

    def __init__(self, names: Sequence[str]) -> None:
        dashes = ("-", "--", ":", "-.")
        self.styles = {
            name: {"color": OKABE_ITO[i % len(OKABE_ITO)], "linestyle": dashes[i // len(OKABE_ITO)]}
            for i, name in enumerate(names)
        }

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        band, kind = band_of(setting, measure), measure.split("/")[2]
        drawn = [name for name in self.styles if name in band.mean]
        for name in drawn:
            draw_line(ax, band, name, **self.styles[name])
        epoch_axis(ax, band.mean.index)
        values = band.mean[drawn].to_numpy(float)
        above = values[np.isfinite(values)]
        if above.size and 0 < FAR_APART * above.min() < above.max():
            log_axis(ax)
        ax.set_ylabel(textwrap.fill(OF_LOOKS.get(kind, plain(kind)), 26))

    def handles(self, maths: dict[str, str], symmetric: Sequence[str]) -> list:
        from matplotlib.lines import Line2D

        in_words = {name: (looks.symmetric if name in symmetric else shown)(name, maths) for name in self.styles}
        return [Line2D([], [], **style, label=in_words[name]) for name, style in self.styles.items()]


def _lines(settings: Sequence[Setting]) -> list[str]:
    """The quantities that have a line each: those of no large family, unless there are no others."""
    found = looks.names(settings)
    many = [family for family in looks.FAMILIES if looks.is_many(settings, family)]
    alone = [name for name in found if not any(fnmatchcase(name, family) for family in many)]
    return (alone or found)[:MAX_NAMES]


class _Decay:
    """Draws the eigenvalues of kernels, the largest first."""

    def __init__(self, maths: dict[str, str], epochs: Sequence[int] | None) -> None:
        self.maths, self.epochs = maths, epochs

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        name = _name(measure)
        shown_epochs = chosen_epochs(kept.epochs(setting, MEASURE), self.epochs, MAX_EPOCHS, np.linspace)
        for epoch, color in zip(shown_epochs, shades("plasma", len(shown_epochs)), strict=True):
            for i, values in enumerate(kept.of_runs(setting, epoch, MEASURE, f"{name}/eigenvalues")):
                above = np.sort(values)[::-1]
                above = above[above > ROUNDING * above[:1].max(initial=0)]
                label = f"_{epoch}" if i else f"epoch {epoch}"
                ax.plot(np.arange(1, len(above) + 1), above, color=color, linewidth=1, label=label)
        ax.set_xscale("log")
        log_ticks_on(ax.xaxis)
        log_axis(ax)
        ax.set(xlabel="i", ylabel=r"$\lambda_i$")
        add_title(ax, looks.symmetric(name, self.maths))
