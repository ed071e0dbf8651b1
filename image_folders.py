"""A dataset as a folder of images: train/CLASS/* and test/CLASS/*; without test/, val/CLASS/* takes its place.

Images at any depth below CLASS are of that class. Files and folders whose names begin with a dot are passed over.

Letters: N samples.
"""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from classes import chosen
from decoding import File
from run import ranks
from run.errors import UserError


@dataclass(frozen=True)
class Half:
    """The files of the training or the test half, and the label of each."""

    files: list[File]
    labels: Tensor  # int64 (N,)


@dataclass(frozen=True)
class Listing:
    """What lies in a folder: the names of the classes, and which files are of which."""

    classes: tuple[str, ...]
    train: Half
    test: Half


def listed(folder: Path, limit: int | None = None, wanted: Sequence[str] | None = None) -> Listing:
    """The images of train/CLASS/* and test/CLASS/*, of all classes or those `wanted`.

    Classes are ordered as in torchvision's ImageFolder. Samples are interleaved, the first of every class, the second
    of every class, …, so that the first N are balanced.
    """
    train, test = folder / "train", _test_half(folder)
    for half in (train, test):
        if not half.is_dir():
            raise UserError(f"{folder} is no dataset: no folder {half.name}/ with one folder of images per class")
        _refuse_link_out(half, folder.resolve())
    names, tested = _classes(train), _classes(test)
    if len(names) < 2:
        raise UserError(f"{train} holds the one class {names[0]}, at least 2 are needed")
    for name in tested:
        if name not in names:
            raise UserError(f"{test / name} is a class that {train} lacks")
    classes = [names[number] for number in chosen(wanted, names, str(folder))]
    _say_missing(test, [name for name in classes if name not in tested])
    return Listing(tuple(classes), _half(train, classes, limit), _half(test, classes, limit))


def _test_half(folder: Path) -> Path:
    test, val = folder / "test", folder / "val"
    return val if val.is_dir() and not test.is_dir() else test


def _classes(half: Path) -> list[str]:
    """The names of the folders in one half, sorted."""
    entries = _entries(half)
    names = [entry.name for entry in entries if entry.is_dir()]
    stray = [entry.name for entry in entries if _is_image(entry)]
    if not names:
        raise UserError(f"{half} is empty: one folder of images per class is needed")
    if stray:
        _warn(f"{half / stray[0]} lies in no folder of a class and is left out, as are all such images ({len(stray)}).")
    return names


def _say_missing(test: Path, missing: list[str]) -> None:
    if missing:
        _warn(f"{test} has no images of {', '.join(missing)}: only training images show these classes.")


def _warn(message: str) -> None:
    if not ranks.name_by_environment():  # the first process says it for all
        warnings.warn(message, stacklevel=2)


def _half(half: Path, classes: list[str], limit: int | None) -> Half:
    """Files and labels of the first images of these classes, classes interleaved."""
    visited = {os.path.realpath(half)}
    by_class = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(half / name, half, visited)) if (half / name).is_dir() else None
        if found == []:
            raise UserError(f"{half / name} holds no image (allowed are {', '.join(IMG_EXTENSIONS)})")
        by_class.append([(file, label) for _, file in found or ()])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_class))
    samples = list(itertools.islice((sample for sample in in_turn if sample), limit))
    if not samples:
        raise UserError(f"{half} holds none of the classes {', '.join(classes)} (--classes)")
    files, labels = zip(*samples, strict=True)
    return Half(list(files), torch.tensor(labels, dtype=torch.int64))


def _images_below(folder: Path | str, half: Path, visited: set[str]) -> Iterator[tuple[tuple[str, str], File]]:
    """The images at any depth, each behind what torchvision sorts them by: its folder and its name.

    Refuses links out of the dataset, links in circles, pipes and devices.
    """
    place, root = os.path.realpath(folder), half.parent.resolve()
    _refuse_link_out(folder, root)
    if place in visited:
        raise UserError(f"{folder} is a link to a folder that is read already")
    visited.add(place)
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _images_below(entry.path, half, visited)
            continue
        if entry.is_symlink():
            _refuse_link_out(entry.path, root)
        if not entry.is_file():
            raise UserError(f"{entry.path} is neither a file nor a folder")
        elif _is_image(entry):
            state = entry.stat()
            name = half.name + entry.path[len(str(half)) :]
            yield (str(folder), entry.name), File(name, state.st_size, state.st_mtime_ns)


def _is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(IMG_EXTENSIONS)


def _entries(folder: Path | str) -> list[os.DirEntry]:
    """What lies in a folder, sorted, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def _refuse_link_out(path: Path | str, root: Path) -> None:
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise UserError(f"{path} is a link to a place outside {root}, which is not followed")
