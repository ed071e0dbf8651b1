"""Images and kernels seen from elsewhere: turned, scaled, in perspective; and convolutions that look through them.

Letters: B batch, H × W size of a map, k × k places of a kernel, p and q the tilts of a perspective.
"""

import math
from collections.abc import Iterator, Sequence
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
        return torch.stack([self._conv_forward(x, kernel, self.bias) for kernel in self.views()]).amax(0)


class ScaledConv2d(ViewedConv2d):
    """One learnt kernel in several fixed scales, on the same k × k places: 0.5 draws it half as large."""

    def __init__(self, *sizes: int, scales: Sequence[float] = (0.7, 1.0, 1.4), **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scales = tuple(scales)

    def views(self) -> Iterator[Tensor]:
        """The kernel in every scale, by bilinear interpolation; zeros beyond its border."""
        for scale in self.scales:
            theta = self.weight.new_tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]])
            yield warped(self.weight, F.affine_grid(theta[None], [1, 1, *self.kernel_size], align_corners=False))


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
            yield warped(self.weight, grid / (1 + p * grid[..., :1] + q * grid[..., 1:]))


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
            yield warped(self.weight, grid).sum(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        maps = [F.conv2d(x, kernel, self.bias, self.stride, self.padding) for kernel in self.views()]
        return torch.stack(maps).amax(0)


def tilted(axis: float, angle: float) -> list[list[float]]:
    """The 3 × 4 matrix of a rotation by `angle` about the axis (cos, sin, 0), after Rodrigues."""
    x, y, c, s = math.cos(axis), math.sin(axis), math.cos(angle), math.sin(angle)
    return [
        [c + x * x * (1 - c), x * y * (1 - c), y * s, 0],
        [x * y * (1 - c), c + y * y * (1 - c), -x * s, 0],
        [-y * s, x * s, c, 0],
    ]


def warped(kernel: Tensor, grid: Tensor) -> Tensor:
    """A kernel (out, in, …) looked up at a grid (1, …, 2 or 3) in [-1, 1]; zeros beyond the border."""
    flat = kernel.flatten(0, 1)[None]  # (1, out·in, …): one grid for all
    return F.grid_sample(flat, grid, align_corners=False).view_as(kernel)


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Images (B, C, H, W) rotated about their centre, by bilinear interpolation; zeros come in at the corners."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    ratio = x.shape[3] / x.shape[2]  # a grid counts both sides from -1 to 1
    theta = x.new_tensor([[c, -s / ratio, 0], [s * ratio, c, 0]]).expand(len(x), -1, -1)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
