"""Batches of a dataset: in which order, augmented how, and where the bytes of its samples lie.

Letters: N samples, B samples of a batch, C channels of an image, H × W pixels.
"""

import copy
import ctypes
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from augmentation import augmentation_of, generator
from run.errors import UserError, WrongFlag
from run.memory import LIBC

if TYPE_CHECKING:
    from datasets import Dataset

EVALUATION_VALUES = 2**20  # pixels or bits in a batch where nothing is trained
FIRST_VALUES = 2**28  # of the first images that a network's start may look at
AHEAD = 2  # batches that are fetched while one is used
MADV_WILLNEED, PAGE = 3, 4096
SHARE_OF_FREE_MEMORY = 0.5  # of the device that the data may take; the rest is the network's


class Batches:
    """Batches (x, y) of one half of a dataset: x float32 (B, *shape), y int64 (B,), both on `device`.

    Every sample comes once per epoch, also those of the short last batch. Order and augmentation depend on
    `seed` and the epoch (`set_epoch`) alone: each sample's shift and flip is the same whatever batch size,
    rank and device are. Global random state is neither read nor changed. Under several devices `batch_size`
    is the global one, and each rank gets every world_size-th sample of each global batch.

    `batches[indices]` is x of these samples without augmentation.
    """

    def __init__(
        self,
        dataset: "Dataset",
        split: str,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        alternate_flip: bool = False,
    ):
        assert split in ("train", "test"), split
        assert 0 <= rank < world_size, (rank, world_size)
        inputs, labels = getattr(dataset, split).inputs, getattr(dataset, split).labels
        if batch_size < world_size:
            raise UserError(f"--batch-size {batch_size}: at least 1 for each of {world_size} device(s) is needed")
        if len(labels) < world_size:
            raise UserError(f"--devices: {world_size} devices cannot share the {len(labels)} {split} sample(s)")
        self.num_samples = len(labels)
        self.epoch = 0
        self.labels = labels.to(device)  # (N,)
        self.device = self.labels.device  # with its index: "cuda" would compare unequal to "cuda:0"
        self._inputs = placed(inputs.contiguous(), self.device)
        per_channel = (-1, *[1] * (inputs.ndim - 2))
        self._offset = dataset.offset.to(self.device).view(per_channel)
        self._scale = dataset.scale.to(self.device).view(per_channel)
        self._bounds = _bounds(self.num_samples, batch_size, world_size)
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle = seed, shuffle
        self._is_mapped = getattr(dataset, split).is_mapped and self._inputs.device.type == "cpu"
        self._augmentation = augmentation_of(dataset, alternate_flip) if augment else None

    batch_sampler = None  # Lightning asks every loader with a sampler for it

    @property
    def sampler(self) -> "Batches":
        """Itself: Lightning calls `set_epoch` on a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator reads the epoch at its first batch: Lightning calls iter() first and set_epoch after it.
        place = self._inputs.device
        order = torch.arange(self.num_samples)
        if self._shuffle:
            order = torch.randperm(self.num_samples, generator=generator(self._seed, self.epoch, "order"))
        choices = None
        if self._augmentation is not None:
            choices = self._augmentation.draw(self.num_samples, self._seed, self.epoch).to(place)
        order = order.to(place)
        parts = [order[start + self._rank : stop : self._world_size] for start, stop in self._bounds]  # of (B,)
        for indices, (images, places) in zip(parts, self._fetched_in_turn(parts), strict=True):
            if choices is None:
                x = images if places is None else images[places]
            else:
                x = self._augmentation(images, places, choices[:, indices].to(self.device))
            yield self._normalised(x), self.labels[indices.to(self.device)]

    def _fetched_in_turn(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For the indices of each batch: images on the device, and which of them it has; None for all in turn."""
        if self._is_mapped or self._inputs.device != self.device:
            return ((images.to(self.device, non_blocking=True), None) for images in ahead(self._bytes_of, parts))
        return ((self._inputs, indices) for indices in parts)

    def _bytes_of(self, indices: Tensor) -> Tensor:
        """inputs[indices] on the CPU, where the device can copy it from beside the computation."""
        if self._is_mapped:
            read_ahead(self._inputs, indices)
        shape = len(indices), *self._inputs.shape[1:]
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        # NumPy's take leaves the interpreter and torch's threads to the computation.
        np.take(self._inputs.numpy(), indices.numpy(), axis=0, out=images.numpy(), mode="clip")
        return images

    def weight(self, batch_idx: int) -> float:
        """By what to multiply this rank's mean over a batch, so that the mean over ranks is that of all its samples."""
        start, stop = self._bounds[batch_idx]
        return len(range(start + self._rank, stop, self._world_size)) * self._world_size / (stop - start)

    def relabelled(self, labels: Tensor) -> "Batches":
        """The same samples with other labels, (N,) or several for each of them, (N, R)."""
        other = copy.copy(self)
        other.labels = labels.to(self.device)
        return other

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self._normalised(self._fetched(indices))

    def _fetched(self, indices: Tensor) -> Tensor:
        """inputs[indices] on the device, still uint8."""
        if isinstance(indices, Tensor):
            indices = indices.to(self._inputs.device)
        inputs = self._inputs[indices]
        if self.device.type == "cuda" and inputs.device.type == "cpu":
            inputs = inputs.pin_memory()  # so that the copy runs beside the computation
        return inputs.to(self.device, non_blocking=True)

    def _normalised(self, inputs: Tensor) -> Tensor:
        return inputs.float().sub_(self._offset).mul_(self._scale)


class Data(LightningDataModule):
    """A dataset as Lightning's Trainer and the measures want it: on the trainer's device, in the rank's share."""

    def __init__(
        self, dataset: "Dataset", batch_size: int | str, *, augment: bool = True, alternate_flip: bool = False,
        seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.dataset = dataset
        self.batch_size = len(dataset.train.labels) if batch_size == "all" else batch_size
        self.random = {"augment": augment, "alternate_flip": alternate_flip, "seed": seed}

    def refuse_few(self, num_devices: int, in_step: int = 0) -> None:
        """Refuse fewer samples than one for each device, and `in_step` for each in a training step."""
        train, test = (len(split.labels) for split in (self.dataset.train, self.dataset.test))
        for num, what, least in (
            (train, "training sample(s) (--limit)", max(in_step, 1)),
            (test, "test sample(s) (--limit)", 1),
            (self.batch_size, "sample(s) a step (-b/--batch-size)", in_step),
        ):
            if num < least * num_devices:
                norm = " with batch norm" if least > 1 else ""
                raise WrongFlag(
                    f"only {num} {what} for {num_devices} device(s) (--devices × --num-nodes){norm}: at least "
                    f"{least * num_devices} are needed"
                )

    def train_dataloader(self) -> Batches:
        """Shuffled and augmented."""
        return self._batches("train", self.batch_size, shuffle=True, **self.random)

    def val_dataloader(self) -> Batches:
        """The test set, as it is."""
        return self.in_order("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch: `Batches` are on the device already, and Lightning's search for tensors takes 0.1 ms a step."""
        return batch

    def first_images(self, num: int = 5000) -> Tensor:
        """The first training samples, normalised, on the CPU."""
        num = min(num, len(self.dataset.train.labels), FIRST_VALUES // math.prod(self.dataset.shape))
        return Batches(self.dataset, "train", num)[torch.arange(num)]

    def in_order(self, split: str) -> Batches:
        """Each sample once, in order and as it is: what measures look at."""
        batch_size = min(max(EVALUATION_VALUES // math.prod(self.dataset.shape), 64), 4096)
        return self._batches(split, batch_size * self.trainer.world_size)

    def _batches(self, split: str, batch_size: int, **options: Any) -> Batches:
        device, trainer = self.trainer.strategy.root_device, self.trainer
        self.dataset = self.dataset.to(device)  # once: all batches share it there
        return Batches(
            self.dataset, split, batch_size, device=device, rank=trainer.global_rank, world_size=trainer.world_size,
            **options,
        )  # fmt: skip


def placed(inputs: Tensor, device: torch.device) -> Tensor:
    """The inputs on the device if they fit; else where they are, to be copied batch by batch."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if inputs.nbytes > SHARE_OF_FREE_MEMORY * free:
            return inputs
    return inputs.to(device)


def ahead(fetch: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """fetch(part) for each in turn, by a thread while those before are used."""
    pool = ThreadPoolExecutor(1, "fetch")
    try:
        waiting = deque(pool.submit(fetch, part) for part in parts[:AHEAD])
        for part in parts[AHEAD:]:
            waiting.append(pool.submit(fetch, part))
            yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(mapped: Tensor, indices: Tensor) -> None:
    """Ask the system for these samples of a file at once: else it reads one after the other, as each is touched."""
    num_bytes, start = mapped[0].nbytes, mapped.data_ptr()
    for index in indices.tolist():
        begin = start + index * num_bytes
        page = begin // PAGE * PAGE
        LIBC.madvise(ctypes.c_void_p(page), ctypes.c_size_t(begin + num_bytes - page), MADV_WILLNEED)


def _bounds(num_samples: int, batch_size: int, world_size: int) -> list[tuple[int, int]]:
    """First and last + 1 of every global batch.

    A short last batch with fewer than 2 samples per rank joins the one before it: batch norm needs two.
    """
    starts = list(range(0, num_samples, batch_size))
    num_last = num_samples - starts[-1]
    if len(starts) > 1 and num_last < min(batch_size, 2 * world_size):
        starts.pop()
    return list(zip(starts, [*starts[1:], num_samples], strict=True))
