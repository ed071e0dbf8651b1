"""What measures that differentiate or disturb a network have in common: on which samples, in which precision.

Letters: N samples.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from classifier import loss_of
from measures.derivatives import CHUNK, Loss, View
from measures.measure import Measure
from measures.samples import Chosen, labels_in, stratified
from run.ranks import Ranks
from run.seeds import seed_from

SAMPLES = 1000


class Viewing(Measure):
    """A measure of the network on the same samples in every epoch: at most `samples` of its one set, 0 for all.

    They are stratified by class from the run's seed. The network is seen in float32, or in float64 where it has that;
    one of a coarser type is copied.
    """

    def __init__(self, *, samples: int = SAMPLES, **common: Any) -> None:
        super().__init__(**{"sets": ("train",)} | common)
        self.samples = samples
        self._has_told = False

    def view_of(self, trainer: Trainer, pl_module: LightningModule) -> tuple[View, Tensor]:
        """The network with its samples, and their indices in the set."""
        [split] = self.sets
        batches, seed = self.batches(trainer, split), pl_module.hparams.get("seed")
        labels = labels_in(batches).cpu()
        index = stratified(labels, self.samples or len(labels), seed_from("look samples", seed, split))
        x = torch.cat([x for _, x in Chosen(batches, index)])
        chunk = None if self._parts == 1 else max(1, CHUNK // self._parts)
        options = {"chunk": chunk, "keeps_graphs": self._parts == 1, "ranks": Ranks.of(trainer)}
        view = View(self._precise(pl_module.network), x, labels[index], loss=loss_of_training(pl_module), **options)
        return view, index

    def _precise(self, network: nn.Module) -> nn.Module:
        """The network, or a copy of it in float32 where its own type is coarser."""
        dtype = next(network.parameters()).dtype
        if dtype.itemsize >= 4:
            return network
        if not self._has_told:
            self._has_told = True
            name = str(dtype).removeprefix("torch.")
            warnings.warn(f"{self.name}: the network is {name}; it is looked at in float32.", stacklevel=2)
        return copy.deepcopy(network).float()


def loss_of_training(pl_module: LightningModule) -> Loss:
    """The loss that the network trains with, of each sample, without label smoothing."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return loss_of(logits, y, pl_module.hparams, reduction="none")

    return loss
