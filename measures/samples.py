"""The same samples in every epoch, and what all layers make of them.

Letters: N samples of a set, n of them chosen, B batch, C classes, d dimension of a layer's flattened activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from measures.passes import Features
from run.errors import UserError
from run.memory import free_memory
from run.ranks import ALONE, Ranks

COPIES = 1.5  # of the widest layer: its activations without their mean, and what a sketch of them takes
BATCH_SIZE = 256  # whatever the number of devices, so that they all see the same batches


def stratified(labels: Tensor, num: int, seed: int) -> Tensor:
    """Indices (n,), ascending, of at most `num` samples, each class with its share of labels (N,), on the CPU.

    Shares are rounded by their largest remainders; within a class the seed chooses.

    >>> labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    >>> labels[stratified(labels, 5, seed=0)].tolist()
    [0, 0, 0, 1, 1]
    """
    labels = labels.cpu()
    if num >= len(labels):
        return torch.arange(len(labels))
    counts = labels.bincount()
    shares, remainders = counts * num // len(labels), counts * num % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: num - int(shares.sum())]] += 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    first = counts.cumsum(0) - counts
    chosen = [by_class[start : start + share] for start, share in zip(first.tolist(), shares.tolist(), strict=True)]
    return torch.cat(chosen).sort().values


def labels_in(batches: Any) -> Tensor:
    """The labels (N,) of all samples, in their order."""
    return batches.labels if hasattr(batches, "labels") else torch.cat([y for _, y in batches])


class Chosen:
    """Batches (place, x) of the samples with these indices: x (B, …), and where they stand among all n.

    Each rank has every num-th of them. Batches of one's own, which give no sample by its index, are gone through in
    their order, on one rank.
    """

    def __init__(self, batches: Any, index: Tensor, ranks: Ranks = ALONE) -> None:
        self.batches, self.index, self.ranks = batches, index, ranks

    def __len__(self) -> int:
        return len(self._parts()) if hasattr(self.batches, "labels") else len(self.batches)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if hasattr(self.batches, "labels"):
            return ((place, self.batches[self.index[place]]) for place in self._parts())
        return self._in_turn()

    def _parts(self) -> list[slice]:
        starts = range(0, len(self.index), BATCH_SIZE)
        return [slice(start, start + BATCH_SIZE) for start in starts][self.ranks.index :: self.ranks.num]

    def _in_turn(self) -> Iterator[tuple[slice, Tensor]]:
        first, done = 0, 0
        for x, _ in self.batches:
            wanted = self.index[(self.index >= first) & (self.index < first + len(x))]
            if len(wanted):
                yield slice(done, done + len(wanted)), x[wanted.to(x.device) - first]
            first, done = first + len(x), done + len(wanted)


def activations_of(features: Features, chosen: Iterable, num: int, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """{layer: activations (n, d)} of `num` chosen samples, in their order, all of them on every rank.

    Refuses, before it takes the memory, what would not fit.
    """
    found: dict[str, Tensor] = {}
    for place, x in chosen:
        batch = {layer: h.flatten(1) for layer, h in features(x).items()}
        if not found:
            refuse_too_large(batch, num)
            found = {layer: h.new_zeros(num, h.shape[1]) for layer, h in batch.items()}
        for layer, h in batch.items():
            found[layer][place] = h
        del batch  # its memory is the next one's
    return {layer: ranks.sum(found.pop(layer)) for layer in list(found)}


def refuse_too_large(batch: dict[str, Tensor], num: int) -> None:
    """Say that `num` samples of layers like these do not fit into memory, nor what is computed from one of them."""
    sizes = [h[0].numel() * h.element_size() for h in batch.values()]
    widest = max(h[0].numel() * max(h.element_size(), 4) for h in batch.values())
    needed = num * (sum(sizes) + COPIES * widest)
    device = next(iter(batch.values())).device
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"the activations of {num} samples at {len(batch)} layer(s) take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: at most {int(num * free / needed)} fit (--cluster-samples), or choose "
            "fewer --layers"
        )
