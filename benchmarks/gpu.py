"""Training and measuring on a GPU: seconds to an accuracy, throughput, what measures add, memory, the roofline.

    make bench-gpu            # or: python benchmarks/gpu.py --data-dir data

Claims, for an H200: CIFARNet trains to 94% on CIFAR-10 in under 5 s from its first step and takes at most 1.1 times a
bare loop of the same recipe; MNISTNet trains to 99% in under 1 s. `run` and the bare loop are those of
training_loop.py; each is trained once before, for what CUDA sets up. Where the real data are not in --data-dir,
random images of the same size take their place: the same time, but no accuracy. "again" is the bare loop a second
time: what differs is noise. The roofline is what a large product of bfloat16 matrices reaches in the same process.
"""

import csv
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from common import Row, Times, arguments, made_up, report, seconds_of, timed_by
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_loop import Case, bare_loop, fitted, with_run

import datasets
import utils
from datasets import Data
from flags import get_args
from networks import Network
from run.console import Console
from run.record import RunRecord
from run.run_folder import RunFolder

PUBLISHED = {  # dataset → shape, training and test samples, a folder that is there where the data are
    "CIFAR10": ((3, 32, 32), 50_000, 10_000, "cifar-10-batches-py"),
    "MNIST": ((1, 28, 28), 60_000, 10_000, "MNIST/raw"),
}
FAST = ("--precision", "bf16-mixed", "--channels-last")
MATRIX = 8192  # rows and columns of the product that stands for the roofline


class Machine:
    """A GPU and whole datasets, or with --quick a CPU and a few samples."""

    def __init__(self, args: Namespace):
        self.quick, self.data_dir = args.quick, args.data_dir
        self.accelerator = "cpu" if args.quick else "gpu"
        self.device = "cpu" if args.quick else "cuda"
        self.rounds = 1 if args.quick else 3

    def case(self, model: str, name: str, *flags: str, num: int | None = None, unclocked: int = 0) -> Case:
        """The preset of a model on a dataset, or on its first `num` samples."""
        small = ("-e", "1", "-b", "16") if self.quick else ()
        argv = ["-m", model, "-d", name, *flags, *small, "--accelerator", self.accelerator, "--quiet", "--no-plots"]
        args = get_args(argv)
        dataset = self.dataset(name, 32 if self.quick else num)
        data = Data(dataset, args.batch_size, augment=args.augment, alternate_flip=args.alternate_flip)
        return Case(data, args, 0 if self.quick else unclocked)

    def dataset(self, name: str, num: int | None) -> datasets.Dataset:
        shape, num_train, num_test, folder = PUBLISHED[name]
        if (Path(self.data_dir) / folder).is_dir():
            return datasets.load(name, self.data_dir, num)
        return made_up(num or num_train, min(num or num_test, num_test), shape)

    def memory(self) -> float | None:
        """Gigabytes at the peak since the last call."""
        if self.device == "cpu":
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


def main() -> None:
    args = arguments(__doc__, data_dir={"default": "data"})
    if not args.quick and not torch.cuda.is_available():
        sys.exit("gpu.py: this machine has no GPU that torch can use, so there is nothing to measure here")
    machine = Machine(args)
    models = [("MNISTNet", "MNIST")] if args.quick else [("CIFARNet", "CIFAR10"), ("MNISTNet", "MNIST")]
    tables = {"Training to the end of the preset": [trained_row(machine, *model) for model in models]}
    if not args.quick:
        tables["ResNet on 32 × 32, batch 512, bf16, channels-last, --compile"] = [throughput_row(machine)]
    measured = [*models, *([] if args.quick else [("ResNet", "CIFAR10")])]
    tables["An epoch's training and measures"] = [measures_row(machine, *model) for model in measured]
    report("gpu", tables, args)


def trained_row(machine: Machine, model: str, name: str) -> Row:
    """Seconds from the first step to the end, test passes included, and the accuracy of real data."""
    case = machine.case(model, name, *FAST)
    bare_loop(case), with_run(case)
    machine.memory()
    times, accuracy = clocked(case, machine.rounds)
    return {
        "model": model,
        "data": case.data.dataset.name,
        "epochs": case.args.epochs,
        "test accuracy": accuracy if case.data.dataset.name == name else None,
        "bare, s": times.median("bare"),
        "again": times.ratio("again", "bare"),
        "run, s": times.median("run"),
        "run": times.ratio("run", "bare"),
        "memory, GB": machine.memory(),
    }


def clocked(case: Case, rounds: int) -> tuple[Times, float]:
    """Bare loop and run in turn; the run's last test accuracy."""
    accuracies = []

    def run() -> float:
        module, seconds = with_run(case)
        accuracies.append(module.values["test_acc"])
        return seconds

    ways = {"bare": lambda: bare_loop(case)[1], "again": lambda: bare_loop(case)[1], "run": run}
    return timed_by(ways, rounds, warm_up=False), accuracies[-1]


def throughput_row(machine: Machine) -> Row:
    """Images per second after the epoch in which torch compiles, and the share of the roofline that this is."""
    case = machine.case("ResNet", "CIFAR10", *FAST, "--compile", "-e", "3", unclocked=1)
    machine.memory()
    times, _ = clocked(case, rounds=1)
    images = len(case.data.dataset.train.labels) * (case.args.epochs - case.unclocked)
    flops = training_flops(case.module().network, case.data.dataset.shape)
    peak = roofline(machine.device)
    return {
        "bare, images/s": images / times.median("bare"),
        "again": times.ratio("bare", "again"),
        "run, share of bare": times.ratio("bare", "run"),
        "GFLOP an image": flops / 1e9,
        "TFLOP/s": images * flops / times.median("run") / 1e12,
        "roofline, TFLOP/s": peak / 1e12,
        "share of it": images * flops / times.median("run") / peak,
        "memory, GB": machine.memory(),
    }


def training_flops(network: Network, shape: tuple[int, ...], batch: int = 16) -> float:
    """Operations of a training step per image, forward and backward."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        F.cross_entropy(network(torch.randn(batch, *shape)), torch.zeros(batch, dtype=torch.int64)).backward()
    return counter.get_total_flops() / batch


def roofline(device: str) -> float:
    """Operations per second of a product of two large bfloat16 matrices."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    return 2 * MATRIX**3 / min(seconds_of(lambda: a @ b, device) for _ in range(20))


def measures_row(machine: Machine, model: str, name: str) -> Row:
    """Seconds of training, NC1 and DIB in the second epoch, from the run's own columns, and the peak memory."""
    num = 10_000 if model == "ResNet" else None
    epochs = "1" if machine.quick else "2"
    case = machine.case(model, name, *FAST, "-e", epochs, "--measure-at", epochs, num=num)
    machine.memory()
    with tempfile.TemporaryDirectory() as log_dir, RunFolder.new(log_dir) as folder:
        console, layers = Console(quiet=True), list(case.module().network.layers)
        callbacks = [*utils.measures(case.args, layers, folder, console), console, RunRecord(folder)]
        fitted(case, callbacks=callbacks, datamodule=case.data)
        with open(folder.path / "metrics.csv", newline="") as file:
            *_, last = csv.DictReader(file)
    training, nc1, dib = (float(last[f"time/{part}"]) for part in ("epoch", "nc1", "dib"))
    return {
        "model": model,
        "training samples": len(case.data.dataset.train.labels),
        "training, s": training,
        "NC1": nc1 / training,
        "DIB": dib / training,
        "memory, GB": machine.memory(),
    }


if __name__ == "__main__":
    main()
