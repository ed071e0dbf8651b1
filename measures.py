"""What all measures share: a pass over the data that leaves no trace, its activations, and their class means.

Letters: N samples, B batch, C classes, d dimension of a layer's flattened activations, L layers.
"""

import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from errors import NotFinite, UserError, is_out_of_memory
from ranks import ALONE, Ranks

Batch = tuple[dict[str, Tensor], Tensor]  # {layer: activations (B, d)}, labels (B,)
Features = Callable[[Tensor], dict[str, Tensor]]

CACHE_SHARE = 0.25  # of free memory: the rest is for the forward pass and for what else runs on the machine
PIECE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}  # in float64 2 MB, which a CPU's cache holds, and 256 MB
MIN_ELEMENTS = 2**16  # below, calling torch costs more than what it computes
MAX_ONE_HOT_CLASSES = 32  # up to here a matrix product sums classes faster than adding row by row does
MOST_PARTS = 64  # into which a batch is cut before memory counts as exhausted
FLOAT32_EPS = torch.finfo(torch.float32).eps


class Activations:
    """Each iteration yields, batch by batch, ({layer: activations (B, d)}, labels (B,)), without gradients.

    As many first batches as fit into `cache_bytes` (default: a quarter of the memory that is free where they
    lie) are kept for later iterations, the rest is computed again: the numbers are the same either way.
    """

    def __init__(
        self, features: Features, batches: Iterable[tuple[Tensor, Tensor]], cache_bytes: int | None = None
    ) -> None:
        self.features = features
        self.batches = batches
        self._room = cache_bytes
        self._kept: list[Batch] = []
        self._complete = False
        self._dimensions: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while position < len(self._kept):
            yield self._kept[position]
            position += 1
        if self._complete:
            return
        for x, y in islice(iter(self.batches), position, None):
            batch = self._compute(x, y)
            if position == len(self._kept):
                self._keep(batch)
            yield batch
            del batch  # else two batches of activations would be alive during the next forward pass
            position += 1
        self._complete = position == len(self._kept)

    def _compute(self, x: Tensor, y: Tensor) -> Batch:
        try:
            return self._forward(x, y)
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        # Not in the handler: while the exception lives, so do the tensors of the failed forward pass.
        self._kept.clear()
        self._room = 0
        torch.cuda.empty_cache()
        warnings.warn(
            "Out of memory: activations are computed again instead of kept. Lower the budget.",
            stacklevel=2,
        )
        return self._forward(x, y)

    def _forward(self, x: Tensor, y: Tensor) -> Batch:
        with torch.no_grad():
            activations = {layer: h.flatten(1) for layer, h in self.features(x).items()}
        self._check(activations, len(y))
        return activations, y.to(next(iter(activations.values())).device)

    def _check(self, activations: dict[str, Tensor], num_samples: int) -> None:
        """What forward hooks may do silently, such as not to fire, must not go unnoticed."""
        self.dtypes = {layer: h.dtype for layer, h in activations.items()}
        dimensions = {layer: h.shape[1] for layer, h in activations.items()}
        if not activations:
            raise RuntimeError("No layer's activations arrived.")
        for layer, h in activations.items():
            if len(h) != num_samples:
                raise RuntimeError(f"Layer {layer!r} gave {len(h)} activations for {num_samples} labels.")
        self._dimensions = self._dimensions or dimensions
        if dimensions != self._dimensions:
            before, now = set(self._dimensions.items()), set(dimensions.items())
            layers = ", ".join(sorted({layer for layer, _ in before ^ now}))
            raise RuntimeError(f"Not every batch gave the same layers and dimensions: see {layers}.")

    def _keep(self, batch: Batch) -> None:
        activations, y = batch
        if self._room is None:
            self._room = int(CACHE_SHARE * free_memory(y.device))
        size = sum(h.numel() * h.element_size() for h in (*activations.values(), y))
        if size <= self._room:
            self._kept.append(batch)
            self._room -= size
        else:
            self._room = 0  # the kept batches stay a prefix, also when the last one is small


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, within the limits that a batch system sets.

    Processes that share a CPU share its memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(system_free_memory(), cgroup_free_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def system_free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # not Linux: macOS tells only how much there is, so assume that half of it is in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cgroup_free_memory() -> float:
    """What the limits of containers and jobs (control groups, version 2) leave; infinite without any."""
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].partition("::")[2].lstrip("/")
    except OSError:
        return float("inf")
    here = Path("/sys/fs/cgroup") / group
    return min((group_free_memory(folder) for folder in (here, *here.parents)), default=float("inf"))


def group_free_memory(folder: Path) -> float:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return float("inf")
    reclaimable = int(statistics["inactive_file"])  # cached files give way when memory is short
    return max(0, limit - used + reclaimable)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Measure a module inside: eval mode, no gradients, no compiled code; afterwards all is as it was.

    As it was are every submodule's `training` flag and the random state of Python, NumPy and torch. Not
    `inference_mode`: what is computed inside may be the input of something that trains.
    """
    modes = [(part, part.training) for part in module.modules()]
    with ExitStack() as stack:
        stack.enter_context(same_random_state(module))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import it: a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            module.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training


@contextmanager
def same_random_state(module: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def joined(activations: Iterable[Batch]) -> Iterator[Batch]:
    """The same activations in batches of at least `MIN_ELEMENTS`, so that small ones do not cost many calls."""
    waiting: list[Batch] = []
    num_elements = 0
    for batch in activations:
        waiting.append(batch)
        num_elements += sum(h.numel() for h in batch[0].values())
        del batch
        if num_elements >= MIN_ELEMENTS:
            yield concatenated(waiting)
            waiting, num_elements = [], 0
    if waiting:
        yield concatenated(waiting)


def concatenated(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    activations, labels = zip(*batches, strict=True)
    return {layer: torch.cat([h[layer] for h in activations]) for layer in activations[0]}, torch.cat(labels)


class Means(NamedTuple):
    """One layer's mean over all samples, mu (d,), and M (C, d), whose rows are mu_c - mu, both float64.

    Rows of classes without samples are zero. Where `coincide`, float32 does not tell the class means apart. Under R
    labelings each of the three has a dimension R in front.
    """

    mu: Tensor
    M: Tensor
    coincide: Tensor


def class_means(
    activations: Iterable[Batch], num_classes: int, ranks: Ranks = ALONE
) -> tuple[dict[str, Means], Tensor]:
    """Every layer's means, and the class counts (C,), from one pass over the data."""
    sums, counts = class_sums(activations, num_classes, ranks)
    return {layer: centred(sums.pop(layer), counts) for layer in list(sums)}, counts


def centred(sums: Tensor, counts: Tensor) -> Means:
    """Means from class sums (C, d), or (R, C, d), whose memory becomes M: there may be gigabytes of it."""
    mu = sums.sum(-2) / counts.sum(-1, keepdim=True)  # (d,)
    M = sums.div_(counts.clamp(min=1)[..., None])  # still the class means
    floor = FLOAT32_EPS * torch.linalg.vector_norm(M, dim=(-2, -1))
    M.sub_(mu[..., None, :]).mul_((counts > 0)[..., None])
    return Means(mu, M, coincide=torch.linalg.vector_norm(M, dim=(-2, -1)) <= floor)


def class_sums(
    activations: Iterable[Batch], num_classes: int, ranks: Ranks = ALONE
) -> tuple[dict[str, Tensor], Tensor]:
    """Every layer's sums over classes, {layer: (C, d)} in float64, and the class counts (C,).

    Where a batch has R labels per sample, (B, R), the classes of the second ones follow those of the first, and so on:
    C stands for R times the number of classes.
    """
    sums: dict[str, Tensor] = {}
    counts, num_labels = 0, 0
    for batch, y in joined(activations):
        members = class_members(y, num_classes)
        counts = counts + members.sum(1)
        num_labels += y.numel()
        sums = sums or {layer: zeros(len(members), h) for layer, h in batch.items()}
        for layer in sums:
            add_to_classes(sums[layer], batch[layer], y, members)
        del batch  # its memory is the next one's
    if not num_labels:
        raise UserError("There is no sample to measure.")
    counts = ranks.sum(torch.cat([counts, counts.new_tensor([num_labels])]))
    counts, num_labels = counts[:-1], counts[-1]
    if counts.sum() != num_labels:
        raise UserError(f"There are labels outside 0 to {num_classes - 1}, the {num_classes} classes.")
    sums = {layer: ranks.sum(s) for layer, s in sums.items()}
    check_finite(sums)
    return sums, counts


def zeros(num_rows: int, h: Tensor) -> Tensor:
    """A float64 matrix as wide as h (B, d), on the same device."""
    return h.new_zeros(num_rows, h.shape[1], dtype=torch.float64)


def class_members(y: Tensor, num_classes: int) -> Tensor:
    """Which of the samples with labels y (B,) are of each class, (C, B); labels of no class are nowhere.

    Of labels (B, R) one set of classes below the other, (R · C, B).
    """
    columns = y.view(len(y), -1).T  # (R, B)
    return (columns[:, None] == torch.arange(num_classes, device=y.device)[:, None]).flatten(0, 1)


def check_same_counts(counts: Tensor, counts_again: Tensor) -> None:
    """The passes over the data must meet the same samples."""
    if not torch.equal(counts, counts_again):
        raise RuntimeError("The two passes over the data met different labels: `batches` must repeat itself.")


def add_to_classes(sums: Tensor, h: Tensor, y: Tensor, members: Tensor) -> None:
    """Add each row of h (B, d) to its classes' rows of sums (C, d); the same bits in every run, on GPUs too."""
    by_product = len(sums) <= MAX_ONE_HOT_CLASSES
    one_hot = members.double() if by_product else None  # (C, B)
    rows = () if by_product else class_rows(y, len(sums))
    for columns in pieces(h):
        piece = h[:, columns].double()
        if by_product:
            sums[:, columns].addmm_(one_hot, piece)
        for row in rows:  # (B,)
            if h.is_cuda:  # index_add_ would add in random order there
                sums[:, columns].index_put_((row,), piece, accumulate=True)
            else:
                sums[:, columns].index_add_(0, row, piece)


def class_rows(y: Tensor, num_rows: int) -> Tensor:
    """In which of the rows of `class_sums` each sample is added, (R, B); labels of no class: counts tell, later."""
    columns = y.view(len(y), -1).T  # (R, B)
    num_classes = num_rows // len(columns)
    return columns.clamp(0, num_classes - 1) + num_classes * torch.arange(len(columns), device=y.device)[:, None]


def pieces(h: Tensor) -> Iterator[slice]:
    """Slices of the columns of h (B, d) that are small enough for working copies in float64."""
    width = max(1, PIECE_ELEMENTS.get(h.device.type, 2**18) // max(1, len(h)))
    return (slice(start, start + width) for start in range(0, h.shape[1], width))


def check_finite(sums: dict[str, Tensor]) -> None:
    """A single infinite or nan activation makes its class's sum so, which is cheaper to look at."""
    finite = torch.stack([torch.linalg.vector_norm(s).isfinite() for s in sums.values()]).tolist()
    broken = [layer for layer, is_finite in zip(sums, finite, strict=True) if not is_finite]
    if broken:
        raise NotFinite(f"Activations are infinite or nan in layer {', '.join(broken)}.")


class Measure(Callback):
    """A measure as a Lightning callback: says when to measure, what, and where the numbers go.

    Measures before training (epoch 0) and after every epoch, or those in `epochs`. The results, {column: value}, lie
    in `values` until the next epoch ends; the trainer's loggers get them too, and callbacks can monitor them.
    `batches` gives the data by set, {"train": …, "test": …}; else the trainer's data module does, by `in_order`.
    """

    name: str  # in the column time/…

    def __init__(
        self,
        *,
        epochs: Container[int] | None = None,
        layers: Sequence[str] | None = None,
        sets: Sequence[str] = ("train", "test"),
        batches: Mapping[str, Iterable[tuple[Tensor, Tensor]]] | None = None,
        cache_bytes: int | None = None,
        progress: Callable[[Iterable, str], Iterator] | None = None,
    ) -> None:
        self.epochs, self.layers, self.sets = epochs, layers, sets
        self.cache_bytes, self.progress = cache_bytes, progress
        self._batches = batches
        self._parts = 1  # of each batch, so that they fit into memory
        self.values: dict[str, float] = {}

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The measure's columns; the module is in eval mode and nothing done to its mode or random state lasts."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self._measure_if_due(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure_if_due(trainer, pl_module, trainer.current_epoch + 1)

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        self.values = {}
        if self.epochs is None or epoch in self.epochs:
            self.measure_now(trainer, pl_module, epoch)

    def measure_now(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Measure the module as it is and publish the results as those of this epoch."""
        start = time.perf_counter()
        Ranks.of(trainer).share_buffers(pl_module)
        try:
            values = self._measure_within_memory(trainer, pl_module, epoch)
        except UserError as error:
            if not (isinstance(error, NotFinite) and pl_module.hparams.get("keep_going")):
                raise UserError(f"epoch {epoch}: {error}") from error
            warnings.warn(f"epoch {epoch}: {error} {self.name} is left out.", stacklevel=2)
            values = {}
        self.values = values | {f"time/{self.name}": time.perf_counter() - start}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **values}, step=trainer.global_step)

    def _measure_within_memory(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Measure; whenever memory runs out, again with half the batch and half the cache."""
        while True:
            try:
                with untouched(pl_module):
                    return self.measure(trainer, pl_module, epoch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or trainer.world_size > 1:  # other ranks would not measure again
                    raise
            # Not in the handler: while the exception lives, so do the tensors that took the memory.
            self._halve(pl_module.device)

    def _halve(self, device: torch.device) -> None:
        if self._parts == MOST_PARTS:
            raise UserError(
                f"out of memory in the measure {self.name}, even with small batches and without a cache: measure "
                "fewer --layers (--dib-layers), or leave it out"
            )
        if self._parts == 1:
            warnings.warn(f"Out of memory in {self.name}: it goes on with smaller batches and cache.", stacklevel=2)
        torch.cuda.empty_cache()
        room = int(CACHE_SHARE * free_memory(device)) if self.cache_bytes is None else self.cache_bytes
        self.cache_bytes = room // 2
        self._parts *= 2

    def features(self, trainer: Trainer, pl_module: LightningModule) -> Features:
        """From a batch to the activations of the chosen layers, in the precision of training."""
        precision = trainer.precision_plugin

        def extract(x: Tensor) -> dict[str, Tensor]:
            with precision.forward_context():
                h = pl_module.network.feature_extractor(precision.convert_input(x))
            return {layer: h[layer] for layer in self.layers or h}

        return extract

    def batches(self, trainer: Trainer, split: str) -> Any:
        """The batches of a set, each sample once and as it is."""
        batches = self._batches[split] if self._batches else trainer.datamodule.in_order(split)
        return Parts(batches, self._parts) if self._parts > 1 else batches

    def shown(self, batches: Iterable, split: str) -> Iterable:
        """The same under a progress bar, each time they are iterated."""
        return Shown(batches, f"{self.name} {split}", self.progress) if self.progress else batches


class Parts:
    """Batches cut into at most so many parts each, one after the other."""

    def __init__(self, batches: Any, num_parts: int) -> None:
        self.batches, self.num_parts = batches, num_parts

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield from zip(x.chunk(self.num_parts), y.chunk(self.num_parts), strict=True)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.batches[indices]

    @property
    def labels(self) -> Tensor:
        return self.batches.labels

    def relabelled(self, labels: Tensor) -> "Parts":
        """The same samples with other labels."""
        return Parts(self.batches.relabelled(labels), self.num_parts)


class Shown:
    """An iterable that shows a progress bar each time it is iterated."""

    def __init__(self, items: Iterable, description: str, progress: Callable[[Iterable, str], Iterator]) -> None:
        self.items, self.description, self.progress = items, description, progress

    def __iter__(self) -> Iterator:
        return self.progress(self.items, self.description)
