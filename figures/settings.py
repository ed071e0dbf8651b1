"""Runs side by side: a `Setting` is runs that differ in their seed alone, a `Comparison` all settings to draw."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures.runs import Run, concat

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_SETTINGS = 60  # whose pages a program can show and whose lines an eye can follow, if barely
# Flags that say where and how to compute, not what: runs that differ in them are still one setting.
BOOKKEEPING = {
    *("log_dir", "name", "seed", "resume", "resumed_from", "config", "provenance", "data_dir", "lr_range_test"),
    *("accelerator", "devices", "num_nodes", "strategy", "compile", "cache_gb"),
    *("keep_going", "save_every", "dib_save", "plots", "quiet", "tsne", "save_activations", "activations_format"),
}


class Band(NamedTuple):
    """The tables of several runs, summed up."""

    mean: DataFrame
    low: DataFrame
    high: DataFrame

    @classmethod
    def over(cls, tables: Sequence[DataFrame], log: bool = False) -> Band:
        """Mean (`log`: geometric, of what is positive), lowest and highest of all that stands in a place."""
        stacked = concat(tables)
        rows = (np.log(stacked.where(stacked > 0)) if log else stacked).groupby(level=0)
        mean, low, high = rows.mean(), rows.min(), rows.max()
        return cls(*map(np.exp, (mean, low, high))) if log else cls(mean, low, high)

    def over_depth(self, layers: Sequence[str]) -> Band:
        """The same with depths 1, 2, …, L as rows and epochs as columns."""
        return Band(*(table.T.reindex(layers).set_axis(range(1, len(layers) + 1)) for table in self))


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed, and what a figure calls them."""

    runs: tuple[Run, ...]
    label: str
    values: tuple[float | str, ...] = ()  # of the flags that differ between settings

    @property
    def title(self) -> str:
        """The label with the number of runs, and how many of them are as long as the longest."""
        if len(self.runs) == 1:
            return self.label
        last = [max(run.metrics.index, default=-1) for run in self.runs]
        cut_short = f", {last.count(max(last))} to epoch {max(last)}" if min(last) < max(last) else ""
        return f"{self.label} ({len(self.runs)} runs{cut_short})"

    @functools.cached_property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for run in self.runs for layer in run.layers))

    @property
    def measures(self) -> list[str]:
        return list(dict.fromkeys(measure for run in self.runs for measure in run.measures))

    @property
    def measured_epochs(self) -> list[int]:
        """The epochs after which any run measured anything."""
        tables = [run.table(measure) for run in self.runs for measure in [*run.measures, *run.looks]]
        return sorted({epoch for table in tables for epoch in table.index})

    @property
    def head_epochs(self) -> list[int]:
        return sorted({epoch for run in self.runs for epoch in run.head_epochs})

    def has(self, *measures: str) -> bool:
        """Whether each of the measures was made in some run."""
        return all(any(not run.table(measure).empty for run in self.runs) for measure in measures)

    def band(self, measure: str, log: bool = False) -> Band:
        return Band.over([run.table(measure) for run in self.runs], log)

    def head_losses(self, epoch: int) -> Band:
        return Band.over([run.head_losses(epoch) for run in self.runs])


@dataclass(frozen=True)
class Comparison:
    """The settings to draw side by side, of all that there are, and what they have in common."""

    settings: tuple[Setting, ...]
    num_settings: int
    subject: str

    @property
    def left_out(self) -> str:
        """A sentence if there are more settings than a page holds; an empty string otherwise."""
        shown = len(self.settings)
        if shown == self.num_settings:
            return ""
        return f"the first {shown} of {self.num_settings} settings; give fewer runs to see the others"

    def heading(self, what: str, *, sums_up: bool = True, lacking: int = 0) -> str:
        """What a figure shows, of which runs, and, if it sums them up, how. `lacking`: settings that it cannot show."""
        several = any(len(setting.runs) > 1 for setting in self.settings)
        alone = self.settings[0] if self.num_settings == 1 else None
        parts = [
            what,
            alone.title if alone else self.subject,
            alone.runs[0].folder.resolve().name if alone and not several else "",
            "lines: mean over runs, bands: lowest to highest" if several and sums_up else "",
            f"not measured in {lacking} of {len(self.settings)} settings" if lacking else "",
            self.left_out,
        ]
        return " · ".join(filter(None, parts))

    def heading_of(self, setting: Setting, what: str) -> str:
        """The same of a figure that shows one setting alone."""
        if self.num_settings == 1:
            return self.heading(what, sums_up=False)
        return f"{what} · {setting.title}, the first of {self.num_settings} settings that has it"

    def name(self, setting: Setting) -> str:
        """What tells a setting from the others; nothing if there are no others."""
        return setting.title if self.num_settings > 1 else ""


def compare(runs: Run | Sequence[Run]) -> Comparison:
    """Groups runs into settings and labels these by the flags in which they differ."""
    runs = [runs] if isinstance(runs, Run) else runs
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(_flags(run).items())), []).append(run)
    flags = [_flags(group[0]) for group in groups.values()]
    names = dict.fromkeys(["model", "dataset", *(name for each in flags for name in each)])
    differing = [name for name in names if len({each.get(name) for each in flags}) > 1]
    common = [flags[0][name] for name in ("model", "dataset") if name in flags[0] and name not in differing]
    subject = " on ".join(common)
    labels = _labels(flags, differing) if differing else [subject or str(runs[0].folder)]
    settings = [
        Setting(tuple(group), label, tuple(_value(group[0], flag, each.get(flag, "")) for flag in differing))
        for group, label, each in zip(groups.values(), labels, flags, strict=True)
    ]
    return Comparison(tuple(settings[:MAX_SETTINGS]), len(settings), subject)


def _flags(run: Run) -> dict[str, str]:
    """Each flag of a run in words; a run whose flags are unknown equals no other."""
    known = {str(flag): value for flag, value in run.hparams.items() if flag not in BOOKKEEPING}
    if known:
        known.setdefault("loss", "cross-entropy")  # a run from before there was another
    if run.hparams.get("lr_range_test"):
        known["learning_rate"] = "from range test"  # which chooses another one for every seed
    return {flag: _in_words(flag, value) for flag, value in known.items()} or {"folder": str(run.folder)}


def _value(run: Run, flag: str, words: str) -> float | str:
    """A flag's number, if it is one that was given, else the words for it."""
    given = run.hparams.get(flag)
    is_number = isinstance(given, int | float) and not isinstance(given, bool) and words == _in_words(flag, given)
    return float(given) if is_number and math.isfinite(given) else words


def _in_words(flag: str, value: object) -> str:
    """A flag as one says it: nonlinearity relu; batch-norm; no batch-norm; MLP."""
    name = flag.replace("_", "-")
    if value is None or isinstance(value, bool):
        return name if value else f"no {name}"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if flag in ("model", "dataset") else f"{name} {text}".rstrip()


def _labels(flags: Sequence[dict[str, str]], differing: Sequence[str]) -> list[str]:
    """A label per setting: the flags that differ, the first four unless it takes more to tell all apart."""
    for num_shown in range(min(4, len(differing)), len(differing) + 1):
        words = [[each.get(flag, f"{flag} unknown") for flag in differing[:num_shown]] for each in flags]
        if len({*map(tuple, words)}) == len(words):
            break
    hidden = [f"{len(differing) - num_shown} more"] if num_shown < len(differing) else []
    return [", ".join(each + hidden) for each in words]
