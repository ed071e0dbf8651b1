"""The heads of DIB: copies of a network's decoders, many of them trained at once on activations that stay as they are.

Engines train the same heads to the same numbers, up to rounding: one after the other (`LoopHeads`), by `vmap` over
stacked parameters (`VmapHeads`), and for chains of linear maps by matrix products that serve the heads of all layers
together (`ProductHeads`). `fastest` chooses. Rounding is 1e-4 nats in float32 and 1e-8 in float64 where Adam divides a
gradient by its size that is nothing else, as that of a bias before batch norm.

Letters: N samples, B batch, C classes, K digits, d dimension of a layer, E head epochs, A heads trained together.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from run.errors import UserError
from run.memory import CACHE_SHARE, free_memory
from run.seeds import seed_from

DECAY = 1 / 100  # of the rate over all head epochs, the authors' setting
MOMENTUM = 0.9  # of SGD
ENCODING_BATCH = 1000  # samples per forward pass when activations are kept
EVALUATION_ELEMENTS = 2**19  # activations of the widest layer per batch where nothing is trained
REORDER_BYTES = 2**26  # up to here there is memory for a second copy, in the order of a head epoch
ALIGNMENT = 16  # elements: every tensor of a head starts at a multiple of 64 bytes, as kernels like it
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


def train(stacks: Sequence["Heads"], samples: "Samples", budget: Budget, advance: Callable[[], None]) -> Tensor:
    """The heads' cross-entropies before training and after every head epoch, float64 (E + 1, A) on the CPU."""
    order = torch.arange(len(samples))
    num_steps, step = budget.epochs * len(parts(len(samples), budget.batch_size)), 0
    losses = [evaluate(stacks, samples, budget.batch_size)]
    for head_epoch in range(budget.epochs):
        order = budget.order(head_epoch, len(samples))
        for activations, digits in samples.batches(order, budget.batch_size):
            for heads in stacks:
                heads.step(activations, digits, budget.rate(step, num_steps), step)
            step += 1
            advance()
        losses.append(evaluate(stacks, samples, budget.batch_size))
    losses = torch.stack(losses).cpu()
    return losses.where(losses.isfinite(), torch.nan)


def evaluate(stacks: Sequence["Heads"], samples: "Samples", batch_size: int) -> Tensor:
    """Each head's mean cross-entropy over all samples, in eval mode, float64 (A,)."""
    widest = max(len(heads.heads) * samples.pair[layer][0].numel() for heads in stacks for layer, _ in heads.heads)
    size = max(batch_size, EVALUATION_ELEMENTS // widest)
    total = 0
    for activations, digits in samples.batches(torch.arange(len(samples)), size):
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
    """

    def __init__(self, network: nn.Module, inputs: Any, digits: Tensor) -> None:
        self.network = network
        self.inputs = inputs
        self.digits = digits  # (K, N)
        self.pair = self._encode(torch.arange(2))  # two samples, to see shapes with
        self._kept: Activations = {}

    def __len__(self) -> int:
        return self.digits.shape[1]

    def num_bytes(self, layers: Iterable[str]) -> int:
        """What these layers' activations take for all samples."""
        return len(self) * sum(self.pair[layer][0].nbytes for layer in layers)

    def keep(self, layers: Sequence[str]) -> None:
        """Compute these layers' activations and keep them instead of those kept so far; without layers, keep
        none."""
        self._kept = {}
        kept = {layer: self.pair[layer].new_empty(len(self), *self.pair[layer].shape[1:]) for layer in layers}
        for part in parts(len(self), ENCODING_BATCH) if kept else ():
            activations = self._encode(torch.arange(part.start, part.stop))
            for layer, h in kept.items():
                h[part] = activations[layer]
        self._kept = kept

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Activations, Tensor]]:
        """Activations {layer: (B, …)} and digits (K, B) of all samples in this order."""
        order = order.to(self.digits.device)
        if self._kept and self.num_bytes(self._kept) <= REORDER_BYTES:
            activations = {layer: h.index_select(0, order) for layer, h in self._kept.items()}
            digits = self.digits.index_select(1, order)
            for part in parts(len(self), size):
                yield {layer: h[part] for layer, h in activations.items()}, digits[:, part]
        else:
            for part in parts(len(self), size):
                yield self._activations(order[part]), self.digits[:, order[part]]

    def _activations(self, indices: Tensor) -> Activations:
        if self._kept:
            return {layer: h[indices] for layer, h in self._kept.items()}
        return self._encode(indices)

    def _encode(self, indices: Tensor) -> Activations:
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
    room = int(CACHE_SHARE * free_memory(samples.digits.device)) if cache_bytes is None else cache_bytes
    plan: list[tuple[list[tuple[Family, ...]], bool]] = []
    too_large, free = [], 0
    for group in groups:
        size = samples.num_bytes(family.layer for family in group)
        if size > room:
            too_large.append(group)
        elif plan and size <= free:
            plan[-1][0].append(group)
            free -= size
        else:
            plan.append(([group], True))
            free = room - size
    return [*plan, (too_large, False)] if too_large else plan


class Heads:
    """Heads that are trained together on the sum of their cross-entropies, so that each gets what it would
    alone.

    Their parameters lie in one vector and so do the gradients: an optimizer's step is a few calls for all of
    them.
    """

    def __init__(self, group: tuple[Family, ...], trained: Sequence[Tensor], autocast: torch.dtype | None) -> None:
        self.heads = [head for family in group for head in family.heads]
        self.dtype, self.device = trained[0].dtype, trained[0].device
        self._rows = torch.tensor([digit for _, digit in self.heads], device=self.device)
        self._autocast = autocast
        priors = [family.log_prior for family in group]
        self._log_prior = None if priors[0] is None else torch.cat(priors)[:, :, None]  # (A, C, 1)
        sizes = [-tensor.numel() // ALIGNMENT * -ALIGNMENT for tensor in trained]
        values = trained[0].new_zeros(sum(sizes))
        gradients = torch.zeros_like(values)  # memory of its own: autograd watches for writes beside the values
        self.trained = []  # leaves that share the vectors' memory
        for tensor, *shares in zip(trained, values.split(sizes), gradients.split(sizes), strict=True):
            leaf, gradient = (share[: tensor.numel()].view_as(tensor).detach() for share in shares)
            leaf.copy_(tensor).requires_grad_().grad = gradient
            self.trained.append(leaf)
        self._gradients = gradients
        self._optimizer = OPTIMIZERS[group[0].budget.optimizer](values, gradients)

    def step(self, activations: Activations, digits: Tensor, rate: float, step: int) -> None:
        """Train on a batch: activations {layer: (B, …)}, digits (K, B)."""
        with self._precision():
            self._backward(activations, digits.index_select(0, self._rows), step)
        self._optimizer.update(rate)

    def cross_entropies(self, activations: Activations, digits: Tensor) -> Tensor:
        """Each head's cross-entropy summed over a batch, in eval mode, float64 (A,)."""
        with self._precision():
            logits = self._logits(activations, training=False)  # (A, C, B)
        target = digits.index_select(0, self._rows)[:, None]  # (A, 1, B)
        log_p = F.log_softmax(logits, 1).gather(1, target)
        return -log_p.sum((1, 2), dtype=torch.float64)

    def states(self) -> dict[Head, dict[str, Tensor]]:
        """Copies of the heads' tensors on the CPU, by their names in the decoder."""
        raise NotImplementedError

    def _backward(self, activations: Activations, digits: Tensor, step: int) -> None:
        """Set the gradients of the sum over heads of the mean cross-entropy; digits (A, B)."""
        with torch.enable_grad():
            logits = self._logits(activations, training=True)
            loss = F.cross_entropy(logits, digits, reduction="none").mean(1).sum()
        self._gradients.zero_()
        loss.backward()

    def _logits(self, activations: Activations, training: bool) -> Tensor:
        """(A, C, B)."""
        raise NotImplementedError

    def _precision(self) -> AbstractContextManager:
        kind = self.device.type
        if self._autocast is None and not torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(kind, self._autocast, enabled=self._autocast is not None)


class LoopHeads(Heads):
    """Modules that are called one after the other: for decoders that draw random numbers, and large ones."""

    def __init__(self, group: tuple[Family, ...], autocast: torch.dtype | None) -> None:
        (self.family,) = group
        self.modules = []
        for state in self.family.states():
            self.modules.append(deepcopy(self.family.decoder))
            self.modules[-1].load_state_dict(state)
        parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        super().__init__(group, [p.detach() for p in parameters], autocast)
        for parameter, leaf in zip(parameters, self.trained, strict=True):
            parameter.data, parameter.grad = leaf.detach(), leaf.grad

    def states(self) -> dict[Head, dict[str, Tensor]]:
        """Copies of the heads' tensors on the CPU, by their names in the decoder."""
        states = [module.state_dict() for module in self.modules]
        return {
            head: {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            for head, state in zip(self.heads, states, strict=True)
        }

    def _backward(self, activations: Activations, digits: Tensor, step: int) -> None:
        self._gradients.zero_()
        for i, head in enumerate(self.heads):
            self.family.budget.seed_head(self.device, head, step)
            with torch.enable_grad():
                loss = F.cross_entropy(self._head_logits(i, activations, training=True), digits[i])
            loss.backward()

    def _logits(self, activations: Activations, training: bool) -> Tensor:
        return torch.stack([self._head_logits(i, activations, training).mT for i in range(len(self.heads))])

    def _head_logits(self, i: int, activations: Activations, training: bool) -> Tensor:
        logits = self.modules[i].train(training)(activations[self.family.layer].to(self.dtype)).to(self.dtype)
        return logits if self._log_prior is None else logits + self._log_prior[i].mT  # (B, C)


class VmapHeads(Heads):
    """One layer's decoder mapped over its heads' stacked tensors: convolutions become grouped convolutions.

    Batch norm's statistics are stacked as well and updated in place, each head's by its own batches.
    """

    def __init__(self, group: tuple[Family, ...], autocast: torch.dtype | None) -> None:
        (self.family,) = group
        self._decoder = self.family.decoder
        self._tensors = stacked(list(self.family.states()))
        names = [name for name, parameter in self._decoder.named_parameters() if parameter.requires_grad]
        super().__init__(group, [self._tensors[name] for name in names], autocast)
        self._tensors |= dict(zip(names, self.trained, strict=True))
        self._map = vmap(partial(functional_call, self._decoder), in_dims=(0, None), randomness="error")

    def states(self) -> dict[Head, dict[str, Tensor]]:
        """Copies of the heads' tensors on the CPU, by their names in the decoder."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self._tensors.items()}
        return {
            head: {name: tensor[i].clone() for name, tensor in tensors.items()} for i, head in enumerate(self.heads)
        }

    def _logits(self, activations: Activations, training: bool) -> Tensor:
        self._decoder.train(training)
        h = activations[self.family.layer].to(self.dtype)
        logits = self._map(self._tensors, h).to(self.dtype).mT
        return logits if self._log_prior is None else logits + self._log_prior


def stacked(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors (A, …) of the heads' tensors of the same name."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def vmappable(decoder: nn.Module, pair: Tensor) -> bool:
    """Whether vmap can train this decoder: it cannot if the decoder draws random numbers or looks at its
    values."""
    tensors = stacked([decoder.state_dict()] * 2)
    try:
        vmap(partial(functional_call, decoder.train()), in_dims=(0, None), randomness="error")(tensors, pair)
    except RuntimeError:
        return False
    return True


class ProductHeads(Heads):
    """Chains of linear maps, non-linearities and batch norm as batched matrix products, for several layers at
    once.

    The chain after a layer is the tail of the chain after the layer before it. So the heads of the first
    layer run alone up to the second layer, from there those of both run in the same products, and so on.
    Activations are (A, d, B) inside. Gradients are written out where small networks spend their time, in
    linear maps and tanh.
    """

    def __init__(self, group: tuple[Family, ...], autocast: torch.dtype | None) -> None:
        states = {}
        for family in group:
            states |= zip(family.heads, family.states(), strict=True)
        chain = group[0].chain
        self._stages = [stage_type(m)(group, len(chain) - i, states) for i, (_, m) in enumerate(chain)]
        tensors = [(stage.tensors, name) for stage in self._stages for name in stage.trained]
        # Autocast does not reach products that write into given memory, so these heads do without.
        super().__init__(group, [owner[name] for owner, name in tensors], autocast=None)
        for (owner, name), leaf in zip(tensors, self.trained, strict=True):
            owner[name] = leaf
        self._minus_one = self.trained[0].new_full((1, 1, 1), -1.0)

    def states(self) -> dict[Head, dict[str, Tensor]]:
        """Copies of the heads' tensors on the CPU, by their names in the decoder."""
        states: dict[Head, dict[str, Tensor]] = {head: {} for head in self.heads}
        for stage in self._stages:
            for name, tensor in stage.tensors.items():
                for (head, prefix), own in zip(stage.owners, tensor.detach().cpu(), strict=True):
                    states[head][prefix + name] = own.clone()
        return states

    def _logits(self, activations: Activations, training: bool) -> Tensor:
        h = None
        for stage in self._stages:
            h = stage.forward(stage.joined(h, activations, self.dtype), training)
        return h if self._log_prior is None else h + self._log_prior

    def _backward(self, activations: Activations, digits: Tensor, step: int) -> None:
        g = self._logits(activations, training=True).softmax(1)  # (A, C, B)
        target = digits[:, None]
        g.scatter_add_(1, target, self._minus_one.expand_as(target)).div_(digits.shape[1])
        for stage in reversed(self._stages):
            g = stage.backward(g)


class Stage:
    """One operation of the chains, for all heads whose layer lies before it; h and g are (A, d, B)."""

    def __init__(self, group: tuple[Family, ...], back: int, states: dict[Head, dict[str, Tensor]]) -> None:
        """The operation that is number `back` from the end of the chains."""
        present = [family for family in group if len(family.chain) >= back]
        self.owners = [(head, family.chain[-back][0]) for family in present for head in family.heads]
        self.entering = [(family.layer, len(family.heads)) for family in present if len(family.chain) == back]
        self.num_upstream = len(self.owners) - sum(count for _, count in self.entering)
        self.module = group[0].chain[-back][1]
        self.trained = [name for name, _ in self.module.named_parameters()]
        self.tensors = {
            name: torch.stack([states[head][prefix + name] for head, prefix in self.owners])
            for name in self.module.state_dict()
        }

    def joined(self, h: Tensor | None, activations: Activations, dtype: torch.dtype) -> Tensor:
        """The input: what the stage before gave, and the activations of the layers whose heads come in
        here."""
        incoming = [activations[layer].flatten(1).to(dtype).T.expand(count, -1, -1) for layer, count in self.entering]
        given = incoming if h is None else [h, *incoming]
        return given[0] if len(given) == 1 else torch.cat(given)

    def forward(self, h: Tensor, training: bool) -> Tensor:
        """The operation's output; in training it may keep what `backward` needs."""
        raise NotImplementedError

    def backward(self, g: Tensor) -> Tensor:
        """From the gradient of the output, that of the tensors (into `.grad`) and of what the stage before
        gave."""
        raise NotImplementedError


class Affine(Stage):
    """W h + b."""

    def forward(self, h: Tensor, training: bool) -> Tensor:
        """(A, d_out, B)."""
        self._h = h
        W = self.tensors["weight"]  # (A, d_out, d_in)
        if "bias" not in self.tensors:
            return torch.bmm(W, h)
        return torch.baddbmm(self.tensors["bias"][:, :, None], W, h)

    def backward(self, g: Tensor) -> Tensor:
        """∂W = g hᵀ, ∂b = Σ_B g, ∂h = Wᵀ g."""
        W = self.tensors["weight"]
        torch.bmm(g, self._h.mT, out=W.grad)
        if "bias" in self.tensors:
            torch.sum(g, 2, out=self.tensors["bias"].grad)
        return torch.bmm(W[: self.num_upstream].mT, g[: self.num_upstream])


class Tanh(Stage):
    """tanh z = 2 σ(2z) − 1, to rounding: on a CPU five times as fast as `torch.tanh`."""

    _minus_one = torch.tensor(-1.0)

    def forward(self, h: Tensor, training: bool) -> Tensor:
        """tanh h."""
        self._y = (2 * h).sigmoid_()
        torch.add(self._minus_one, self._y, alpha=2, out=self._y)
        return self._y

    def backward(self, g: Tensor) -> Tensor:
        """(1 − y²) g."""
        y, g = self._y[: self.num_upstream], g[: self.num_upstream]
        return torch.addcmul(g, g * y, y, value=-1)


class Differentiated(Stage):
    """A module that autograd differentiates."""

    def forward(self, h: Tensor, training: bool) -> Tensor:
        """The module's output."""
        with torch.set_grad_enabled(training):
            self._h = h.detach().requires_grad_()
            self._y = self.call(self._h, training)
        return self._y.detach()

    def backward(self, g: Tensor) -> Tensor:
        """∂h, and ∂ of the tensors into their `.grad`."""
        trained = [self.tensors[name] for name in self.trained]
        gradients = torch.autograd.grad(self._y, [self._h, *trained], g)
        for tensor, gradient in zip(trained, gradients[1:], strict=True):
            tensor.grad.copy_(gradient)
        return gradients[0][: self.num_upstream]

    def call(self, h: Tensor, training: bool) -> Tensor:
        """The non-linearity, element by element."""
        return self.module(h)


class BatchNorm(Differentiated):
    """Batch norm of every feature of every head: its own batch's statistics in training, running ones
    else."""

    def call(self, h: Tensor, training: bool) -> Tensor:
        """All heads' features as the channels of one batch norm."""
        if training and "num_batches_tracked" in self.tensors:
            self.tensors["num_batches_tracked"] += 1
        mean, variance, weight, bias = (
            self.tensors[name].flatten() if name in self.tensors else None
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        momentum, eps = self.module.momentum, self.module.eps
        flat = h.reshape(1, -1, h.shape[2])  # (1, A · d, B)
        own = training or mean is None
        return F.batch_norm(flat, mean, variance, weight, bias, own, momentum, eps).view_as(h)


POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Hardtanh)
STAGES = {
    nn.Linear: Affine,
    nn.Tanh: Tanh,
    nn.BatchNorm1d: BatchNorm,
    **dict.fromkeys(POINTWISE, Differentiated),
}


def stage_type(module: nn.Module) -> type[Stage] | None:
    """The stage that computes what this module computes, also where a subclass only starts differently."""
    for kind, stage in STAGES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return stage
    return None


def chain(decoder: nn.Module, num_dimensions: int) -> list[tuple[str, nn.Module]] | None:
    """The modules that compute, each with the prefix of its tensors' names, if `ProductHeads` can work on
    them.

    It can on chains of linear maps, non-linearities and batch norm that flatten first; else the answer is
    None.
    """
    links, is_flat = [], num_dimensions == 2
    for prefix, module in leaves(decoder):
        is_flat |= isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
        if isinstance(module, nn.Identity | nn.Flatten):
            continue
        if not is_flat or not is_plain(module):
            return None
        links.append((prefix, module))
    return links


def leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a sequence, or sequences within it, call one after the other, with the prefix of its tensors'
    names."""
    if type(module) is not nn.Sequential:
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from leaves(child, f"{prefix}{name}.")


def is_plain(module: nn.Module) -> bool:
    """Whether a stage computes what this module does and all of its parameters are trained."""
    learnt = all(parameter.requires_grad for parameter in module.parameters())
    cumulative = isinstance(module, nn.BatchNorm1d) and module.momentum is None
    return learnt and not cumulative and stage_type(module) is not None


def is_tail(chain: list[tuple[str, nn.Module]] | None, longer: list[tuple[str, nn.Module]] | None) -> bool:
    """Whether a chain does what the end of the longer one does."""
    if not chain or not longer:
        return False
    return [repr(module) for _, module in chain] == [repr(module) for _, module in longer[-len(chain) :]]


class Adam:
    """Adam (betas 0.9 and 0.999, eps 1e-8) of a vector: what `torch.optim.Adam` does at a third of its
    overhead."""

    def __init__(self, values: Tensor, gradients: Tensor) -> None:
        self.values, self.gradients = values, gradients
        self.m, self.v = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = 0

    def update(self, rate: float) -> None:
        """One step."""
        self.steps += 1
        self.m.lerp_(self.gradients, 1 - 0.9)
        self.v.mul_(0.999).addcmul_(self.gradients, self.gradients, value=1 - 0.999)
        unbiased = (self.v / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.values.addcdiv_(self.m, unbiased, value=-rate / (1 - 0.9**self.steps))


class SGD:
    """Gradient descent with momentum, as in `torch.optim.SGD`."""

    def __init__(self, values: Tensor, gradients: Tensor) -> None:
        self.values, self.gradients = values, gradients
        self.velocity = torch.zeros_like(values)

    def update(self, rate: float) -> None:
        """One step."""
        self.velocity.mul_(MOMENTUM).add_(self.gradients)
        self.values.add_(self.velocity, alpha=-rate)


OPTIMIZERS = {"adam": Adam, "sgd": SGD}
INITS = ("reset", "copy")
ENGINES = {"products": ProductHeads, "vmap": VmapHeads, "loop": LoopHeads}


def fastest(group: tuple[Family, ...]) -> str:
    """The engine for these heads, a key of ENGINES, as `benchmarks/dib_heads.py` finds it.

    Convolutions have enough work per call, and as grouped convolutions, which vmap makes of them, they run slower.
    """
    family = group[0]
    if family.chain:
        return "products"
    convolves = any(parameter.ndim > 2 for parameter in family.decoder.parameters())
    return "vmap" if not convolves and vmappable(family.decoder, family.pair) else "loop"
