"""Layers of networks whose decisions can be read off their input gradients: "and", "or", positive weights, choice.

Each is a module of its own and works in anybody's network.

Letters: B batch, C channels or units, G groups of n consecutive units, H × W size of a map, T temperature.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warps import PerspectiveConv2d, ProjectiveConv2d, ScaledConv2d, rotated

__all__ = [
    "AugMax", "GlobalMaxPool", "GroupMean", "GumbelConv2d", "IterNorm", "PadTo", "Parallel", "PercentileNorm",
    "PerspectiveConv2d", "PositiveConv2d", "ProjectiveConv2d", "Prototypes", "Scale", "ScaledConv2d", "ShiftNorm",
    "SoftMaxPool", "Variants",
]  # fmt: skip


class SoftMaxPool(nn.Module):
    """Or: one value per group of units, (B, G·n, …) → (B, G, …): Σ_j p_j u_j over its n units u, p = softmax(u / T).

    Between their mean (T → ∞) and their maximum (T → 0); what is added to all units is added to the value. By hand,
    for u = (0, ln 3) and T = 1: p = (1/4, 3/4), so 3/4 ln 3.

    >>> round(SoftMaxPool(1)(torch.tensor([[1.0, 3.0]]).log()).item() / math.log(3), 5)
    0.75
    """

    def __init__(self, num_groups: int, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"the temperature of SoftMaxPool must be above 0, not {temperature}")
        self.num_groups, self.temperature = num_groups, temperature

    def forward(self, u: Tensor) -> Tensor:
        """(B, G·n, …) → (B, G, …)."""
        u = in_groups(u, self.num_groups)  # (B, G, n, …)
        return ((u / self.temperature).softmax(2) * u).sum(2)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.num_groups}, temperature={self.temperature:g}"


class GroupMean(nn.Module):
    """And: the mean of each of G groups of consecutive units, (B, G·n, …) → (B, G, …): high if all parts are there."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups

    def forward(self, u: Tensor) -> Tensor:
        """(B, G·n, …) → (B, G, …)."""
        return in_groups(u, self.num_groups).mean(2)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.num_groups}"


class Scale(nn.Module):
    """Multiply by one learnt factor, which starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The factor 1."""
        nn.init.ones_(self.factor)

    def forward(self, x: Tensor) -> Tensor:
        """x · factor, any shape."""
        return x * self.factor


class GlobalMaxPool(nn.Module):
    """The largest value of each channel over the map, (B, C, H, W) → (B, C, 1, 1): is the part anywhere?"""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 1, 1)."""
        return x.amax((2, 3), keepdim=True)


class Prototypes(nn.Module):
    """A head: logits (B, C) of a feature map (B, D, H, W), or of vectors (B, D) as a map of one place.

    A part is a direction in features, as similar to a sample as at the place where it fits best; a prototype is the
    mean of its parts, a class the soft maximum of its prototypes.
    """

    def __init__(self, channels: int, num_classes: int, num_prototypes: int = 12, num_parts: int = 5) -> None:
        super().__init__()
        self.parts = nn.Conv2d(channels, num_classes * num_prototypes * num_parts, 1)
        self.pool = GlobalMaxPool()
        self.prototypes = GroupMean(num_classes * num_prototypes)
        self.classes = SoftMaxPool(num_classes)
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) or (B, D) → (B, C)."""
        x = x[..., None, None] if x.ndim == 2 else x
        parts = self.pool(self.parts(x)).flatten(1)
        return self.scale(self.classes(self.prototypes(parts)))


class PadTo(nn.Module):
    """Zeros around images that are smaller than `size`, as evenly as can be; larger ones stay."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, max(H, size), max(W, size))."""
        missing = [max(self.size - length, 0) for length in (x.shape[3], x.shape[2])]
        return F.pad(x, [side for total in missing for side in (total // 2, total - total // 2)])

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.size}"


class PositiveConv2d(nn.Conv2d):
    """`Conv2d` whose weights are at least 0; its bias is free.

    Weights are clamped at the start and, by `constrain`, after every step of the optimizer: the program's training does
    so by itself, another loop calls it.
    """

    def reset_parameters(self) -> None:
        """torch's default, clamped."""
        super().reset_parameters()
        self.constrain()

    @torch.no_grad()
    def constrain(self) -> None:
        """Set negative weights to 0."""
        self.weight.clamp_(min=0)


class GumbelConv2d(nn.Conv2d):
    """Convolution in which every unit chooses, at each place of its kernel, which `topk` input channels it attends to.

    Beside the weights W it learns logits a of the same shape (out, in, k, k) and convolves with W · m. In training m is
    softmax over the input channels of (a + g) / tau, with g standard Gumbel noise, and if `hard` the `topk` largest of
    these as 1, others 0, with the gradient of the softmax (straight-through). In eval mode m has the `topk` largest of
    a, without noise. Hard and with topk = in it is `Conv2d`. `tau` is to fall over training: the program does it from
    `--tau 1:0.1`, another loop sets it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        tau: float = 1.0,
        hard: bool = True,
        topk: int = 1,
    ) -> None:
        if not 1 <= topk <= channels_in:
            raise ValueError(f"topk must be between 1 and the {channels_in} input channels, not {topk}")
        super().__init__(channels_in, channels_out, kernel_size, stride, padding, bias=bias)
        self.hard, self.topk, self.first_tau = hard, topk, tau
        self.logits = nn.Parameter(torch.empty_like(self.weight))
        self.register_buffer("tau", torch.tensor(float(tau)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default for weights and bias; logits so small that noise decides at first; the first temperature."""
        super().reset_parameters()
        if hasattr(self, "tau"):  # not while Conv2d is being built
            nn.init.normal_(self.logits, std=0.01)
            self.tau.fill_(self.first_tau)

    def mask(self) -> Tensor:
        """What the weights are multiplied by, (out, in, k, k)."""
        if not self.training:
            return self._largest(self.logits)
        noise = -torch.empty_like(self.logits).exponential_().log()  # −log of an exponential variable is Gumbel's
        soft = ((self.logits + noise) / self.tau).softmax(1)
        return self._largest(soft) + (soft - soft.detach()) if self.hard else soft

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        return self._conv_forward(x, self.weight * self.mask(), self.bias)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{super().extra_repr()}, topk={self.topk}, hard={self.hard}"

    def _largest(self, values: Tensor) -> Tensor:
        """1 at the `topk` largest values over the input channels, else 0."""
        return torch.zeros_like(values).scatter_(1, values.topk(self.topk, dim=1).indices, 1.0)


class AugMax(nn.Module):
    """The maximum of units over transformed copies of the input: max_t units(t(x)); x itself is always among them.

    With `flip` (left and right exchanged) the units are exactly invariant to it; `rotD` adds rotations by ±D degrees,
    of square maps of zeros beyond the border. Copies pass one after the other: as many passes as there are copies.
    """

    def __init__(self, transforms: Sequence[str], *units: nn.Module) -> None:
        super().__init__()
        self.transforms = tuple(transforms)
        self.units = units[0] if len(units) == 1 else nn.Sequential(*units)
        self._angles = [angle for name in self.transforms if name != "flip" for angle in angles(name)]

    def copies(self, x: Tensor) -> Iterator[Tensor]:
        """The input and its transformed copies; with flips, each of them mirrored too."""
        for copy in (x, *(rotated(x, angle) for angle in self._angles)):
            yield copy
            if "flip" in self.transforms:
                yield copy.flip(-1)

    def variants(self, x: Tensor) -> Tensor:
        """Units of all V copies, (B, V, …), those of the input itself first."""
        return torch.stack([self.units(copy) for copy in self.copies(x)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """max over copies, in the units' shape."""
        return self.variants(x).amax(1)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return ", ".join(self.transforms)


class Variants(AugMax):
    """Units of the same copies of the input side by side, (B, V, …), for what takes the maximum later."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → (B, V, …): with `flip` a mirrored input gives the same in another order."""
        return self.variants(x)


class Parallel(nn.Module):
    """Networks side by side on the same input: their outputs (B, G·n, …) concatenated, those of a group together.

    With `pool`, a temperature, the value of each output is instead its soft maximum over the branches, as of
    `SoftMaxPool`, in the shape of one.
    """

    def __init__(self, branches: Iterable[nn.Module], num_groups: int = 1, pool: float | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.num_groups, self.pool = num_groups, pool

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → (B, branches · units, …), or (B, units, …) if pooled."""
        outputs = [branch(x) for branch in self.branches]
        if self.pool is None:
            return torch.cat([in_groups(u, self.num_groups) for u in outputs], dim=2).flatten(1, 2)
        u = torch.stack(outputs, dim=-1)
        return ((u / self.pool).softmax(-1) * u).sum(-1)


class IterNorm(nn.Module):
    """Whitening of channels by Newton's iterations (Huang et al. 2019, Algorithm 1), in groups of channels.

    Over the batch and its places, with centred values X (d, m) of a group: Σ = X Xᵀ / m + ε I, Σ_N = Σ / tr Σ, P_0 = I,
    P_t = (3 P_{t-1} − P_{t-1}³ Σ_N) / 2, output P_T X / √tr Σ, then a learnt scale and bias. Mean and whitening matrix
    run along for eval mode. The T iterations approach Σ^(-1/2) from below: directions of little variance less. Computes
    in float32 at least, also where autocast would not.
    """

    def __init__(
        self, num_features: int, group_size: int = 64, iterations: int = 5, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        num_groups = next(
            g for g in range(1, num_features + 1) if num_features % g == 0 <= group_size * g - num_features
        )
        self.num_groups, self.iterations, self.eps, self.momentum = num_groups, iterations, eps, momentum
        size = num_features // num_groups
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_groups, size, 1))
        self.register_buffer("running_whitening", torch.empty(num_groups, size, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, bias 0; statistics of values that are white already."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_whitening.copy_(torch.eye(self.running_whitening.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) → (B, C, …)."""
        with torch.autocast(x.device.type, enabled=False):
            return self._normalised(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def _normalised(self, x: Tensor) -> Tensor:
        X = x.transpose(0, 1).reshape(self.num_groups, -1, x.numel() // x.shape[1])  # (g, d, m)
        if self.training:
            mean, whitening = self._statistics(X)
        else:
            mean, whitening = self.running_mean.to(X.dtype), self.running_whitening.to(X.dtype)
        white = (whitening @ (X - mean)).view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return white * self.weight.view(shape) + self.bias.view(shape)

    def _statistics(self, X: Tensor) -> tuple[Tensor, Tensor]:
        mean = X.mean(2, keepdim=True)
        centred = X - mean
        identity = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
        covariance = centred @ centred.mT / X.shape[2] + self.eps * identity  # (g, d, d)
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        P = identity.expand_as(covariance)
        for _ in range(self.iterations):
            P = (3 * P - P @ P @ P @ (covariance / trace)) / 2
        whitening = P / trace.sqrt()
        with torch.no_grad():
            follow(self.running_mean, mean, self.momentum)
            follow(self.running_whitening, whitening, self.momentum)
        return mean, whitening


class ShiftNorm(nn.BatchNorm2d):
    """Batch norm with a learnt bias and no scale: all units keep the same variance."""

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, affine=False, **options)
        self.bias = nn.Parameter(torch.zeros(num_features))
        # Without any weight torch cannot differentiate batch norm twice.
        self.register_buffer("one", torch.ones(num_features), persistent=False)

    def reset_parameters(self) -> None:
        """As batch norm's, and no shift."""
        super().reset_parameters()
        if self.bias is not None:  # not while BatchNorm2d is being built
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.one, self.bias, self.training, self.momentum, self.eps)


class PercentileNorm(nn.BatchNorm2d):
    """Batch norm that keeps each unit's top `percent` percent and sets the rest to 0.

    The bound is the unit's quantile over the batch and its places; a running mean of it serves in eval mode.
    """

    def __init__(self, num_features: int, percent: float = 20.0, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.percent = percent
        self.register_buffer("running_bound", torch.zeros(num_features))

    def reset_running_stats(self) -> None:
        """As batch norm's, and no bound."""
        super().reset_running_stats()
        if hasattr(self, "running_bound"):  # not while BatchNorm2d is being built
            self.running_bound.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        x = super().forward(x)
        bound = self.running_bound
        if self.training:
            values = x.detach().transpose(0, 1).flatten(1)  # (C, B·H·W)
            kept = max(1, round(values.shape[1] * self.percent / 100))
            bound = values.topk(kept, dim=1).values[:, -1]
            follow(self.running_bound, bound, self.momentum)
        return x * (x >= bound[:, None, None])


def angles(transform: str) -> tuple[float, float]:
    """Degrees that `rot15` turns by, both ways."""
    try:
        degrees = float(transform.removeprefix("rot"))
    except ValueError:
        degrees = math.nan
    if not (transform.startswith("rot") and 0 < degrees < 180):
        raise ValueError(f"{transform!r} is no transform; there are flip and rotD, D degrees between 0 and 180")
    return degrees, -degrees


def follow(running: Tensor, now: Tensor, momentum: float) -> None:
    """Move a running mean towards a value: `lerp_`, which vmap would do slowly, and say so."""
    running.add_(momentum * (now.to(running.dtype) - running))


def in_groups(u: Tensor, num_groups: int) -> Tensor:
    """(B, G·n, …) → (B, G, n, …): consecutive units together."""
    if u.shape[1] % num_groups:
        raise ValueError(f"{u.shape[1]} units cannot be divided into {num_groups} groups of equal size")
    return u.unflatten(1, (num_groups, -1))
