"""Runs as a table: which of them, in which order, with which columns; and their means over seeds."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from run.listed import DONE, MEASURED, Listed, natural
from run.presets import DEFAULTS, preset
from run.settings import differing, grouped, is_number, key, key_of, value_in_words
from run.values import perhaps

ABOUT = ("name", "model", "dataset")
RESULTS = ("epoch", "state", "last", "best")
TITLES = {"dataset": "data", "epoch": "epochs", "last": "test acc", "best": "best"}
WORDS = ("name", "model", "dataset", "state", "tag", "note")  # set to the left
SHARES = ("last", "best", "test_acc", "train_acc")  # shown in percent
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt
}  # fmt: skip
CONDITION = re.compile(r"([^<>=!]+)(<=|>=|!=|==|=|<|>)(.*)", re.S)
NOTHING = "–"

Thing = TypeVar("Thing")


class WrongName(ValueError):
    """Nothing in any run is called so."""


@dataclass(frozen=True)
class Table:
    """Columns by name and a row for each run, or for each setting; `hidden` are flags that differ as presets do."""

    columns: list[str]
    rows: list[dict[str, Any]]
    hidden: tuple[str, ...] = ()


def table(runs: Sequence[Listed], columns: Sequence[str] = ()) -> Table:
    """A row for each run, with the flags in which they differ and the columns that are asked for."""
    flags, hidden = telling_flags(runs)
    seeds = ["seed"] * (len({run.value("seed") for run in runs}) > 1)
    remarks = [name for name in ("tag", "note") if any(run.value(name) for run in runs)]
    flags = [name for name in flags if name != "epochs"]  # which stand beside those done
    names = [*ABOUT, *flags, *seeds, *RESULTS, *expanded(runs, columns), *remarks]
    names = list(dict.fromkeys(names))
    rows = [{name: run.value(name) for name in (*names, "epochs", "folder")} for run in runs]
    for row, name in zip(rows, names_of(runs), strict=True):
        row["name"] = name
    return Table(names, rows, hidden)


def means(runs: Sequence[Listed], columns: Sequence[str] = ()) -> Table:
    """A row for each setting: how many of its runs are done, and of these the mean of every number; NAME ± its
    standard deviation (n - 1), where there are two or more."""
    flags, hidden = telling_flags(runs)
    measured = [*(name for name in RESULTS if name not in ("epoch", "state")), *expanded(runs, columns)]
    names = list(dict.fromkeys([*ABOUT[1:], *flags, "runs", "done", *measured]))
    rows = []
    for group in grouped((key_of(run.setting), run) for run in runs):
        done = [run for run in group if run.state in (DONE, MEASURED)]
        row = {name: group[0].setting.get(name.replace("-", "_")) for name in names[: names.index("runs")]}
        row |= {"runs": len(group), "done": len(done), "seeds": [run.value("seed") for run in group]}
        for name in measured:
            row[name], row[f"{name} ±"] = mean_of([run.value(name) for run in done])
        rows.append(row)
    return Table(names, rows, hidden)


def mean_of(values: Iterable[Any]) -> tuple[Any, float | None]:
    """Mean and standard deviation (n - 1) of finite numbers; of other things the one that all have, or nothing."""
    values = list(values)
    if values and all(is_number(value) for value in values):
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    words = {value_in_words(value) for value in values}
    return (values[0] if len(words) == 1 else None), None


def telling_flags(runs: Sequence[Listed]) -> tuple[list[str], tuple[str, ...]]:
    """The flags in which runs differ, with `-` for `_`; and apart from them those that differ by presets alone.

    Models and datasets have presets: where every run has its own preset's value, the model's name says it already.
    """
    settings = [run.setting for run in runs]
    names = [name for name in differing(settings) if name not in (*ABOUT, "folder")]
    by_preset = [name for name in names if len({*_kinds(settings)}) > 1 and all(_is_preset(s, name) for s in settings)]
    shown = [name.replace("_", "-") for name in names if name not in by_preset]
    return shown, tuple(name.replace("_", "-") for name in by_preset)


def _kinds(settings: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    return ((str(setting.get("model")), str(setting.get("dataset"))) for setting in settings)


def _is_preset(setting: dict[str, Any], name: str) -> bool:
    """Whether a flag is what its model and data have unasked; true where flags are unknown."""
    usual = DEFAULTS | preset(setting.get("model"), setting.get("dataset"))
    return name not in setting or (name in usual and key(name, setting[name]) == key(name, usual[name]))


def names_of(runs: Sequence[Listed]) -> list[str]:
    """What to call runs: by their folders' names, or where two share one by their whole paths."""
    names = [run.value("name") for run in runs]
    return names if len({*names}) == len(names) else [str(run.folder) for run in runs]


def expanded(runs: Sequence[Listed], patterns: Sequence[str]) -> list[str]:
    """The names that shell patterns mean, in the order of the runs' columns."""
    if not patterns:
        return []
    known = list(dict.fromkeys(name for run in runs for name in run.rows.columns))
    names: list[str] = []
    for pattern in patterns:
        matching = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        names += matching or [known_name(runs, pattern)]
    return list(dict.fromkeys(names))


def known_name(runs: Sequence[Listed], name: str) -> str:
    """The name, or the one that a title stands for; an error if no run has anything of that name."""
    name = {title: name for name, title in TITLES.items() if name != "epoch"}.get(name, name)
    known = {each for run in runs for each in run.names()} | DEFAULTS.keys()
    if name not in known and name.replace("-", "_") not in known:
        raise WrongName(f"no run has {name!r}{perhaps(name, known)}")
    return name


def where(runs: Sequence[Listed], conditions: Sequence[str]) -> list[Listed]:
    """The runs for which every condition holds: `dataset=MNIST`, `learning-rate<=0.01`, `model=*Net`, `state!=done`."""
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if not match:
            raise WrongName(f"{condition!r} is no condition: NAME=VALUE, or with !=, <, <=, >, >= between them")
        name, sign, wanted = match[1].strip(), match[2].replace("==", "="), match[3].strip()
        name = known_name(runs, name)
        if sign[0] in "<>" and _number(wanted) is None:
            raise WrongName(f"{condition!r} compares with {wanted!r}, which is no number")
        runs = [run for run in runs if holds(run.value(name), sign, wanted)]
    return list(runs)


def holds(value: Any, sign: str, wanted: str) -> bool:
    """Whether a value compares as wanted: by number where both are numbers, else by its words, as a shell pattern.

    Of a list that holds for the whole or for one of its parts. What is not there is unlike anything.
    """
    number = _number(wanted)
    if is_number(value) and number is not None:
        return COMPARISONS[sign](value, number)
    if sign[0] in "<>":
        return False
    words = [value_in_words(value), *(map(str, value) if isinstance(value, list) else ())]
    if isinstance(value, bool):
        words.append(str(value).lower())
    return any(fnmatch.fnmatchcase(word, wanted) for word in words) == (sign == "=")


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None


def newest_first(runs: Iterable[Listed]) -> list[Listed]:
    return sorted(runs, key=lambda run: run.started, reverse=True)


def ordered(things: Iterable[Thing], value_of: Callable[[Thing], Any], *, reverse: bool = False) -> list[Thing]:
    """Things by a value: numbers from the highest down, words from A on; `reverse` turns this round. Gaps come last."""
    pairs = [(value_of(thing), thing) for thing in things]
    gaps = [pair for pair in pairs if is_gap(pair[0])]
    numbers = [pair for pair in pairs if is_number(pair[0])]
    words = [pair for pair in pairs if not is_gap(pair[0]) and not is_number(pair[0])]
    numbers.sort(key=lambda pair: pair[0], reverse=not reverse)
    words.sort(key=lambda pair: natural(value_in_words(pair[0])), reverse=reverse)
    return [thing for _, thing in [*numbers, *words, *gaps]]


def is_gap(value: Any) -> bool:
    """Whether there is nothing to show."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def texts(table: Table) -> tuple[list[str], list[list[str]], list[int]]:
    """Titles, cells, and which columns are set to the left."""
    rows = [[cell(row, name) for name in table.columns] for row in table.rows]
    return [title(name) for name in table.columns], rows, [i for i, n in enumerate(table.columns) if n in WORDS]


def cell(row: dict[str, Any], name: str) -> str:
    """What a person reads in a row under a name."""
    value = row[name]
    if name == "epoch":
        done, wanted = (NOTHING if figure is None else str(figure) for figure in (value, row.get("epochs")))
        return f"{done}/{wanted}"
    if name in ("note", "tag") and not value:
        return ""
    if name == "started":
        return str(value)[:16]
    spread = row.get(f"{name} ±")
    return in_figures(name, value) + (f" ± {in_figures(name, spread)}" if spread is not None else "")


def in_figures(name: str, value: Any) -> str:
    """A value in a table: accuracies in percent, other measured numbers with four digits, the rest as it was given."""
    if is_gap(value):
        return NOTHING
    if name in SHARES and is_number(value):
        return f"{value:.2%}"
    if isinstance(value, float) and (value != int(value) if math.isfinite(value) else True):
        return f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(value_in_words(value).split())


def title(name: str) -> str:
    """What stands above a column."""
    return TITLES.get(name, name)
