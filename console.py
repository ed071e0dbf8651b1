"""What a person at the terminal sees: a banner, one progress bar, a line per epoch, a closing summary."""

import logging
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from errors import Interrupted

Item = TypeVar("Item")

MEASURES = {
    "NC1 train": "nc1/train/{}",
    "NC1 test": "nc1/test/{}",
    "DIB minimality": "dib/minimality/{}",
    "numerical rank": "rank/numerical/train/{}",
    "stable rank": "rank/stable/train/{}",
    "effective rank": "rank/effective/train/{}",
}
UNWANTED_WARNINGS = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's way of asking torch
    ".*sync_dist=True.*",  # what is logged is that of all ranks already
)


class Console(Callback):
    """One bar over the steps of the whole run and above it a line per epoch; neither with `quiet`."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one; not with `quiet`."""
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """The items, under a bar that vanishes when they are through: for what takes long between two steps."""
        return iter(tqdm(items, description, total, leave=False, disable=self._without_bar(), delay=0.5))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        hidden = self._without_bar() or not trainer.is_global_zero
        self._bar = tqdm(total=steps, initial=trainer.global_step, unit=" steps", leave=False, disable=hidden)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False)

    def on_train_batch_end(self, *_: object) -> None:
        self._bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.say(epoch_line(trainer.current_epoch + 1, trainer.max_epochs, pl_module.values))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def _without_bar(self) -> bool:
        return self.quiet or not sys.stderr.isatty()


class OwnSignals(Callback):
    """Takes the signals back from Lightning, whose handler waits for other ranks, which may never answer."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Interrupted.take_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Interrupted.take_signals()


def epoch_line(epoch: int, num_epochs: int, values: Mapping[str, float]) -> str:
    """`epoch  3/10  train loss 0.1034  acc  96.81%  test loss 0.0973  acc  97.02%`"""
    parts = [f"epoch {epoch:>{len(str(num_epochs))}}/{num_epochs}"]
    for split in ("train", "test"):
        if f"{split}_loss" in values:
            loss, accuracy = values[f"{split}_loss"], values[f"{split}_acc"]
            parts.append(f"{split} loss {loss:.4f}  acc {accuracy:7.2%}")
    return "   ".join(parts)


def banner(args: Namespace, facts: Mapping[str, Any], folder: Path) -> str:
    """What runs on what and where, in four lines."""
    lines = {
        "data": f"{args.dataset}: {facts['train_samples']:,} training and {facts['test_samples']:,} test samples, "
        f"{facts['num_classes']} classes",
        "network": f"{args.model}: {facts['parameters']:,} parameters, measured at {', '.join(facts['layers'])}",
        "device": f"{facts['device']}, {args.precision}",
        "folder": str(folder),
    }
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def device_name(trainer: Trainer) -> str:
    """How many of which device, as a reader of results wants to know it."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} × {name}" if trainer.world_size > 1 else name


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns below each other: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others])

    return "\n".join(map(line, [header, *rows]))


def layer_table(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name, shape and dimension of every layer."""
    rows = [[layer, " × ".join(map(str, shape)), str(math.prod(shape))] for layer, shape in shapes.items()]
    return table(["layer", "shape", "dimension"], rows)


def closing(rows: Sequence[Mapping[str, str]], layers: Sequence[str]) -> str:
    """What came out: accuracies, and per layer each measure, first epoch and last."""
    measured = [row for row in rows if any("/" in name and not name.startswith("time/") for name in row)]
    parts = [_accuracies(rows)]
    if measured:
        parts += [measure_table(measured[0], measured[-1], layers)]
        parts += [_equiseparation(measured[-1])]
    return "\n\n".join(part for part in parts if part) + "\n"


def measure_table(first: Mapping[str, str], last: Mapping[str, str], layers: Sequence[str]) -> str:
    """Per layer what the measures gave first and last, as `first → last`; empty where nothing was measured."""
    shown = {title: key for title, key in MEASURES.items() if any(key.format(layer) in last for layer in layers)}
    if not shown:
        return ""
    header = [f"epoch {_course(first, last, 'epoch')}", *shown]
    cells = [[layer, *(_course(first, last, key.format(layer)) for key in shown.values())] for layer in layers]
    return table(header, cells)


def _course(first: Mapping[str, str], last: Mapping[str, str], name: str) -> str:
    """`first → last`, or the one value where there is one row."""
    before, after = (_short(row.get(name)) for row in (first, last))
    return after if first is last else f"{before} → {after}"


def _accuracies(rows: Sequence[Mapping[str, str]]) -> str:
    tested = [row for row in rows if "test_acc" in row]
    if not tested:
        return ""
    best = max(tested, key=lambda row: float(row["test_acc"]))
    return (
        f"test accuracy {float(tested[-1]['test_acc']):.2%} after epoch {tested[-1]['epoch']}, "
        f"at best {float(best['test_acc']):.2%} after epoch {best['epoch']}"
    )


def _equiseparation(row: Mapping[str, str]) -> str:
    fits = []
    for split in ("train", "test"):
        if f"equiseparation/{split}/r" in row:
            r, slope = (float(row[f"equiseparation/{split}/{figure}"]) for figure in ("r", "slope"))
            fits.append(f"{split} r = {r:.3f}, slope {slope:.3f}")
    return "equi-separation, log NC1 over the layers: " + "; ".join(fits) if fits else ""


def _short(number: str | None) -> str:
    return "–" if number is None else f"{float(number):.4g}"


def silence_libraries() -> None:
    """Keep quiet about what the program chose itself, and about products."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    for message in UNWANTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
