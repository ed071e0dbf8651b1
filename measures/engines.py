"""Ways to train the heads of DIB, many at once, to the same numbers up to rounding.

One after the other (`LoopHeads`), by `vmap` over stacked parameters (`VmapHeads`), and for chains of linear maps by
matrix products that serve the heads of all layers together (`ProductHeads`). `fastest` chooses. Rounding is 1e-4 nats
in float32 and 1e-8 in float64 where Adam divides a gradient by its size that is nothing else, as that of a bias before
batch norm.

Letters: N samples, B batch, C classes, K digits, d dimension of a layer, E head epochs, A heads trained together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from measures.chains import stage_type
from run.batch_norm import over_all_ranks
from run.errors import UserError
from run.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from measures.heads import Activations, Family, Head

MOMENTUM = 0.9  # of SGD
ALIGNMENT = 16  # elements: every tensor of a head starts at a multiple of 64 bytes, as kernels like it


class Heads:
    """Heads that are trained together on the sum of their cross-entropies, so that each gets what it would
    alone.

    Their parameters lie in one vector and so do the gradients: an optimizer's step is a few calls for all of
    them. Each rank of a team has the same heads and a part of every batch; their gradients are added up.
    """

    def __init__(
        self, group: tuple[Family, ...], trained: Sequence[Tensor], autocast: torch.dtype | None, team: Ranks
    ) -> None:
        self.team = team
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

    def step(self, activations: Activations, digits: Tensor, size: int, rate: float, step: int) -> None:
        """Train on this rank's part of a batch of `size`: activations {layer: (B, …)}, digits (K, B)."""
        with self._precision():
            self._backward(activations, digits.index_select(0, self._rows), size, step)
        self._gradients.copy_(self.team.sum(self._gradients))
        self._optimizer.update(rate)
        self._constrain()

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

    def _backward(self, activations: Activations, digits: Tensor, size: int, step: int) -> None:
        """Set the gradients of the sum over heads of what this part adds to the batch's mean; digits (A, B)."""
        with torch.enable_grad():
            logits = self._logits(activations, training=True)
            loss = (F.cross_entropy(logits, digits, reduction="none").sum(1) / size).sum()
        self._gradients.zero_()
        loss.backward()

    def _logits(self, activations: Activations, training: bool) -> Tensor:
        """(A, C, B)."""
        raise NotImplementedError

    def _constrain(self) -> None:
        """Put weights back where their layers want them, such as above 0; only `LoopHeads` trains such layers."""

    def _precision(self) -> AbstractContextManager:
        kind = self.device.type
        if self._autocast is None and not torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(kind, self._autocast, enabled=self._autocast is not None)


class LoopHeads(Heads):
    """Modules that are called one after the other: for decoders that draw random numbers, and large ones."""

    def __init__(self, group: tuple[Family, ...], autocast: torch.dtype | None, team: Ranks = ALONE) -> None:
        (self.family,) = group
        self.modules = []
        for state in self.family.states():
            self.modules.append(deepcopy(self.family.decoder))
            self.modules[-1].load_state_dict(state)
        parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        super().__init__(group, [p.detach() for p in parameters], autocast, team)
        for parameter, leaf in zip(parameters, self.trained, strict=True):
            parameter.data, parameter.grad = leaf.detach(), leaf.grad
        self._constrained = [part for module in self.modules for part in module.modules() if hasattr(part, "constrain")]

    def states(self) -> dict[Head, dict[str, Tensor]]:
        """Copies of the heads' tensors on the CPU, by their names in the decoder."""
        states = [module.state_dict() for module in self.modules]
        return {
            head: {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            for head, state in zip(self.heads, states, strict=True)
        }

    def _backward(self, activations: Activations, digits: Tensor, size: int, step: int) -> None:
        self._gradients.zero_()
        for i, head in enumerate(self.heads):
            self.family.budget.seed_head(self.device, head, step)
            with torch.enable_grad(), self._together(i):
                logits = self._head_logits(i, activations, training=True)
                loss = F.cross_entropy(logits, digits[i], reduction="sum") / size
            loss.backward()

    def _together(self, i: int) -> AbstractContextManager:
        """Inside, a head's batch norm counts the team's samples."""
        return nullcontext() if self.team.num == 1 else over_all_ranks(self.modules[i], self.team.group)

    def _logits(self, activations: Activations, training: bool) -> Tensor:
        return torch.stack([self._head_logits(i, activations, training).mT for i in range(len(self.heads))])

    def _constrain(self) -> None:
        for layer in self._constrained:
            layer.constrain()

    def _head_logits(self, i: int, activations: Activations, training: bool) -> Tensor:
        logits = self.modules[i].train(training)(activations[self.family.layer].to(self.dtype)).to(self.dtype)
        return logits if self._log_prior is None else logits + self._log_prior[i].mT  # (B, C)


class VmapHeads(Heads):
    """One layer's decoder mapped over its heads' stacked tensors: convolutions become grouped convolutions.

    Batch norm's statistics are stacked as well and updated in place, each head's by its own batches.
    """

    def __init__(self, group: tuple[Family, ...], autocast: torch.dtype | None, team: Ranks = ALONE) -> None:
        (self.family,) = group
        self._decoder = self.family.decoder
        if team.num > 1 and has_batch_norm(self._decoder):
            raise UserError("Within vmap the heads' batch norm cannot count other devices' samples; leave engine out.")
        self._tensors = stacked(list(self.family.states()))
        names = [name for name, parameter in self._decoder.named_parameters() if parameter.requires_grad]
        super().__init__(group, [self._tensors[name] for name in names], autocast, team)
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
    """Whether vmap can train this decoder: not if it draws random numbers, looks at its values or constrains them."""
    if any(hasattr(part, "constrain") for part in decoder.modules()):
        return False
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

    def __init__(self, group: tuple[Family, ...], autocast: torch.dtype | None, team: Ranks = ALONE) -> None:
        states = {}
        for family in group:
            states |= zip(family.heads, family.states(), strict=True)
        chain = group[0].chain
        self._stages = [stage_type(m)(group, len(chain) - i, states, team) for i, (_, m) in enumerate(chain)]
        tensors = [(stage.tensors, name) for stage in self._stages for name in stage.trained]
        # Autocast does not reach products that write into given memory, so these heads do without.
        super().__init__(group, [owner[name] for owner, name in tensors], None, team)
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

    def _backward(self, activations: Activations, digits: Tensor, size: int, step: int) -> None:
        g = self._logits(activations, training=True).softmax(1)  # (A, C, B)
        target = digits[:, None]
        g.scatter_add_(1, target, self._minus_one.expand_as(target)).div_(size)
        for stage in reversed(self._stages):
            g = stage.backward(g)


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
ENGINES = {"products": ProductHeads, "vmap": VmapHeads, "loop": LoopHeads}


def fastest(group: tuple[Family, ...], team: Ranks = ALONE) -> str:
    """The engine for these heads, a key of ENGINES, as `benchmarks/dib_heads.py` finds it.

    Convolutions have enough work per call, and as grouped convolutions, which vmap makes of them, they run slower.
    Within vmap batch norm cannot ask the team's other ranks.
    """
    family = group[0]
    if family.chain:
        return "products"
    convolves = any(parameter.ndim > 2 for parameter in family.decoder.parameters())
    asks = team.num > 1 and has_batch_norm(family.decoder)
    return "vmap" if not convolves and not asks and vmappable(family.decoder, family.pair) else "loop"


def has_batch_norm(decoder: nn.Module) -> bool:
    """Whether a sample's output depends on its batch in training."""
    return any(isinstance(part, _BatchNorm) for part in decoder.modules())
