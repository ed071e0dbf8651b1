"""Runs side by side: a `Setting` is runs that differ in their seed alone, a `Comparison` all settings to draw."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from figures.runs import Run, concat
from run.settings import differing, grouped, in_words, is_number, key_of, setting_of

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_SETTINGS = 60  # whose pages a program can show and whose lines an eye can follow, if barely


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
    groups = grouped((key_of(_setting(run)), run) for run in runs)
    flags = [_setting(group[0]) for group in groups]
    words = [{flag: in_words(flag, value) for flag, value in each.items()} for each in flags]
    names = differing(flags)
    common = [words[0][name] for name in ("model", "dataset") if name in flags[0] and name not in names]
    subject = " on ".join(common)
    labels = _labels(words, names) if names else [subject or str(runs[0].folder)]
    settings = [
        Setting(tuple(group), label, tuple(_value(each.get(flag, ""), flag) for flag in names))
        for group, label, each in zip(groups, labels, flags, strict=True)
    ]
    return Comparison(tuple(settings[:MAX_SETTINGS]), len(settings), subject)


def _setting(run: Run) -> dict[str, object]:
    """The flags that make a run's setting; a run whose flags are unknown equals no other."""
    return setting_of(run.hparams) or {"folder": str(run.folder)}


def _value(value: object, flag: str) -> float | str:
    """A flag's number, if it is one, else the words for it."""
    return float(value) if is_number(value) else in_words(flag, value)


def _labels(flags: Sequence[dict[str, str]], differing: Sequence[str]) -> list[str]:
    """A label per setting: the flags that differ, the first four unless it takes more to tell all apart."""
    for num_shown in range(min(4, len(differing)), len(differing) + 1):
        words = [[each.get(flag, f"{flag} unknown") for flag in differing[:num_shown]] for each in flags]
        if len({*map(tuple, words)}) == len(words):
            break
    hidden = [f"{len(differing) - num_shown} more"] if num_shown < len(differing) else []
    return [", ".join(each + hidden) for each in words]
