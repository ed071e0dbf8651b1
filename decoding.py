"""Images as bytes: decoded into memory, or once into one file beside the data that all processes of a machine map.

Such a file lies in `.decoded/` in the images' folder: a header, which says of which images it is, then their bytes.
While it is made it is called `.partial`, and behind the bytes every part of it that is done leaves its record.

Letters: N samples, C channels of an image, H × W pixels.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from run import ranks
from run.errors import UserError, WrongFlag
from run.files import alone
from run.memory import machine_memory

GREY_MODES = ("1", "L", "LA")  # of PIL
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits per channel
PART_IMAGES, PART_BYTES = 256, 2**23  # decoded as one task: one for each image would cost as much as a small image
HEADER = 2**16  # bytes
VERSION = 1  # of the file's form, and of how images are decoded
SHARE_OF_MEMORY = 0.5  # that the data of all processes may take; the rest is for what they compute

Progress = Callable[[Iterable, str, int], Iterator]


class File(NamedTuple):
    """A file as it was found."""

    name: str  # below the dataset's folder
    size: int  # bytes
    changed: int  # ns


@dataclass(frozen=True)
class Decoded:
    """The samples, those of training first, and how often each of 256 values stands in the channels of these."""

    inputs: Tensor  # uint8 (N, C, H, W)
    counts: Tensor  # int64 (C, 256)
    is_mapped: bool


@dataclass(frozen=True)
class Sources:
    """Which images, in the order of the samples, and what size they are to have."""

    folder: Path
    files: list[File]
    num_train: int
    image_size: int | None = None
    selection: str = ""  # which of the folder's images, in the name of their file

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W). Images that are all grey have one channel, others three; they are not decoded for that."""
        with ThreadPoolExecutor(num_cpus()) as pool:
            blocks = (self.files[start : start + PART_IMAGES] for start in range(0, len(self.files), PART_IMAGES))
            are_grey = all(all(pool.map(self._is_grey, block)) for block in blocks)
        width, height = (self.image_size, self.image_size) if self.image_size else self._size(self.files[0])
        return len(self.files), 1 if are_grey else 3, height, width

    @cached_property
    def fingerprint(self) -> str:
        """Another one where any image is another, or stands elsewhere."""
        digest = hashlib.blake2b(f"{VERSION} {self.num_train} {self.image_size}".encode(), digest_size=16)
        for file in self.files:
            digest.update(f"\0{file.name}\0{file.size} {file.changed}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        """First and last + 1 of the samples that are decoded as one task; none has training and test samples."""
        step = max(1, min(PART_IMAGES, PART_BYTES // math.prod(self.shape[1:])))
        halves = (0, self.num_train), (self.num_train, len(self.files))
        return [(start, min(start + step, end)) for begin, end in halves for start in range(begin, end, step)]

    def decode(self, start: int, stop: int, into: np.ndarray) -> None:
        """These samples, uint8 (stop − start, C, H, W)."""
        _, channels, height, width = self.shape
        for place, file in enumerate(self.files[start:stop]):
            path, first = self.folder / file.name, self.folder / self.files[0].name
            pixels = _pixels(path, self.image_size)
            if pixels.shape[:2] != (height, width):
                raise UserError(
                    f"{path} is {pixels.shape[1]} × {pixels.shape[0]} but {first} is {width} × {height}: all must have "
                    "one size; --image-size N scales and crops them to N × N"
                )
            into[place] = pixels[:, :, :channels].transpose(2, 0, 1)

    def _is_grey(self, file: File) -> bool:
        with _opened_image(self.folder / file.name) as image:
            return image.mode in GREY_MODES

    def _size(self, file: File) -> tuple[int, int]:
        """Width and height."""
        with _opened_image(self.folder / file.name) as image:
            return image.size


def decoded(
    sources: Sources,
    data_dir: Path,
    *,
    in_memory: bool | None = None,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> Decoded:
    """The images as bytes: in memory where `in_memory` says so, or where those of all processes fit without saying.

    Else mapped from a file, which is made if there is none of these images. The numbers are the same either way.
    """
    path = _place(sources, data_dir)
    stored = _opened(path, sources)
    shape = stored.inputs.shape if stored else sources.shape
    if _belongs_into_memory(shape, in_memory, num_processes):
        return _in_memory(sources) if stored is None else Decoded(stored.inputs.clone(), stored.counts, False)
    return stored or _stored(sources, path, progress or (lambda items, description, total: iter(items)))


def _belongs_into_memory(shape: tuple[int, ...], in_memory: bool | None, num_processes: int) -> bool:
    free, needed = machine_memory(), math.prod(shape) * num_processes
    if in_memory and needed > free:
        raise WrongFlag(
            f"argument --in-memory: {shape[0]:,} images of {shape[3]} × {shape[2]} take {needed / 1e9:.1f} GB in "
            f"{num_processes} process(es) and {free / 1e9:.1f} GB are free; no maps them from one file"
        )
    return needed <= SHARE_OF_MEMORY * free if in_memory is None else in_memory


def _in_memory(sources: Sources) -> Decoded:
    inputs = np.empty(sources.shape, dtype=np.uint8)

    def decode(part: tuple[int, int]) -> np.ndarray:
        start, stop = part
        sources.decode(start, stop, inputs[start:stop])
        return _counts(inputs[start:stop]) if start < sources.num_train else 0

    with ThreadPoolExecutor(num_cpus()) as pool:  # PIL decodes outside the interpreter's lock
        counts = sum(pool.map(decode, sources.parts))
    return Decoded(torch.from_numpy(inputs), torch.from_numpy(counts), False)


def _counts(images: np.ndarray) -> np.ndarray:
    """How often each value stands in each channel of (n, C, H, W), int64 (C, 256)."""
    return np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])])


# One file


def _place(sources: Sources, data_dir: Path) -> Path:
    """Where the file of these images lies: beside them, or where that is forbidden in the data folder."""
    name = "-".join(filter(None, [str(sources.image_size or "unscaled"), sources.selection])) + ".bytes"
    folder = sources.folder / ".decoded"
    if os.access(folder if folder.exists() else sources.folder, os.W_OK) or (folder / name).exists():
        return folder / name
    real = os.path.realpath(sources.folder)
    return data_dir / ".decoded" / f"{os.path.basename(real)}-{hashlib.blake2b(real.encode()).hexdigest()[:8]}" / name


def _opened(path: Path, sources: Sources) -> Decoded | None:
    """The file, if it is there and of these images as they are now."""
    header = _header(path)
    if header is None or header.get("fingerprint") != sources.fingerprint or "counts" not in header:
        return None
    shape = tuple(header["shape"])
    if path.stat().st_size != HEADER + math.prod(shape):
        return None
    try:
        mapped = np.memmap(path, np.uint8, "r", HEADER, shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be mapped into memory ({error}): is there a limit (ulimit -v)?") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no tensors that cannot be written to
        inputs = torch.from_numpy(mapped)
    return Decoded(inputs, torch.tensor(header["counts"]), True)


def _header(path: Path) -> dict | None:
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER))
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def _stored(sources: Sources, path: Path, progress: Progress) -> Decoded:
    """The file of these images; one process makes it, others that want it wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_suffix(".lock")):
            there = _opened(path, sources)  # another process may have made it while this one waited
            if there is None:
                Partial(sources, path).complete(progress)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return there or _opened(path, sources)


class Partial:
    """A file of images on its way: goes on where a killed process has left it."""

    def __init__(self, sources: Sources, path: Path) -> None:
        self.sources, self.final, self.path = sources, path, path.with_suffix(".partial")
        self.image_bytes = math.prod(sources.shape[1:])
        self.begin_of_records = HEADER + math.prod(sources.shape)
        self.record_shape = sources.shape[1], 256
        self.record_bytes = 8 * math.prod(self.record_shape)
        self.about = {"version": VERSION, "fingerprint": sources.fingerprint, "shape": sources.shape}

    def complete(self, progress: Progress) -> None:
        """Decode what is missing, on all cores, and give the file its name."""
        parts = self.sources.parts
        size = self.begin_of_records + len(parts) * self.record_bytes
        self._refuse_full_disk(size)
        self._say(size)
        descriptor = self._open(size)
        try:
            missing = [number for number in range(len(parts)) if not self._record(descriptor, number).any()]
            with ThreadPoolExecutor(num_cpus()) as pool:
                done = pool.map(partial(self._make, descriptor), missing)
                for _ in progress(done, f"decoding into {self.final}", len(missing)):
                    pass
            self._finish(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self.path, self.final)

    def _refuse_full_disk(self, size: int) -> None:
        taken = 0
        with suppress(OSError):
            taken = self.path.stat().st_blocks * 512
        free = shutil.disk_usage(self.path.parent).free
        if size - taken > free:
            raise UserError(
                f"{self.path.parent} has {free / 1e9:.1f} GB left and the decoded images take {size / 1e9:.1f} GB: "
                "make room, choose a smaller --image-size, or --limit"
            )

    def _say(self, size: int) -> None:
        if not ranks.name_by_environment():
            num = len(self.sources.files)
            print(f"decoding {num:,} images once into {self.final} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)

    def _open(self, size: int) -> int:
        """The file, empty except for a header, unless what is there is of the same images."""
        header = _header(self.path)
        goes_on = header == json.loads(json.dumps(self.about)) and self.path.stat().st_size == size
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if goes_on else os.O_TRUNC), 0o644)
        if not goes_on:
            os.ftruncate(descriptor, size)
            self._write(descriptor, _as_header(self.about), 0)
        return descriptor

    def _make(self, descriptor: int, number: int) -> None:
        """Decode a part, and when it is on the disk write its record."""
        start, stop = self.sources.parts[number]
        images = np.empty((stop - start, *self.sources.shape[1:]), dtype=np.uint8)
        self.sources.decode(start, stop, images)
        self._write(descriptor, images.data, HEADER + start * self.image_bytes)
        os.fsync(descriptor)
        self._write(descriptor, _counts(images).data, self.begin_of_records + number * self.record_bytes)

    def _record(self, descriptor: int, number: int) -> np.ndarray:
        """The counts of values in a part, (C, 256): all 0 where it is not done."""
        content = os.pread(descriptor, self.record_bytes, self.begin_of_records + number * self.record_bytes)
        return np.frombuffer(content, dtype=np.int64).reshape(self.record_shape)

    def _finish(self, descriptor: int) -> None:
        """Write the counts over all training images into the header, and cut the records off."""
        parts = enumerate(self.sources.parts)
        counts = sum(self._record(descriptor, i) for i, (start, _) in parts if start < self.sources.num_train)
        self._write(descriptor, _as_header(self.about | {"counts": counts.tolist()}), 0)
        os.fsync(descriptor)
        os.ftruncate(descriptor, self.begin_of_records)
        os.fsync(descriptor)

    @staticmethod
    def _write(descriptor: int, content: bytes | memoryview, place: int) -> None:
        content = memoryview(content).cast("B")
        while content:
            written = os.pwrite(descriptor, content, place)
            content, place = content[written:], place + written


def _as_header(about: dict) -> bytes:
    text = json.dumps(about).encode()
    assert len(text) < HEADER, len(text)
    return text + b" " * (HEADER - len(text) - 1) + b"\n"


# One image


def num_cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pixels(path: Path, image_size: int | None) -> np.ndarray:
    """The image as RGB, uint8 (H, W, 3); with `image_size` its shorter side scaled to that, and the middle cut out.

    As torchvision's Resize and CenterCrop do it.
    """
    try:
        with Image.open(path) as image:
            mode, rgb = image.mode, image.convert("RGB")
        if image_size is not None:
            rgb = _middle(rgb, image_size)
    except Exception as error:  # PIL's decoders answer broken files with a dozen kinds of exceptions
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    if mode in DEEP_MODES:
        raise UserError(f"{path} has more than 8 bits per channel (mode {mode}), allowed are 8")
    return np.asarray(rgb)


def _middle(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    if shorter != size:
        image = image.resize([size * side // shorter for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _opened_image(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
