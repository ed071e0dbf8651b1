"""The heads of DIB: copies of a network's decoders, many of them trained at once on activations that stay as they are.

How a group of them computes is an engine's matter, in `engines.py`; here stand what they learn from, how they start and
how long they train.

Letters: N samples, B batch, C classes, K digits, d dimension of a layer, E head epochs, A heads trained together.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from measures.chains import chain, is_tail
from measures.engines import OPTIMIZERS, Heads
from run.errors import UserError
from run.memory import CACHE_SHARE, free_memory
from run.ranks import ALONE
from run.seeds import seed_from

DECAY = 1 / 100  # of the rate over all head epochs, the authors' setting
ENCODING_BATCH = 1000  # samples per forward pass when activations are kept
EVALUATION_ELEMENTS = 2**19  # activations of the widest layer per batch where nothing is trained
INITS = ("reset", "copy")
REORDER_BYTES = 2**26  # up to here there is memory for a second copy, in the order of a head epoch
Head = tuple[str, int]  # layer and digit; digit 0 is the most significant
Activations = dict[str, Tensor]  # {layer: (B, …)}


@dataclass(frozen=True)
class Budget:
    """How the heads are trained. It is part of the result: another budget reads another amount."""

    epochs: int
    learning_rate: float
    batch_size: int
    optimizer: str = "adam"
    init: str = "reset"
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("init", self.init, INITS)):
            if value not in known:
                raise UserError(f"The DIB heads have no {name} {value!r}; choose one of {', '.join(known)}.")
        if self.epochs < 0 or self.batch_size < 1 or not self.learning_rate > 0:
            raise UserError("The DIB heads need a rate and a batch size above 0 and at least 0 head epochs.")

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step: falls exponentially, over all steps by the factor DECAY."""
        return self.learning_rate * DECAY ** (step / num_steps)

    def order(self, head_epoch: int, num_samples: int) -> Tensor:
        """The order of the samples in a head epoch, the same for all layers and digits."""
        generator = torch.Generator().manual_seed(seed_from("dib order", self.seed, self.epoch, head_epoch))
        return torch.randperm(num_samples, generator=generator)

    def seed_head(self, device: torch.device, head: Head, step: int | None = None) -> None:
        """Seed the global generators for a head's initial weights, or for one step of its dropout."""
        seed = seed_from("dib head", self.seed, self.epoch, *head, *(() if step is None else (step,)))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":  # torch.manual_seed would seed the other devices as well
            torch.cuda.default_generators[device.index].manual_seed(seed)


def train(stacks: Sequence[Heads], samples: "Samples", budget: Budget, advance: Callable[[], None]) -> Tensor:
    """The heads' cross-entropies before training and after every head epoch, float64 (E + 1, A) on the CPU.

    In a team it is what this rank's samples add to them.
    """
    order = torch.arange(len(samples))
    num_steps, step = budget.epochs * len(parts(len(samples), budget.batch_size)), 0
    losses = [evaluate(stacks, samples, budget.batch_size)]
    for head_epoch in range(budget.epochs):
        order = budget.order(head_epoch, len(samples))
        for activations, digits, size in samples.batches(order, budget.batch_size):
            for heads in stacks:
                heads.step(activations, digits, size, budget.rate(step, num_steps), step)
            step += 1
            advance()
        losses.append(evaluate(stacks, samples, budget.batch_size))
    losses = torch.stack(losses).cpu()
    return losses.where(losses.isfinite(), torch.nan)


def evaluate(stacks: Sequence[Heads], samples: "Samples", batch_size: int) -> Tensor:
    """Each head's mean cross-entropy over all samples, in eval mode, float64 (A,): this rank's terms of it."""
    widest = max(len(heads.heads) * samples.pair[layer][0].numel() for heads in stacks for layer, _ in heads.heads)
    size = max(batch_size, EVALUATION_ELEMENTS // widest) * samples.team.num
    total = 0
    for activations, digits, _ in samples.batches(torch.arange(len(samples)), size):
        total = total + torch.cat([heads.cross_entropies(activations, digits) for heads in stacks])
    return total / len(samples)


def parts(num_samples: int, size: int) -> list[slice]:
    """Consecutive slices of `size` samples; a single one left over joins the last, as batch norm needs two."""
    stops = list(range(size, num_samples, size))
    if stops and size > 1 and num_samples - stops[-1] == 1:
        stops.pop()
    return [slice(*bounds) for bounds in zip([0, *stops], [*stops, num_samples], strict=True)]


def head_epochs(num_samples: int, batch_size: int, epochs: int | None = None, steps: int | None = None) -> int:
    """The head epochs of a budget: as given, or the whole ones that come to at least so many steps."""
    if (epochs is None) == (steps is None):
        raise UserError("The DIB heads need epochs or steps to train for, one of the two.")
    if steps is None:
        return epochs
    if steps < 1 or batch_size < 1:
        raise UserError("The DIB heads need at least 1 step and a batch size above 0.")
    return math.ceil(steps / len(parts(num_samples, batch_size)))


class Samples:
    """Activations of the layers and digits of all samples, in batches of any order.

    Activations are kept from one pass over the data or computed batch by batch, by one forward pass for all
    layers: the numbers are the same to rounding.

    The T ranks of a team share every batch out. Where activations are kept, each rank has those of every T-th sample,
    whatever their number in a batch, which may be 0; else it computes as many of a batch as the others do.
    """

    def __init__(self, network: nn.Module, inputs: Any, digits: Tensor) -> None:
        self.network = network
        self.inputs = inputs
        self.digits = digits  # (K, N)
        self.pair = self.encode(torch.arange(2))  # two samples, to see shapes with
        self._kept: Activations = {}
        self.team = ALONE

    def __len__(self) -> int:
        return self.digits.shape[1]

    def num_bytes(self, layers: Iterable[str]) -> int:
        """What these layers' activations take for all samples that a rank keeps: at most, so that all say the same."""
        return math.ceil(len(self) / self.team.num) * sum(self.pair[layer][0].nbytes for layer in layers)

    def keep(self, layers: Sequence[str]) -> None:
        """Compute these layers' activations and keep them instead of those kept so far; without layers, keep
        none."""
        self._kept, own = {}, self._own
        kept = {layer: self.pair[layer].new_empty(len(own), *self.pair[layer].shape[1:]) for layer in layers}
        for part in parts(len(own), ENCODING_BATCH) if kept else ():
            activations = self.encode(own[part])
            for layer, h in kept.items():
                h[part] = activations[layer]
        self._kept = kept

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Activations, Tensor, int]]:
        """This rank's activations {layer: (B, …)} and digits (K, B) of each batch of all samples in this order, and how
        many samples the batch has."""
        whole = parts(len(self), size)
        order, slices = self._shares(order, whole)
        order = order.to(self.digits.device)
        sizes = [part.stop - part.start for part in whole]
        if self._kept and self.num_bytes(self._kept) <= REORDER_BYTES:
            places = order // self.team.num
            activations = {layer: h.index_select(0, places) for layer, h in self._kept.items()}
            digits = self.digits.index_select(1, order)
            for part, num in zip(slices, sizes, strict=True):
                yield {layer: h[part] for layer, h in activations.items()}, digits[:, part], num
        else:
            for part, num in zip(slices, sizes, strict=True):
                yield self._activations(order[part]), self.digits[:, order[part]], num

    @property
    def _own(self) -> Tensor:
        """The samples whose activations this rank may keep."""
        return torch.arange(self.team.index, len(self), self.team.num)

    def _shares(self, order: Tensor, whole: list[slice]) -> tuple[Tensor, list[slice]]:
        """This rank's samples in their order, and where those of each whole batch lie among them."""
        if self.team.num == 1:
            return order, whole
        within = order if self._kept else torch.cat([torch.arange(part.stop - part.start) for part in whole])
        is_own = within % self.team.num == self.team.index
        stops = is_own.cumsum(0)[[part.stop - 1 for part in whole]].tolist()
        return order[is_own], [slice(*bounds) for bounds in pairwise([0, *stops])]

    def _activations(self, indices: Tensor) -> Activations:
        if self._kept:
            return {layer: h[indices // self.team.num] for layer, h in self._kept.items()}
        if not len(indices):
            return {layer: h[:0] for layer, h in self.pair.items()}
        return self.encode(indices)

    def encode(self, indices: Tensor) -> Activations:
        """The activations of these samples, from a forward pass."""
        if isinstance(self.inputs, Tensor):
            indices = indices.to(self.inputs.device)
        return self.network.feature_extractor(self.inputs[indices].to(self.digits.device))


class Family:
    """The heads of one layer before training: a decoder to shape them by and, from the seeds, their tensors."""

    def __init__(
        self, network: nn.Module, pair: Activations, heads: Sequence[Head], log_p: Tensor, budget: Budget
    ) -> None:
        self.layer, _ = heads[0]
        self.heads = heads
        self.pair = pair[self.layer]  # activations of two samples
        self.budget = budget
        _, self.decoder = network.get_encoder_decoder(self.layer)
        self.chain = chain(self.decoder, self.pair.ndim)
        self._reset = getattr(network, "reset", reset_parameters)
        self._log_p = log_p[[digit for _, digit in heads]].to(next(self.decoder.parameters()).dtype)  # (A, C)
        self._check_outputs(log_p.shape[1])

    @property
    def log_prior(self) -> Tensor | None:
        """What is added to the logits of heads that have no last bias to start there, (A, C)."""
        return self._log_p if self.budget.init == "reset" and last_bias(self.decoder) is None else None

    def states(self) -> Iterator[dict[str, Tensor]]:
        """The initial tensors of each head, by their names in the decoder."""
        bias = last_bias(self.decoder)
        tensors = self.decoder.state_dict()  # shares memory with the decoder
        for head, log_p in zip(self.heads, self._log_p, strict=True):
            if self.budget.init == "reset":
                self.budget.seed_head(log_p.device, head)
                self._reset(self.decoder)
                if bias is not None:
                    bias.copy_(log_p)
            yield {name: tensor.clone() for name, tensor in tensors.items()}

    def _check_outputs(self, num_classes: int) -> None:
        outputs = self.decoder.eval()(self.pair.to(self._log_p.dtype))
        if outputs.shape != (len(self.pair), num_classes):
            raise UserError(
                f"DIB's heads need {num_classes} outputs per sample, one per class, but the decoder after "
                f"{self.layer} gives {tuple(outputs.shape[1:])}."
            )


def own_copy(network: nn.Module) -> nn.Module:
    """A copy whose decoders can be trained: in float32 or float64, and never writing into their inputs.

    One copy of the network is much cheaper than one of every decoder; the decoders then share their modules, so what
    they are reset to must be taken from them at once.
    """
    copy = deepcopy(network)
    for part in copy.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    return copy.to(torch.promote_types(next(copy.parameters()).dtype, torch.float32))


def reset_parameters(module: nn.Module) -> None:
    """Give every submodule that knows how to its fresh parameters and statistics."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def last_bias(decoder: nn.Module) -> nn.Parameter | None:
    """The bias of the linear map that a decoder ends with, if it ends with one that has a bias."""
    *_, last = (part for part in decoder.modules() if not list(part.children()))
    return last.bias if isinstance(last, nn.Linear) else None


def groups(families: Sequence[Family], engine: str | None) -> list[tuple[Family, ...]]:
    """Families whose heads are computed together: those of chains that are the tail of the first one's
    chain."""
    joined: list[tuple[Family, ...]] = []
    for family in families:
        if joined and engine in (None, "products") and is_tail(family.chain, joined[-1][0].chain):
            joined[-1] += (family,)
        else:
            joined.append((family,))
    return joined


def bundles(
    groups: Iterable[tuple[Family, ...]], samples: Samples, cache_bytes: int | None
) -> list[tuple[list[tuple[Family, ...]], bool]]:
    """Which groups train at the same time, and whether their activations are kept meanwhile.

    All at once if their activations fit; else as few bundles as fit one after the other, each with a pass
    over the data of its own. Groups that do not fit alone are all trained at once, without.
    """
    most = samples.team.least(room(samples, cache_bytes))  # a team must have one plan
    plan: list[tuple[list[tuple[Family, ...]], bool]] = []
    too_large, free = [], 0
    for group in groups:
        size = samples.num_bytes(family.layer for family in group)
        if size > most:
            too_large.append(group)
        elif plan and size <= free:
            plan[-1][0].append(group)
            free -= size
        else:
            plan.append(([group], True))
            free = most - size
    return [*plan, (too_large, False)] if too_large else plan


def room(samples: Samples, cache_bytes: int | None) -> int:
    """Bytes in which activations may be kept: as given, or a share of the free memory."""
    return int(CACHE_SHARE * free_memory(samples.digits.device)) if cache_bytes is None else cache_bytes
