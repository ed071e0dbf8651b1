"""Convolutions whose second derivatives take no longer than their first.

torch computes second derivatives of a convolution by one of another kind, with batch and channels exchanged and kernels
as large as images, for which CPUs have no quick way. But y = x * W is bilinear: whatever is derived from it is it
itself or one of its two adjoints, and these are quick.

Letters: x input (B, C, …), W kernels (C', C / groups, …), y output (B, C', …), g what is like y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}  # and their dimensions


class Geometry(NamedTuple):
    """How a convolution goes over its input: a number per dimension each, and groups of channels."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, num: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Geometry:
        """As the arguments of `torch.conv2d` say, in so many dimensions."""
        return cls(*(each(value, num) for value in (stride, padding, dilation)), groups)

    def convolved(self, x: Tensor, W: Tensor) -> Tensor:
        """x * W."""
        return torch.ops.aten.convolution(x, W, None, *self._in_full)

    def by_input(self, g: Tensor, W: Tensor, shape: Sequence[int]) -> Tensor:
        """The derivative of ⟨g, x * W⟩ by x, which has this shape."""
        x = g.new_empty(1).expand(shape)  # only asked for its shape
        return torch.ops.aten.convolution_backward(g, x, W, None, *self._in_full, [True, False, False])[0]

    def by_kernels(self, g: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The derivative of ⟨g, x * W⟩ by W, which has this shape."""
        W = g.new_empty(1).expand(shape)
        return torch.ops.aten.convolution_backward(g, x, W, None, *self._in_full, [False, True, False])[1]

    @property
    def _in_full(self) -> tuple[Any, ...]:
        """As torch asks for it, which has one function for transposed convolutions too, and their output's padding."""
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups


class Convolution(Function):
    """x * W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.geometry = geometry
        return geometry.convolved(x, W)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        return (
            ByInput.apply(g, W, x.shape, ctx.geometry) if ctx.needs_input_grad[0] else None,
            ByKernels.apply(g, x, W.shape, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
        )


class ByInput(Function):
    """The derivative of ⟨g, x * W⟩ by x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, W: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, W)
        ctx.geometry = geometry
        return geometry.by_input(g, W, shape)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        g, W = ctx.saved_tensors
        return (
            Convolution.apply(x, W, ctx.geometry) if ctx.needs_input_grad[0] else None,
            ByKernels.apply(g, x, W.shape, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class ByKernels(Function):
    """The derivative of ⟨g, x * W⟩ by W."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return geometry.by_kernels(g, x, shape)

    @staticmethod
    def backward(ctx: Any, W: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        return (
            Convolution.apply(x, W, ctx.geometry) if ctx.needs_input_grad[0] else None,
            ByInput.apply(g, W, x.shape, ctx.geometry) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class BilinearConvolutions(TorchFunctionMode):
    """Inside, convolutions are those of this module."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        num = CONVOLUTIONS.get(func)
        if num is None or torch._C._are_functorch_transforms_active():  # vmap and its kin know only torch's own
            return func(*args, **kwargs or {})
        return convolution(func, num, *args, **kwargs or {})


def convolution(
    func: Callable, num: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, *where: Any, **how: Any
) -> Tensor:
    """`func`, torch's convolution in so many dimensions, by `Convolution`; by itself what that does not know."""
    options = dict(zip(Geometry._fields, where, strict=False)) | how
    if isinstance(options.get("padding"), str) or input.dim() != num + 2:
        return func(input, weight, bias, **options)
    y = Convolution.apply(input, weight, Geometry.of(num, **options))
    return y if bias is None else y + bias.view(-1, *[1] * num)


def each(value: int | Sequence[int], num: int) -> tuple[int, ...]:
    """A number per dimension, of one for all or one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num if len(values) == 1 else values
