"""Slots: how many there are, what each looks for, what an update brings, and what no slot could cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from figures import kept
from figures.axes import epoch_axis
from figures.pages import legend_below, new_page, styled
from figures.runs import Run
from figures.settings import Setting, compare
from figures.style import OKABE_ITO, NothingToDraw, kind_color, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATCHES, UPDATE = "slots", "slot_update"
NO_SLOTS = "There are no slots; main.py grows them with --head slots."
NO_PICTURES = "There are no pictures of slots; main.py keeps them at the end of training with --head slots."
NO_UPDATE = "No slots were updated; main.py does so with --slot-update."
PER_ROW = 6  # pairs of pictures, or samples
MAX_PICTURES = 60
MAX_LEGEND = 20  # classes


@styled
def slots_over_epochs(runs: Run | Sequence[Run]) -> Figure:
    """How many slots each class has after every epoch, and all together; a column per setting, means over its runs."""
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if any("slots/num" in run.metrics for run in setting.runs)]
    if not settings:
        raise NothingToDraw(NO_SLOTS)
    lacking = len(comparison.settings) - len(settings)
    figure, axes = new_page(2, len(settings), comparison.heading("Slots over epochs", lacking=lacking), height=2.3)
    for column, setting in zip(axes.T, settings, strict=True):
        table = _mean_of(setting)
        column[0].plot(table.index, table["slots/num"], color=OKABE_ITO[0], label="all slots")
        by_class = [name for name in table if name.startswith("slots/num/class")]
        for c, name in enumerate(by_class):
            column[1].plot(table.index, table[name], color=kind_color(c), label=f"class {c}")
        for ax, name in zip(column, ("slots", "slots of a class"), strict=True):
            ax.set_ylim(bottom=0)
            epoch_axis(ax, table.index)
            ax.set_ylabel(name)
        column[0].set_title(plain(comparison.name(setting), width=30))
    legend_below(figure, axes[1, 0].get_lines()[:MAX_LEGEND])
    return figure


@styled
def slot_pictures(runs: Run | Sequence[Run]) -> Figure:
    """Slots in pairs: the training image of its class that is nearest to it, and its mean gradient on noise.

    Of each class those that match the most training samples; over a pair stands the class, and how many. Of the first
    run that kept them.
    """
    setting, arrays = _first_with(runs, MATCHES, "gradients", NO_PICTURES)
    images, gradients = arrays["nearest_inputs"], arrays["gradients"]
    if images.ndim != 4:
        raise NothingToDraw("Slots of vectors have no pictures: the samples are no images.")
    heading = compare(runs).heading_of(setting, "Slots: nearest training image, gradient on noise")
    figure, axes = _tiles(2 * len(images), 2 * PER_ROW, heading)
    for i, j in enumerate(arrays["shown"]):
        axes[2 * i].imshow(**_picture(images[i]))
        axes[2 * i].set_title(f"{arrays['label'][j]}: {arrays['hits'][j]}", fontsize=6, pad=1)
        axes[2 * i + 1].imshow(**_gradient(gradients[i]))
    return figure


@styled
def uncovered_samples(runs: Run | Sequence[Run]) -> Figure:
    """Training samples that no slot of their class matches, first those that look most like another class.

    Over each stand its label and the class of the most similar slot: labels that are wrong come early. Of the first run
    that kept them.
    """
    setting, arrays = _first_with(runs, MATCHES, "uncovered_inputs", NO_PICTURES)
    images = arrays["uncovered_inputs"][:MAX_PICTURES]
    if images.ndim != 4:
        raise NothingToDraw("Samples that no slot covers have no pictures: they are no images.")
    what = f"{len(images)} of {len(arrays['uncovered']):,} training samples that no slot covers: label → looks like"
    figure, axes = _tiles(len(images), 2 * PER_ROW, compare(runs).heading_of(setting, what))
    for ax, image, label, other in zip(axes, images, arrays["uncovered_label"], arrays["uncovered_as"], strict=False):
        ax.imshow(**_picture(image))
        ax.set_title(f"{label} → {other}", fontsize=6, pad=1)
    return figure


@styled
def accuracy_by_slots(runs: Run | Sequence[Run]) -> Figure:
    """Accuracy against the number of slots, as an update adds them one by one: on its half and on the held-out one."""
    comparison = compare(runs)
    settings = [setting for setting in comparison.settings if any(kept.epochs_of(run, UPDATE) for run in setting.runs)]
    if not settings:
        raise NothingToDraw(NO_UPDATE)
    lacking = len(comparison.settings) - len(settings)
    heading = comparison.heading("Accuracy by number of slots", sums_up=False, lacking=lacking)
    figure, axes = new_page(1, len(settings), heading, height=2.8)
    names = {"updated": "half that it is for", "held_out": "held-out half"}
    for ax, setting in zip(axes.flat, settings, strict=True):
        for run in setting.runs:
            for (name, words), color in zip(names.items(), OKABE_ITO, strict=False):
                for epoch in kept.epochs_of(run, UPDATE)[-1:]:
                    arrays, made = kept.read(kept.file_of(run, epoch, UPDATE))
                    num = made["slots_before"] + np.arange(len(arrays[name]))
                    ax.plot(num, 100 * arrays[name], color=color, label=words)
        ax.set_xlabel("slots")
        ax.set_ylabel("accuracy (%)")
        ax.set_title(plain(comparison.name(setting), width=30))
    legend_below(figure, axes.flat[0].get_lines()[:2])
    return figure


def _mean_of(setting: Setting) -> Any:
    """The columns of slots, mean over a setting's runs, a row per epoch."""
    import pandas

    tables = [run.metrics.filter(regex="^slots/num") for run in setting.runs if "slots/num" in run.metrics]
    return pandas.concat(tables).groupby(level=0).mean()


def _first_with(
    runs: Run | Sequence[Run], measure: str, name: str, lacking: str
) -> tuple[Setting, dict[str, np.ndarray]]:
    """The arrays of the first run that kept one of this name, at its last such epoch, with the run's setting."""
    for setting in compare(runs).settings:
        for run in setting.runs:
            for epoch in reversed(kept.epochs_of(run, measure)):
                arrays, _ = kept.read(kept.file_of(run, epoch, measure))
                if name in arrays:
                    return setting, arrays
    raise NothingToDraw(lacking)


def _tiles(num: int, num_columns: int, heading: str) -> tuple[Figure, list[Axes]]:
    """Places for pictures, without frames."""
    figure, axes = new_page(-(-num // num_columns), num_columns, heading, width=0.68, height=0.78)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        ax.set_frame_on(False)
    return figure, list(axes.flat)


def _picture(image: np.ndarray) -> dict[str, Any]:
    """An image (C, H, W), from its lowest value to its highest, as `imshow` wants it: in colors if it has three."""
    low, high = image.min(), image.max()
    return _channels_last((image - low) / max(high - low, 1e-12))


def _gradient(g: np.ndarray) -> dict[str, Any]:
    """g / (2 max|g|) + ½: what is not there is grey."""
    return _channels_last(g / (2 * max(np.abs(g).max(), 1e-12)) + 0.5)


def _channels_last(image: np.ndarray) -> dict[str, Any]:
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
    return {"X": picture, "cmap": "gray", "vmin": 0, "vmax": 1}
