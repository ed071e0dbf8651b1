"""A pass over the data that leaves no trace, and its activations.

Letters: N samples, B batch, d dimension of a layer's flattened activations.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from run.memory import CACHE_SHARE, free_memory

Batch = tuple[dict[str, Tensor], Tensor]  # {layer: activations (B, d)}, labels (B,)
Features = Callable[[Tensor], dict[str, Tensor]]

MIN_ELEMENTS = 2**16  # below, calling torch costs more than what it computes


class Activations:
    """Each iteration yields, batch by batch, ({layer: activations (B, d)}, labels (B,)), without gradients.

    As many first batches as fit into `cache_bytes` (default: a quarter of the memory that is free where they
    lie) are kept for later iterations, the rest is computed again: the numbers are the same either way.
    """

    def __init__(
        self, features: Features, batches: Iterable[tuple[Tensor, Tensor]], cache_bytes: int | None = None
    ) -> None:
        self.features = features
        self.batches = batches
        self._room = cache_bytes
        self._kept: list[Batch] = []
        self._complete = False
        self._dimensions: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while position < len(self._kept):
            yield self._kept[position]
            position += 1
        if self._complete:
            return
        for x, y in islice(iter(self.batches), position, None):
            batch = self._compute(x, y)
            if position == len(self._kept):
                self._keep(batch)
            yield batch
            del batch  # else two batches of activations would be alive during the next forward pass
            position += 1
        self._complete = position == len(self._kept)

    def _compute(self, x: Tensor, y: Tensor) -> Batch:
        try:
            return self._forward(x, y)
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        # Not in the handler: while the exception lives, so do the tensors of the failed forward pass.
        self._kept.clear()
        self._room = 0
        torch.cuda.empty_cache()
        warnings.warn(
            "Out of memory: activations are computed again instead of kept. Lower the budget.",
            stacklevel=2,
        )
        return self._forward(x, y)

    def _forward(self, x: Tensor, y: Tensor) -> Batch:
        with torch.no_grad():
            activations = {layer: h.flatten(1) for layer, h in self.features(x).items()}
        self._check(activations, len(y))
        return activations, y.to(next(iter(activations.values())).device)

    def _check(self, activations: dict[str, Tensor], num_samples: int) -> None:
        """What forward hooks may do silently, such as not to fire, must not go unnoticed."""
        self.dtypes = {layer: h.dtype for layer, h in activations.items()}
        dimensions = {layer: h.shape[1] for layer, h in activations.items()}
        if not activations:
            raise RuntimeError("No layer's activations arrived.")
        for layer, h in activations.items():
            if len(h) != num_samples:
                raise RuntimeError(f"Layer {layer!r} gave {len(h)} activations for {num_samples} labels.")
        self._dimensions = self._dimensions or dimensions
        if dimensions != self._dimensions:
            before, now = set(self._dimensions.items()), set(dimensions.items())
            layers = ", ".join(sorted({layer for layer, _ in before ^ now}))
            raise RuntimeError(f"Not every batch gave the same layers and dimensions: see {layers}.")

    def _keep(self, batch: Batch) -> None:
        activations, y = batch
        if self._room is None:
            self._room = int(CACHE_SHARE * free_memory(y.device))
        size = sum(h.numel() * h.element_size() for h in (*activations.values(), y))
        if size <= self._room:
            self._kept.append(batch)
            self._room -= size
        else:
            self._room = 0  # the kept batches stay a prefix, also when the last one is small


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Measure a module inside: eval mode, no gradients, no compiled code; afterwards all is as it was.

    As it was are every submodule's `training` flag and the random state of Python, NumPy and torch. Not
    `inference_mode`: what is computed inside may be the input of something that trains.
    """
    modes = [(part, part.training) for part in module.modules()]
    with ExitStack() as stack:
        stack.enter_context(same_random_state(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncompiled())
        try:
            module.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled networks run as they were written: hooks into a compiled one may never be called."""
    if "torch._dynamo" not in sys.modules:  # else nothing is compiled, and asking would import it: a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def same_random_state(module: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def joined(activations: Iterable[Batch]) -> Iterator[Batch]:
    """The same activations in batches of at least `MIN_ELEMENTS`, so that small ones do not cost many calls."""
    waiting: list[Batch] = []
    num_elements = 0
    for batch in activations:
        waiting.append(batch)
        num_elements += sum(h.numel() for h in batch[0].values())
        del batch
        if num_elements >= MIN_ELEMENTS:
            yield concatenated(waiting)
            waiting, num_elements = [], 0
    if waiting:
        yield concatenated(waiting)


def concatenated(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    activations, labels = zip(*batches, strict=True)
    return {layer: torch.cat([h[layer] for h in activations]) for layer in activations[0]}, torch.cat(labels)
