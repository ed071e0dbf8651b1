"""A dataset as a folder of images: train/CLASS/* and test/CLASS/*.

Letters: N samples, C channels of an image, H × W pixels.
"""

import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from classes import chosen
from run.errors import UserError

Half = tuple[Tensor, Tensor]  # inputs, uint8 (N, C, H, W), and labels, int64 (N,), of the training or the test half

GREY_MODES = ("1", "L", "LA")  # of PIL
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits per channel
IMAGES_PER_TASK = 256


def read(folder: Path, limit: int | None, wanted: Sequence[str] | None = None) -> tuple[tuple[str, ...], Half, Half]:
    """The names of the classes, and the images of train/CLASS/* and test/CLASS/* with their labels.

    Classes, all or those `wanted`, are ordered as in torchvision's ImageFolder. Samples are interleaved, the first of
    every class, the second of every class, …, so that the first N are balanced. Images that are all grey have one
    channel, else three.
    """
    for half in ("train", "test"):
        if not (folder / half).is_dir():
            raise UserError(f"{folder} is no dataset: no folder {half}/ with one folder of images per class")
        _refuse_link_out(folder / half, folder.resolve())
        _refuse_bad_entries(folder / half, folder.resolve(), visited=set())
    names = _classes(folder / "train")
    if len(names) < 2:
        raise UserError(f"{folder / 'train'} holds the one class {names[0]}, at least 2 are needed")
    classes = [names[number] for number in chosen(wanted, names, str(folder))]
    for name in _classes(folder / "test"):
        if name not in names:
            raise UserError(f"{folder / 'test' / name} is a class that {folder / 'train'} lacks")
    train_paths, train_labels = _find_images(folder / "train", classes, limit)
    test_paths, test_labels = _find_images(folder / "test", classes, limit)
    images = _decode(train_paths + test_paths)
    num_train = len(train_paths)
    return tuple(classes), (images[:num_train], train_labels), (images[num_train:], test_labels)


def _refuse_bad_entries(folder: Path, root: Path, visited: set[str]) -> None:
    """Refuses links out of `root`, links in circles, pipes and devices, at any depth below `folder`."""
    visited.add(os.path.realpath(folder))
    for entry in _scan(folder):
        if entry.is_symlink():
            _refuse_link_out(Path(entry.path), root)
        if entry.is_dir():
            if os.path.realpath(entry.path) in visited:
                raise UserError(f"{entry.path} is a link to a folder that is read already")
            _refuse_bad_entries(Path(entry.path), root, visited)
        elif not entry.is_file():
            raise UserError(f"{entry.path} is neither a file nor a folder")


def _refuse_link_out(path: Path, root: Path) -> None:
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise UserError(f"{path} is a link to a place outside {root}, which is not followed")


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def _classes(folder: Path) -> list[str]:
    try:
        return find_classes(folder)[0]
    except FileNotFoundError:
        raise UserError(f"{folder} is empty: one folder of images per class is needed") from None


def _find_images(folder: Path, classes: list[str], limit: int | None) -> tuple[list[str], Tensor]:
    """Paths and labels of the first images of these classes below `folder`, classes interleaved."""
    class_to_index = {name: i for i, name in enumerate(classes) if (folder / name).is_dir()}  # test may lack some
    if not class_to_index:
        raise UserError(f"{folder} holds none of the classes {', '.join(classes)} (--classes)")
    samples = make_dataset(folder, class_to_index, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)  # (N,)
    for name, label in class_to_index.items():
        if label not in labels:
            raise UserError(f"{folder / name} holds no image (allowed are {', '.join(IMG_EXTENSIONS)})")
    counters = {label: itertools.count() for label in class_to_index.values()}
    places = [(next(counters[label]), label) for _, label in samples]  # the index within its class comes first
    order = sorted(range(len(samples)), key=places.__getitem__)[:limit]
    return [samples[i][0] for i in order], labels[order]


def _decode(paths: list[str]) -> Tensor:
    """The images, uint8 (N, 1 or 3, H, W), which must all have the size of the first."""
    size = width, height = _open(paths[0])[0].size
    images = _room_for((len(paths), 3, height, width))

    def decode_some(start: int) -> bool:
        """Decodes a few images, as a task each would cost as much as a small image; whether all are grey."""
        are_grey = True
        for i in range(start, min(start + IMAGES_PER_TASK, len(paths))):
            image, is_grey = _open(paths[i])
            if image.size != size:
                found, first = (f"{width} × {height}" for width, height in (image.size, size))
                raise UserError(f"{paths[i]} is {found} but {paths[0]} is {first}: all must have one size")
            images[i] = np.asarray(image).transpose(2, 0, 1)
            are_grey &= is_grey
        return are_grey

    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        are_grey = all(list(pool.map(decode_some, range(0, len(paths), IMAGES_PER_TASK))))
    return torch.from_numpy(images[:, :1].copy() if are_grey else images)


def _room_for(shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError:
        gigabytes = math.prod(shape) / 1e9
        raise UserError(
            f"--dataset: {shape[0]} images of {shape[3]} × {shape[2]} need {gigabytes:.0f} GB of memory, "
            "more than there is: use smaller images or --limit"
        ) from None


def _open(path: str) -> tuple[Image.Image, bool]:
    """The image as RGB, and whether it is grey."""
    try:
        with Image.open(path) as image:
            mode, rgb = image.mode, image.convert("RGB")
    except Exception as error:  # PIL's decoders answer broken files with a dozen kinds of exceptions
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    if mode in DEEP_MODES:
        raise UserError(f"{path} has more than 8 bits per channel (mode {mode}), allowed are 8")
    return rgb, mode in GREY_MODES
