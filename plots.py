"""Figures of runs: what training, neural collapse, decodable information and rank did, layer by layer.

    python plots.py lightning_logs/version_3                  every figure of one run, in figures/
    python plots.py lightning_logs -o paper --format pdf      all runs: seeds averaged, settings side by side

From Python, or in `plots.ipynb`: `plots.nc1_over_depth(plots.load(["lightning_logs/version_3"]))`.

Every figure takes one run or several. Runs whose flags differ in nothing but the seed are one setting: lines
are means over its runs (geometric where the axis is logarithmic), bands reach from the lowest to the highest.
Different settings stand side by side. What was not measured is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from run.errors import UserError
from runs import SPLITS, Band, Run, Setting, compare, load, number

if TYPE_CHECKING:  # matplotlib takes half a second to import, which is done once there is something to draw
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Label(NamedTuple):
    """What an axis says, and whether it is logarithmic, as it is for every ratio."""

    text: str
    log: bool = False


RANKS = ("numerical", "stable", "effective")
LABELS = {
    "loss": Label("cross-entropy (nats)"),
    "acc": Label("accuracy (%)"),
    "nc1": Label("NC1 = tr(Σ_W Σ_B⁺)", log=True),
    "dib/loss": Label("cross-entropy of the heads (nats)"),
    "dib/minimality": Label("minimality (nats)"),
    "dib/sufficiency": Label("sufficiency (nats)"),
    **{f"rank/{kind}": Label(f"{kind} rank", log=True) for kind in RANKS},
    **{f"rank/means_{kind}": Label(f"{kind} rank of class means", log=True) for kind in RANKS},
}
EPOCH_LABEL = "epoch (0: before training)"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # less yellow, on white
LEGEND_WIDTH = 1.4  # inches
MAX_NAMES = 24  # layer names that a legend or an axis holds
MAX_MARKED = 30  # points of a line that are marked; more would blur dashes
STYLE = {
    "figure.dpi": 120,
    "figure.titlesize": 9,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of `python plots.py`."""
    parser = argparse.ArgumentParser(prog="plots.py", description="Figures of a run, or of several.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder that holds such folders")
    add("-o", "--output", default="figures", metavar="FOLDER", help="where to write (default: figures)")
    add("--format", choices=("png", "pdf", "svg"), default="png", help="file format (default: png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the figures and print their paths. Exit status: 0 done, 1 error, 2 wrong flag, 130 Ctrl-C."""
    args = get_args(argv)
    try:
        _write_all(load(args.runs, say=_say), Path(args.output), args.format)
    except UserError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class NothingToDraw(Exception):
    """Says in a sentence what a figure would need."""


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Gives a figure this module's style, whatever the user's, and a sentence if there is nothing to draw."""

    @functools.wraps(draw)
    def styled(*args: object, **kwargs: object) -> Figure:
        from matplotlib import style

        with style.context(["default", STYLE]):
            try:
                return draw(*args, **kwargs)
            except NothingToDraw as nothing:
                return _sentence(str(nothing))

    return styled


@_styled
def training_curves(runs: Run | Sequence[Run]) -> Figure:
    """Loss and accuracy over epochs, a color per setting; strokes at the bottom mark the measured epochs."""
    comparison = compare(runs)
    if not any(setting.has(quantity) for setting in comparison.settings for quantity in ("loss", "acc")):
        raise NothingToDraw("Neither loss nor accuracy was logged.")
    figure, axes = _page(1, 2, comparison.heading("Training"), share=False)
    for ax, quantity in zip(axes.flat, ("loss", "acc"), strict=True):
        for setting, color in zip(comparison.settings, OKABE_ITO, strict=False):
            _training(ax, setting, quantity, color, name=comparison.name(setting))
        _mark_measured(ax, comparison.settings)
    _legend(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


@_styled
def nc1_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """NC1 of every layer over the epochs, a row per split and a column per setting."""
    return _grid(runs, "NC1 over epochs", [f"nc1/{split}" for split in SPLITS], _over_epochs)


@_styled
def nc1_over_depth(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """NC1 over the layers at some epochs (default: five, denser at the start) and the law of equi-separation.

    Dashed: least-squares fits of log NC1 over depth, with Pearson's r and slope. Dotted: the chance level.
    """
    draw = functools.partial(_nc1_over_depth, epochs=epochs)
    return _grid(runs, "NC1 over depth", [f"nc1/{split}" for split in SPLITS], draw, legend="panels", width=4.5)


@_styled
def heat_map(runs: Run | Sequence[Run], measure: str = "nc1/test") -> Figure:
    """Layers × measured epochs of any measure: one of `Run.measures`, such as nc1/test or dib/minimality."""
    label = _label(measure)
    settings = [setting for setting in compare(runs).settings if setting.has(measure)]
    norm = _norm([_band(setting, measure).mean for setting in settings], label.log)
    draw = functools.partial(_heat_map, norm=norm)
    height = max(2.3, 0.14 * min(MAX_NAMES, max(len(setting.layers) for setting in settings)))
    figure = _grid(runs, label.text, [measure], draw, legend="none", share=False, height=height)
    meshes = [mesh for ax in figure.axes for mesh in ax.collections]
    colorbar = figure.colorbar(meshes[0], ax=figure.axes, label=label.text)
    if label.log:
        _log_ticks(colorbar.ax.yaxis, norm.vmin, norm.vmax)
    return figure


@_styled
def minimality_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How much of a sample's identity can be read from each layer: the mean over digits of H(Y_k) - CE_k."""
    return _grid(runs, "Minimality over epochs", ["dib/minimality"], _over_epochs)


@_styled
def sufficiency_minimality(runs: Run | Sequence[Run]) -> Figure:
    """The way of every layer in the plane of minimality and sufficiency: first epoch circle, last dot."""
    rows = [f"dib/sufficiency/{split}" for split in SPLITS]
    return _grid(runs, "Sufficiency and minimality, first (○) to last epoch (●)", rows, _path, needs=["dib/minimality"])


@_styled
def nc1_against_minimality(runs: Run | Sequence[Run]) -> Figure:
    """The way of every layer in the plane of minimality and NC1: first epoch circle, last dot."""
    rows = [f"nc1/{split}" for split in SPLITS]
    return _grid(runs, "NC1 against minimality, first (○) to last epoch (●)", rows, _path, needs=["dib/minimality"])


@_styled
def head_losses(runs: Run | Sequence[Run], epochs: Sequence[int] | None = None) -> Figure:
    """Cross-entropy of the DIB heads in training, at some epochs (default: first, middle, last).

    Where curves still fall at the right end, more head epochs would read more. Dashed: the entropy of the
    digits, which is the loss of heads that read nothing.
    """
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if setting.head_epochs]
    if not settings:
        raise NothingToDraw("No losses of DIB heads were kept (dib.csv).")
    measured = sorted({epoch for setting in settings for epoch in setting.head_epochs})
    chosen = _chosen(measured, epochs, 3, np.linspace)
    figure, axes = _page(len(settings), len(chosen), comparison.heading("Training of the DIB heads"))
    for ax, (setting, epoch) in zip(axes.flat, itertools.product(settings, chosen), strict=True):
        _heads(ax, setting, epoch)
        ax.set_title(f"{_plain(comparison.name(setting), width=45)}\nepoch {epoch}".lstrip())
        ax.label_outer()
    _layer_legend(figure, settings)
    return figure


@_styled
def rank_over_epochs(runs: Run | Sequence[Run], split: str = "train", class_means: bool = False) -> Figure:
    """Numerical, stable and effective rank of every layer's activations, or class means, over the epochs."""
    return _grid(runs, *_rank_rows("epochs", split, class_means), _over_epochs)


@_styled
def rank_over_depth(
    runs: Run | Sequence[Run],
    split: str = "train",
    class_means: bool = False,
    epochs: Sequence[int] | None = None,
) -> Figure:
    """Numerical, stable and effective rank of activations, or class means, over the layers at some epochs."""
    draw = functools.partial(_over_depth, epochs=epochs)
    return _grid(runs, *_rank_rows("depth", split, class_means), draw, legend="panels", width=4.5)


@_styled
def lr_range_test(runs: Run | Sequence[Run]) -> Figure:
    """Loss in the learning-rate range test, raw (thin) and smoothed (bold), with the chosen rate."""
    comparison = compare(runs)
    tested = {setting: [run for run in setting.runs if len(run.lr_test)] for setting in comparison.settings}
    tested = {setting: runs for setting, runs in tested.items() if runs}
    if not tested:
        raise NothingToDraw("No learning-rate range test was made (lr_range_test.csv).")
    figure, axes = _page(1, len(tested), comparison.heading("Learning-rate range test", sums_up=False))
    for ax, (setting, runs) in zip(axes.flat, tested.items(), strict=True):
        for run, color in zip(runs, itertools.cycle(OKABE_ITO), strict=False):
            _lr_test(ax, run, color)
        ax.set_title(_plain(comparison.name(setting), width=45))
        ax.legend()
        ax.label_outer()
    return figure


@_styled
def summary(runs: Run | Sequence[Run]) -> Figure:
    """One page with the most telling panels of a run, or of several of one setting."""
    comparison = compare(runs)
    setting = comparison.settings[0]
    nc1_over_depth = functools.partial(_nc1_over_depth, num=3)
    candidates = [
        (_training, "loss"),
        (_training, "acc"),
        (_over_epochs, "rank/effective/test"),
        (_over_epochs, "nc1/train"),
        (_over_epochs, "nc1/test"),
        (_over_epochs, "dib/minimality"),
        (nc1_over_depth, "nc1/train"),
        (nc1_over_depth, "nc1/test"),
        (_path, "dib/sufficiency/test"),
    ]
    panels = [(draw, measure) for draw, measure in candidates if setting.has(measure)]
    if not panels:
        raise NothingToDraw("No epoch was logged.")
    num_rows, num_columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure, axes = _page(num_rows, num_columns, comparison.heading("Summary"), share=False)
    for ax, (draw, measure) in zip(axes.flat, panels, strict=False):
        draw(ax, setting, measure)
        if draw in (_training, nc1_over_depth):
            ax.legend(fontsize=6, frameon=True, edgecolor="none")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    if setting.layers:
        _layer_legend(figure, [setting])
    return figure


def figures(runs: Run | Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """Every figure with a name for its file."""
    settings = compare(runs).settings
    functions = [summary] if len(settings) == 1 else []
    functions += [training_curves, nc1_over_epochs, nc1_over_depth, minimality_over_epochs]
    functions += [sufficiency_minimality, head_losses, nc1_against_minimality, lr_range_test]
    for function in functions:
        yield function.__name__, function(runs)
    for function, split in itertools.product((rank_over_epochs, rank_over_depth), SPLITS):
        yield f"{function.__name__}_{split}", function(runs, split)
        yield f"{function.__name__}_class_means_{split}", function(runs, split, class_means=True)
    for measure in dict.fromkeys(measure for setting in settings for measure in setting.measures):
        yield f"heat_map_{re.sub('[^A-Za-z0-9_.-]', '_', measure)}", heat_map(runs, measure)


def write(figure: Figure, path: Path) -> Path:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(unfinished, format=path.suffix[1:])
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return path


def _grid(
    runs: Run | Sequence[Run],
    title: str,
    measures: Sequence[str],
    draw: Callable[[Axes, Setting, str], None],
    *,
    needs: Sequence[str] = (),
    legend: str = "layers",
    **page: object,
) -> Figure:
    """A row of panels per measure that was made, a column per setting. `legend`: layers, panels or none."""
    comparison = compare(runs)
    settings = comparison.settings
    rows = [measure for measure in measures if any(setting.has(measure, *needs) for setting in settings)]
    if not rows:
        raise NothingToDraw(f"Not measured: {', '.join([*measures, *needs])}.")
    figure, axes = _page(len(rows), len(settings), comparison.heading(title), **page)
    for ax, (measure, setting) in zip(axes.flat, itertools.product(rows, settings), strict=True):
        (draw if setting.has(measure, *needs) else _not_measured)(ax, setting, measure)
        if legend == "panels" and ax.get_lines():
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        if page.get("share", True):
            ax.label_outer()
    for ax, setting in zip(axes[0], settings, strict=True):
        ax.set_title(_plain(comparison.name(setting), width=45))
    if legend == "layers":
        _layer_legend(figure, settings)
    return figure


def _rank_rows(over: str, split: str, class_means: bool) -> tuple[str, list[str]]:
    """Title and measures of a rank figure."""
    title = f"Rank of {'class means' if class_means else 'activations'} over {over}"
    return title, [f"rank/{'means_' if class_means else ''}{kind}/{split}" for kind in RANKS]


def _training(ax: Axes, setting: Setting, quantity: str, color: str = OKABE_ITO[0], name: str = "") -> None:
    """Loss or accuracy: train dashed, test solid."""
    from matplotlib.ticker import PercentFormatter

    band = setting.band(quantity)
    for split, linestyle in zip(SPLITS, ("--", "-"), strict=True):
        if split in band.mean:
            label = _plain(f"{name}, {split}" if name else split, width=30)
            _line(ax, band, split, color=color, linestyle=linestyle, label=label)
    _epoch_axis(ax, band.mean.index)
    _y_axis(ax, quantity)
    if quantity == "acc":
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    else:
        _log_if_wide(ax)


def _mark_measured(ax: Axes, settings: Sequence[Setting]) -> None:
    epochs = sorted({epoch for setting in settings for epoch in setting.measured_epochs})
    where = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    if epochs:
        ax.plot(epochs, [0] * len(epochs), "|", color="0.3", markersize=4, label="measured epoch", **where)


def _over_epochs(ax: Axes, setting: Setting, measure: str) -> None:
    """A line per layer."""
    band = _band(setting, measure)
    for layer, color in _colors(setting).items():
        if layer in band.mean:
            _line(ax, band, layer, color=color, label=_plain(layer))
    _epoch_axis(ax, band.mean.index)
    _y_axis(ax, measure)


def _over_depth(ax: Axes, setting: Setting, measure: str, epochs: Sequence[int] | None = None, num: int = 5) -> None:
    """A line per epoch: those asked for, else `num`, denser at the start."""
    band = _band(setting, measure)
    chosen = _chosen(list(band.mean.index), epochs, num, np.geomspace)
    by_depth = band.over_depth(setting.layers)
    for epoch, color in zip(chosen, _shades("plasma_r", len(chosen)), strict=True):
        _line(ax, by_depth, epoch, color=color, label=f"epoch {epoch}")
    _depth_axis(ax, setting.layers)
    _y_axis(ax, measure)


def _nc1_over_depth(ax: Axes, setting: Setting, measure: str, **which: object) -> None:
    """A line per epoch, each with the fit of equi-separation, and the chance level."""
    _over_depth(ax, setting, measure, **which)
    for line in ax.get_lines():
        depth, nc1 = line.get_data()
        if len(depth) > 2:  # a line through two points always fits
            r, slope, fit = _equiseparation(depth, nc1)
            line.set_label(f"{line.get_label()}: r = {r:.3f}, slope {slope:.2f}".replace("-", "−"))
            ax.plot(depth, fit, "--", linewidth=0.8, color=line.get_color())
    chance = setting.runs[0].chance_level(measure.removeprefix("nc1/"))
    chance = [chance.get(layer, math.nan) for layer in setting.layers]
    if np.isfinite(chance).any():
        ax.plot(range(1, len(chance) + 1), chance, ":", color="0.3", label="chance level")


def _equiseparation(depth: np.ndarray, nc1: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Pearson's r of log NC1 and depth, the slope of the least-squares line, and that line as NC1."""
    x, z = depth - np.mean(depth), np.log(nc1)
    slope = x @ z / (x @ x)
    spread = math.sqrt((x @ x) * np.sum((z - z.mean()) ** 2))
    return x @ z / spread if spread else math.nan, slope, np.exp(z.mean() + slope * x)


def _heat_map(ax: Axes, setting: Setting, measure: str, norm: Normalize) -> None:
    """Layers as rows, the first on top; measured epochs as columns of equal width; grey where undefined."""
    table = _band(setting, measure).mean
    table = table[[layer for layer in setting.layers if layer in table]]
    ax.pcolormesh(table.T.to_numpy(float), norm=norm, cmap="cividis")
    epochs = _thin(list(enumerate(table.index)), 8)
    layers = _thin(list(enumerate(table.columns)), MAX_NAMES)
    ax.set_xticks([i + 0.5 for i, _ in epochs], [str(epoch) for _, epoch in epochs])
    ax.set_yticks([i + 0.5 for i, _ in layers], [_plain(layer) for _, layer in layers])
    ax.set(xlabel=EPOCH_LABEL, ylabel="layer", facecolor="0.85")
    ax.grid(False)
    ax.invert_yaxis()


def _path(ax: Axes, setting: Setting, measure: str) -> None:
    """The way of each layer from the first epoch (circle) to the last (dot), minimality to the right."""
    x, y = _band(setting, "dib/minimality").mean, _band(setting, measure).mean
    for layer, color in _colors(setting).items():
        column = layer if layer in y else measure  # sufficiency is one number for all layers
        if layer in x and column in y:
            path = x[[layer]].assign(y=y[column]).dropna().to_numpy()  # (E, 2)
            ax.plot(*path.T, color=color, linewidth=0.8, label=_plain(layer))
            ax.plot(*path[:1].T, "o", color=color, markersize=4, markerfacecolor="white")
            ax.plot(*path[-1:].T, "o", color=color, markersize=4)
    ax.set_xlabel(_label("dib/minimality").text)
    _y_axis(ax, measure)


def _heads(ax: Axes, setting: Setting, epoch: int) -> None:
    """A line per layer over the head epochs, and the entropy of the digits where it is known."""
    band = setting.head_losses(epoch)
    for layer, color in _colors(setting).items():
        if layer in band.mean:
            _line(ax, band, layer, color=color, label=_plain(layer))
    if setting.has("dib/loss", "dib/minimality"):
        entropy = setting.band("dib/loss").mean + setting.band("dib/minimality").mean  # equal for all layers
        value = entropy.mean(axis=1).get(epoch, math.nan)
        ax.axhline(value, linestyle="--", color="0.3", label="entropy of the digits")
    ax.set_xlabel("head epoch")
    _y_axis(ax, "dib/loss")


def _lr_test(ax: Axes, run: Run, color: str) -> None:
    test = run.lr_test
    ax.plot(test["lr"], test["loss"], color=color, linewidth=0.5, alpha=0.6)
    ax.plot(test["lr"], test["smoothed"], color=color, linewidth=1.8)
    rate = number(run.hparams.get("learning_rate"))
    if run.hparams.get("lr_range_test") and rate > 0:
        label = _plain(f"seed {run.hparams.get('seed')}: {rate:.3g} chosen")
        ax.axvline(rate, linestyle="--", color=color, label=label)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    _y_axis(ax, "loss")
    _log_if_wide(ax)


def _not_measured(ax: Axes, setting: Setting, measure: str) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
    ax.tick_params(labelbottom=False)
    _y_axis(ax, measure)


def _band(setting: Setting, measure: str) -> Band:
    return setting.band(measure, log=_label(measure).log)


def _line(ax: Axes, band: Band, column: str | int, **style: object) -> None:
    """The mean; where runs differ, a band from the lowest to the highest."""
    x = band.mean[column].dropna().index.to_numpy()
    # Without their last digits, as the rounding errors of a constant would fill the whole axis.
    mean, low, high = ([float(f"{value:.9g}") for value in table[column].dropna()] for table in band)
    ax.plot(x, mean, marker="o" if len(x) <= MAX_MARKED else "", **style)
    if low != high:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _label(measure: str) -> Label:
    """What the axis of a measure says: the quantity with its unit, and the split."""
    name, _, split = measure.rpartition("/")
    if split not in SPLITS:
        return LABELS.get(measure, Label(_plain(measure)))
    text, log = LABELS.get(name, Label(_plain(name)))
    return Label(f"{text}, {split} set", log)


def _y_axis(ax: Axes, measure: str) -> None:
    text, log = _label(measure)
    ax.set_ylabel(textwrap.fill(text, 32))
    if log:
        _log_axis(ax)


def _log_axis(ax: Axes) -> None:
    if math.isfinite(ax.dataLim.minposy):  # there is a value above zero
        ax.set_yscale("log")
        _log_ticks(ax.yaxis, *ax.get_ylim())


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at powers of ten, and between these where there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _log_if_wide(ax: Axes) -> None:
    """A loss that falls to a hundredth is readable only on a logarithmic axis."""
    values = [value for line in ax.get_lines() for value in line.get_ydata() if value > 0]
    if values and max(values) > 100 * min(values):
        _log_axis(ax)


def _epoch_axis(ax: Axes, epochs: Sequence[int]) -> None:
    """Epochs at even steps of the logarithm get an axis on which these are even."""
    ax.set_xlabel(EPOCH_LABEL)
    if len(epochs) == 1:
        ax.set_xticks(epochs)
    elif len(epochs) > 4 and sorted(epochs)[len(epochs) // 2] < max(epochs) / 4:
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter("{x:.0f}")
    else:
        ax.locator_params(axis="x", integer=True)


def _depth_axis(ax: Axes, layers: Sequence[str]) -> None:
    ticks = _thin(list(enumerate(layers, start=1)), MAX_NAMES)
    crowded = {"rotation": 90, "fontsize": 7} if sum(map(len, layers)) > 30 else {}
    ax.set_xticks([depth for depth, _ in ticks], [_plain(layer) for _, layer in ticks], **crowded)
    ax.set_xlabel("layer, in network order")


def _thin(items: list, limit: int) -> list:
    """At most `limit` of the items, at even steps, the last among them."""
    step = max(1, math.ceil(len(items) / limit))
    return items[::-step][::-1]


def _chosen(measured: list[int], wanted: Sequence[int] | None, num: int, space: Callable) -> list[int]:
    """The wanted epochs, else `num` of those measured, from the first to the last."""
    if wanted is None:
        positions = space(1, len(measured), num).round().astype(int)
        return [measured[position - 1] for position in dict.fromkeys(positions)]
    known = [epoch for epoch in wanted if epoch in measured]
    if not known:
        raise NothingToDraw(f"Measured epochs are {', '.join(map(str, _thin(measured, 12)))}; not {wanted}.")
    return known


def _colors(setting: Setting) -> dict[str, tuple]:
    """A color per layer, from light at the input to dark at the output."""
    return dict(zip(setting.layers, _shades("viridis_r", len(setting.layers)), strict=True))


def _shades(name: str, num: int) -> list[tuple]:
    """Colors at even steps of a perceptually uniform map, without its beginning: too light for white paper."""
    import matplotlib

    return [matplotlib.colormaps[name](position) for position in np.linspace(1, 0.12, num)[::-1]]


def _norm(tables: Sequence[DataFrame], log: bool) -> Normalize:
    """One scale of colors for all tables."""
    from matplotlib.colors import LogNorm, Normalize

    values = np.concatenate([table.to_numpy(float).ravel() for table in tables] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        raise NothingToDraw("Not measured, or nowhere defined.")
    return (LogNorm if log else Normalize)(values.min(), values.max())


def _page(
    num_rows: int, num_columns: int, title: str, *, width: float = 3.2, height: float = 2.3, share: bool = True
) -> tuple[Figure, np.ndarray]:
    """Panels with room for a legend on the right."""
    figure = _new_figure(width * num_columns + LEGEND_WIDTH, height * num_rows + 0.5)
    shared = {"sharex": "col", "sharey": "row"} if share else {}
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **shared)
    letters_per_inch = 13  # of the title
    title = _plain(title, width=int(letters_per_inch * width * num_columns))
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure, axes


def _sentence(text: str) -> Figure:
    """A figure that only says something."""
    figure = _new_figure(6, 0.6)
    ax = figure.subplots()
    ax.set_axis_off()
    ax.text(0.5, 0.5, _plain(text, width=90), ha="center", va="center")
    return figure


def _new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window and to no pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure, handles: Sequence, labels: Sequence[str]) -> None:
    """Beside the panels; the page grows if one column is too short."""
    num_lines = sum(label.count("\n") + 1 for label in labels)
    lines_per_column = int(figure.get_figheight() * 72 / 11)  # points; a line of 7-point letters takes 11
    num_columns = math.ceil(num_lines / lines_per_column)
    figure.set_figwidth(figure.get_figwidth() + (num_columns - 1) * LEGEND_WIDTH)
    figure.legend(handles, labels, loc="outside right upper", ncols=num_columns)


def _layer_legend(figure: Figure, settings: Sequence[Setting]) -> None:
    """The colors of the layers, under the name of the setting where networks differ."""
    from matplotlib.lines import Line2D

    networks = {tuple(setting.layers): setting for setting in reversed(settings)}
    entries = []
    for setting in reversed(networks.values()):
        if len(networks) > 1:
            entries.append(Line2D([], [], linestyle="", label=_plain(setting.label, width=24)))
        for layer, color in _thin(list(_colors(setting).items()), MAX_NAMES):
            entries.append(Line2D([], [], color=color, label=_plain(layer)))
    _legend(figure, entries, [entry.get_label() for entry in entries])


def _plain(text: str, width: int = 200) -> str:
    """Text from outside, wrapped, without mathematics and letters that the font lacks."""
    letters = _letters()
    text = "".join(letter if ord(letter) in letters else "?" for letter in text).replace("$", r"\$")
    text = textwrap.fill(text, width, break_on_hyphens=False)
    return " " + text if text.startswith("_") else text  # an underscore hides a label from the legend


@functools.cache
def _letters() -> frozenset[int]:
    """The letters of matplotlib's own font."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def _write_all(runs: Sequence[Run], folder: Path, file_format: str) -> None:
    missing = []
    for name, figure in figures(runs):
        if any(ax.axison for ax in figure.axes):
            print(write(figure, folder / f"{name}.{file_format}"), flush=True)
        else:
            missing.append(name)
    if missing:
        _say(f"not measured, so not drawn: {', '.join(missing)}")


def _say(sentence: str) -> None:
    print(f"plots.py: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
