"""Two devices next to one: training and every measure of MNISTNet, by the runs' own `time/` columns.

    OMP_NUM_THREADS=1 python benchmarks/devices.py

On a CPU a device is a process of one thread: two of them need two idle cores. On GPUs: --accelerator gpu --devices 1 4.
Claim: the heads of DIB are shared out, so that N devices make it nearly N times as fast; training and NC1 are shared
out by samples. "again" is one device a second time: what differs from 1 there is noise. "room" is what the machine has
for it: several runs of one device at once against a run alone. Where cores share caches, memory or arithmetic units,
that is less than their number.
"""

import csv
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import ROOT, Row, arguments, in_fresh_process, report
from PIL import Image

PARTS = ("epoch", "nc1", "rank", "dib")


def main() -> None:
    args = arguments(
        __doc__,
        accelerator={"default": "cpu"},
        devices={"nargs": 2, "type": int, "default": [1, 2]},
    )
    num, epochs = (100, 1) if args.quick else (1000, 3)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", num)
        few, many = args.devices
        start = partial(run, Path(folder), epochs=epochs, accelerator=args.accelerator)
        runs = {name: start(n, name) for name, n in (("few", few), ("many", many), ("again", few))}
        with ThreadPoolExecutor() as pool:  # each waits for a process
            beside = list(pool.map(lambda i: start(few, f"beside{i}"), range(many // few)))
        runs["room"] = {part: statistics.mean(seconds[part] for seconds in beside) * few / many for part in PARTS}
    report("devices", {f"{many} devices instead of {few}": [row(part, runs, few) for part in PARTS]}, args)


def write_images(folder: Path, num: int) -> None:
    """Random images of ten classes, as files: the run is one as users start it."""
    generator = torch.Generator().manual_seed(0)
    for split, size in (("train", num), ("test", num // 10)):
        for i in range(size):
            path = folder / split / str(i % 10) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (28, 28), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)


def run(folder: Path, devices: int, name: str, *, epochs: int, accelerator: str) -> dict[str, float]:
    """Median seconds an epoch of training with its test, and of each measure, after the first epoch."""
    flags = ["-m", "MNISTNet", "-d", folder / "images", "-e", epochs, "-b", 100, "--rank", "--no-plots", "--quiet"]
    where = ["--accelerator", accelerator, "--devices", devices, "--log-dir", folder / "logs", "--name", name]
    done = in_fresh_process(ROOT / "main.py", *flags, *where)
    assert done.returncode == 0, done.stderr
    with open(folder / "logs" / name / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))[1:]
    return {part: statistics.median(float(row[f"time/{part}"]) for row in rows) for part in PARTS}


def row(part: str, runs: dict[str, dict[str, float]], few: int) -> Row:
    seconds = runs["few"][part]
    faster, room, again = (seconds / runs[name][part] for name in ("many", "room", "again"))
    about = {"": part, f"s, {few} device{'s' * (few > 1)}": seconds}
    return about | {"times faster": faster, "room": room, "again": again}


if __name__ == "__main__":
    main()
