"""An epoch over CIFAR-10-sized data with shifts and flips: our batches against torchvision in a DataLoader.

    OMP_NUM_THREADS=1 python benchmarks/data.py

Claim: at least 10 times faster. Both give normalised float batches of 512, shuffled; the images are random, which costs
what real ones do. "again" is our own epoch a second time: what differs from 1 there is noise.
"""

from collections.abc import Iterable

import torch
from common import arguments, made_up, report, side_by_side
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import datasets

BATCH_SIZE = 512


class Images(Dataset):
    """Images one by one, as torchvision's own datasets give them."""

    def __init__(self, split: datasets.Split, transform: transforms.Compose):
        self.images, self.labels = split.inputs.permute(0, 2, 3, 1).numpy(), split.labels.tolist()  # (N, H, W, C)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def main() -> None:
    args = arguments(__doc__)
    dataset = made_up(1000 if args.quick else 50_000, 10)
    ours = datasets.Batches(dataset, "train", BATCH_SIZE, shuffle=True, augment=True)
    images = Images(dataset.train, transform(dataset))
    ways = {
        "our batches": ours,
        "again": ours,
        "torchvision, DataLoader": DataLoader(images, BATCH_SIZE, shuffle=True),
        "the same with 2 workers": DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=2),
    }
    times = side_by_side({name: lambda batches=way: exhaust(batches) for name, way in ways.items()}, rounds=1)
    rows = [{"": way, "seconds": times.median(way), "ratio": times.ratio(way, "our batches")} for way in ways]
    report("data", {f"An epoch over {len(images)} images of 3 × 32 × 32": rows}, args)


def transform(dataset: datasets.Dataset) -> transforms.Compose:
    """The same augmentation and normalisation, image by image."""
    mean, std = (dataset.offset / 255).tolist(), (1 / (255 * dataset.scale)).tolist()
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=dataset.shift, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


if __name__ == "__main__":
    main()
