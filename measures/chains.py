"""Decoders that are chains of simple stages, whose forward and backward passes many heads can share.

Letters: B batch, d dimension of a stage's input, A heads trained together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from run.batch_norm import normalised
from run.ranks import Ranks

if TYPE_CHECKING:
    from measures.heads import Activations, Family, Head


class Stage:
    """One operation of the chains, for all heads whose layer lies before it; h and g are (A, d, B)."""

    def __init__(
        self, group: tuple[Family, ...], back: int, states: dict[Head, dict[str, Tensor]], team: Ranks
    ) -> None:
        """The operation that is number `back` from the end of the chains."""
        self.team = team
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
        own = training or mean is None
        if training and self.team.num > 1:
            y, *now = normalised(h.flatten(0, 1), weight, bias, eps, self.team.group)
            for running, value in zip((mean, variance), now, strict=True):
                running.lerp_(value, momentum)
            return y.view_as(h)
        flat = h.reshape(1, -1, h.shape[2])  # (1, A · d, B)
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
