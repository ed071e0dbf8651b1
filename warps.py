"""Images and kernels seen from elsewhere: turned, scaled, in perspective; and convolutions that look through them.

Letters: B batch, H × W size of a map, k × k places of a kernel, p and q the tilts of a perspective.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ViewedConv2d(nn.Conv2d):
    """The maximum over views of one learnt kernel, each a convolution; what the views are, subclasses say."""

    def views(self) -> Iterator[Tensor]:
        """Kernels (out, in, k, k)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        return torch.stack([self._conv_forward(x, kernel, self.bias) for kernel in exact_views(self, x)]).amax(0)


class ScaledConv2d(ViewedConv2d):
    """One learnt kernel in several fixed scales, on the same k × k places: 0.5 draws it half as large."""

    def __init__(self, *sizes: int, scales: Sequence[float] = (0.7, 1.0, 1.4), **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scales = tuple(scales)

    def views(self) -> Iterator[Tensor]:
        """The kernel in every scale, by bilinear interpolation; zeros beyond its border."""
        for scale in self.scales:
            theta = self.weight.new_tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]])
            grid = F.affine_grid(theta[None], [1, 1, *self.kernel_size], align_corners=False)  # (1, k, k, 2)
            yield warped(self.weight, shares_of(grid, self.kernel_size))


class PerspectiveConv2d(ViewedConv2d):
    """One learnt kernel under learnt perspective warps, the first of which starts as none.

    A point (x, y), each in [-1, 1] and (0, 0) the centre, is looked up at (x, y) / (1 + p x + q y): the two entries p
    and q of the last row of the warp's matrix are learnt for every view and, as tanh(.) / 2 of what is stored, keep the
    denominator above 0.
    """

    def __init__(self, *sizes: int, num_views: int = 3, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.warps = nn.Parameter(torch.empty(num_views, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default for the kernel; views that tilt evenly in all directions, but for the first."""
        super().reset_parameters()
        if hasattr(self, "warps"):  # not while Conv2d is being built
            turns = 2 * math.pi * torch.arange(len(self.warps)) / max(len(self.warps) - 1, 1)
            with torch.no_grad():
                self.warps.copy_(torch.stack([turns.cos(), turns.sin()], dim=1) / 2)
                self.warps[0] = 0

    def views(self) -> Iterator[Tensor]:
        """The kernel under every warp, by bilinear interpolation; zeros beyond its border."""
        identity = torch.eye(2, 3, dtype=self.weight.dtype, device=self.weight.device)[None]
        grid = F.affine_grid(identity, [1, 1, *self.kernel_size], align_corners=False)  # (1, k, k, 2)
        for p, q in self.warps.tanh() / 2:
            seen = grid / (1 + p * grid[..., :1] + q * grid[..., 1:])
            yield warped(self.weight, shares_of(seen, self.kernel_size))


class ProjectiveConv2d(nn.Module):
    """A learnt kernel with depth, (out, in, k, k, k), tilted in 8 directions, projected; the maximum over the views.

    A view turns the kernel by `tilt` degrees about an axis in its plane, at a multiple of 45 degrees from x to y, and
    sums over the depth.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel_size: int, stride: int = 1, padding: int = 0,
        bias: bool = True, tilt: float = 30.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.tilt = kernel_size, stride, padding, tilt
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, *[kernel_size] * 3))
        self.bias = nn.Parameter(torch.empty(channels_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """So that a projected kernel has about the size that `Conv2d` starts with."""
        bound = 1 / math.sqrt(self.weight.shape[1] * self.kernel_size**3)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def views(self) -> Iterator[Tensor]:
        """The projected kernels (out, in, k, k), by trilinear interpolation."""
        for turn in range(8):
            theta = self.weight.new_tensor(tilted(math.pi * turn / 4, math.radians(self.tilt)))
            size = [1, 1, *[self.kernel_size] * 3]
            grid = F.affine_grid(theta[None], size, align_corners=False)  # (1, k, k, k, 3)
            shares = shares_of(grid, self.weight.shape[2:]).unflatten(0, (self.kernel_size, -1))  # (k, k², k³)
            yield warped(self.weight, shares.sum(0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        maps = [F.conv2d(x, kernel, self.bias, self.stride, self.padding) for kernel in exact_views(self, x)]
        return torch.stack(maps).amax(0)


def exact_views(layer: ViewedConv2d | ProjectiveConv2d, x: Tensor) -> list[Tensor]:
    """The views of a layer's kernel, for an input: autocast would round where in the kernel they look."""
    with torch.autocast(x.device.type, enabled=False):
        return list(layer.views())


def tilted(axis: float, angle: float) -> list[list[float]]:
    """The 3 × 4 matrix of a rotation by `angle` about the axis (cos, sin, 0), after Rodrigues."""
    x, y, c, s = math.cos(axis), math.sin(axis), math.cos(angle), math.sin(angle)
    return [
        [c + x * x * (1 - c), x * y * (1 - c), y * s, 0],
        [x * y * (1 - c), c + y * y * (1 - c), -x * s, 0],
        [-y * s, x * s, c, 0],
    ]


def warped(kernel: Tensor, shares: Tensor) -> Tensor:
    """A kernel (out, in, …) whose k × k places take these shares (k², values) of its values, (out, in, k, k)."""
    return (kernel.flatten(2) @ shares.mT).unflatten(2, kernel.shape[-2:])


# Both of the following are `F.grid_sample` with zeros beyond the border, which older versions of torch cannot
# differentiate twice, nor, on a GPU, differentiate with deterministic operations alone.


def shares_of(grid: Tensor, sizes: Sequence[int]) -> Tensor:
    """What each place of a grid (1, …, D), in [-1, 1] and x first, takes of each value on `sizes` places.

    By linear interpolation, (places, values); nothing beyond the border.
    """
    shares = grid.new_ones(1, 1)
    for coordinate, size in zip(grid.flatten(0, -2).flip(-1).unbind(-1), sizes, strict=True):
        at = ((coordinate + 1) * size - 1) / 2  # in places, the first at 0
        near = (1 - (at[:, None] - torch.arange(size, device=grid.device)).abs()).clamp(min=0)  # (places, size)
        shares = (shares[:, :, None] * near[:, None]).flatten(1)
    return shares


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Images (B, C, H, W) rotated about their centre, by bilinear interpolation; zeros come in at the corners.

    To the other side it is exactly the mirrored rotation of the mirrored image.
    """
    if degrees < 0:
        return rotated(x.flip(-1), -degrees).flip(-1)
    (height, width), dtype = x.shape[2:], torch.promote_types(x.dtype, torch.float32)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    down = torch.arange(height, dtype=dtype, device=x.device)[:, None] - (height - 1) / 2  # from the centre
    right = torch.arange(width, dtype=dtype, device=x.device) - (width - 1) / 2
    row, column = c * down + s * right + (height - 1) / 2, c * right - s * down + (width - 1) / 2  # looked up, (H, W)
    result, flat = torch.zeros_like(x), x.flatten(2)
    for below, beside in product((0, 1), repeat=2):
        i, j = row.floor() + below, column.floor() + beside
        is_inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        share = (1 - (row - i).abs()) * (1 - (column - j).abs()) * is_inside
        places = (i.clamp(0, height - 1) * width + j.clamp(0, width - 1)).long().flatten()
        result = result + share.to(x.dtype) * flat.index_select(2, places).view(x.shape)
    return result
