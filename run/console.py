"""What a person at the terminal sees while it runs: one progress bar, a line per epoch; and silence of libraries."""

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from run.errors import Interrupted
from run.tables import epoch_line

Item = TypeVar("Item")

UNWANTED_WARNINGS = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's way of asking torch
    ".*`srun` command is available.*",  # on every login node, also for those who mean to run there
)


class Console(Callback):
    """One bar over the steps of the whole run and above it a line per epoch, with the seconds that it took, measures
    among them; neither with `quiet`."""

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
        self._say_lines(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()
        self._bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False)

    def on_train_batch_end(self, *_: object) -> None:
        self._bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            seconds = time.perf_counter() - self._start
            self.say(epoch_line(trainer.current_epoch + 1, trainer.max_epochs, pl_module.values, seconds))
        self._say_lines(trainer)

    def _say_lines(self, trainer: Trainer) -> None:
        """What measures of this epoch have to say."""
        for callback in trainer.callbacks if trainer.is_global_zero else ():
            if getattr(callback, "values", None) and (text := getattr(callback, "line", str)()):
                self.say(text)

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


def device_name(trainer: Trainer) -> str:
    """How many of which device, as a reader of results wants to know it."""
    device = trainer.strategy.root_device
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{trainer.world_size} × {name}" if trainer.world_size > 1 else name


def silence_libraries() -> None:
    """Keep quiet about what the program chose itself, and about products."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    for message in UNWANTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
