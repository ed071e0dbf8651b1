"""Layers of networks whose decisions can be read off their input gradients: "and", "or", positive weights, choice.

Each is a module of its own and works in anybody's network.

Letters: B batch, C channels or units, G groups of n consecutive units, H × W size of a map, T temperature.
"""

import math

import torch
from torch import Tensor, nn


class SoftMaxPool(nn.Module):
    """Or: one value per group of units, (B, G·n) → (B, G): Σ_j p_j u_j over the group's n units u, p = softmax(u / T).

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
        """(B, G·n) → (B, G)."""
        u = in_groups(u, self.num_groups)  # (B, G, n)
        return ((u / self.temperature).softmax(-1) * u).sum(-1)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.num_groups}, temperature={self.temperature:g}"


class GroupMean(nn.Module):
    """And: the mean of each of G groups of consecutive units, (B, G·n) → (B, G): high where all parts are there."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups

    def forward(self, u: Tensor) -> Tensor:
        """(B, G·n) → (B, G)."""
        return in_groups(u, self.num_groups).mean(-1)

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


def in_groups(u: Tensor, num_groups: int) -> Tensor:
    """(B, G·n) → (B, G, n): consecutive units together."""
    if u.shape[1] % num_groups:
        raise ValueError(f"{u.shape[1]} units cannot be divided into {num_groups} groups of equal size")
    return u.unflatten(1, (num_groups, -1))
