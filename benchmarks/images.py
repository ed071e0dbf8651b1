"""More photos than memory holds: mapped from one decoded file, against torchvision's ImageFolder in a DataLoader.

    OMP_NUM_THREADS=1 python benchmarks/images.py

Claim: once decoded, batches as tests and measures see them cost at most a fifth of what they do from ImageFolder, and
with random crops a third; the memory of a process stays flat on a set six times what a control group allows it; two
processes share the pages. The photos are made up: of 500 × 375, as those of ImageNet are on average, for the cost, and
of 224 × 224 for the memory. Both sides give normalised float batches. Ratios are of the CPU's time, all threads and
processes together, so that idle cores help neither side.
"""

import io
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from common import ROOT, arguments, cell, cpu_seconds_of, report
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import datasets
from run import memory

SIZE, PHOTO, BATCH_SIZE = 224, (500, 375), 64
DISTINCT = 520  # photos; further ones are copies of them, which cost the same
LIMIT = 250_000_000  # bytes of each process; two batches, as floats, are 77 MB
EPOCHS = 3
MOST = 8  # batches that are read to see how fast that is
GROUP_FILES = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}
WAYS = ("ours", "ours, again", "ImageFolder", "ImageFolder, 2 workers")


def main() -> None:
    args = arguments(__doc__, images={"type": int, "default": 10_000})
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as place:  # on a disk, as /tmp may be memory
        photos, many = Path(place) / "photos", Path(place) / "many"
        once = make_photos(photos, 40 if args.quick else DISTINCT, PHOTO)
        make_photos(many, 40 if args.quick else args.images, (SIZE, SIZE))
        tables = {
            f"Batches of {BATCH_SIZE} photos of {PHOTO[0]} × {PHOTO[1]} at {SIZE} × {SIZE}; decoding one, once, takes "
            f"{cell(once)} ms of the CPU": throughput(photos, args.quick),
            f"Memory, MB, of processes to which a control group allows {LIMIT / 1e6:.0f} each": flatness(many),
            "Two processes, both of which have read all of the file": sharing(many),
        }
    report("images", tables, args)


def make_photos(folder: Path, num: int, size: tuple[int, int]) -> float:
    """Two classes of JPEGs with large forms and noise, decoded once by us; what that took of the CPU, ms a photo."""
    photos = [photo(i, size) for i in range(min(num, DISTINCT))]
    for i in range(num):
        place = folder / ("test" if i < 4 else "train") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").write_bytes(photos[i % len(photos)])
    return 1e3 * cpu_seconds_of(lambda: load(str(folder))) / num


def photo(seed: int, size: tuple[int, int]) -> bytes:
    random, file = np.random.default_rng(seed), io.BytesIO()
    forms = Image.fromarray(random.integers(256, size=(12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(forms.resize(size, Image.Resampling.BICUBIC)) + random.integers(-16, 17, size=(*size[::-1], 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def load(folder: str) -> datasets.Dataset:
    return datasets.load(folder, image_size=SIZE, in_memory=False)


# A process of its own for each reader, so that its memory is its own


def read(
    folder: str, way: str, augment: bool, epochs: int, most: int | None = None, wait_for: str | None = None
) -> dict:
    """Seconds of an epoch and of the CPU in it, and after each epoch the process's memory in MB."""
    memory.keep_freed_memory()  # as main.py does; ImageFolder has it, too
    batches = ours(folder, augment) if way == "ours" else torchvisions(folder, augment, way)
    result = {"seconds": [], "cpu": [], "anonymous": [own_memory()], "counts": 0}
    for _ in range(epochs):
        start, cpu = time.perf_counter(), cpu_seconds()
        result["counts"] = exhaust(islice(batches, most))
        result["seconds"].append(time.perf_counter() - start)
        result["cpu"].append(cpu_seconds() - cpu)
        result["anonymous"].append(own_memory())
    if wait_for:
        meet(wait_for)
        result |= pages(".bytes")
        meet(wait_for + "-done")
    return result


def ours(folder: str, augment: bool) -> datasets.Batches:
    return datasets.Batches(load(folder), "train", BATCH_SIZE, shuffle=True, augment=augment)


def torchvisions(folder: str, augment: bool, way: str) -> DataLoader:
    cut = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE)]
    if augment:
        cut = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*cut, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)])
    images = ImageFolder(f"{folder}/train", transform)
    return DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=2 if "workers" in way else 0)


def exhaust(batches: Iterable) -> int:
    return sum(len(y) for _, y in batches)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def own_memory() -> float:
    """What of this process lies in memory and is no file, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:"))


def pages(suffix: str) -> dict[str, float]:
    """MB of the mapped file that this process sees in memory, and its share of them: half, of what two see."""
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
    block = next(block for block in blocks if f"{suffix}\n" in block)
    values = {line.split(":")[0]: line.split()[1] for line in block.splitlines() if line.endswith(" kB")}
    return {name: int(values[name]) / 1e3 for name in ("Rss", "Pss")}


def meet(place: str) -> None:
    """Wait until both readers have come here."""
    Path(f"{place}.{os.getpid()}").touch()
    while len(list(Path(place).parent.glob(f"{Path(place).name}.*"))) < 2:
        time.sleep(0.01)


class Reader:
    """A process that reads, perhaps within a control group. What it was forked with counts as its parent's memory."""

    def __init__(self, group: Path | None, **about: object) -> None:
        context = multiprocessing.get_context("fork")
        self.answer, answer = context.Pipe(duplex=False)
        self.process = context.Process(target=self._run, args=(group, about, answer))
        self.process.start()
        answer.close()

    def _run(self, group: Path | None, about: dict, answer: Connection) -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        answer.send(read(**about))

    def result(self) -> dict:
        found = self.answer.recv()
        self.process.join()
        return found


# The tables


def throughput(folder: Path, quick: bool) -> list[dict]:
    rows = []
    for augment, what in ((False, "as they are"), (True, "random crops")):
        about = {"folder": str(folder), "augment": augment, "epochs": 1, "most": 1 if quick else MOST}
        found = {way: Reader(None, way=way.removesuffix(", again"), **about).result() for way in WAYS}
        num = found["ours"]["counts"]
        cpu = {way: result["cpu"][0] for way, result in found.items()}
        rows += [
            {"": f"{what}: {way}", "photos a second": num / found[way]["seconds"][0],
             "CPU, ms a photo": 1e3 * cpu[way] / num, "CPU / ours": cpu[way] / cpu["ours"]}
            for way in WAYS
        ]  # fmt: skip
    return rows


def flatness(folder: Path) -> list[dict]:
    """One process, and two at once, in a group that allows each LIMIT bytes, the pages of the file among them."""
    size = sum(path.stat().st_size for path in folder.glob(".decoded/*.bytes")) / 1e6
    rows = []
    for num in (1, 2):
        forget(folder.glob(".decoded/*.bytes"))
        with control_group(num * LIMIT) as group:
            about = {"folder": str(folder), "way": "ours", "augment": False, "epochs": EPOCHS}
            results = [reader.result() for reader in [Reader(group, **about) for _ in range(num)]]
            peak = peak_of(group)
        rows += [
            {"": f"process {i + 1} of {num}", "file": size, "limit": None if group is None else num * LIMIT / 1e6,
             "peak of the group": peak, **{f"own after epoch {i}": own for i, own in enumerate(result["anonymous"])},
             "photos a second": result["counts"] / result["seconds"][-1]}
            for i, result in enumerate(results)
        ]  # fmt: skip
    return rows


def forget(paths: Iterable[Path]) -> None:
    """Have the system read these files from the disk again: pages that it has count for the group that read them."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sharing(folder: Path) -> list[dict]:
    with tempfile.TemporaryDirectory() as place:
        about = {"folder": str(folder), "augment": False, "epochs": 1, "wait_for": f"{place}/here"}
        readers = [Reader(None, way="ours", **about) for _ in range(2)]
        rows = [{"": f"process {i + 1}", "sees, MB": found["Rss"], "its share, MB": found["Pss"]}
                for i, found in enumerate(reader.result() for reader in readers)]  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in ("sees, MB", "its share, MB")}
    return [*rows, {"": "together", **total}]


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A control group below this process's own with this limit in bytes; None where it may make none."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = [Path(memory.ROOTS[name]) / own.lstrip("/") for _, name, own in lines if name in memory.ROOTS]
    for place in places:
        group = place / f"benchmark-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        for file in GROUP_FILES:
            try:
                (group / file).write_text(str(limit))
            except OSError:
                continue
            yield group
            group.rmdir()
            return
        group.rmdir()
    yield None


def peak_of(group: Path | None) -> float | None:
    """The most that the group has held, in MB."""
    files = [group / file for file in GROUP_FILES.values()] if group else []
    return next((int(file.read_text()) / 1e6 for file in files if file.exists()), None)


if __name__ == "__main__":
    main()
