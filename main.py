"""One run, from the command line to the closing summary. Start reading here.

Torch and Lightning take seconds to import, so each step imports what it needs itself: `--help` and a wrong flag are
answered before that.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from run import ranks
from run.ending import memory_for, status_of
from run.turns import turn

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from lightning.pytorch import Trainer

    from classifier import Classifier
    from datasets import Data
    from run.console import Console
    from run.record import RunRecord
    from run.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says. Exit status: 0 done, 1 error, 2 wrong flag, 128 + the number of a signal."""
    return status_of(partial(story, sys.argv[1:] if argv is None else argv))


def story(argv: list[str]) -> int:
    """What the flags ask for; the exit status."""
    from flags import get_args

    args = get_args(argv)
    with memory_for(args.batch_size), turn(args.log_dir):
        if args.list_layers:
            list_layers(args)
        elif isinstance(args.seed, list) or args.sweep:
            from run.sweep import sweep

            return sweep(args, argv, get_args)
        elif args.measure:
            measure(args)
        else:
            train(args)
    return 0


def train(args: Namespace) -> None:
    """Train a network with the measures around it, and leave everything in the run's folder."""
    import utils
    from classifier import new_classifier
    from run.between_steps import between_steps
    from run.checkpoints import read_checkpoint
    from run.console import Console
    from run.loggers import Loggers, refuse_missing
    from run.lr_range_test import lr_range_test
    from run.memory import keep_freed_memory
    from run.presets import flags_of_run
    from run.record import RunRecord
    from run.run_folder import RunFolder
    from run.tables import banner
    from run.trainer import new_trainer

    refuse_missing(args.logger)
    keep_freed_memory()
    flags = flags_of_run(args)
    data = load_data(args)
    module = new_classifier(flags, data)
    layers = utils.layers_to_measure(args, module.network, data.dataset.shape)
    trainer = new_trainer(args)
    about = facts(trainer, module, data, layers)  # what the machine lacks is said while there is no folder
    data.refuse_few(trainer.world_size, in_step=1 if module.network.trains_on_one(data.dataset.shape) else 2)
    about |= utils.plans(args, data.dataset)  # and what the data lack

    us = ranks.assemble(trainer, vars(args))
    console = Console(quiet=args.quiet or not us.is_first)
    with RunFolder.of(args, us) as folder:
        write_hparams = partial(folder.write_hparams, flags, about)
        record = RunRecord(folder, save_every=args.save_every, going_on=write_hparams)
        callbacks = [*between_steps(module), *utils.measures(args, layers, folder, console), console, record]
        if folder.checkpoint:
            module.refuse_other(read_checkpoint(folder.checkpoint), folder.checkpoint)
            folder.refuse_other_length(args)
        console.say(banner(args, about, folder.path))
        if folder.epoch == args.epochs:
            console.say(f"the run is finished: it has done its {args.epochs} epochs")
            if folder.before.get("epochs") != args.epochs:
                write_hparams()
            conclude(args, record, layers, console)
            update_slots(args, data, folder.checkpoint, folder, console)
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
        record.loggers = Loggers(args.logger, folder, flags)
        trainer = new_trainer(args, callbacks=callbacks, num_sanity_val_steps=0 if folder.checkpoint else -1)
        trainer.fit(module, datamodule=data, ckpt_path=folder.checkpoint)
        conclude(args, record, layers, console)
        update_slots(args, data, folder.path / "checkpoints/last.ckpt", folder, console)


def measure(args: Namespace) -> None:
    """Measure saved networks and leave the results, a row for each, in a folder of their own."""
    import utils
    from classifier import SavedNetworks
    from run.checkpoints import checkpoints_in
    from run.console import Console
    from run.loggers import Loggers, refuse_missing
    from run.memory import keep_freed_memory
    from run.presets import flags_of_run
    from run.record import RunRecord
    from run.run_folder import RunFolder
    from run.tables import banner
    from run.trainer import new_trainer, use_threads

    refuse_missing(args.logger)
    keep_freed_memory()
    files = checkpoints_in(args.measure, one_for="--slot-update" if args.slot_update else None)
    data = load_data(args)
    networks = SavedNetworks(files, data.dataset.shape, data.dataset.num_classes, args.precision == "64-true")
    module = networks[0]
    use_threads(vars(args), module.network)
    layers = utils.layers_to_measure(args, module.network, data.dataset.shape)
    trainer = new_trainer(args)
    about = facts(trainer, module, data, layers) | utils.plans(args, data.dataset)
    about["measured"] = networks.paths if len(networks) > 1 else networks.paths[0]
    data.refuse_few(trainer.world_size)

    us = ranks.assemble(trainer, vars(args))
    console = Console(quiet=args.quiet or not us.is_first)
    with RunFolder.of(args, us) as folder, folder.places(networks.epochs) as places:
        console.say(banner(args, about, folder.path))
        folder.write_hparams(flags_of_run(args) | {"loss": module.hparams.loss}, about)
        record = RunRecord(folder, loggers=Loggers(args.logger, folder, flags_of_run(args)))
        measures_in = {place: utils.measures(args, layers, place, console) for place in places}
        for i, (place, epoch) in enumerate(zip(places, networks.epochs, strict=True)):
            module, measures = networks[i], measures_in[place]
            if len(networks) > 1:
                console.say(f"{i + 1} of {len(networks)}: {module.source}, epoch {epoch}")
            trainer = new_trainer(args, callbacks=[*measures, record])
            trainer.validate(module, datamodule=data, verbose=False)
            module.to(trainer.strategy.root_device)
            for measure in measures:
                measure.measure_now(trainer, module, epoch)
            record.write_row(trainer, module, epoch, checkpoint=module.source if len(networks) > 1 else None)
        if len(networks) > 1:
            together = [measure.average_now(trainer, networks.on(trainer), folder.arrays) for measure in measures]
            record.write_average(trainer, {name: value for values in together for name, value in values.items()})
        conclude(args, record, layers, console)
        update_slots(args, data, networks.paths[0], folder, console)


def update_slots(args: Namespace, data: Data, source: str | Path, folder: RunFolder, console: Console) -> None:
    """With `--slot-update`, give the network in a checkpoint slots for half of the test set."""
    if not args.slot_update:
        return
    from classifier import Classifier
    from run.checkpoints import read_checkpoint
    from run.slot_update import update_from
    from run.trainer import new_trainer

    content, dataset = read_checkpoint(source), data.dataset
    module = Classifier.from_checkpoint(
        content, str(source), dataset.shape, dataset.num_classes, args.precision == "64-true"
    )
    trainer = new_trainer(args)
    trainer.validate(module, datamodule=data, verbose=False)
    console.say(update_from(content, trainer, module, folder, args.target_acc))


def conclude(args: Namespace, record: RunRecord, layers: list[str], console: Console) -> None:
    """Say what came out and where it lies."""
    from run.catalogue import MEASURES
    from run.record import rise
    from run.sweep import note_results
    from run.tables import closing

    folder = record.folder
    if folder.is_ours:
        rows = [row for row in record.table.rows() if "epoch" in row]
        console.say(closing(rows[-1:] if args.measure else rows, layers))
        if args.plots and rise([int(row["epoch"]) for row in rows]):
            pictures = [name for about in MEASURES if about.is_asked(vars(args)) for name in about.pictures]
            for figure in ["summary", *pictures]:
                path = draw(folder, figure, console)
                if path:
                    record.loggers.figure(path, int(rows[-1]["epoch"]))
        record.loggers.close()
        print(f"results in {folder.path}")
        note_results(folder.path)


def draw(folder: RunFolder, figure: str, console: Console) -> Path | None:
    """Leave one of the figures of `plots.py` in a run's folder, if there is something to show; its file."""
    import plots

    drawn = getattr(plots, figure)(plots.load([folder.path])) if folder.is_ours else None
    if not (drawn and plots.shows_something(drawn)):
        return None
    path = plots.write(drawn, folder.path / f"{figure}.png")
    console.say(f"{figure.replace('_', ' ')} in {path}")
    return path


def list_layers(args: Namespace) -> None:
    """Print name, shape and dimension of the layers that are measured, or of every one that can be."""
    from classifier import Classifier
    from datasets import shape_and_classes
    from measures.layers import by_module, example_of, shapes_of_layers
    from networks import dimensions
    from run.presets import flags_of_run
    from run.tables import layer_table

    shape, num_classes = shape_and_classes(args.dataset, args.classes, args.image_size)
    network = Classifier.from_flags(flags_of_run(args), shape, num_classes).network.eval()
    shapes = dimensions(network, shape)
    if args.list_layers == "all":
        shapes = by_module(shapes_of_layers(network, example_of(network, shape)))
    try:
        print(layer_table(shapes), flush=True)
    except BrokenPipeError:  # who reads has seen enough, as with `| head -1`
        sys.stdout = sys.stderr  # and is offered the rest no more


def load_data(args: Namespace) -> Data:
    """The dataset as Lightning's Trainer wants it."""
    import datasets
    from run.console import Console

    dataset = datasets.load(
        args.dataset, args.data_dir, args.limit, args.classes, args.image_size,
        in_memory=None if args.in_memory is None else args.in_memory == "yes",
        num_processes=args.devices, progress=Console(quiet=args.quiet).progress,
    )  # fmt: skip
    return datasets.Data(
        dataset, args.batch_size, augment=args.augment, alternate_flip=args.alternate_flip, seed=args.seed
    )


def facts(trainer: Trainer, module: Classifier, data: Data, layers: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a reader of the results needs beside the flags; `layers` are those measured, with their shapes."""
    from run.console import device_name

    return {
        "device": device_name(trainer),
        "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        "num_classes": data.dataset.num_classes,
        "classes": data.dataset.counts,
        "train_samples": len(data.dataset.train.labels),
        "test_samples": len(data.dataset.test.labels),
        "layers": list(layers),
        "dimensions": {layer: math.prod(shape) for layer, shape in layers.items()},
    }


def from_shell() -> None:
    """The program, as it is called from a shell."""
    ranks.leave(main())


if __name__ == "__main__":
    from_shell()
