"""Which data: whole sets as uint8 tensors, and the decodable labels; their batches are in `batches.py`.

    dataset = load("CIFAR10", "data")
    for x, y in Batches(dataset, "train", 512, device="cuda", shuffle=True, augment=True):
        ...

Letters: N samples, B samples of a batch, C classes (in an image's shape: channels), H × W pixels, N_D digits.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets as torchvision_datasets

import classes as choice
import image_folders
from batches import Batches, Data, placed
from decoding import Decoded, Sources, decoded
from downloads import Source, cifar10_source, mnist_source, obtain
from run.errors import UserError

__all__ = [
    "DATASETS", "Batches", "Data", "Dataset", "Split", "conditional_entropies", "decodable_labels", "digit_entropies",
    "load", "shape_and_classes", "szt",
]  # fmt: skip

# The icosahedron of SZT: row v lists the neighbours of vertex v. Vertices at distance three are opposite.
NEIGHBOURS = [
    [1, 3, 5, 10, 11],
    [0, 2, 3, 4, 11],
    [1, 3, 4, 8, 9],
    [0, 1, 2, 8, 10],
    [1, 2, 6, 9, 11],
    [0, 6, 7, 10, 11],
    [4, 5, 7, 9, 11],
    [5, 6, 8, 9, 10],
    [2, 3, 7, 9, 10],
    [2, 4, 6, 7, 8],
    [0, 3, 5, 7, 8],
    [0, 1, 4, 5, 6],
]
OPPOSITES = [(0, 9), (1, 7), (2, 5), (3, 6), (4, 10), (8, 11)]
SZT_TRAIN_PERCENT = 85  # Shwartz-Ziv & Tishby (2017), their headline figure
SZT_SPLIT_SEED = 2017

PUBLISHED = {  # shape of a sample and names of the classes, known without the data
    "SZT": ((12,), ("0", "1")),
    "MNIST": ((1, 28, 28), mnist_source(torchvision_datasets.MNIST).classes),
    "FashionMNIST": ((1, 28, 28), mnist_source(torchvision_datasets.FashionMNIST).classes),
    "CIFAR10": ((3, 32, 32), cifar10_source().classes),
}
IMAGE_SHIFT = 2  # pixels


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the test half of a dataset."""

    inputs: Tensor  # uint8 (N, C, H, W), or (N, 12) for SZT
    labels: Tensor  # int64 (N,)
    is_mapped: bool = False  # from a file that all processes share

    def only(self, numbers: Sequence[int], num_classes: int) -> "Split":
        """The samples of these classes, labelled by their places in `numbers`."""
        place = torch.full((num_classes,), -1)  # (C,)
        place[list(numbers)] = torch.arange(len(numbers))
        labels = place[self.labels]  # (N,)
        return Split(self.inputs[labels >= 0], labels[labels >= 0])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset in raw bytes, and what normalises, x = (inputs − offset) · scale, and augments it."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    offset: Tensor  # (channels,)
    scale: Tensor  # (channels,)
    shift: int  # augmentation moves an image by up to this many pixels
    flip: bool  # whether a mirrored image is still one of its class
    crop: bool = False  # augmentation cuts out a part and scales it up instead

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def counts(self) -> dict[str, list[int]]:
        """How many training and test samples there are of every class."""
        train, test = (split.labels.bincount(minlength=self.num_classes) for split in (self.train, self.test))
        return dict(zip(self.classes, torch.stack([train, test], 1).tolist(), strict=True))

    def only(self, numbers: Sequence[int]) -> "Dataset":
        """The samples of these classes alone, labelled 0, 1, … in the order of `numbers`."""
        train, test = (split.only(numbers, self.num_classes) for split in (self.train, self.test))
        return replace(self, classes=tuple(self.classes[number] for number in numbers), train=train, test=test)

    def to(self, device: torch.device) -> "Dataset":
        """The same with its inputs on the device, if they fit there."""
        train, test = (
            replace(split, inputs=placed(split.inputs.contiguous(), device)) for split in (self.train, self.test)
        )
        return replace(self, train=train, test=test)


def load(
    name: str,
    data_dir: str | os.PathLike = "data",
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    **where: Any,
) -> Dataset:
    """The dataset `name`, one of DATASETS or a folder with train/CLASS/* and test/CLASS/* images.

    Published sets are looked for in `data_dir` and downloaded into it on first use. `classes`, names or numbers, are
    those to keep, labelled 0, 1, … in the dataset's own order. `limit` keeps the first samples of each half, after
    that: SZT is stored shuffled and a folder's classes interleaved, so that those are mixed. Images of a folder are
    scaled and cropped to `image_size`; `where` says whether they are to lie in memory, as in `decoding.decoded`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1 sample is needed")
    if name in DATASETS:
        if name in PUBLISHED:
            choice.chosen(classes, PUBLISHED[name][1], name)  # refused before anything is downloaded
        dataset = DATASETS[name](Path(data_dir).expanduser())
        return _first(_of_classes(dataset, classes), limit)
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        sources, labels, names = _images_of(Path(folder), limit, classes, image_size)
        return _image_folder(sources, labels, names, decoded(sources, Path(data_dir).expanduser(), **where))
    raise UserError(f"--dataset {name}: neither one of {', '.join(DATASETS)} nor a folder of images")


def shape_and_classes(
    name: str, classes: Sequence[str] | None = None, image_size: int | None = None
) -> tuple[tuple[int, ...], int]:
    """The shape of a sample and the number of classes; nothing is downloaded or decoded for that."""
    if name in PUBLISHED:
        shape, names = PUBLISHED[name]
        return shape, len(choice.chosen(classes, names, name))
    if name not in DATASETS:
        sources, _, names = _images_of(Path(name).expanduser(), None, classes, image_size)
        return sources.shape[1:], len(names)
    dataset = load(name, classes=classes)
    return dataset.shape, dataset.num_classes


def _of_classes(dataset: Dataset, classes: Sequence[str] | None) -> Dataset:
    return dataset if classes is None else dataset.only(choice.chosen(classes, dataset.classes, dataset.name))


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None:
        return dataset
    train, test = (  # cloned, so that the memory of the whole set is free again
        Split(split.inputs[:limit].clone(), split.labels[:limit].clone()) for split in (dataset.train, dataset.test)
    )
    return replace(dataset, train=train, test=test)


def szt() -> tuple[Tensor, Tensor]:
    """All 4096 patterns of 12 bits in counting order, uint8 (4096, 12), and their labels, int64 (4096,).

    The bits are the vertices of an icosahedron. With k = number of ones, a and o = pairs of ones on an edge
    and on opposite vertices, r = k(k−1)/2 − a − o, the label is 1 exactly when 23k + a − 5r − 8o ≥ 99: a
    function of what rotations leave alone.
    """
    patterns = torch.arange(4096)[:, None] >> torch.arange(11, -1, -1) & 1  # (4096, 12)
    edges = [(v, neighbour) for v, row in enumerate(NEIGHBOURS) for neighbour in row if v < neighbour]
    k = patterns.sum(1)
    a = _pairs_of_ones(patterns, edges)
    o = _pairs_of_ones(patterns, OPPOSITES)
    r = k * (k - 1) // 2 - a - o
    labels = (23 * k + a - 5 * r - 8 * o >= 99).long()
    return patterns.byte(), labels


def _pairs_of_ones(patterns: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    first, second = torch.tensor(pairs).T
    return (patterns[:, first] * patterns[:, second]).sum(1)


def _szt_dataset() -> Dataset:
    """SZT, 3481 patterns for training and 615 for testing, shuffled, the same ones always."""
    patterns, labels = szt()
    # RandomState's stream is frozen for all versions of NumPy; torch promises nothing of the kind.
    order = torch.from_numpy(np.random.RandomState(SZT_SPLIT_SEED).permutation(len(labels)))
    num_train = labels.bincount() * SZT_TRAIN_PERCENT // 100  # per class, rounded down
    is_train = _index_within_class(labels[order]) < num_train[labels[order]]
    train, test = (Split(patterns[half], labels[half]) for half in (order[is_train], order[~is_train]))
    offset, scale = torch.tensor([0.5]), torch.tensor([2.0])  # bits become ±1
    return Dataset("SZT", ("0", "1"), train, test, offset, scale, shift=0, flip=False)


def _mnist(data_dir: Path) -> Dataset:
    source = mnist_source(torchvision_datasets.MNIST)
    return _published(source, data_dir, mean=(0.1307,), std=(0.3081,), flip=False)


def _fashion_mnist(data_dir: Path) -> Dataset:
    source = mnist_source(torchvision_datasets.FashionMNIST)
    return _published(source, data_dir, mean=(0.2860,), std=(0.3530,), flip=True)


def _cifar10(data_dir: Path) -> Dataset:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _published(cifar10_source(), data_dir, mean=mean, std=std, flip=True)


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "SZT": lambda data_dir: _szt_dataset(),
    "MNIST": _mnist,
    "FashionMNIST": _fashion_mnist,
    "CIFAR10": _cifar10,
}


def _published(source: Source, data_dir: Path, mean: tuple[float, ...], std: tuple[float, ...], flip: bool) -> Dataset:
    train, test = (Split(*half) for half in obtain(source, data_dir))
    offset, scale = 255 * torch.tensor(mean), 1 / (255 * torch.tensor(std))
    return Dataset(source.name, source.classes, train, test, offset, scale, IMAGE_SHIFT, flip)


def _images_of(
    folder: Path, limit: int | None, wanted: Sequence[str] | None, image_size: int | None
) -> tuple[Sources, tuple[Tensor, Tensor], tuple[str, ...]]:
    """The files of a folder of images, the labels of both halves, and the names of the classes."""
    listing = image_folders.listed(folder, limit, wanted)
    selected = None if limit is None and wanted is None else repr((limit, listing.classes))
    selection = "" if selected is None else hashlib.blake2b(selected.encode(), digest_size=4).hexdigest()
    train, test = listing.train, listing.test
    sources = Sources(folder, train.files + test.files, len(train.files), image_size, selection)
    return sources, (train.labels, test.labels), listing.classes


def _image_folder(
    sources: Sources, labels: tuple[Tensor, Tensor], classes: tuple[str, ...], images: Decoded
) -> Dataset:
    """A folder of images, with the mean and the deviation of the training images used."""
    train, test = (
        Split(inputs, half, images.is_mapped)
        for inputs, half in zip(images.inputs.tensor_split([sources.num_train]), labels, strict=True)
    )
    offset, scale = _normalisation(images.counts)
    crop = sources.image_size is not None
    shift = 0 if crop else min(IMAGE_SHIFT, *(size - 1 for size in train.inputs.shape[2:]))  # reflection needs a pixel
    return Dataset(str(sources.folder), classes, train, test, offset, scale, shift, flip=True, crop=crop)


def _normalisation(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and scale per channel, (C,) each: mean and 1 / deviation, exact because counted, (C, 256)."""
    values = torch.arange(256, dtype=torch.float64)
    weights = counts.double() / counts.sum(1, keepdim=True)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(1)
    std = variance.sqrt().clamp_min(1.0)  # a channel of one value has none; less than one grey level is none
    return mean.float(), (1 / std).float()


def decodable_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The decodable labels of modified Algorithm 1, int64 (N, N_D), the most significant digit first.

    Within each class the samples are enumerated 0, 1, … in their order. That index, written in base C =
    num_classes with N_D = ⌈log_C max_c n_c⌉ digits, gives the sample's N_D new labels. Integers only: a
    floating-point logarithm is off by one at exact powers (125 samples in base 5). Classes may be empty.
    Where no class has two samples N_D is 0, as the formula says: the class alone identifies the sample.
    """
    labels = torch.as_tensor(labels)
    _refuse_labels(labels, num_classes)
    index = _index_within_class(labels.long())
    max_count, num_digits = int(index.max()) + 1, 0
    while num_classes**num_digits < max_count:
        num_digits += 1
    place_values = [num_classes**place for place in reversed(range(num_digits))]
    return index[:, None] // torch.tensor(place_values, dtype=torch.int64, device=index.device) % num_classes


def digit_entropies(digits: Tensor, num_classes: int) -> Tensor:
    """The empirical entropy H(Y_k) of each column of `digits` (N, N_D), in nats, float64 (N_D,).

    Of the pooled digit, from its counts, not log C. H(Y) of plain labels is `digit_entropies(labels[:, None],
    C)`.
    """
    num_samples, num_digits = digits.shape
    columns = torch.arange(num_digits, device=digits.device)
    counts = (digits + columns * num_classes).flatten().bincount(minlength=num_digits * num_classes)
    p = counts.view(num_digits, num_classes).double() / num_samples  # (N_D, C)
    return torch.special.entr(p).sum(1)


def conditional_entropies(digits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """What the class leaves open of each column of `digits` (N, N_D), in nats, float64 (N_D,).

    H(Y_k | Y) = Σ_c (n_c / N) H(Y_k | Y = c), from counts. Ten samples of three classes, six, three and one:

    >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    >>> digits = decodable_labels(labels, 3)
    >>> digits.T.tolist()  # the numbers 0 … 5, 0 … 2 and 0 in base 3
    [[0, 0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]

    The first digit is 0 or 1 with probabilities 7/10 and 3/10. Within class 0, six of the ten samples, both are equally
    frequent; the other classes know it: H(Y_1 | Y) = 6/10 log 2. The second is open in two classes: 9/10 log 3.

    >>> [f"{entropy:.3f}" for entropy in digit_entropies(digits, 3)]
    ['0.611', '1.089']
    >>> [f"{entropy:.3f}" for entropy in conditional_entropies(digits, labels, 3)]
    ['0.416', '0.989']

    What lies between, I(Y; Y_k), the class alone tells: 0.195 and 0.100 nats.
    """
    num_samples, num_digits = digits.shape
    entropies = torch.zeros(num_digits, dtype=torch.float64, device=digits.device)
    class_counts = labels.bincount(minlength=num_classes)
    for k, digit in enumerate(digits.T):
        pairs, counts = (labels.long() * num_classes + digit).unique(return_counts=True)
        surprise = (class_counts[pairs // num_classes].double() / counts).log()  # -log p(y_k | y)
        entropies[k] = (counts * surprise).sum() / num_samples
    return entropies


def _refuse_labels(labels: Tensor, num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"decodable labels need at least 2 classes, got num_classes = {num_classes}")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be a vector with at least one entry, got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels must lie in 0 … {num_classes - 1}, got {lowest} … {highest}")


def _index_within_class(labels: Tensor) -> Tensor:
    """How many samples of its class come before each sample, int64 (N,)."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    first = counts.cumsum(0) - counts  # where each class begins in `order`
    index = torch.empty_like(labels)
    index[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    return index
