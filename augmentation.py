"""What augmentation does to images: shifts and flips of small ones, crops that are scaled up of those of any size.

Letters: N samples, B samples of a batch, C channels of an image, H × W pixels.
"""

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

AREAS = 0.08, 1.0  # share of the image that a crop has, and its width over its height: those of Inception (Szegedy et
RATIOS = 3 / 4, 4 / 3  # al. 2015), which are torchvision's
AT_ONCE = 2**20  # values of images: what a crop of more reads and writes on a CPU does not lie in its cache
ATTEMPTS = 10  # to find a crop that lies within the image


def augmentation_of(dataset: "Dataset", alternate_flip: bool) -> "Moves | Crops | None":
    """What a dataset's training images undergo."""
    if dataset.crop:
        return Crops(dataset.flip, alternate_flip)
    if dataset.shift or dataset.flip:
        return Moves(*dataset.shape[1:], dataset.shift, dataset.flip, alternate_flip)
    return None


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
            choices[1] += self.num_shifts * flips(num_samples, seed, epoch, self.alternate_flip)
        return choices

    def __call__(self, images: Tensor, places: Tensor | None, choices: Tensor) -> Tensor:
        """The images at these places, or all in turn, moved as each one's choices (2, B) say, uint8 (B, C, H, W)."""
        places = torch.arange(len(images), device=images.device) if places is None else places
        return gathered(images, places, *self.pixels(choices))

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


class Crops:
    """Parts of random area and shape at random places, scaled up to the whole image's size, and flips."""

    def __init__(self, flip: bool, alternate_flip: bool):
        self.flip, self.alternate_flip = flip, alternate_flip

    def draw(self, num_samples: int, seed: int, epoch: int) -> Tensor:
        """For every sample the crop's left, top, width and height, relative to the image's, and the flip, (5, N)."""
        randomness = generator(seed, epoch, "crop")
        size = torch.ones(2, num_samples)  # the whole image, where no attempt fits
        is_open = torch.ones(num_samples, dtype=torch.bool)
        for _ in range(ATTEMPTS):
            area, ratio = torch.rand(2, num_samples, generator=randomness)
            area = AREAS[0] + (AREAS[1] - AREAS[0]) * area
            ratio = RATIOS[0] * (RATIOS[1] / RATIOS[0]) ** ratio
            found = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])  # (2, N)
            is_found = is_open & (found.amax(0) <= 1)
            size = torch.where(is_found, found, size)
            is_open &= ~is_found
        corner = (1 - size) * torch.rand(2, num_samples, generator=randomness)
        is_flipped = flips(num_samples, seed, epoch, self.alternate_flip) if self.flip else torch.zeros(num_samples)
        return torch.cat([corner, size, is_flipped[None].float()])

    def __call__(self, images: Tensor, places: Tensor | None, choices: Tensor) -> Tensor:
        """The images at these places, or all in turn, each cropped as its choices (5, B) say, float32 (B, C, H, W)."""
        images = images if places is None else images[places]
        at_once = len(images)
        if images.device.type == "cpu":
            at_once = max(1, AT_ONCE // images.shape[1:].numel())
        parts = zip(images.split(at_once), choices.split(at_once, dim=1), strict=True)
        return torch.cat([self._cut(*part) for part in parts])

    def _cut(self, images: Tensor, choices: Tensor) -> Tensor:
        height, width = images.shape[2:]
        left, top, across, down, is_flipped = choices
        x = _positions(left, across, width)  # (B, W)
        x = torch.where(is_flipped[:, None] > 0, x.flip(1), x)
        y = _positions(top, down, height)  # (B, H)
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)  # (B, H, W, 2)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)


def _positions(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Where the pixels of a crop come from, (B, size), −1 and 1 being the centres of the image's outermost pixels.

    Whole pixels are cut out, and none beyond the crop's border takes part: as if it were cut first and scaled then.
    """
    num = (length * size).round().clamp(1, size)[:, None]
    begin = (first[:, None] * size).round().minimum(size - num)
    pixel = begin + (torch.arange(size, device=first.device) + 0.5) * num / size - 0.5
    return pixel.maximum(begin).minimum(begin + num - 1) * (2 / max(size - 1, 1)) - 1


def flips(num_samples: int, seed: int, epoch: int, alternate: bool) -> Tensor:
    """0 or 1 for every sample: tossed each epoch, or tossed once and then alternating (airbench)."""
    first = 0 if alternate else epoch
    tossed = torch.randint(2, (num_samples,), generator=generator(seed, first, "flip"))
    return (tossed + epoch - first) % 2


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Random numbers that depend on these three alone, on the CPU so that every device gets the same."""
    digest = hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
