"""What `--look` left in runs: which quantities, their names in mathematics, and families of them to draw as one."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from figures import kept
from figures.axes import spread
from figures.settings import Setting
from figures.style import NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURE = "look"
NUMBERED = re.compile(r"(eig|min|sv|pca_share)\d+")  # statistics that are drawn as spectra
ERRORS = ("residual", "trace_error", "fro_error", "pca_error", "nmf_error")  # and such as say how exact others are
FAMILIES = ("grad-loss-theta-*", "grad-loss-f-*", "hess-loss-theta-*", "hess-loss-f-*", "theta-*", "f-*",
            "grad-f-output-theta-*", "grad-f-output-f-*")  # fmt: skip
FAMILY_STATISTICS = ("norm", "sample_norm", "snr", "top_share", "stable_rank", "trace", "eig1")
MOST_LACKING = 6  # named in a heading
MANY = 4  # members from which a family has heat maps


def names(settings: Sequence[Setting], statistic: str = "[^/]+") -> list[str]:
    """The quantities that have a statistic of all samples, in the order of the columns."""
    pattern = re.compile(rf"look/([^/]+)/{statistic}")
    columns = (column for setting in settings for run in setting.runs for column in run.looks)
    return list(dict.fromkeys(match[1] for match in map(pattern.fullmatch, columns) if match))


def statistics(settings: Sequence[Setting]) -> list[str]:
    """The statistics of all samples that are numbers of their own: no part of a spectrum, no error."""
    columns = (column for setting in settings for run in setting.runs for column in run.looks)
    found = dict.fromkeys(column.split("/")[2] for column in columns if column.count("/") == 2)
    return [name for name in found if not NUMBERED.fullmatch(name) and name not in ERRORS]


def is_many(settings: Sequence[Setting], family: str) -> bool:
    """Whether a family, as grad-loss-theta-*, has enough members to be drawn as one."""
    return sum(fnmatchcase(name, family) for name in names(settings)) >= MANY


def families(settings: Sequence[Setting]) -> list[str]:
    """Measures with a star, look/grad-loss-theta-*/norm, that have enough members for a heat map."""
    measures = [f"look/{family}/{statistic}" for family in FAMILIES for statistic in FAMILY_STATISTICS]
    return [measure for measure in measures if any(setting.band(measure).mean.shape[1] >= MANY for setting in settings)]


def arrays_named(setting: Setting, epoch: int, ending: str) -> list[str]:
    """The names of arrays of all samples, NAME/ENDING, that some run kept; `ending` is a regular expression."""
    pattern = re.compile(rf"[^/]+/{ending}")
    files = [kept.file_of(run, epoch, MEASURE) for run in setting.runs if kept.has_file(run, epoch, MEASURE)]
    return list(dict.fromkeys(name for file in files for name in kept.names_in(file) if pattern.fullmatch(name)))


def first_with(settings: Sequence[Setting], ending: str, lacking: str) -> tuple[Setting, list[str]]:
    """The first setting that kept arrays NAME/ENDING, and their names; `lacking` is said if there is none."""
    for setting in settings:
        epochs = {epoch for run in setting.runs for epoch in kept.epochs_of(run, MEASURE)}
        found = arrays_named(setting, max(epochs), ending) if epochs else []
        if found:
            return setting, found
    raise NothingToDraw(lacking)


def maths(settings: Sequence[Setting]) -> dict[str, str]:
    """The quantities' names in mathematics, where a run wrote them down and they can be shown."""
    found: dict[str, str] = {}
    for setting in settings:
        for run in setting.runs:
            for epoch in kept.epochs_of(run, MEASURE)[-1:]:
                found |= maths_in(kept.read(kept.file_of(run, epoch, MEASURE), ())[1])
    return found


def maths_in(about: dict[str, Any]) -> dict[str, str]:
    """The same of the settings of one file."""
    written = about.get("math")
    return {name: text for name, text in written.items() if _is_shown(text)} if isinstance(written, dict) else {}


def chosen(found: Sequence[str], wanted: Sequence[str] | None, most: int) -> list[str]:
    """The wanted ones, by their whole names or their quantities'; else at most so many, from the first to the last."""
    if wanted is None:
        return spread(list(found), most, np.linspace)
    those = [name for name in found if name in wanted or name.split("/")[0] in wanted]
    if not those:
        raise NothingToDraw(f"There are {', '.join(found)}; not {', '.join(wanted)}.")
    return those


def left_out(shown: Sequence[str], found: Sequence[str]) -> str:
    """What a heading says where a page has not all: how many, and which to ask for."""
    lacking = [name for name in found if name not in shown]
    if not lacking:
        return ""
    names = ", ".join(lacking[:MOST_LACKING]) + ", …" * (len(lacking) > MOST_LACKING)
    return f" ({len(shown)} of {len(found)}; with names= also {names})"


@functools.cache
def _is_shown(text: object) -> bool:
    """Whether this is mathematics that a figure can show."""
    from matplotlib.mathtext import MathTextParser

    try:
        MathTextParser("path").parse(text)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def shown(name: str, maths: dict[str, str], width: int = 30) -> str:
    """A quantity's name as figures write it."""
    return maths.get(name) or plain(name, width)


def symmetric(name: str, maths: dict[str, str]) -> str:
    """What a symmetric matrix is called: of a Jacobian it is the kernel."""
    return f"$J J^T$, $J$ = {shown(name, maths)}" if name.startswith("grad-") else shown(name, maths)


def add_title(ax: Axes, title: str) -> None:
    """Under the title that the panel has, of its setting."""
    ax.set_title("\n".join(filter(None, [ax.get_title(), title])))
