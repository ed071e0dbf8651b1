"""Batch norm over the samples of all processes, as one process would have it of the whole batch.

Letters: B samples of this process, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def over_all_ranks(network: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside, every batch norm that trains normalises by the mean and the variance over all processes' samples.

    All processes, or those of the group, must call the network alike. torch's SyncBatchNorm does so on GPUs alone, and
    for good: copies of the network that train in one process, such as DIB's heads, would wait for the others.
    """
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_forward, norm, group)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """What the norm gives for a batch (B, C, …) that is one process's share."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    h = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)  # (C, values)
    h, mean, variance = normalised(h, norm.weight, norm.bias, norm.eps, group)
    _follow(norm, mean, variance)
    return h.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1).to(x.dtype)


def normalised(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Channels (C, values) normalised over the values of all processes, and their mean and unbiased variance (C,)."""
    total, num = Sum.apply(torch.cat([h.sum(1), h.new_tensor([h.shape[1]])]), group).split([len(h), 1])
    num = num.detach()
    mean = total / num  # (C,)
    centred = h - mean[:, None]
    variance = Sum.apply(centred.square().sum(1), group) / num
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    h = centred * scale[:, None]
    if bias is not None:
        h = h + bias[:, None]
    return h, mean.detach(), variance.detach() * num / (num - 1).clamp_min(1)


def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of the batch, as batch norm does."""
    if not norm.track_running_stats:
        return
    norm.num_batches_tracked += 1
    weight = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, now in ((norm.running_mean, mean), (norm.running_var, variance)):
        running.lerp_(now.to(running.dtype), weight)


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, through which gradients come back from the losses of all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
