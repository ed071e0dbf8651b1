"""The learning-rate range test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures.axes import log_if_wide
from figures.pages import COLUMNS, new_page, remove, styled
from figures.runs import Run, number
from figures.settings import compare
from figures.style import OKABE_ITO, NothingToDraw, plain
from figures.training import loss_axis

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
        raise NothingToDraw(
            "No learning-rate range test was made (lr_range_test.csv); main.py makes it with --lr-range-test."
        )
    lacking = len(comparison.settings) - len(tested)
    heading = comparison.heading("Learning-rate range test", sums_up=False, lacking=lacking)
    num_columns = min(len(tested), COLUMNS)
    figure, axes = new_page(math.ceil(len(tested) / num_columns), num_columns, heading, height=2.4)
    for ax, (setting, runs) in zip(axes.flat, tested.items(), strict=False):
        if ax is not axes[0, 0]:
            ax.sharey(axes[0, 0])
        for run, color in zip(runs, itertools.cycle(OKABE_ITO), strict=False):
            _lr_test(ax, run, color)
        ax.set_title(plain(comparison.name(setting), width=30))
        ax.legend()
        if ax not in axes[:, 0]:
            ax.tick_params(labelleft=False)
            ax.set_ylabel("")
    remove(axes.flat[len(tested) :])
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
    loss_axis(ax, run)
    log_if_wide(ax)
