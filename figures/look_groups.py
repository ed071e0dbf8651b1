"""Spectra of Hessians beside each other: of groups and of all samples, of networks and of their average."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures import kept, looks
from figures.axes import MAX_NAMES, chosen_epochs, log_axis, spread
from figures.densities import Density, DensityAxes
from figures.looks import MEASURE, add_title
from figures.pages import color_legend, new_page, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import NothingToDraw, kind_color, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 6  # quantities of a page
MAX_MEMBERS = 20  # groups or networks of a panel
ROUNDING = 1e-6  # of the largest eigenvalue: what is below may be rounding of float32
WHOLE = "black"  # the color of all samples, or of the average
NO_GROUPS = "No Hessian was looked at by groups; main.py looks at them with --look hessian --look-by class."
NO_AVERAGE = "No average of Hessians is there; main.py has it of --measure A.ckpt B.ckpt --look hessian."


class Member(NamedTuple):
    """The spectrum of one group or network: its density, its largest eigenvalues in descending order, its color."""

    density: Density
    top: np.ndarray
    color: object


Members = dict[str, Member]  # by what a legend calls them


@styled
def spectra_by_group(runs: Run | Sequence[Run], epoch: int | None = None, names: Sequence[str] | None = None) -> Figure:
    """The spectrum of each Hessian of all samples (black) and of each group's: density, and largest eigenvalues.

    After the last measured epoch by default, of the first setting that has any; the density is the mean over its runs,
    and so are eigenvalues. Of clusters, which have other members in each run, the first run's.
    """
    comparison = compare(runs)
    setting, found = looks.first_with(comparison.settings, r"(?:class|batch|slot|cluster)\d+/density_nodes", NO_GROUPS)
    measured = kept.epochs(setting, MEASURE)
    [epoch] = measured[-1:] if epoch is None else chosen_epochs(measured, [epoch], 1, np.linspace)
    groups = kept.settings_of(setting, epoch, MEASURE).get("groups", {})
    rows = [f"{name}/{kind}" for name in dict.fromkeys(name.split("/")[0] for name in found) for kind in groups]
    chosen = looks.chosen(rows, names, MAX_ROWS)
    maths, panels = looks.maths([setting]), {}
    for name, kind in (row.split("/") for row in chosen):
        of = Setting(setting.runs[:1], setting.label) if kind == "cluster" else setting
        panels[f"{looks.symmetric(name, maths)}, by {kind}"] = _of_groups(of, epoch, name, groups[kind])
    heading = comparison.heading_of(setting, f"Spectra by group, epoch {epoch}{looks.left_out(chosen, rows)}")
    return _page(heading, panels)


@styled
def spectra_of_average(runs: Run | Sequence[Run], names: Sequence[str] | None = None) -> Figure:
    """The spectrum of the average of several networks' Hessians (black), and of each network: density and eigenvalues.

    The average is of matrices, so that its largest eigenvalue is at most the mean of theirs, and far below it where
    their eigenvectors differ. Of the first run that has an average.
    """
    comparison = compare(runs)
    run = next((run for setting in comparison.settings for run in setting.runs if _average_of(run).is_file()), None)
    if run is None:
        raise NothingToDraw(NO_AVERAGE)
    kept_names = kept.names_in(_average_of(run))
    found = [name.split("/")[0] for name in kept_names if re.fullmatch("[^/]+/density_nodes", name)]
    if not found:
        raise NothingToDraw(NO_AVERAGE)
    chosen = looks.chosen(found, names, MAX_ROWS)
    about = kept.read(_average_of(run), ())[1]
    maths = looks.maths_in(about)
    panels = {looks.symmetric(name, maths): _of_networks(run, about.get("networks", []), name) for name in chosen}
    num = len(_files_of(run))
    heading = f"Average of {num} networks{looks.left_out(chosen, found)} · {run.folder.resolve().name}"
    return _page(heading, panels)


def _of_groups(setting: Setting, epoch: int, name: str, groups: Sequence[str]) -> Members:
    members = {}
    for group in [*spread(list(groups), MAX_MEMBERS, np.linspace), "all"]:
        path = name if group == "all" else f"{name}/{group}"
        number = re.sub(r"\D", "", group)
        color = WHOLE if group == "all" else kind_color(int(number) if number else -1)
        tops = kept.of_runs(setting, epoch, MEASURE, f"{path}/eigenvalues")
        members[re.sub(r"(?=\d+$)", " ", group, count=1)] = Member(Density.of(setting, epoch, path), mean(tops), color)
    return members


def _of_networks(run: Run, sources: Sequence[str], name: str) -> Members:
    files = dict(zip(_labels(sources, len(_files_of(run))), _files_of(run), strict=True))
    shown = spread(list(files), MAX_MEMBERS, np.linspace)
    colors = [*shades("viridis", len(shown)), WHOLE]
    members = {}
    for label, color in zip([*shown, "average"], colors, strict=True):
        file = files.get(label, _average_of(run))
        tops = list(kept.read(file, (f"{name}/eigenvalues",))[0].values())
        members[label] = Member(Density.in_file(file, name), mean(tops), color)
    return members


def mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Their mean, as far as the shortest reaches; nothing of none."""
    return np.mean([array[: min(map(len, arrays))] for array in arrays], axis=0) if arrays else np.empty(0)


def _average_of(run: Run) -> Path:
    return run.folder / f"arrays/average/{MEASURE}.npz"


def _files_of(run: Run) -> list[Path]:
    """A file for each network, in the order in which they were measured."""
    own = sorted(run.folder.glob(f"checkpoint*/arrays/epoch*/{MEASURE}.npz"))
    return own or sorted(run.folder.glob(f"arrays/epoch*/{MEASURE}.npz"))


def _labels(sources: Sequence[str], num: int) -> list[str]:
    """What tells networks from each other: their files' names, else those of their runs, else numbers."""
    paths = [PurePath(str(source)) for source in sources]
    epochs = [re.sub(r"^epoch0*(?=\d)", "epoch ", path.stem) for path in paths]
    runs = [path.parts[-3] if len(path.parts) > 2 else path.stem for path in paths]
    alike = (labels for labels in (epochs, runs) if len(set(labels)) == len(labels) == num)
    return next(alike, [f"network {i}" for i in range(1, num + 1)])


def _page(heading: str, panels: dict[str, Members]) -> Figure:
    """A row for each quantity: densities on the left, eigenvalues on the right."""
    figure, axes = new_page(len(panels), 2, heading, width=3.4, height=2.5)
    for (left, right), (title, members) in zip(axes, panels.items(), strict=True):
        dense = {label: member for label, member in members.items() if member.density.probes}
        if dense:
            _draw_densities(left, dense)
            [*_, whole] = dense.values()
            title = f"{title}, {'exact' if whole.density.is_exact else f'probes: {len(whole.density.probes)}'}"
        _draw_eigenvalues(right, members)
        add_title(left, title)
    colors = {label: member.color for members in panels.values() for label, member in members.items()}
    color_legend(figure, {None: colors})
    return figure


def _draw_densities(ax: Axes, members: Members) -> None:
    axis = DensityAxes([member.density for member in members.values()])
    for label, member in members.items():
        member.density.draw(ax, axis, member.color, label, band=False)
    axis.set_on(ax)


def _draw_eigenvalues(ax: Axes, members: Members) -> None:
    """The largest, against their number, as long as they are above rounding."""
    for label, member in members.items():
        values = member.top[:MAX_NAMES]
        values = values[values > ROUNDING * values[:1].max(initial=0)]
        i = np.arange(1, len(values) + 1)
        ax.plot(i, values, "o-", color=member.color, label=label, markersize=2.5, linewidth=1)
    log_axis(ax)
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="i", ylabel=r"$\lambda_i$")
