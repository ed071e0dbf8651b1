"""Which runs are one setting, differing in nothing but their seed, and in which flags settings differ, in words."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from run.presets import DEFAULTS

# Flags that say where and how to compute, or what to call it: runs that differ in them are still one setting.
BOOKKEEPING = {
    *("log_dir", "name", "note", "tag", "seed", "resume", "resumed_from", "config", "provenance", "data_dir"),
    *("accelerator", "devices", "num_nodes", "strategy", "compile", "cache_gb", "lr_range_test"),
    *("keep_going", "save_every", "dib_save", "logger", "plots", "quiet", "tsne", "save_activations"),
    *("activations_format", "in_memory", "slot_update", "target_acc"),
}
FOUND = "from range test"


def setting_of(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that make a run's setting; empty where they are unknown.

    A flag that came after the run was made has its default. A range test chooses another rate for every seed.
    """
    known = {str(flag): value for flag, value in hparams.items() if flag not in BOOKKEEPING}
    if not known:
        return {}
    later = {flag: value for flag, value in DEFAULTS.items() if flag not in (*BOOKKEEPING, "model", "dataset")}
    known = later | known
    return known | ({"learning_rate": FOUND} if hparams.get("lr_range_test") else {})


def in_words(flag: str, value: object) -> str:
    """A flag as one says it: nonlinearity relu; batch-norm; no batch-norm; MLP."""
    name = flag.replace("_", "-")
    if value is None or isinstance(value, bool):
        return name if value else f"no {name}"
    words = value_in_words(value)
    return words if flag in ("model", "dataset", "folder") else f"{name} {words}".rstrip()


def value_in_words(value: object) -> str:
    """A flag's value as one gives it: 0.1; 512 256; yes; none."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The flags in which settings differ, model and data first."""
    names = dict.fromkeys(["model", "dataset", *(name for each in settings for name in each)])
    return [name for name in names if len({key(name, each.get(name)) for each in settings}) > 1]


def key(flag: str, value: object) -> Hashable:
    """What two runs share exactly if they have the same value: 1 and 1.0 are one number."""
    return value if is_number(value) else in_words(flag, value)


def key_of(setting: Mapping[str, Any]) -> Hashable:
    """The same of all flags of a setting."""
    return tuple(sorted((flag, key(flag, value)) for flag, value in setting.items()))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def grouped(runs: Iterable[tuple[Hashable, Any]]) -> list[list[Any]]:
    """What has the same key together, in the order in which keys first come."""
    groups: dict[Hashable, list[Any]] = {}
    for of_setting, run in runs:
        groups.setdefault(of_setting, []).append(run)
    return list(groups.values())
