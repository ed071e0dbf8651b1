"""Training with all that a normal run has around it, measures aside, against a bare PyTorch loop.

    OMP_NUM_THREADS=1 python benchmarks/training_loop.py

Claims: MLP on SZT takes at most 3 times the bare loop, whose steps are half a millisecond long, and is at least 1.7
times faster than the same module fed by a standard DataLoader; ResNet on 32 × 32 with batches of 512 takes at most
1.05 times the bare loop. The bare loop has the same batches, schedule, optimizer, mean loss and accuracy, and test
pass; its weights are the same at the end, bit for bit. `trainer` is Lightning's as `main.py` makes it; `run` adds the
run's folder, with a row of metrics.csv and a checkpoint per epoch. "again" is the bare loop a second time: what
differs from 1 there is noise. The DataLoader has no workers, which for such small samples cost more than they save;
its samples are normalised beforehand, or, "of bytes", lie in memory as ours do.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import torch
from common import Row, arguments, made_up, report, synchronise, timed_by
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import datasets
from classifier import LOOKAHEAD_STEPS, Classifier, logits_over_views, new_classifier
from datasets import Batches, Data
from flags import get_args
from main import load_data
from networks import evaluating
from run.console import Console
from run.presets import flags_of_run
from run.record import RunRecord
from run.run_folder import RunFolder
from run.trainer import new_trainer


def main() -> None:
    args = arguments(__doc__)
    rows = [row(*case) for case in (quick_cases() if args.quick else cases())]
    report("training_loop", {"Training loop, times the bare loop": rows}, args)


def cases() -> Iterator[tuple[str, "Case", int, Iterable[str]]]:
    """What is trained, in how many rounds, in which ways."""
    yield "MLP on SZT", szt(epochs=40), 7, WAYS
    mnistnet = images("MNISTNet", (1, 28, 28), num=5120, batch_size=256)
    yield "MNISTNet, 28 × 28, batch 256", mnistnet, 3, ("bare", "again", "trainer", "run")
    resnet = images("ResNet", (3, 32, 32), num=512, batch_size=512)
    yield "ResNet, 32 × 32, batch 512", resnet, 1, ("bare", "again", "run")


def quick_cases() -> Iterator[tuple[str, "Case", int, Iterable[str]]]:
    yield "MLP on SZT", szt(epochs=1), 1, WAYS


class Case:
    """What is trained, and for how long. Seconds count from the end of the first `unclocked` epochs."""

    def __init__(self, data: Data, args: Namespace, unclocked: int = 0):
        self.args, self.data, self.unclocked = args, data, unclocked
        self.num_steps = args.epochs * len(Batches(data.dataset, "train", args.batch_size))
        self.device = "cuda" if args.accelerator == "gpu" else "cpu"

    def module(self) -> Classifier:
        return new_classifier(flags_of_run(self.args), self.data)

    def batches(self, split: str, batch_size: int, **options: object) -> Batches:
        return Batches(self.data.dataset, split, batch_size, device=self.device, **options)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.args.precision == "bf16-mixed")


class Clock(Callback):
    """Seconds from the end of the first epochs that do not count."""

    def __init__(self, case: Case):
        self.case = case

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.case.unclocked:
            self.start()

    def start(self) -> None:
        synchronise(self.case.device)
        self.started = time.perf_counter()

    def seconds(self) -> float:
        synchronise(self.case.device)
        return time.perf_counter() - self.started


def szt(epochs: int) -> Case:
    args = quiet_args("-m", "MLP", "-d", "SZT", "-e", str(epochs))
    return Case(load_data(args), args)


def images(model: str, shape: tuple[int, ...], num: int, batch_size: int) -> Case:
    """An epoch over made-up images, tested on few."""
    args = quiet_args("-m", model, "-d", "CIFAR10", "-e", "1", "-b", str(batch_size))
    return Case(Data(made_up(num, 64, shape), batch_size), args)


def quiet_args(*argv: str) -> Namespace:
    return get_args([*argv, "--accelerator", "cpu", "--quiet", "--no-plots", "--no-nc", "--no-dib"])


def row(name: str, case: Case, rounds: int, chosen: Iterable[str]) -> Row:
    """Some ways of training against the bare loop."""
    trained = {}

    def clock(way: str) -> float:
        trained[way], seconds = WAYS[way](case)
        return seconds

    times = timed_by({way: partial(clock, way) for way in chosen}, rounds, warm_up=rounds > 2)
    same = [trained[way].network.state_dict().values() for way in ("bare", "run")]
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True)), f"{name}: the bare loop trains something else"
    ratios = {way: times.ratio(way, "bare") if way in times else None for way in WAYS if way != "bare"}
    saved = {f"{way} / run": times.ratio(way, "run") if way in times else None for way in WAYS if "DataLoader" in way}
    return {"": name, "ms a bare step": 1e3 * times.median("bare") / case.num_steps, **ratios, **saved}


def bare_loop(case: Case) -> tuple[Classifier, float]:
    """What one would write by hand, with the module's own recipe."""
    module, args, clock = case.module().to(case.device), case.args, Clock(case)
    network, hp = module.network, module.hparams
    train = case.batches("train", args.batch_size, shuffle=True, **case.data.random)
    test = case.batches("test", 4096)
    progress = SimpleNamespace(estimated_stepping_batches=case.num_steps, max_epochs=args.epochs, global_step=0)
    module.trainer = progress  # all that the recipe asks a Trainer for
    recipe = module.configure_optimizers()
    optimizer, schedule = recipe["optimizer"], recipe["lr_scheduler"]["scheduler"]
    for epoch in range(args.epochs):
        if epoch == case.unclocked:
            clock.start()
        train.set_epoch(epoch)
        tally = []
        for x, y in train:
            with case.precision():
                logits = network(x)
                loss = F.cross_entropy(logits, y, label_smoothing=hp.label_smoothing)
            tally.append((len(y), loss.detach(), (logits.detach().argmax(1) == y).sum()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.global_step += 1
            if hp.lookahead and (progress.global_step % LOOKAHEAD_STEPS == 0 or module._is_last_step()):
                module._look_ahead()
        means(tally)
        tested(module, test, case)
    return module, clock.seconds()


@torch.no_grad()
def tested(module: Classifier, batches: Batches, case: Case) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode."""
    network, tally = module.network, []
    with evaluating(network), case.precision():
        for x, y in batches:
            logits = logits_over_views(network, x) if module.hparams.tta else network(x)
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
    """The same run, its batches from torch's DataLoader over samples that are normalised beforehand."""

    def samples(split: str) -> Dataset:
        batches = case.batches(split, 1)
        return TensorDataset(batches[torch.arange(batches.num_samples)], batches.labels)

    return with_samples(case, samples)


def with_data_loader_of_bytes(case: Case) -> tuple[Classifier, float]:
    """The same over samples that lie in memory as ours do, and are normalised when they are asked for."""
    return with_samples(case, lambda split: Normalised(case.data.dataset, split))


class Normalised(Dataset):
    """Samples one by one, normalised."""

    def __init__(self, dataset: datasets.Dataset, split: str):
        half, per_channel = getattr(dataset, split), (-1, *[1] * (len(dataset.shape) - 1))
        self.inputs, self.labels = half.inputs, half.labels
        self.offset, self.scale = dataset.offset.view(per_channel), dataset.scale.view(per_channel)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index].float().sub_(self.offset).mul_(self.scale), self.labels[index]


def with_samples(case: Case, samples: Callable[[str], Dataset]) -> tuple[Classifier, float]:
    train = DataLoader(samples("train"), case.args.batch_size, shuffle=True)
    loaders = {"train_dataloaders": train, "val_dataloaders": DataLoader(samples("test"), case.args.batch_size)}
    with tempfile.TemporaryDirectory() as log_dir, RunFolder.new(log_dir) as folder:
        return fitted(case, callbacks=[Console(quiet=True), RunRecord(folder)], **loaders)


def fitted(case: Case, datamodule: Data | None = None, train_dataloaders: object = None, val_dataloaders: object = None,
           callbacks: Sequence[Callback] = (), **options: object) -> tuple[Classifier, float]:  # fmt: skip
    """A module trained by the program's trainer, and its seconds."""
    clock = Clock(case)
    trainer = new_trainer(case.args, callbacks=[clock, *callbacks], **options)
    module = case.module()
    trainer.fit(module, train_dataloaders, val_dataloaders, datamodule=datamodule)
    return module, clock.seconds()


WAYS = {
    "bare": bare_loop,
    "again": bare_loop,
    "trainer": with_trainer,
    "run": with_run,
    "DataLoader": with_data_loader,
    "DataLoader of bytes": with_data_loader_of_bytes,
}

if __name__ == "__main__":
    main()
