"""The loss at a distance from the network, and what noise and missing channels do to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures import kept
from figures.axes import MAX_NAMES, chosen_epochs, in_units_of, short, spread, thin
from figures.pages import color_legend, epoch_legend, legend_below, new_page, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, plain, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANDSCAPE, PERTURB = "landscape", "perturb"
NO_LANDSCAPE = "There are no landscapes of the loss; main.py measures them with --landscape."
NO_NOISE = "Nothing was perturbed; main.py adds noise and removes channels with --perturb."
NO_CHANNELS = "No channel was taken out; main.py does so with --perturb --perturb-channels."
IN_WORDS = {"eig1": "first eigenvector", "eig2": "second eigenvector", "random": "random, by filter"}
MAX_EPOCHS = 2
MAX_LINES = 12  # of equal loss
MAX_NAMED = 8  # networks written beside a path
HEADROOM = 0.05  # of the losses' range, above and below them
NEAR_ZERO = 0.001  # of accuracy or loss: within, the axis is linear
DECADES = tuple(sign * 10.0**power for power in range(-3, 7) for sign in (-1, 1))


@styled
def landscape_curves(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """The loss along each direction from the network, a color per epoch, and the parabola of its slope and curvature.

    First and last epoch by default; a row per setting. Axes hold the losses; a parabola (dashed) may leave them.
    """
    comparison = compare(runs)
    settings = _those_with(comparison.settings, LANDSCAPE, NO_LANDSCAPE)
    shown = {setting: chosen_epochs(kept.epochs(setting, LANDSCAPE), epochs, MAX_EPOCHS, np.linspace)
             for setting in settings}  # fmt: skip
    names = dict.fromkeys(name for setting, of in shown.items() for epoch in of for name in _directions(setting, epoch))
    lacking = len(comparison.settings) - len(settings)
    heading = comparison.heading("Loss along directions", lacking=lacking)
    figure, axes = new_page(len(settings), len(names), heading, height=2.3)
    for row, setting in zip(axes, settings, strict=True):
        for ax, name in zip(row, names, strict=True):
            _curves(ax, setting, shown[setting], name)
            ax.set_title(IN_WORDS.get(name, plain(name)))
        row[0].set_ylabel("loss")
        row[0].set_title(_titled(comparison.name(setting), row[0].get_title()))
    for ax in axes[-1]:
        ax.set_xlabel("distance α")
    epoch_legend(figure, {ax: setting for row, setting in zip(axes, settings, strict=True) for ax in row})
    legend_below(figure, _curve_styles())
    return figure


@styled
def landscape_maps(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """Lines of equal loss over the plane of the Hessian's first two eigenvectors, and over that of a path of networks.

    The cross is the network, at the first epoch and the last; the path goes from the circle to the dot. Steps between
    lines are even in the loss's logarithm. Of the first run that has any.
    """
    comparison = compare(runs)
    setting, run = _first_run(comparison.settings)
    maps = list(_maps_of(run, epochs))
    if not maps:
        raise NothingToDraw("There are no maps of the loss; main.py measures them with --landscape --landscape-map 21.")
    heading = comparison.heading_of(setting, "Maps of the loss")
    figure, axes = new_page(1, len(maps), heading, width=3.4, height=3.2)
    for ax, of in zip(axes.flat, maps, strict=True):
        of.draw(ax)
    return figure


@styled
def perturbation_curves(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """Accuracy and loss against the size of the noise that is added to a layer's output, a color per layer.

    At size 1 the noise is as large as what it is added to. A row per setting and epoch, first and last by default, of
    several settings the last; lines are means over draws and runs, bands reach from the lowest to the highest.
    """
    return _perturbed(runs, epochs, "Noise on layers", "noise", NO_NOISE, _noise)


@styled
def channel_importance(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """The accuracy lost and the loss gained without each channel of a layer, the most needed first, a color per layer.

    Axes are linear near zero, else logarithmic. A row per setting and epoch, first and last by default, of several
    settings the last; lines are means over runs, of each the channels in their own order.
    """
    return _perturbed(runs, epochs, "Layers without a channel", "channels", NO_CHANNELS, _channels)


def _those_with(settings: Sequence[Setting], measure: str, lacking: str) -> list[Setting]:
    """The settings of which a run kept arrays; `lacking` is said if there is none."""
    found = [setting for setting in settings if any(kept.epochs_of(run, measure) for run in setting.runs)]
    if not found:
        raise NothingToDraw(lacking)
    return found


def _titled(*parts: str) -> str:
    return "\n".join(plain(part, width=30) for part in parts if part)


def _directions(setting: Setting, epoch: int) -> list[str]:
    files = [kept.file_of(run, epoch, LANDSCAPE) for run in setting.runs if kept.has_file(run, epoch, LANDSCAPE)]
    names = (name for file in files for name in kept.names_in(file) if name.endswith("/parabola"))
    return [name.removesuffix("/parabola") for name in dict.fromkeys(names)]


def _curves(ax: Axes, setting: Setting, epochs: Sequence[int], name: str) -> None:
    """A direction's losses and parabolas; the axis is that of the losses."""
    all_losses = []
    for epoch, color in zip(epochs, shades("plasma", len(epochs)), strict=True):
        losses, parabolas = (kept.of_runs(setting, epoch, LANDSCAPE, f"{name}/{of}") for of in ("losses", "parabola"))
        if losses:
            [alphas, *_] = kept.of_runs(setting, epoch, LANDSCAPE, "alphas")
            _line(ax, alphas, np.stack(losses), color, f"epoch {epoch}")
            ax.plot(alphas, np.mean(parabolas, axis=0), "--", color=color, linewidth=0.9)
            all_losses.append(np.ravel(losses))
    found = np.concatenate([*all_losses, []])
    found = found[np.isfinite(found)]
    if found.size:
        low, high = found.min(), found.max()
        margin = HEADROOM * (high - low) or HEADROOM * abs(high) or HEADROOM
        ax.set_ylim(low - margin, high + margin)
    else:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")


def _line(ax: Axes, x: np.ndarray, lines: np.ndarray, color: object, label: str, marker: str = "") -> None:
    """The mean of several lines, and a band from the lowest to the highest."""
    ax.plot(x, lines.mean(axis=0), color=color, label=plain(label), marker=marker)
    if len(lines) > 1:
        ax.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _curve_styles() -> list:
    from matplotlib.lines import Line2D

    labels = {"-": "loss", "--": "parabola of slope and curvature"}
    return [Line2D([], [], color="0.3", linestyle=style, label=label) for style, label in labels.items()]


class _Map(NamedTuple):
    """Losses over a plane, one in row i and column j at x_i and y_j, and a path in it."""

    title: str
    labels: tuple[str, str]
    x: np.ndarray
    y: np.ndarray
    losses: np.ndarray
    path: np.ndarray
    names: Sequence[str] = ()

    def draw(self, ax: Axes) -> None:
        losses = np.ma.masked_invalid(self.losses.T)
        levels = levels_of(self.losses)
        if len(levels):
            norm = "log" if levels[0] > 0 else None
            lines = ax.contour(self.x, self.y, losses, levels, cmap="viridis", norm=norm, linewidths=0.9)
            ax.clabel(lines, levels[::2], fontsize=6, fmt=lambda level: short(float(f"{level:.2g}")))
        else:
            ax.text(0.5, 0.9, "the same loss everywhere", transform=ax.transAxes, ha="center", color="0.4")
        if len(self.path) > 1:
            self._draw_path(ax)
        else:
            ax.plot(*self.path.T, "+", color="black", markersize=7)
        ax.set(title=self.title, xlabel=self.labels[0], ylabel=self.labels[1], aspect="equal")
        ax.set(xlim=(self.x[0], self.x[-1]), ylim=(self.y[0], self.y[-1]))

    def _draw_path(self, ax: Axes) -> None:
        color = OKABE_ITO[1]
        ax.plot(*self.path.T, color=color, marker=".", linewidth=1)
        ax.plot(*self.path[:1].T, "o", color=color, markersize=5, markerfacecolor="white")
        ax.plot(*self.path[-1:].T, "o", color=color, markersize=5)
        for name, point in spread(list(zip(self.names, self.path, strict=False)), MAX_NAMED, np.linspace):
            ax.annotate(plain(name), point, (3, 3), textcoords="offset points", fontsize=7)


def levels_of(losses: np.ndarray) -> np.ndarray:
    """Losses at even steps of the logarithm between the least and the largest; of what is not positive, at even steps.

    >>> levels_of(np.array([[0.0, 6.5, 13.0]])).tolist()
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    """
    found = losses[np.isfinite(losses)]
    if not found.size or found.min() == found.max():
        return np.empty(0)
    space = np.geomspace if found.min() > 0 else np.linspace
    levels = space(found.min(), found.max(), MAX_LINES + 2)[1:-1]
    return levels if (np.diff(levels) > 0).all() else np.empty(0)  # else they differ by rounding alone


def _first_run(settings: Sequence[Setting]) -> tuple[Setting, Run]:
    """The first run that kept a landscape, of an epoch or of a path."""
    for setting in settings:
        for run in setting.runs:
            if kept.epochs_of(run, LANDSCAPE) or _path_file(run).is_file():
                return setting, run
    raise NothingToDraw(NO_LANDSCAPE)


def _path_file(run: Run) -> PurePath:
    return run.folder / f"arrays/average/{LANDSCAPE}.npz"


def _maps_of(run: Run, epochs: Sequence[int] | None) -> Iterator[_Map]:
    """Those of the first and the last epoch, and that of the path."""
    found = kept.epochs_of(run, LANDSCAPE)
    for epoch in chosen_epochs(found, epochs, MAX_EPOCHS, np.linspace) if found else []:
        arrays, _ = kept.read(kept.file_of(run, epoch, LANDSCAPE), ("map/alphas", "map/losses"))
        if "map/losses" in arrays:
            alphas = arrays["map/alphas"]
            labels = ("along the first eigenvector", "along the second")
            yield _Map(f"epoch {epoch}", labels, alphas, alphas, arrays["map/losses"], np.zeros((1, 2)))
    if _path_file(run).is_file():
        arrays, about = kept.read(_path_file(run))
        if "map/alphas1" in arrays:
            names = [re.sub(r"^epoch0*(?=\d)", "", PurePath(str(name)).stem) for name in about.get("networks", [])]
            labels = ("first component of the path", "second component")
            axes = arrays["map/alphas1"], arrays["map/alphas2"]
            yield _Map("path of networks", labels, *axes, arrays["map/losses"], arrays["path"], names)


def _perturbed(
    runs: Run | Sequence[Run],
    epochs: Sequence[int] | None,
    title: str,
    kind: str,
    lacking: str,
    draw: Callable[[Sequence[Axes], Setting, int, dict[str, tuple]], None],
) -> Figure:
    """A row of two panels, of accuracy and of loss, per setting and epoch."""
    comparison = compare(runs)
    settings = _those_with(comparison.settings, PERTURB, lacking)
    num = MAX_EPOCHS if len(settings) == 1 else 1
    rows, colors = [], {}
    for setting in settings:
        measured = kept.epochs(setting, PERTURB)
        places = _places(setting, measured[-1], kind)
        if places:
            shown = chosen_epochs(measured if num > 1 or epochs else measured[-1:], epochs, num, np.linspace)
            colors[setting] = dict(zip(places, shades("viridis", len(places)), strict=True))
            rows += [(setting, epoch) for epoch in shown]
    if not rows:
        raise NothingToDraw(lacking)
    heading = comparison.heading(title, lacking=len(comparison.settings) - len(colors))
    figure, axes = new_page(len(rows), 2, heading, height=2.3)
    for pair, (setting, epoch) in zip(axes, rows, strict=True):
        for ax, above in zip(pair, axes[0], strict=True):
            if ax is not above:
                ax.sharey(above)
        draw(pair, setting, epoch, colors[setting])
        pair[0].set_title(_titled(comparison.name(setting), f"epoch {epoch}"))
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    color_legend(figure, {setting: dict(thin(list(of.items()), MAX_NAMES)) for setting, of in colors.items()})
    return figure


def _places(setting: Setting, epoch: int, kind: str) -> list[str]:
    """The layers that noise or missing channels disturbed, in the order of the arrays."""
    files = [kept.file_of(run, epoch, PERTURB) for run in setting.runs if kept.has_file(run, epoch, PERTURB)]
    names = (name for file in files for name in kept.names_in(file))
    beginning, end = f"{kind}/", "/losses"
    return [name[len(beginning) : -len(end)] for name in dict.fromkeys(names)
            if name.startswith(beginning) and name.endswith(end)]  # fmt: skip


def _noise(pair: Sequence[Axes], setting: Setting, epoch: int, colors: dict[str, tuple]) -> None:
    [sizes, *_] = kept.of_runs(setting, epoch, PERTURB, "sizes")
    for ax, quantity in zip(pair, ("accuracies", "losses"), strict=True):
        for place, color in colors.items():
            draws = kept.of_runs(setting, epoch, PERTURB, f"noise/{place}/{quantity}")
            if draws:
                _line(ax, sizes, np.concatenate(draws), color, place, marker="o")
        ax.set_xscale("symlog", linthresh=float(sizes[sizes > 0].min()))
        ticks = thin(sizes.tolist(), 8)
        ax.set_xticks(ticks, [short(tick) for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("size of the noise, relative to what it is added to")
    pair[0].set_ylabel("accuracy (%)")
    pair[0].yaxis.set_major_formatter(in_units_of(0.01))
    pair[1].set_ylabel("loss")


def _channels(pair: Sequence[Axes], setting: Setting, epoch: int, colors: dict[str, tuple]) -> None:
    clean = kept.of_runs(setting, epoch, PERTURB, "clean")
    for ax, quantity, i, sign in zip(pair, ("accuracies", "losses"), (1, 0), (-1, 1), strict=True):
        for place, color in colors.items():
            found = kept.of_runs(setting, epoch, PERTURB, f"channels/{place}/{quantity}")
            if found:
                changes = [np.sort(sign * (of - at[i]))[::-1] for of, at in zip(found, clean, strict=True)]
                marker = "o" if len(changes[0]) <= MAX_NAMES else ""
                _line(ax, np.arange(1, len(changes[0]) + 1), np.stack(changes), color, place, marker)
        _near_zero(ax)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(in_units_of(1))
        ax.set_xlabel("channel, the most needed first")
    pair[0].set_ylabel("accuracy lost (%)")
    pair[0].yaxis.set_major_formatter(in_units_of(0.01))
    pair[1].set_ylabel("rise of the loss")
    pair[1].yaxis.set_major_formatter(in_units_of(1))


def _near_zero(ax: Axes) -> None:
    """A y-axis that is linear near zero and logarithmic beyond, with powers of ten beside it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set_yscale("asinh", linear_width=NEAR_ZERO)
    ax.yaxis.set_major_locator(FixedLocator([0.0, *DECADES]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
