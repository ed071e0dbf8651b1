"""What some layers need between the steps of training: weights put back in bounds, a temperature that falls."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn


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


def between_steps(module: LightningModule) -> list[Callback]:
    """The callbacks that a network's layers need."""
    callbacks: list[Callback] = []
    if layers_with("constrain", module):
        callbacks.append(Constrain())
    if layers_with("tau", module):
        first, last = map(float, module.hparams.tau.split(":"))
        callbacks.append(Anneal(first, last))
    return callbacks


def layers_with(name: str, module: nn.Module) -> list[nn.Module]:
    """The layers within a module that have an attribute of this name."""
    return [layer for layer in module.modules() if hasattr(layer, name)]
