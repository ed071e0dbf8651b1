"""What was looked at, over the epochs: spectra, eigenvalues, and every other statistic."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures import kept, looks
from figures.axes import (
    MAX_NAMES,
    band_of,
    chosen_epochs,
    draw_line,
    epoch_axis,
    in_units_of,
    is_wide,
    log_axis,
    log_ticks_on,
    thin,
)  # fmt: skip
from figures.labels import OF_LOOKS
from figures.looks import MEASURE, add_title, shown
from figures.pages import COLUMNS, epoch_legend, grid, legend_below, legend_beside, new_page, remove, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, plain, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_ROWS = 8  # quantities of a page
MAX_EPOCHS = 3
FAR_APART = 20  # the largest of several quantities over the least, from which lines would lie flat at the bottom
ROUNDING = 1e-14  # of the largest eigenvalue: what is below is none
SMOOTHING = 0.1  # decades: the width of a Gaussian, and of a histogram's bins
NEAR_ZERO = 1e-4  # of the largest |λ|: within, the axis is linear
DECADES = 7  # of density below its peak that a panel shows where it comes from probes
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
def ntk_spectrum(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """The eigenvalues λ_i of each neural tangent kernel against i, both on logarithmic axes, a color per epoch.

    A straight line is a power law. A line per run; what rounding left below zero is not shown.
    """
    comparison = compare(runs)
    found = [name for name in looks.names(comparison.settings, "eig1") if name.startswith("grad-")]
    if not found:
        raise NothingToDraw("No kernel was looked at; main.py looks at one with --look ntk.")
    draw = _Decay(looks.maths(comparison.settings), epochs)
    measures = [f"look/{name}/eig1" for name in found[:MAX_ROWS]]
    options = {"share": False, "sums_up": False, "height": 2.6, "legend": epoch_legend}
    return grid(runs, "Neural tangent kernels", measures, draw, **options)


def _rows(
    settings: Sequence[Setting], statistic: str, wanted: Sequence[str] | None, lacking: str
) -> tuple[list[str], str]:
    """The quantities to draw, the wanted ones or at most eight, and what a heading says of the others."""
    found = looks.names(settings, statistic)
    if not found:
        raise NothingToDraw(lacking)
    chosen = [name for name in wanted if name in found] if wanted is not None else found[:MAX_ROWS]
    if not chosen:
        raise NothingToDraw(f"Looked at were {', '.join(found)}; not {', '.join(wanted)}.")
    return chosen, f" (the first {len(chosen)} of {len(found)})" if wanted is None and len(chosen) < len(found) else ""


def _name(measure: str) -> str:
    return measure.split("/")[1]


class _Spectra:
    """Draws densities of eigenvalues; the axes of a quantity are the same in all settings."""

    def __init__(self, settings: Sequence[Setting], names: Sequence[str], epochs: Sequence[int] | None) -> None:
        self.maths = looks.maths(settings)
        self.found: dict[tuple[Setting, str], dict[int, _Density]] = {}
        for setting in settings:
            if any(kept.epochs_of(run, MEASURE) for run in setting.runs):
                shown_epochs = chosen_epochs(kept.epochs(setting, MEASURE), epochs, MAX_EPOCHS, np.linspace)
                for name in names:
                    densities = {epoch: _Density.of(setting, epoch, name) for epoch in shown_epochs}
                    self.found[setting, name] = {epoch: d for epoch, d in densities.items() if d.probes}
        self.measures = [f"look/{name}/eig1" for name in names if self._all_of(name)]
        if not self.measures:
            raise NothingToDraw("The run's arrays, look.npz, are not there; main.py keeps them with --look.")

    def __call__(self, ax: Axes, setting: Setting, measure: str) -> None:
        name = _name(measure)
        axis, of_epochs = _SymmetricAxis(self._all_of(name)), self.found.get((setting, name), {})
        for i, (epoch, color) in enumerate(zip(of_epochs, shades("plasma", len(of_epochs)), strict=True)):
            of_epochs[epoch].draw(ax, axis, color, f"epoch {epoch}")
            top = _top(setting, epoch, name)
            level = np.full(len(top), 0.97 - 0.05 * i)
            ax.plot(top, level, "|", color=color, transform=ax.get_xaxis_transform(), markersize=5, label="_top")
        axis.set_on(ax)
        ax.set_yscale("log")
        ax.set_ylim(*self._heights(name, axis))
        log_ticks_on(ax.yaxis)
        ax.set(xlabel="eigenvalue λ", ylabel="density per decade")
        how = next(iter(of_epochs.values())).how if of_epochs else "not measured"
        add_title(ax, f"{looks.symmetric(name, self.maths)}, {how}")

    def _all_of(self, name: str) -> list[_Density]:
        return [density for (_, of), by_epoch in self.found.items() if of == name for density in by_epoch.values()]

    def _heights(self, name: str, axis: _SymmetricAxis) -> tuple[float, float]:
        """From half of what one eigenvalue makes, or seven decades below the peak, to above it."""
        peak = max(density.curves(axis).max() for density in self._all_of(name))
        floor = min(density.least or peak / 10**DECADES for density in self._all_of(name))
        return floor, peak * (peak / floor) ** 0.25


class _Density(NamedTuple):
    """Σ_j w_j δ(λ - θ_j) by each probe of each run: pairs of nodes and weights."""

    probes: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, setting: Setting, epoch: int, name: str) -> _Density:
        arrays = [kept.of_runs(setting, epoch, MEASURE, f"{name}/density_{part}") for part in ("nodes", "weights")]
        return cls([probe for of_run in zip(*arrays, strict=True) for probe in zip(*of_run, strict=True)])

    @property
    def is_exact(self) -> bool:
        """Whether the nodes are all eigenvalues, of weight 1/n each."""
        return all(np.allclose(weights, 1 / len(weights)) for _, weights in self.probes)

    @property
    def how(self) -> str:
        """From what it is known."""
        num_probes = len(self.probes)
        if self.is_exact:
            return "exact"
        return "1 probe" if num_probes == 1 else f"{num_probes} probes: mean, lowest to highest"

    @property
    def least(self) -> float:
        """Half of what one eigenvalue makes in a bin, 0 if that is unknown."""
        return min(1 / (2 * len(nodes) * SMOOTHING) for nodes, _ in self.probes) if self.is_exact else 0.0

    def curves(self, axis: _SymmetricAxis) -> np.ndarray:
        """Per decade, of each probe: in bins of what is exact, else at places."""
        if self.is_exact:
            return np.stack([
                np.histogram(axis.place(nodes), axis.edges, weights=weights)[0] / SMOOTHING
                for nodes, weights in self.probes
            ])  # fmt: skip
        return np.stack([_smooth(axis.places, axis.place(nodes), weights) for nodes, weights in self.probes])

    def draw(self, ax: Axes, axis: _SymmetricAxis, color: object, label: str) -> None:
        curves = self.curves(axis)
        mean, low, high = curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0)
        if self.is_exact:
            edges = axis.values(axis.edges)
            ax.stairs(mean, edges, color=color, linewidth=1.2)
            ax.stairs(high, edges, baseline=low, fill=True, color=color, alpha=0.2)
            ax.plot([], [], color=color, label=label)
        else:
            places = axis.values(axis.places)
            ax.plot(places, mean, color=color, label=label)
            ax.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)


def _smooth(places: np.ndarray, nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ_j w_j N(u; u_j, σ²) at places u."""
    steps = (places[:, None] - nodes) / SMOOTHING
    return np.exp(-(steps**2) / 2) @ weights / (SMOOTHING * math.sqrt(2 * math.pi))


class _SymmetricAxis:
    """λ on an axis that is logarithmic on both sides of zero: u = asinh(λ / λ₀) / ln 10, in decades where |λ| ≫ λ₀."""

    def __init__(self, densities: Sequence[_Density]) -> None:
        nodes = np.concatenate([nodes for density in densities for nodes, _ in density.probes])
        self.largest = float(np.abs(nodes).max())
        self.width = NEAR_ZERO * self.largest or 1.0
        places = self.place(nodes)
        first, last = math.floor(places.min() / SMOOTHING) - 4, math.ceil(places.max() / SMOOTHING) + 4
        self.edges = SMOOTHING * np.arange(first, last + 1)
        self.places = np.linspace(self.edges[0], self.edges[-1], 4 * (last - first) + 1)

    def place(self, values: np.ndarray) -> np.ndarray:
        return np.arcsinh(values / self.width) / math.log(10)

    def values(self, places: np.ndarray) -> np.ndarray:
        return self.width * np.sinh(places * math.log(10))

    def set_on(self, ax: Axes) -> None:
        ax.set_xscale("asinh", linear_width=self.width)
        ax.set_xlim(*self.values(self.edges[[0, -1]]))
        _ticks_around_zero(ax.xaxis, self.width, self.largest or 1.0)


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
            _ticks_around_zero(ax.yaxis, NEAR_ZERO * largest.max(), largest.max())


def _ticks_around_zero(axis: Axis, width: float, largest: float) -> None:
    """Zero and powers of ten on either side, from beyond the part that is linear on."""
    from matplotlib.ticker import FixedLocator, NullLocator

    powers = range(math.floor(math.log10(width)) + 1, math.floor(math.log10(largest)) + 1)
    ticks = thin([10.0**power for power in powers], 3)
    axis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0.0, *ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(in_units_of(1))


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
