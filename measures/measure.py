"""A measure as a Lightning callback: when it measures, on which data, and where its numbers go."""

from __future__ import annotations

import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from measures.layers import features_of_layers
from measures.passes import Features, untouched
from run.errors import NotFinite, UserError, is_out_of_memory
from run.memory import CACHE_SHARE, free_memory
from run.ranks import Ranks
from run.record import AVERAGE

if TYPE_CHECKING:
    from typing import Self

    from datasets import Dataset
    from run.arrays import Arrays
    from run.console import Console
    from run.run_folder import RunFolder

MOST_PARTS = 64  # into which a batch is cut before memory counts as exhausted


class Measure(Callback):
    """A measure as a Lightning callback: says when to measure, what, and where the numbers go.

    Measures before training (epoch 0) and after every epoch, or those in `epochs`. The results, {column: value}, lie
    in `values` until the next epoch ends; the trainer's loggers get them too, and callbacks can monitor them.
    `batches` gives the data by set, {"train": …, "test": …}; else the trainer's data module does, by `in_order`.
    What is no number `measure` leaves in `arrays`, and in `settings` how it was made: `store` keeps both by epoch.
    """

    name: str  # in the column time/…

    def __init__(
        self,
        *,
        epochs: Container[int] | None = None,
        layers: Sequence[str] | None = None,
        sets: Sequence[str] = ("train", "test"),
        batches: Mapping[str, Iterable[tuple[Tensor, Tensor]]] | None = None,
        cache_bytes: int | None = None,
        progress: Callable[[Iterable, str], Iterator] | None = None,
        store: Arrays | None = None,
    ) -> None:
        self.epochs, self.layers, self.sets = epochs, layers, sets
        self.cache_bytes, self.progress = cache_bytes, progress
        self._batches = batches
        self._parts = 1  # of each batch, so that they fit into memory
        self.values: dict[str, float] = {}
        self.store = store
        self.arrays: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Self:
        """The measure as a run's flags want it; `common` are the arguments that all measures take."""
        return cls(**common)

    @staticmethod
    def plan(args: Namespace, dataset: Dataset) -> dict[str, Any]:
        """What follows from flags and data, for `hparams.yaml`. Refuses data that it cannot measure."""
        return {}

    @staticmethod
    def refuse_layers(args: Namespace, layers: Collection[str], network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse, before a run begins, layers at which this cannot be measured."""

    def line(self) -> str:
        """What the terminal shows below the line of an epoch that was measured; by default nothing."""
        return ""

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The measure's columns; the module is in eval mode and nothing done to its mode or random state lasts."""
        raise NotImplementedError

    def measure_average(self, trainer: Trainer, modules: Sequence[LightningModule]) -> dict[str, float]:
        """Columns of a row of its own for several saved networks together; nothing for a measure without such.

        Called once, after `measure` for each. A module is read from its file whenever `modules` is asked for it, in
        eval mode and on the trainer's device: `list(modules)` holds all at a time.
        """
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self._measure_if_due(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_if_due(trainer, pl_module, trainer.current_epoch + 1)

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        self.values = {}
        if self.epochs is None or epoch in self.epochs:
            self.measure_now(trainer, pl_module, epoch)

    def measure_now(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Measure the module as it is and publish the results as those of this epoch."""
        start = time.perf_counter()
        Ranks.of(trainer).share_buffers(pl_module)
        try:
            values = self._measure_within_memory(trainer, pl_module, epoch)
        except UserError as error:
            if not (isinstance(error, NotFinite) and pl_module.hparams.get("keep_going")):
                raise UserError(f"epoch {epoch}: {error}") from error
            warnings.warn(f"epoch {epoch}: {error} {self.name} is left out.", stacklevel=2)
            values, self.arrays = {}, {}
        self._keep(trainer, pl_module.hparams.get("seed"), epoch)
        self.values = values | {f"time/{self.name}": time.perf_counter() - start}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **values}, step=trainer.global_step)

    def average_now(
        self, trainer: Trainer, modules: Sequence[LightningModule], store: Arrays | None
    ) -> dict[str, float]:
        """What `measure_average` finds, with the time that it took; its arrays go to `store`, as those of `average`."""
        start = time.perf_counter()
        self.arrays, self.settings, self.store = {}, {}, store
        with torch.no_grad():
            values = self.measure_average(trainer, modules)
        self._keep(trainer, None, AVERAGE)
        return values | {f"time/{self.name}": time.perf_counter() - start} if values else {}

    def _keep(self, trainer: Trainer, seed: int | None, epoch: int | str) -> None:
        """Store the arrays, if there are any."""
        if self.store and self.arrays and trainer.is_global_zero:
            self.store.write(epoch, self.name, self.arrays, {"sets": list(self.sets), "seed": seed} | self.settings)

    def _measure_within_memory(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Measure; whenever memory runs out, again with half the batch and half the cache."""
        while True:
            try:
                with untouched(pl_module):
                    return self.measure(trainer, pl_module, epoch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or trainer.world_size > 1:  # other ranks would not measure again
                    raise
            # Not in the handler: while the exception lives, so do the tensors that took the memory.
            self._halve(pl_module.device)

    def _halve(self, device: torch.device) -> None:
        if self._parts == MOST_PARTS:
            raise UserError(
                f"out of memory in the measure {self.name}, even with small batches and without a cache: measure "
                "fewer --layers (--dib-layers), or leave it out"
            )
        if self._parts == 1:
            warnings.warn(f"Out of memory in {self.name}: it goes on with smaller batches and cache.", stacklevel=2)
        torch.cuda.empty_cache()
        room = int(CACHE_SHARE * free_memory(device)) if self.cache_bytes is None else self.cache_bytes
        self.cache_bytes = room // 2
        self._parts *= 2

    def features(self, trainer: Trainer, pl_module: LightningModule) -> Features:
        """From a batch to the activations of the chosen layers, in the precision of training."""
        precision, features = trainer.precision_plugin, features_of_layers(pl_module.network, self.layers)

        def extract(x: Tensor) -> dict[str, Tensor]:
            with precision.forward_context():
                return features(precision.convert_input(x))

        return extract

    def batches(self, trainer: Trainer, split: str) -> Any:
        """The batches of a set, each sample once and as it is."""
        batches = self._batches[split] if self._batches else trainer.datamodule.in_order(split)
        return Parts(batches, self._parts) if self._parts > 1 else batches

    def shown(self, batches: Iterable, split: str) -> Iterable:
        """The same under a progress bar, each time they are iterated."""
        return Shown(batches, f"{self.name} {split}", self.progress) if self.progress else batches


class Parts:
    """Batches cut into at most so many parts each, one after the other."""

    def __init__(self, batches: Any, num_parts: int) -> None:
        self.batches, self.num_parts = batches, num_parts

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield from zip(x.chunk(self.num_parts), y.chunk(self.num_parts), strict=True)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.batches[indices]

    @property
    def labels(self) -> Tensor:
        return self.batches.labels

    def relabelled(self, labels: Tensor) -> Parts:
        """The same samples with other labels."""
        return Parts(self.batches.relabelled(labels), self.num_parts)


class Shown:
    """An iterable that shows a progress bar each time it is iterated."""

    def __init__(self, items: Iterable, description: str, progress: Callable[[Iterable, str], Iterator]) -> None:
        self.items, self.description, self.progress = items, description, progress

    def __iter__(self) -> Iterator:
        return self.progress(self.items, self.description)
