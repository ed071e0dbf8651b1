"""Training with all that a normal run has around it, measures aside, against a bare PyTorch loop.

    OMP_NUM_THREADS=1 python benchmarks/training_loop.py

Claims: MLP on SZT takes at most 3 times the bare loop, whose steps are half a millisecond long, and is at least 1.7
times faster than the same module fed by a standard DataLoader; ResNet on 32 × 32 with batches of 512 takes at most
1.05 times the bare loop. The bare loop has the same batches, schedule, optimizer, mean loss and accuracy, and test
pass; its weights are the same at the end, bit for bit. `trainer` is Lightning's as `main.py` makes it; `run` adds the
run's folder, with a row of metrics.csv and a checkpoint per epoch. "again" is the bare loop a second time: what
differs from 1 there is noise.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from common import Row, arguments, made_up, report, timed_by
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import main as program
from console import Console
from datasets import Batches, Data
from flags import flags_of_run, get_args
from networks import Classifier, evaluating, rate_factor
from run_folder import RunFolder, RunRecord

WAYS = ("bare", "again", "trainer", "run", "DataLoader")


def main() -> None:
    args = arguments(__doc__)
    rows = [row(*case) for case in (quick_cases() if args.quick else cases())]
    report("training_loop", {"Training loop, times the bare loop": rows}, args)


def cases() -> Iterator[tuple[str, "Case", int, tuple[str, ...]]]:
    """What is trained, in how many rounds, in which ways."""
    yield "MLP on SZT", szt(epochs=40), 7, WAYS
    yield "MNISTNet, 28 × 28, batch 256", images("MNISTNet", (1, 28, 28), num=1280, batch_size=256), 5, WAYS
    yield "ResNet, 32 × 32, batch 512", images("ResNet", (3, 32, 32), num=512, batch_size=512), 2, WAYS[:2] + WAYS[3:4]


def quick_cases() -> Iterator[tuple[str, "Case", int, tuple[str, ...]]]:
    yield "MLP on SZT", szt(epochs=1), 1, WAYS


class Case:
    """What is trained, and for how long."""

    def __init__(self, data: Data, args: Namespace):
        self.args, self.data = args, data
        batches = len(Batches(data.dataset, "train", args.batch_size))
        self.num_steps = batches * args.epochs

    def module(self) -> Classifier:
        return program.new_classifier(flags_of_run(self.args), self.data)


def szt(epochs: int) -> Case:
    args = quiet_args("-m", "MLP", "-d", "SZT", "-e", str(epochs))
    return Case(program.load_data(args), args)


def images(model: str, shape: tuple[int, ...], num: int, batch_size: int) -> Case:
    """An epoch over made-up images, tested on few."""
    args = quiet_args("-m", model, "-d", "CIFAR10", "-e", "1", "-b", str(batch_size))
    return Case(Data(made_up(num, 64, shape), batch_size), args)


def quiet_args(*argv: str) -> Namespace:
    return get_args([*argv, "--accelerator", "cpu", "--quiet", "--no-plots", "--no-nc", "--no-dib"])


def row(name: str, case: Case, rounds: int, chosen: Sequence[str]) -> Row:
    """Some ways of training against the bare loop."""
    ways = dict(zip(WAYS, (bare_loop, bare_loop, with_trainer, with_run, with_data_loader), strict=True))
    same = [ways[way](case)[0].network.state_dict().values() for way in ("bare", "run")]  # and a warm-up
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True)), f"{name}: the bare loop trains something else"
    times = timed_by({way: lambda train=ways[way]: train(case)[1] for way in chosen}, rounds, warm_up=False)
    ratios = {way: times.ratio(way, "bare") if way in times else None for way in WAYS[1:]}
    saved = times.ratio("DataLoader", "run") if "DataLoader" in times else None
    return {
        "": name,
        "ms a bare step": 1e3 * times.median("bare") / case.num_steps,
        **ratios,
        "DataLoader / run": saved,
    }


def bare_loop(case: Case) -> tuple[Classifier, float]:
    """What one would write by hand."""
    module, args = case.module(), case.args
    network, hp = module.network, module.hparams
    train = Batches(case.data.dataset, "train", args.batch_size, shuffle=True, **case.data.random)
    test = Batches(case.data.dataset, "test", 4096)
    start = time.perf_counter()
    optimizer = module._optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step / case.num_steps, hp))
    for epoch in range(args.epochs):
        train.set_epoch(epoch)
        tally = []
        for x, y in train:
            logits = network(x)
            loss = F.cross_entropy(logits, y, label_smoothing=hp.label_smoothing)
            tally.append((len(y), loss.detach(), (logits.detach().argmax(1) == y).sum()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        means(tally)
        tested(network, test)
    return module, time.perf_counter() - start


@torch.no_grad()
def tested(network: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode."""
    tally = []
    with evaluating(network):
        for x, y in batches:
            logits = network(x)
            tally.append((len(y), F.cross_entropy(logits, y), (logits.argmax(1) == y).sum()))
    return means(tally)


def means(tally: list[tuple[int, torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    sizes, losses, correct = zip(*tally, strict=True)
    weights = torch.tensor(sizes, dtype=torch.float64, device=losses[0].device) / sum(sizes)
    return (torch.stack(losses) * weights).sum().item(), torch.stack(correct).sum().item() / sum(sizes)


def with_trainer(case: Case) -> tuple[Classifier, float]:
    """Lightning's Trainer and nothing kept."""
    return fitted(case, enable_checkpointing=False, callbacks=[Console(quiet=True)], datamodule=case.data)


def with_run(case: Case) -> tuple[Classifier, float]:
    """What `main.py` does, measures aside."""
    with tempfile.TemporaryDirectory() as log_dir, RunFolder.new(log_dir) as folder:
        return fitted(case, callbacks=[Console(quiet=True), RunRecord(folder)], datamodule=case.data)


def with_data_loader(case: Case) -> tuple[Classifier, float]:
    """The same run, its batches from torch's DataLoader."""
    halves = {}
    for split in ("train", "test"):
        batches = Batches(case.data.dataset, split, 1)
        samples = TensorDataset(batches[torch.arange(batches.num_samples)], batches.labels)
        halves[split] = DataLoader(samples, case.args.batch_size, shuffle=split == "train")
    loaders = {"train_dataloaders": halves["train"], "val_dataloaders": halves["test"]}
    with tempfile.TemporaryDirectory() as log_dir, RunFolder.new(log_dir) as folder:
        return fitted(case, callbacks=[Console(quiet=True), RunRecord(folder)], **loaders)


def fitted(case: Case, datamodule: Data | None = None, train_dataloaders: object = None, val_dataloaders: object = None,
           **options: object) -> tuple[Classifier, float]:  # fmt: skip
    """A module trained by the program's trainer, and the seconds of `fit`."""
    module, trainer = case.module(), program.new_trainer(case.args, **options)
    start = time.perf_counter()
    trainer.fit(module, train_dataloaders, val_dataloaders, datamodule=datamodule)
    return module, time.perf_counter() - start


if __name__ == "__main__":
    main()
