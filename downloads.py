"""Published datasets as files: looked for, checked, and fetched by torchvision where they are missing or damaged.

Letters: N samples, C channels of an image, H × W pixels.
"""

import functools
import hashlib
import math
import os
import pickle
import queue
import shutil
import socket
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.utils import check_integrity

from run.errors import UserError
from run.files import alone

Half = tuple[Tensor, Tensor]  # inputs, uint8 (N, C, H, W), and labels, int64 (N,), of the training or the test half

# Of the unpacked files; torchvision knows the checksums of the archives alone.
MNIST_CHECKSUMS = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
MNIST_LENGTHS = (60_000, 10_000)  # training and test samples of the published files
PATIENCE = 10.0  # seconds that a silent server is waited for


@dataclass(frozen=True)
class Source:
    """Where torchvision gets a dataset from, and what it leaves: all paths below the data folder."""

    name: str
    classes: tuple[str, ...]
    folder: str  # that holds the files
    archives: dict[str, str]  # path → checksum
    files: tuple[str, ...]
    urls: tuple[str, ...]
    download: Callable[[Path], object]
    read: Callable[[Path], tuple[Half, Half]]  # raises Damaged


class Damaged(Exception):
    """A file of a dataset that is missing or not what it should be."""


def mnist_source(dataset: type[torchvision_datasets.MNIST]) -> Source:
    name = dataset.__name__
    folder = f"{name}/raw"
    return Source(
        name=name,
        classes=tuple(dataset.classes),
        folder=folder,
        archives={f"{folder}/{archive}": md5 for archive, md5 in dataset.resources},
        files=tuple(f"{folder}/{archive.removesuffix('.gz')}" for archive, _ in dataset.resources),
        urls=tuple(mirror + dataset.resources[0][0] for mirror in dataset.mirrors),
        download=functools.partial(dataset, download=True),
        read=lambda data_dir: _read_mnist(data_dir / folder, MNIST_CHECKSUMS[name]),
    )


def cifar10_source() -> Source:
    dataset = torchvision_datasets.CIFAR10
    contents = {**dict(dataset.train_list + dataset.test_list), dataset.meta["filename"]: dataset.meta["md5"]}
    return Source(
        name="CIFAR10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        folder=dataset.base_folder,
        archives={dataset.filename: dataset.tgz_md5},
        files=tuple(f"{dataset.base_folder}/{file}" for file in contents),
        urls=(dataset.url,),
        download=functools.partial(dataset, download=True),
        read=lambda data_dir: _read_cifar10(data_dir / dataset.base_folder),
    )


def _read_mnist(folder: Path, checksums: dict[str, str]) -> tuple[Half, Half]:
    train, test = (_read_mnist_half(folder, half, checksums) for half in ("train", "t10k"))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise Damaged(f"{folder} holds training and test images of different size")
    return train, test


def _read_mnist_half(folder: Path, half: str, checksums: dict[str, str]) -> Half:
    images, labels = f"{half}-images-idx3-ubyte", f"{half}-labels-idx1-ubyte"
    inputs = _read_idx(folder / images, 3, checksums[images])[:, None]  # (N, 1, H, W)
    targets = _read_idx(folder / labels, 1, checksums[labels]).long()  # (N,)
    if len(inputs) != len(targets):
        raise Damaged(f"{folder / labels} is damaged ({len(targets)} labels for {len(inputs)} images)")
    if targets.max() > 9:
        raise Damaged(f"{folder / labels} is damaged (label {targets.max()}, allowed are 0 to 9)")
    return inputs, targets


def _read_idx(path: Path, num_dimensions: int, checksum: str) -> Tensor:
    """The bytes in an IDX file: 0, 0, type 8, number of dimensions, their big-endian sizes, then the values.

    A file of the published length must be the published one. Others may be somebody's own, and need only be
    whole.
    """
    content = _content(path)
    header = 4 + 4 * num_dimensions
    if len(content) < header or content[:4].tolist() != [0, 0, 8, num_dimensions]:
        raise Damaged(f"{path} is damaged (it does not start like an IDX file)")
    sizes = content[4:header].view(">u4").tolist()
    if 0 in sizes or len(content) != header + math.prod(sizes):
        raise Damaged(f"{path} is damaged ({len(content)} bytes instead of {header + math.prod(sizes)})")
    if sizes[0] in MNIST_LENGTHS and hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
        raise Damaged(f"{path} is damaged (wrong checksum)")
    return torch.from_numpy(content[header:].reshape(sizes))


def _read_cifar10(folder: Path) -> tuple[Half, Half]:
    dataset = torchvision_datasets.CIFAR10
    _checked_content(folder / dataset.meta["filename"], dataset.meta["md5"])  # torchvision wants it, we do not
    train, test = (_read_cifar10_half(folder, files) for files in (dataset.train_list, dataset.test_list))
    return train, test


def _read_cifar10_half(folder: Path, files: list[list[str]]) -> Half:
    # A pickle can run code: only the bytes whose checksum was just compared are unpickled.
    batches = [pickle.loads(_checked_content(folder / file, md5), encoding="latin1") for file, md5 in files]
    inputs = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch["labels"] for batch in batches])
    return torch.from_numpy(inputs), torch.from_numpy(labels).long()


def _checked_content(path: Path, checksum: str) -> np.ndarray:
    content = _content(path)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
        raise Damaged(f"{path} is damaged (wrong checksum)")
    return content


def _content(path: Path) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def obtain(source: Source, data_dir: Path) -> tuple[Half, Half]:
    """The two halves of the dataset, which is downloaded if a file is missing or damaged."""
    try:
        return source.read(data_dir)
    except Damaged as damaged:
        problem = _archive_problem(source, data_dir) or str(damaged)
    try:
        if not _has_whole_archives(source, data_dir):
            _refuse_offline(source.urls)  # before anything is written
        print(f"{problem}: downloading {source.name} into {data_dir}", file=sys.stderr)
        data_dir.mkdir(parents=True, exist_ok=True)
        with alone(data_dir / f".{source.name}.lock"):
            return _download(source, data_dir)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error, Damaged) as error:
        archives = ", ".join(os.path.basename(archive) for archive in source.archives)
        destination = data_dir / os.path.dirname(next(iter(source.archives)))
        reason = " ".join(str(error).split())  # torchvision's have several lines
        raise UserError(
            f"{source.name} cannot be loaded: {problem} and the download failed ({reason}); bring {archives} "
            f"into {destination} by hand, or name with --data-dir the folder in which {source.folder} lies"
        ) from error


def _staging(source: Source, data_dir: Path) -> Path:
    """Where a download stands until it is whole."""
    return data_dir / f".{source.name}-download"


def _archive_problem(source: Source, data_dir: Path) -> str | None:
    for path, md5 in source.archives.items():
        if (data_dir / path).is_file() and not check_integrity(data_dir / path, md5):
            return f"{data_dir / path} is damaged (wrong checksum)"
    if _staging(source, data_dir).exists():
        return f"the download in {_staging(source, data_dir)} was interrupted"
    return None


def _has_whole_archives(source: Source, data_dir: Path) -> bool:
    folders = (data_dir, _staging(source, data_dir))
    return all(any(check_integrity(folder / path, md5) for folder in folders) for path, md5 in source.archives.items())


def _refuse_offline(urls: Sequence[str]) -> None:
    """Returns if one of the servers answers and raises ConnectionError if none does, soon in either case.

    Threads, because looking up a name and trying all addresses of a host have no time-out of their own.
    """
    answers = queue.SimpleQueue()
    for url in urls:
        threading.Thread(target=lambda url=url: answers.put(_failure(url)), daemon=True).start()
    for _ in urls:
        try:
            failure = answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise ConnectionError(f"no answer from {urls[0]} within {PATIENCE:.0f} s") from None
        if failure is None:
            return
    raise ConnectionError(failure)


def _failure(url: str) -> str | None:
    try:
        urlopen(Request(url, method="HEAD"), timeout=PATIENCE).close()
    except HTTPError:
        return None  # a refusal is an answer: torchvision may know another way
    except (OSError, HTTPException) as error:
        return f"{url}: {error}"
    return None


def _download(source: Source, data_dir: Path) -> tuple[Half, Half]:
    """Lets torchvision download into a folder beside, and moves the files to their place once whole."""
    with suppress(Damaged):  # another process may have brought them while this one waited for the lock
        return source.read(data_dir)
    staging = _staging(source, data_dir)
    _keep_whole_archives(source, data_dir, staging)
    with _network_timeout():
        source.download(staging)
    halves = source.read(staging)
    for file in source.files:
        (data_dir / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, data_dir / file)
    shutil.rmtree(staging, ignore_errors=True)
    return halves


def _keep_whole_archives(source: Source, data_dir: Path, staging: Path) -> None:
    """Leaves in `staging` the whole archives, of an interrupted download or brought by hand, and no more.

    torchvision downloads an archive with a wrong checksum again, but takes any unpacked file for whole.
    """
    for archive, md5 in source.archives.items():
        if not check_integrity(staging / archive, md5) and check_integrity(data_dir / archive, md5):
            (staging / archive).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data_dir / archive, staging / archive)
    for path in [path for path in staging.rglob("*") if path.is_file()]:
        checksum = source.archives.get(path.relative_to(staging).as_posix(), "none: not an archive")
        if not check_integrity(path, checksum):
            path.unlink()


@contextmanager
def _network_timeout() -> Iterator[None]:
    """torchvision opens its connections without a time-out, and a silent server would hold it for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
