"""The command line: flags, presets and config files. Imports nothing heavy, so that `--help` answers at once.

A value is looked for on the command line, then in the config file (`-c`), then in the preset of the model and
the dataset, then among the defaults. What was found is what the run's `hparams.yaml` holds.
"""

import argparse
import sys
from pathlib import Path

from run import command, slurm
from run.catalogue import MEASURES
from run.grid import Sweep, points
from run.parser import Help, Parser
from run.presets import (
    DATASETS,
    DEFAULTS,
    FIRST_CONVS,
    HEADS,
    IMAGE_MODELS,
    LOGGERS,
    LOSSES,
    MODELS,
    NONLINEARITIES,
    NORMS,
    OPTIMIZERS,
    POOLED,
    POOLS,
    PRECISIONS,
    SCHEDULES,
    SLOT_NORMS,
    STRATEGIES,
    WHITE_BOXES,
    are_raw,
    flags_of_run,
    merged,
    preset,
)  # fmt: skip
from run.ranks import too_many_processes
from run.stored_flags import stored_flags
from run.values import (
    MAX_EPOCHS,
    MAX_IMAGE_SIZE,
    MAX_NODES,
    MAX_RATE,
    MAX_SCALE,
    MAX_THREADS,
    OneOrSeveral,
    batch_size,
    epoch,
    falling,
    number,
    perhaps,
    rate,
    text,
    transform,
)  # fmt: skip

MAX_NAME = 255  # bytes in a file's name
SLOT_PRECISIONS = ("32-true", "64-true", "bf16-mixed")
FIRST_CHANNELS = 120  # of the networks that choose among them
OF_MODELS = {  # flags that only these networks have
    "widths": ("-w/--widths", ("MLP",)),
    "nonlinearity": ("-nl/--nonlinearity", ("MLP",)),
    "batch_norm": ("--batch-norm", ("MLP",)),
    "stem": ("--stem", ("ResNet", "ConvNeXt")),
    "augmax": ("--augmax", WHITE_BOXES),
    "branches": ("--branches", WHITE_BOXES),
    "norm": ("--norm", WHITE_BOXES),
    "first_conv": ("--first-conv", WHITE_BOXES),
    "topk": ("--topk", ("Gumbel",)),
    "tau": ("--tau", ("Gumbel",)),
}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every flag with its value. A wrong flag ends the program with status 2 and one sentence."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _build_parser()
    if {"-h", "--help"} & set(argv):
        chosen, _ = _selection().parse_known_args(argv)
        parser.set_defaults(**DEFAULTS | preset(chosen.model, chosen.dataset, chosen.head, chosen.widths))
    given = vars(parser.parse_args(argv))
    if given.get("sweep"):
        given = _with_first_values(parser, given, argv)
    stored = stored_flags(parser, given)
    chosen = DEFAULTS | stored | given
    flags = merged(
        DEFAULTS, preset(chosen["model"], chosen["dataset"], chosen["head"], chosen["widths"]), stored, given
    )
    if "measure_every" in given and "measure_at" not in given:
        flags["measure_at"] = None  # the preset's epochs give way to the user's
    if "layers" in stored | given and "dib_layers" not in stored | given:
        flags["dib_layers"] = None  # and so do its layers
    if flags["head"] == "prototypes" and flags["dib_layers"] and "dib_layers" not in stored | given:
        flags["dib_layers"] = [layer for layer in flags["dib_layers"] if layer != POOLED.get(flags["model"])]
    if flags["head"] == "slots" and "dib" not in stored | given:
        flags["dib"] = False  # its decoders end in a head of their own, which would have no slots
    if flags["head"] == "slots" and "slots" not in stored | given:
        flags["slots"] = True
    if flags["loss"] != "cross-entropy" and "label_smoothing" not in stored | given:
        flags["label_smoothing"] = 0.0  # and its smoothing, which is one of the cross-entropy
    _refuse_bad_combinations(parser, given, flags)
    args = argparse.Namespace(**flags)
    begun = None if args.resume or args.measure or args.list_layers else slurm.run_to_go_on_with(flags_of_run(args))
    return get_args(["--resume", str(begun), *["--quiet"] * args.quiet]) if begun else args


def _with_first_values(parser: Parser, given: dict, argv: list[str]) -> dict:
    """The flags of a sweep's first run, by which flags are found that do not go together."""
    for axis in given["sweep"]:
        if axis.flag.replace("-", "_") in given:
            parser.error(f"argument --sweep: {axis.flag} is given as --{axis.flag}, too")
    if "resume" in given:
        parser.error("argument --sweep: not allowed with --resume: the same command as before goes on with a sweep")
    first = points(given["sweep"], 0)[0]
    return vars(parser.parse_args([*argv, *first.words])) | {"sweep": given["sweep"]}


def _selection() -> argparse.ArgumentParser:
    """Just the flags that choose the preset, for `--help`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--model", default=DEFAULTS["model"])
    parser.add_argument("-d", "--dataset", default=DEFAULTS["dataset"])
    parser.add_argument("-w", "--widths", nargs="*")
    parser.add_argument("--head", default=DEFAULTS["head"])
    return parser


def _build_parser() -> Parser:
    parser = Parser(
        prog=command.NAME,
        usage="%(prog)s [-m MODEL] [-d DATASET] [flag ...]",
        description="Train an image classifier and measure, after every epoch, how its layers organise the data.\n"
        "`-m ResNet -d CIFAR10 --help` shows the defaults for that model and dataset.",
        formatter_class=Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.is_of_run = True
    parser.register("type", None, text)  # for flags without a type of their own
    for add_group in (_add_run, _add_data, _add_network, _add_optimisation, _add_measures):
        add_group(parser)
    return parser


# fmt: off
def _add_run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("-c", "--config", metavar="FILE", help="take flags from a YAML file; a run's own hparams.yaml repeats that run")
    add("--resume", metavar="RUN", help="go on with the run in this folder; `last`: the newest one in --log-dir")
    add("--measure", nargs="+", metavar="CHECKPOINT",
        help="measure saved networks instead of training one; a run's folder: every checkpoint that it keeps")
    add("--list-layers", nargs="?", const="measured", choices=("measured", "all"), metavar="all",
        help="print the measured layers with shape and dimension, and stop; `all`: every layer that --layers can name")
    add("--log-dir", metavar="DIR", help="where the runs' folders lie")
    add("--name", help="name of the run's folder (else version_0, version_1, …)")
    add("--note", metavar="TEXT", help="what this run is for, in your words: kept with its flags, shown by runs.py")
    add("--tag", nargs="+", metavar="WORD", help="words to find it by, as in `runs.py --where tag=WORD`")
    add("--seed", type=number(int, 0, 2**32 - 1), nargs="+", action=OneOrSeveral, metavar="N",
        help="seed of everything random; several: one run for each, and their means")
    add("--sweep", nargs="*", action=Sweep, metavar="FLAG VALUE",
        help="a run for each of these values of a flag (of several: '512 256'; of a switch: yes no); once for each "
        "flag, with --seed for every combination; the same command goes on with a sweep that ended early")
    add("--accelerator", choices=("auto", "cpu", "gpu"), help="where to compute")
    add("--devices", type=number(int, 1), metavar="N", help="number of devices per machine")
    add("--num-nodes", type=number(int, 1, MAX_NODES), metavar="N", help="number of machines")
    add("--threads", type=number(int, 1, MAX_THREADS), metavar="N",
        help="threads of each process on the CPU (else 1 for networks below 10,000 parameters, for others all)")
    add("--strategy", choices=STRATEGIES, help="Lightning's strategy; for several devices auto is ddp")
    add("--sync-batch-norm", action=argparse.BooleanOptionalAction,
        help="batch norm by the samples of all devices, as one device would do it")
    add("--precision", choices=PRECISIONS, help="number format of training")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the network with torch.compile")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format that convolutions on GPUs like")
    add("--deterministic", action=argparse.BooleanOptionalAction, help="only operations that repeat bit for bit")
    add("--save-every", type=number(int, 1), metavar="K", help="keep a checkpoint of every K-th epoch as well")
    add("--keep-going", action=argparse.BooleanOptionalAction, help="go on when the loss is nan or infinite")
    add("--plots", action=argparse.BooleanOptionalAction, help="leave summary.png in the run's folder")
    add("--logger", nargs="+", choices=LOGGERS, help="pass on what metrics.csv gets, and the summary, to these as well")
    add("--quiet", action="store_true", help="for batch jobs: nothing but warnings, errors and where the results lie")


def _add_data(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("-d", "--dataset", metavar="NAME",
        help=f"{', '.join(DATASETS)}, or a folder with train/CLASS/* and test/CLASS/*")
    add("--data-dir", metavar="DIR", help="where datasets lie or are downloaded to")
    add("--classes", nargs="+", metavar="NAME",
        help="only these classes, by name or number, labelled anew in the dataset's order")
    add("--limit", type=number(int, 1), metavar="N",
        help="only the first N samples of each set (of --classes), for trying things")
    add("--image-size", type=number(int, 1, MAX_IMAGE_SIZE), metavar="N",
        help="images of a folder: shorter side scaled to N, the middle cut out; training: random crops, scaled to N")
    add("--in-memory", choices=("yes", "no"),
        help="images of a folder: in every process's memory, or mapped from one file (else by what is free)")
    add("--augment", action=argparse.BooleanOptionalAction, help="random shifts, and flips where the data allow it")
    add("--alternate-flip", action=argparse.BooleanOptionalAction, help="flip every sample in every other epoch")


def _add_network(parser: Parser) -> None:
    add = parser.add_argument_group("network").add_argument
    add("-m", "--model", choices=MODELS, help="architecture")
    add("-w", "--widths", type=number(int, 1), nargs="*", metavar="N",
        help="MLP: widths of the hidden layers; without any the head works on the raw input")
    add("-nl", "--nonlinearity", choices=NONLINEARITIES, help="MLP: non-linearity of the hidden layers")
    add("--batch-norm", action=argparse.BooleanOptionalAction, help="MLP: batch norm before the non-linearity")
    add("--stem", choices=("small", "imagenet"),
        help="ResNet, ConvNeXt: first layers that keep the resolution, or torchvision's (else small up to 64 × 64)")
    add("--head", choices=HEADS,
        help="what makes the logits; prototypes: means of parts of the last feature map, and for each class their soft "
        "maximum; slots: features memorised in training, each with the threshold at which it makes no mistake there")
    add("--slot-scale", type=number(float, 0, MAX_SCALE, open_low=True), metavar="X",
        help="slots: inverse temperature of the soft maximum over a class's slots, and factor of the logits")
    add("--slot-lr", type=rate(), metavar="RATE",
        help="slots: learning rate of their plain gradient descent, the same in every step")
    add("--slot-prune", type=number(int, 0), metavar="N",
        help="slots: after every epoch, drop those that add at most N training samples to a greedy cover")
    add("--slot-update", action=argparse.BooleanOptionalAction,
        help="slots: afterwards, label what none matches of half of the test set, and add slots for it")
    add("--target-acc", type=number(float, 0, 1), metavar="ACC",
        help="--slot-update: also find the fewest slots and labels for this accuracy")
    add("--slot-pool", choices=POOLS, help="slots: a class's score is the soft maximum or the maximum of its slots")
    add("--slot-norm", choices=SLOT_NORMS,
        help="slots: features as they are, or behind a batch norm without learnt parameters (not on the raw input)")
    names = ", ".join(WHITE_BOXES)
    add("--augmax", type=transform, nargs="+", metavar="TRANSFORM",
        help=f"{names}: units are the largest over copies of the image: flip, rot15 (by ±15 degrees); with --head "
        "slots, also on the raw input, similarities with slots are")
    add("--branches", type=number(int, 1, 64), metavar="N", help=f"{names}: the layers N times, side by side")
    add("--norm", choices=NORMS, help=f"{names}: normalisation of the first layer")
    add("--first-conv", choices=FIRST_CONVS, help=f"{names}: first convolution, whose kernel may have several views")
    add("--topk", type=number(int, 1, FIRST_CHANNELS), metavar="K", help="Gumbel: channels that a unit chooses")
    add("--tau", type=falling, metavar="FIRST:LAST", help="Gumbel: temperature of the choice, falls over training")


def _add_optimisation(parser: Parser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    fraction = number(float, 0, 1)
    add("-e", "--epochs", type=number(int, 1, MAX_EPOCHS), metavar="N", help="passes over the training set")
    add("-b", "--batch-size", type=batch_size(), metavar="N",
        help="samples a step, over all devices together; `all`: the whole training set")
    add("-lr", "--learning-rate", type=rate(), metavar="RATE", help="highest learning rate")
    add("--loss", choices=LOSSES,
        help="what training lowers; mse: half the squared distance of logits and one-hot label, mean over samples")
    add("--optimizer", choices=OPTIMIZERS, help="sgd is with Nesterov momentum")
    add("--momentum", type=number(float, 0, 1), metavar="M", help="momentum of sgd; 0: plain gradient descent")
    add("--betas", type=fraction, nargs=2, metavar="B", help="decay rates of adam and adamw")
    add("--weight-decay", type=number(float, 0, MAX_RATE), metavar="WD", help="weight decay")
    add("--label-smoothing", type=fraction, metavar="S", help="label smoothing of the cross-entropy")
    add("--schedule", choices=SCHEDULES, help="how the rate falls after the warm-up")
    add("--warmup", type=fraction, metavar="F", help="share of the steps in which the rate rises")
    add("--start-factor", type=fraction, metavar="F", help="rate at the start of the warm-up, relative to the highest")
    add("--end-factor", type=fraction, metavar="F", help="rate at the end, relative to the highest")
    add("--bias-lr-scale", type=number(float, 1 / MAX_SCALE, MAX_SCALE), metavar="X",
        help="rate of batch norms' biases, relative")
    add("--whiten-epochs", type=number(int, 0), metavar="N", help="CIFARNet: epochs that train the whitening's bias")
    add("--lookahead", action=argparse.BooleanOptionalAction, help="average the weights over every five steps")
    add("--tta", action=argparse.BooleanOptionalAction, help="test on mirrored and shifted copies, averaged")
    add("--lr-range-test", nargs="?", const="train", choices=("train", "only"), metavar="only",
        help="find the learning rate before training; `only`: and stop there")


def _add_measures(parser: Parser) -> None:
    group = parser.add_argument_group("measures")
    add = group.add_argument
    for about in MEASURES:
        add(f"--{about.flag}", **about.takes or {"action": argparse.BooleanOptionalAction}, help=about.help)
    add("--measure-every", type=number(int, 1), metavar="K", help="measure before training and after every K-th epoch")
    add("--measure-at", type=epoch, nargs="+", metavar="EPOCH",
        help="measure after these epochs; log:N: N at even log steps")
    add("--layers", nargs="+", metavar="PATTERN", help="layers to measure, shell patterns over their names (else all)")
    add("--measure-sets", nargs="+", choices=("train", "test"), help="sets to measure")
    add("--cache-gb", type=number(float, 0), metavar="GB",
        help="memory for activations (else a quarter of what is free); what does not fit is computed twice")
    for about in MEASURES:
        rivals = group.add_mutually_exclusive_group()
        for flag in about.flags:
            to = rivals if flag.name in about.instead else group
            options = {"action": argparse.BooleanOptionalAction} if isinstance(flag.default, bool) else flag.options
            to.add_argument(f"--{flag.name.replace('_', '-')}", help=flag.help, **options)


# fmt: on


def _refuse_small_batches(parser: Parser, flags: dict) -> None:
    """Each device needs a sample of every batch, and two where an MLP has batch norm."""
    num_devices = flags["devices"] * flags["num_nodes"]
    has_norm = flags["batch_norm"] and flags["model"] == "MLP"
    needed = num_devices * (2 if has_norm else 1)
    if flags["batch_size"] != "all" and flags["batch_size"] < needed:
        parser.error(
            f"argument -b/--batch-size: {flags['batch_size']} is too few for {num_devices} device(s) (--devices × "
            f"--num-nodes){' with --batch-norm' if has_norm else ''}: at least {needed} are needed"
        )


def _refuse_flags_of_what_is_not_asked(parser: Parser, given: dict, flags: dict) -> None:
    for about in MEASURES:
        for flag in about.flags:
            is_of_it_alone = about.takes or isinstance(flag.default, bool)  # else a preset may have it unasked
            owners = [about, *(other for other in MEASURES if flag.name in other.shares)]
            if given.get(flag.name) and is_of_it_alone and not any(owner.is_asked(flags) for owner in owners):
                *others, last = (f"--{owner.flag}" for owner in owners)
                names = f"{', '.join(others)} and {last}, none of which is" if others else f"{last}, which is not"
                parser.error(f"argument --{flag.name.replace('_', '-')}: belongs to {names} asked for")


def _names_a_folder(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and len(name.encode()) <= MAX_NAME


def _refuse_what_slots_lack(parser: Parser, given: dict, flags: dict) -> None:
    """A layer that grows is trained on one device, in numbers that tell similarities apart, and is never compiled."""
    error = parser.error
    if given.get("ood") and not flags["slots"]:
        error("argument --ood: belongs to --slots, which is not asked for")
    if flags["head"] != "slots":
        if flags["slots"] and not flags["measure"]:
            error(f"argument --slots: is for --head slots, and the head is {flags['head']}")
        if "slot" in (flags["look_by"] or ()) and not flags["measure"]:
            error(f"argument --look-by: slots are what --head slots has, and the head is {flags['head']}")
        for name in ("slot_scale", "slot_lr", "slot_prune", "slot_pool", "slot_norm", "slot_update", "target_acc"):
            if name in given and not (flags["measure"] and name in ("slot_update", "target_acc")):
                error(f"argument --{name.replace('_', '-')}: is for --head slots, and the head is {flags['head']}")
        return
    is_raw = are_raw(flags["model"], flags["head"], flags["widths"])
    if flags["slot_norm"] != "none" and is_raw:
        error(
            "argument --slot-norm: is for slots behind a network; the raw input (-m MLP -w) is normalised by its mean"
        )
    if flags["augmax"] and flags["dataset"] == "SZT":
        error("argument --augmax: needs images to mirror and to turn, and SZT has patterns of 12 bits")
    if flags["augmax"] and flags["model"] not in WHITE_BOXES and not is_raw:
        error("argument --augmax: with --head slots it is for images in white-box networks, or as they are (-m MLP -w)")
    if flags["target_acc"] is not None and not flags["slot_update"]:
        error("argument --target-acc: belongs to --slot-update, which is not asked for")
    if flags["dib"]:
        error("argument --dib: a fresh decoder would have no slots: not allowed with --head slots")
    if flags["devices"] * flags["num_nodes"] > 1:
        error("argument --devices: --head slots grows, and is measured, on one device alone")
    if flags["measure"]:
        return
    if flags["precision"] not in SLOT_PRECISIONS:
        error(f"argument --precision: for --head slots it is one of {', '.join(SLOT_PRECISIONS)}: thresholds need them")
    if flags["compile"]:
        error("argument --compile: not allowed with --head slots, whose size changes in every step")
    if flags["loss"] != "cross-entropy":
        error("argument --loss: only cross-entropy is allowed with --head slots, whose logits are no targets")
    if flags["epochs"] < 2:
        error("argument -e/--epochs: --head slots needs at least 2: in the last one nothing grows")
    if flags["lr_range_test"] and is_raw:
        error(
            "argument --lr-range-test: without -w/--widths --head slots has no layer of this rate: slots have --slot-lr"
        )


def _refuse_bad_combinations(parser: Parser, given: dict, flags: dict) -> None:
    error = parser.error
    dataset, model = flags["dataset"], flags["model"]
    if dataset not in DATASETS and not Path(dataset).is_dir():
        close = perhaps(dataset, DATASETS, "; ")
        error(f"argument -d/--dataset: {dataset!r} is neither one of {', '.join(DATASETS)} nor a folder{close}")
    for name, needless in (("image_size", False), ("in_memory", given.get("in_memory") == "yes")):
        if name in given and dataset in DATASETS and not needless:
            error(f"argument --{name.replace('_', '-')}: is for folders of images; {dataset} is loaded as it is")
    if dataset == "SZT" and model in IMAGE_MODELS and not flags["measure"]:
        error(f"argument -m/--model: {model} needs images, and SZT has patterns of 12 bits: use -m MLP")
    for name, (flag, models) in OF_MODELS.items():
        if name in given and model not in models and not (name == "augmax" and flags["head"] == "slots"):
            error(f"argument {flag}: is for {' and '.join(f'-m {other}' for other in models)}; {model} has none")
    _refuse_what_slots_lack(parser, given, flags)
    if flags["augmax"] and len(set(flags["augmax"])) < len(flags["augmax"]):
        error("argument --augmax: a transform comes twice")
    if "learning_rate" in given and "lr_range_test" in given:
        error("argument --lr-range-test: not allowed with -lr/--learning-rate: the test chooses the rate")
    _refuse_flags_of_what_is_not_asked(parser, given, flags)
    if "measure_every" in given and "measure_at" in given:
        error("argument --measure-at: not allowed with --measure-every")
    if flags["sync_batch_norm"] and flags["compile"] and flags["devices"] * flags["num_nodes"] > 1:
        error("argument --sync-batch-norm: not allowed with --compile: what is compiled cannot wait for other devices")
    if flags["sync_batch_norm"] and flags["norm"] != "batch" and flags["devices"] * flags["num_nodes"] > 1:
        error(f"argument --sync-batch-norm: not allowed with --norm {flags['norm']}, which is of each device's samples")
    crowd = too_many_processes(flags["devices"]) if flags["accelerator"] == "cpu" else None
    if crowd:
        error(crowd)
    if not flags["measure"]:
        _refuse_small_batches(parser, flags)
    if max(flags["betas"]) >= 1:
        error("argument --betas: both must be below 1")
    if flags["momentum"] >= 1:
        error("argument --momentum: must be below 1")
    if flags["label_smoothing"] >= 1:
        error("argument --label-smoothing: must be below 1")
    if flags["label_smoothing"] > 0 and flags["loss"] != "cross-entropy":
        error(
            f"argument --label-smoothing: is for --loss cross-entropy; with --loss {flags['loss']} only 0 is allowed, "
            f"not {flags['label_smoothing']:g}"
        )
    late = [item for item in flags["measure_at"] or [] if item.isdigit() and int(item) > flags["epochs"]]
    if late:
        error(f"argument --measure-at: epoch {late[0]} is behind the last one, {flags['epochs']}")
    if flags["name"] is not None and not _names_a_folder(flags["name"]):
        error(f"argument --name: {flags['name']!r} is not the name of a folder")
    if flags["resume"] and flags["measure"]:
        error("argument --measure: not allowed with --resume")
