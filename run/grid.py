"""The runs of a sweep: every combination of the values that `--sweep` and `--seed` give, and how each is asked for."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from run.presets import DEFAULTS, OF_ONE_CALL
from run.values import perhaps

FIXED = {*OF_ONE_CALL, "log_dir", "name", "note", "tag", "seed"}  # are no question to a sweep
SWITCH = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


class Axis(NamedTuple):
    """A flag with the values that it takes in turn, each as the words that the command line has for it."""

    flag: str
    words: dict[str, list[str]]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its value of every swept flag, and its seed."""

    values: tuple[tuple[str, str], ...]
    words: tuple[str, ...]  # on the command line
    seed: int

    @property
    def label(self) -> str:
        """`learning-rate 0.1, seed 2`"""
        return ", ".join(f"{flag} {value}" for flag, value in (*self.values, ("seed", self.seed)))

    def name(self, stem: str) -> str:
        """What to call its folder: `mine_learning-rate0.1_seed2`."""
        values = (f"{flag}{re.sub('[^A-Za-z0-9.+-]+', '-', value)}" for flag, value in self.values)
        return "_".join([stem, *values, f"seed{self.seed}"])

    def argv(self, argv: Sequence[str], stem: str | None) -> list[str]:
        """The flags of this run alone: of those given twice the last ones count, and a bare --sweep takes all back."""
        name = [] if stem is None else ["--name", self.name(stem)]
        # A bare --sweep comes where there was one: what has none may be called by a program that knows none.
        bare = ["--sweep"] if self.values else []
        return [*argv, *bare, *self.words, "--seed", str(self.seed), *name]


def points(axes: Sequence[Axis], seeds: int | Sequence[int]) -> list[Point]:
    """All combinations; the seed changes fastest."""
    seeds = seeds if isinstance(seeds, list) else [seeds]
    combinations = itertools.product(*([(axis.flag, value) for value in axis.words] for axis in axes))
    words = {axis.flag: axis.words for axis in axes}
    return [
        Point(values, tuple(word for flag, value in values for word in words[flag][value]), seed)
        for values in combinations
        for seed in seeds
    ]


class Sweep(argparse.Action):
    """`--sweep FLAG VALUE…`, once for each flag; without a word it takes back those before it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: list[str], flag: str | None = None) -> None:
        if not values:
            namespace.sweep = None
            return
        axes = getattr(namespace, "sweep", None) or []
        axis = self._axis(parser, *values)
        if axis.flag in (other.flag for other in axes):
            raise argparse.ArgumentError(self, f"{axis.flag} comes twice")
        namespace.sweep = [*axes, axis]

    def _axis(self, parser: argparse.ArgumentParser, name: str, *values: str) -> Axis:
        known = {option.lstrip("-"): action for option, action in parser._option_string_actions.items()}
        action = known.get(name) or known.get(name.replace("_", "-"))
        if action is None or action.dest not in DEFAULTS:
            raise argparse.ArgumentError(self, f"there is no flag {name!r}{perhaps(name, known)}")
        flag = action.dest.replace("_", "-")
        if action.dest == "seed":
            raise argparse.ArgumentError(self, "for several seeds give --seed several values")
        if action.dest in FIXED:
            raise argparse.ArgumentError(self, f"--{flag} is one for all runs")
        if not values:
            raise argparse.ArgumentError(self, f"{flag} has no values: --sweep {flag} VALUE…")
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise argparse.ArgumentError(self, f"{flag} {twice[0]} comes twice")
        return Axis(flag, {value: list(self._words(action, flag, value)) for value in values})

    def _words(self, action: argparse.Action, flag: str, value: str) -> Iterable[str]:
        if isinstance(action, argparse.BooleanOptionalAction):
            if value.lower() not in SWITCH:
                raise argparse.ArgumentError(self, f"{flag} is a switch, yes or no, not {value!r}")
            return words_for(flag, SWITCH[value.lower()])
        several = action.nargs in ("+", "*") or isinstance(action.nargs, int)
        return words_for(flag, shlex.split(value) if several else value)


def words_for(flag: str, value: Any) -> list[str]:
    """The words on the command line that give a flag a value."""
    name = flag.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
