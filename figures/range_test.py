"""The learning-rate range test."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.axes import log_if_wide, y_axis
from figures.pages import new_page, styled
from figures.runs import Run, number
from figures.settings import compare
from figures.style import OKABE_ITO, NothingToDraw, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def lr_range_test(runs: Run | Sequence[Run]) -> Figure:
    """Loss in the learning-rate range test, raw (thin) and smoothed (bold), with the chosen rate."""
    comparison = compare(runs)
    tested = {setting: [run for run in setting.runs if len(run.lr_test)] for setting in comparison.settings}
    tested = {setting: runs for setting, runs in tested.items() if runs}
    if not tested:
        raise NothingToDraw("No learning-rate range test was made (lr_range_test.csv).")
    figure, axes = new_page(1, len(tested), comparison.heading("Learning-rate range test", sums_up=False))
    for ax, (setting, runs) in zip(axes.flat, tested.items(), strict=True):
        for run, color in zip(runs, itertools.cycle(OKABE_ITO), strict=False):
            _lr_test(ax, run, color)
        ax.set_title(plain(comparison.name(setting), width=45))
        ax.legend()
        ax.label_outer()
    return figure


def _lr_test(ax: Axes, run: Run, color: str) -> None:
    test = run.lr_test
    ax.plot(test["lr"], test["loss"], color=color, linewidth=0.5, alpha=0.6)
    ax.plot(test["lr"], test["smoothed"], color=color, linewidth=1.8)
    rate = number(run.hparams.get("learning_rate"))
    if run.hparams.get("lr_range_test") and rate > 0:
        label = plain(f"seed {run.hparams.get('seed')}: {rate:.3g} chosen")
        ax.axvline(rate, linestyle="--", color=color, label=label)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    y_axis(ax, "loss")
    log_if_wide(ax)
