"""One run, from the command line to the closing summary. Start reading here.

Torch and Lightning take seconds to import, so each step imports what it needs itself: `--help` and a wrong flag are
answered before that.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ranks
import slurm
from errors import (
    Interrupted,
    UserError,
    WrongFlag,
    is_out_of_memory,
    is_too_large,
    write_what_the_terminal_can,
)

if TYPE_CHECKING:
    from argparse import Namespace

    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from console import Console
    from datasets import Data
    from networks import Classifier
    from run_folder import RunFolder, RunRecord

SMALL = 10_000  # parameters: below, a second thread takes longer to wake than it saves


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says. Exit status: 0 done, 1 error, 2 wrong flag, 128 + the number of a signal."""
    Interrupted.on(signal.SIGINT, signal.SIGTERM, *slurm.time_out_signals())
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    write_what_the_terminal_can()
    ranks.end_with_starter()
    try:
        return attempt(sys.argv[1:] if argv is None else argv)
    except Interrupted as signal_:
        Interrupted.over()
        if ranks.name_by_environment():
            time.sleep(ranks.COURTESY)  # the first rank says it, and asks SLURM for another turn
            return signal_.status
        ended(signal_, signal_.status)
        return ended(slurm.requeue(), signal_.status) if signal_.number == signal.SIGUSR1 else signal_.status


def attempt(argv: list[str]) -> int:
    """Do it, or say in a sentence why not."""
    try:
        from flags import get_args

        args = get_args(argv)
        if args.list_layers:
            list_layers(args)
        elif isinstance(args.seed, list):
            from sweep import sweep

            return sweep(args, argv)
        elif args.measure:
            measure(args)
        else:
            train(args)
        sys.stdout.flush()
    except UserError as error:
        return ended(error, error.status)
    except OSError as error:  # what the system refuses elsewhere than in the run's folder
        if error.filename is None:
            sys.stdout = sys.stderr  # the full disk or closed pipe is asked no more
        return ended(f"{error.filename or 'standard output'}: {error.strerror}", 1)
    except (RuntimeError, MemoryError) as error:
        if ranks.is_lost_rank(error):
            return ended(ranks.LOST, 1)
        if is_too_large(error):
            return ended(
                "a step became too large for --precision: lower -lr/--learning-rate, --bias-lr-scale, --weight-decay "
                "or --dib-lr",
                1,
            )
        if not is_out_of_memory(error):
            raise
        return ended(
            f"out of memory: try a smaller -b/--batch-size than {args.batch_size}, a smaller network, "
            "or --precision bf16-mixed",
            1,
        )
    return 0


def ended(why: object, status: int) -> int:
    """Say why the program ends early; the exit status.

    Ranks behind the first speak later: where all end for the same reason, their launcher has mostly ended them by then.
    """
    rank = ranks.name_by_environment()
    if rank:
        time.sleep(ranks.COURTESY)
    print(f"main.py: {rank}{why}", file=sys.stderr)
    return status


def train(args: Namespace) -> None:
    """Train a network with the measures around it, and leave everything in the run's folder."""
    from functools import partial

    import utils
    from console import Console
    from flags import flags_of_run
    from lr_range_test import lr_range_test
    from run_folder import RunFolder, RunRecord, read_checkpoint
    from tables import banner

    flags = flags_of_run(args)
    data = load_data(args)
    module = new_classifier(flags, data)
    layers = utils.layers_to_measure(args, module.network.layers)
    trainer = new_trainer(args)
    about = facts(trainer, module, data, layers)  # what the machine lacks is said while there is no folder
    data.refuse_few(trainer.world_size, in_step=1 if module.network.trains_on_one(data.dataset.shape) else 2)
    about |= utils.dib_plan(args, data.dataset)  # and what the data lack

    us = ranks.assemble(trainer, vars(args))
    console = Console(quiet=args.quiet or not us.is_first)
    with RunFolder.of(args, us) as folder:
        write_hparams = partial(folder.write_hparams, flags, about)
        record = RunRecord(folder, save_every=args.save_every, going_on=write_hparams)
        callbacks = [*utils.measures(args, layers, folder, console), console, record]
        if folder.checkpoint:
            module.refuse_other(read_checkpoint(folder.checkpoint), folder.checkpoint)
            folder.refuse_other_length(args)
        console.say(banner(args, about, folder.path))
        if folder.epoch == args.epochs:
            console.say(f"the run is finished: it has done its {args.epochs} epochs")
            if folder.before.get("epochs") != args.epochs:
                write_hparams()
            conclude(args, record, layers, console)
            return
        if not folder.checkpoint:
            write_hparams()
        if args.lr_range_test and not folder.checkpoint:
            flags["learning_rate"] = lr_range_test(module, data, folder.path, partial(new_trainer, args))
            module = new_classifier(flags, data)  # the test has spent the other one
            write_hparams()
            console.say(f"the range test chose the learning rate {flags['learning_rate']:g}")
            draw(folder, "lr_range_test", console)
        if args.lr_range_test == "only":
            return
        trainer = new_trainer(args, callbacks=callbacks, num_sanity_val_steps=0 if folder.checkpoint else -1)
        trainer.fit(module, datamodule=data, ckpt_path=folder.checkpoint)
        conclude(args, record, layers, console)


def measure(args: Namespace) -> None:
    """Measure a saved network and leave the results in a folder of their own."""
    import utils
    from console import Console
    from flags import flags_of_run
    from networks import Classifier
    from run_folder import RunFolder, RunRecord, read_checkpoint
    from tables import banner

    content = read_checkpoint(args.measure)
    data = load_data(args)
    double = args.precision == "64-true"
    module = Classifier.from_checkpoint(content, args.measure, data.dataset.shape, data.dataset.num_classes, double)
    use_threads(vars(args), module)
    layers = utils.layers_to_measure(args, module.network.layers)
    trainer = new_trainer(args)
    about = facts(trainer, module, data, layers) | utils.dib_plan(args, data.dataset) | {"measured": args.measure}
    data.refuse_few(trainer.world_size)

    us = ranks.assemble(trainer, vars(args))
    console = Console(quiet=args.quiet or not us.is_first)
    with RunFolder.of(args, us) as folder:
        console.say(banner(args, about, folder.path))
        folder.write_hparams(flags_of_run(args), about)
        measures, record = utils.measures(args, layers, folder, console), RunRecord(folder)
        trainer = new_trainer(args, callbacks=[*measures, record])
        trainer.validate(module, datamodule=data, verbose=False)
        module.to(trainer.strategy.root_device)
        for measure in measures:
            measure.measure_now(trainer, module, epoch=content["epoch"] + 1)
        record.write_row(trainer, module, epoch=content["epoch"] + 1)
        conclude(args, record, layers, console)


def conclude(args: Namespace, record: RunRecord, layers: list[str], console: Console) -> None:
    """Say what came out and where it lies."""
    from sweep import note_results
    from tables import closing

    folder = record.folder
    if folder.is_ours:
        console.say(closing(record.table.rows(), layers))
        if args.plots:
            draw(folder, "summary", console)
        print(f"results in {folder.path}")
        note_results(folder.path)


def draw(folder: RunFolder, figure: str, console: Console) -> None:
    """Leave one of the figures of `plots.py` in a run's folder."""
    import plots

    if folder.is_ours:
        path = plots.write(getattr(plots, figure)(plots.load([folder.path])), folder.path / f"{figure}.png")
        console.say(f"{figure.replace('_', ' ')} in {path}")


def list_layers(args: Namespace) -> None:
    """Print name, shape and dimension of every layer that can be measured."""
    from datasets import shape_and_classes
    from flags import flags_of_run
    from networks import Classifier, dimensions
    from tables import layer_table

    shape, num_classes = shape_and_classes(args.dataset)
    module = Classifier.from_flags(flags_of_run(args), shape, num_classes)
    try:
        print(layer_table(dimensions(module.network, shape)), flush=True)
    except BrokenPipeError:  # who reads has seen enough, as with `| head -1`
        sys.stdout = sys.stderr  # and is offered the rest no more


def load_data(args: Namespace) -> Data:
    """The dataset as Lightning's Trainer wants it."""
    import datasets

    dataset = datasets.load(args.dataset, args.data_dir, args.limit)
    return datasets.Data(
        dataset, args.batch_size, augment=args.augment, alternate_flip=args.alternate_flip, seed=args.seed
    )


def new_classifier(flags: dict[str, Any], data: Data) -> Classifier:
    """An untrained network. Flags and data alone decide its weights."""
    import torch

    from networks import Classifier

    module = Classifier.from_flags(flags, data.dataset.shape, data.dataset.num_classes)
    use_threads(flags, module)
    if flags["model"] == "CIFARNet":
        module.network.whiten(data.first_images())
    if flags["precision"] == "64-true":
        module.double()  # Lightning would do it after it has read a checkpoint's weights into the module
    if flags["channels_last"]:
        module.network.to(memory_format=torch.channels_last)
    if flags["compile"]:
        module.network.compile()  # in place: names stay, and what measures call stays plain
    return module


def use_threads(flags: Mapping[str, Any], module: Classifier) -> None:
    """Have torch compute with `--threads`. Without: a small network with one, others with all, shared by processes.

    To be called before anything is computed, as the last digits of sums depend on it.
    """
    import torch

    num = flags["threads"]
    if num is None and sum(parameter.numel() for parameter in module.network.parameters()) < SMALL:
        num = 1
    elif num is None:
        shares = 1 if "OMP_NUM_THREADS" in os.environ else flags["devices"]
        num = max(1, torch.get_num_threads() // shares)
    torch.set_num_threads(num)
    os.environ.setdefault("OMP_NUM_THREADS", str(num))  # else Lightning chooses for several processes


def new_trainer(args: Namespace, **options: Any) -> Trainer:
    """Lightning's Trainer, without the logs, bars, checkpoints and samplers for which we bring our own."""
    import torch
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    from console import OwnSignals, silence_libraries
    from flags import too_many_processes
    from run_folder import WholeCheckpoints

    silence_libraries()
    if not torch.cuda.is_available():
        # Lightning has torch look for the driver anew whenever it is asked for a GPU; Adam asks at every step.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    options = {
        "accelerator": args.accelerator,
        "devices": args.devices,
        "num_nodes": args.num_nodes,
        "strategy": new_strategy(args),
        "precision": args.precision,
        "deterministic": args.deterministic,
        "max_epochs": args.epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "plugins": [WholeCheckpoints()],
        **options,
        "callbacks": [OwnSignals(), *options.get("callbacks", ())],
    }
    crowd = too_many_processes(args.devices) if args.accelerator == "auto" and not torch.cuda.is_available() else None
    if crowd:
        raise WrongFlag(crowd)
    try:
        if SLURMEnvironment.detect():  # else four tasks with --devices 1 would be four runs
            SLURMEnvironment().validate_settings(args.devices, args.num_nodes)
        return Trainer(**options)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        flags = "--accelerator, --devices, --num-nodes, --strategy, --precision"
        raise UserError(f"one of {flags} does not fit this machine: {' '.join(str(error).split())}") from None


def new_strategy(args: Namespace) -> Strategy | str:
    """How several processes train together; a single one needs nothing of it."""
    from ddp import SteadyDDP

    if args.strategy == "auto" and args.devices * args.num_nodes == 1:
        return "auto"
    return SteadyDDP(timeout=ranks.PATIENCE, find_unused_parameters=args.strategy == "ddp_find_unused_parameters_true")


def facts(trainer: Trainer, module: Classifier, data: Data, layers: list[str]) -> dict[str, Any]:
    """What a reader of the results needs beside the flags."""
    from console import device_name
    from networks import dimensions

    shapes = dimensions(module.network, data.dataset.shape)
    return {
        "device": device_name(trainer),
        "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        "num_classes": data.dataset.num_classes,
        "train_samples": len(data.dataset.train.labels),
        "test_samples": len(data.dataset.test.labels),
        "layers": layers,
        "dimensions": {layer: math.prod(shapes[layer]) for layer in layers},
    }


if __name__ == "__main__":
    ranks.leave(main())
