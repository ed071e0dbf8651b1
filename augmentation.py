"""What augmentation does to images: from which row and column of it each pixel of a sample is taken.

Letters: N samples, B samples of a batch, C channels of an image, H × W pixels.
"""

import hashlib

import torch
from torch import Tensor


class Moves:
    """Random shifts, reflected at the border, and flips: from which row and column each pixel is taken."""

    def __init__(self, height: int, width: int, shift: int, flip: bool, alternate_flip: bool):
        self.num_shifts = 2 * shift + 1
        self.flip, self.alternate_flip = flip, alternate_flip
        self.rows = _reflected(height, shift)  # (shifts, H)
        columns = _reflected(width, shift)
        self.columns = torch.cat([columns, columns.flip(1)])  # (2 shifts, W), the second half mirrored

    def draw(self, num_samples: int, seed: int, epoch: int) -> Tensor:
        """For every sample a row of `rows` and a row of `columns`, (2, N)."""
        randomness = generator(seed, epoch, "shift")
        choices = torch.randint(self.num_shifts, (2, num_samples), generator=randomness)
        if self.flip:
            choices[1] += self.num_shifts * self._flips(num_samples, seed, epoch)
        return choices

    def _flips(self, num_samples: int, seed: int, epoch: int) -> Tensor:
        """0 or 1 for every sample: tossed each epoch, or tossed once and then alternating (airbench)."""
        first = 0 if self.alternate_flip else epoch
        tossed = torch.randint(2, (num_samples,), generator=generator(seed, first, "flip"))
        return (tossed + epoch - first) % 2

    def pixels(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (B, H) and columns (B, W) from which the pixels of a batch come."""
        if self.rows.device != choices.device:
            self.rows, self.columns = self.rows.to(choices.device), self.columns.to(choices.device)
        return self.rows[choices[0]], self.columns[choices[1]]


def _reflected(size: int, shift: int) -> Tensor:
    """Where position i comes from under each shift, (2 shift + 1, size): −1 is 1, size is size − 2."""
    position = (torch.arange(-shift, shift + 1)[:, None] + torch.arange(size)).abs()
    return torch.minimum(position, 2 * (size - 1) - position)


def gathered(images: Tensor, indices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """out[b, c, i, j] = images[indices[b], c, rows[b, i], columns[b, j]], uint8 (B, C, H, W).

    Whole image rows first (index_select copies 32 bytes at once), then pixels within them: twice the time of
    images[indices] alone, where one advanced indexing takes ten times that.
    """
    _, channels, height, width = images.shape
    image_and_channel = indices[:, None] * channels + torch.arange(channels, device=indices.device)  # (B, C)
    line = image_and_channel[:, :, None] * height + rows[:, None, :]  # (B, C, H)
    lines = images.view(-1, width).index_select(0, line.flatten()).view(-1, channels * height, width)
    column = columns[:, None, :].expand(-1, channels * height, -1)  # (B, C · H, W)
    return lines.gather(2, column).view(-1, channels, height, width)


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Random numbers that depend on these three alone, on the CPU so that every device gets the same."""
    digest = hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
