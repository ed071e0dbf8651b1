"""Densities of eigenvalues as panels show them: smoothed, or in bins, on axes that are logarithmic but near zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures import kept
from figures.axes import in_units_of, log_ticks_on, thin
from figures.looks import MEASURE
from figures.settings import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SMOOTHING = 0.1  # decades: the width of a Gaussian, and of a histogram's bins
NEAR_ZERO = 1e-4  # of the largest |λ|: within, the axis is linear
PARTS = ("nodes", "weights")
DECADES = 7  # of density below its peak that a panel shows where it comes from probes


class Density(NamedTuple):
    """Σ_j w_j δ(λ - θ_j) by each probe of each run: pairs of nodes and weights."""

    probes: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, setting: Setting, epoch: int, name: str) -> Density:
        """That of a quantity, or of a group in it, NAME/GROUP, which the runs of a setting kept."""
        nodes, weights = (kept.of_runs(setting, epoch, MEASURE, f"{name}/density_{part}") for part in PARTS)
        return cls([probe for of_run in zip(nodes, weights, strict=True) for probe in zip(*of_run, strict=True)])

    @classmethod
    def in_file(cls, path: Path, name: str) -> Density:
        """The same of a single file."""
        arrays = kept.read(path, [f"{name}/density_{part}" for part in PARTS])[0].values()
        return cls(list(zip(*arrays, strict=True)) if arrays else [])

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

    def curves(self, axis: DensityAxes) -> np.ndarray:
        """Per decade, of each probe: in bins of what is exact, else at places."""
        if self.is_exact:
            return np.stack([
                np.histogram(axis.place(nodes), axis.edges, weights=weights)[0] / SMOOTHING
                for nodes, weights in self.probes
            ])  # fmt: skip
        return np.stack([smooth(axis.places, axis.place(nodes), weights) for nodes, weights in self.probes])

    def draw(self, ax: Axes, axis: DensityAxes, color: object, label: str, *, band: bool = True) -> None:
        """The mean over probes, and a band from the lowest to the highest."""
        curves = self.curves(axis)
        mean, low, high = curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0)
        if self.is_exact:
            edges = axis.values(axis.edges)
            ax.stairs(mean, edges, color=color, linewidth=1.2)
            ax.plot([], [], color=color, label=label)
            if band:
                ax.stairs(high, edges, baseline=low, fill=True, color=color, alpha=0.2)
        else:
            places = axis.values(axis.places)
            ax.plot(places, mean, color=color, label=label)
            if band:
                ax.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)


def smooth(places: np.ndarray, nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ_j w_j N(u; u_j, σ²) at places u."""
    steps = (places[:, None] - nodes) / SMOOTHING
    return np.exp(-(steps**2) / 2) @ weights / (SMOOTHING * math.sqrt(2 * math.pi))


class DensityAxes:
    """The axes that densities are drawn on: λ logarithmic on both sides of zero, and density logarithmic.

    u = asinh(λ / λ₀) / ln 10 is in decades where |λ| ≫ λ₀.
    """

    def __init__(self, densities: Sequence[Density]) -> None:
        self.densities = densities
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
        ticks_around_zero(ax.xaxis, self.width, self.largest or 1.0)
        ax.set_yscale("log")
        ax.set_ylim(*self._heights())
        log_ticks_on(ax.yaxis)
        ax.set(xlabel="eigenvalue λ", ylabel="density per decade")

    def _heights(self) -> tuple[float, float]:
        """From half of what one eigenvalue makes, or seven decades below the peak, to above it."""
        peak = max(density.curves(self).max() for density in self.densities)
        floor = min(density.least or peak / 10**DECADES for density in self.densities)
        return floor, peak * (peak / floor) ** 0.25


def ticks_around_zero(axis: Axis, width: float, largest: float) -> None:
    """Zero and powers of ten on either side, from beyond the part that is linear on."""
    from matplotlib.ticker import FixedLocator, NullLocator

    powers = range(math.floor(math.log10(width)) + 1, math.floor(math.log10(largest)) + 1)
    ticks = thin([10.0**power for power in powers], 3)
    axis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0.0, *ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(in_units_of(1))
