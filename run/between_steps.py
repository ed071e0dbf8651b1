"""What some layers need between the steps of training: weights in bounds, a temperature that falls, slots that come."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class Constrain(Callback):
    """Calls `constrain()` of the layers that have it after every step of the optimizer."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        for layer in layers_with("constrain", pl_module):
            layer.constrain()


class Anneal(Callback):
    """Has `tau` of the layers that have it fall from `first` to `last` by the same factor at every step."""

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        done = trainer.global_step / max(trainer.estimated_stepping_batches - 1, 1)
        for layer in layers_with("tau", pl_module):
            layer.tau.fill_(self.first * (self.last / self.first) ** min(done, 1.0))


class Grow(Callback):
    """Trains the layer of slots that a network ends with: it grows, takes its own steps, and is pruned.

    It grows in every batch, but not in the last epoch. Before each test every slot gets its threshold on the whole
    training set, and a cover of that is kept. `values` hold the number of slots, in all and of each class, how many
    were added and pruned, how many samples no slot could tell from those of another class, and which share of the
    training samples has a slot of its class that matches.
    """

    def __init__(self, lr: float, prune: int) -> None:
        self.lr, self.prune = lr, prune
        self.values: dict[str, float] = {}

    def line(self) -> str:
        """What the terminal shows below the line of an epoch."""
        if "slots/added" not in self.values:
            return ""
        num, added, pruned = (int(self.values[f"slots/{name}"]) for name in ("num", "added", "pruned"))
        return (
            f"slots {num:,} (+{added:,}, -{pruned:,}), {self.values['slots/covered']:.2%} of the training set covered"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.values = counts(grown_in(pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before, self._added, self._uncovered = len(grown_in(pl_module)), 0, 0
        self._grows = trainer.current_epoch + 1 != trainer.max_epochs

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._grows:
            grown_in(pl_module).await_batch(batch[1])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        layer = grown_in(pl_module)
        if self._grows:
            self._added += layer.growth.added
            self._uncovered += layer.growth.uncovered
        layer.step(self.lr)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        layer = grown_in(pl_module)
        covered = layer.calibrate(*features_and_labels(trainer, pl_module, "train"))
        kept = layer.prune(covered, self.prune)
        self.values = counts(layer) | {
            "slots/added": self._added,
            "slots/pruned": self._before + self._added - len(layer),
            "slots/uncovered": self._uncovered,
            "slots/covered": float(covered[:, kept].any(1).double().mean()),
        }


def grown_in(module: nn.Module) -> Any:
    """The layer that grows."""
    return layers_with("await_batch", module)[0]


def counts(layer: Any) -> dict[str, float]:
    """The columns of how many slots there are, in all and of each class."""
    by_class = {f"slots/num/class{c}": num for c, num in enumerate(layer.counts.tolist())}
    return {"slots/num": len(layer)} | by_class


def features_and_labels(trainer: Trainer, pl_module: LightningModule, split: str) -> tuple[Tensor, Tensor]:
    """What the last measured layer makes of a set, (N, d) or (N, V, d), as the network is, and the labels."""
    network, precision = pl_module.network, trainer.precision_plugin
    features, labels = [], []
    with torch.no_grad(), precision.forward_context():
        for x, y in trainer.datamodule.in_order(split):
            features.append(network.feature_extractor(precision.convert_input(x))[network.layers[-1]])
            labels.append(y)
    return torch.cat(features), torch.cat(labels)


def between_steps(module: LightningModule) -> list[Callback]:
    """The callbacks that a network's layers need."""
    callbacks: list[Callback] = []
    if layers_with("constrain", module):
        callbacks.append(Constrain())
    if layers_with("tau", module):
        first, last = map(float, module.hparams.tau.split(":"))
        callbacks.append(Anneal(first, last))
    if layers_with("await_batch", module):
        callbacks.append(Grow(module.hparams.slot_lr, module.hparams.slot_prune))
    return callbacks


def layers_with(name: str, module: nn.Module) -> list[nn.Module]:
    """The layers within a module that have an attribute of this name."""
    return [layer for layer in module.modules() if hasattr(layer, name)]
