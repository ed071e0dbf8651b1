"""The command line: flags, presets and config files. Imports nothing heavy, so that `--help` answers at once.

A value is looked for on the command line, then in the config file (`-c`), then in the preset of the model and
the dataset, then among the defaults. What was found is what the run's `hparams.yaml` holds.
"""

import argparse
import difflib
import os
import reprlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ranks
import slurm

MODELS = ("MLP", "MNISTNet", "CIFARNet", "ConvNeXt", "ResNet")
IMAGE_MODELS = ("MNISTNet", "CIFARNet", "ConvNeXt", "ResNet")  # others get what the data are
DATASETS = ("SZT", "MNIST", "FashionMNIST", "CIFAR10")
NONLINEARITIES = ("tanh", "relu", "gelu", "silu", "sigmoid", "leaky_relu", "elu", "identity")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")

DEFAULTS = {
    # run
    "config": None,
    "resume": None,
    "measure": None,
    "list_layers": False,
    "log_dir": "lightning_logs",
    "name": None,
    "seed": 0,
    "accelerator": "auto",
    "devices": 1,
    "num_nodes": 1,
    "threads": None,
    "strategy": "auto",
    "precision": "32-true",
    "compile": False,
    "channels_last": False,
    "deterministic": False,
    "save_every": None,
    "keep_going": False,
    "plots": True,
    "quiet": False,
    # data
    "dataset": "SZT",
    "data_dir": "data",
    "limit": None,
    "augment": True,
    "alternate_flip": False,
    # network
    "model": "MLP",
    "widths": [512, 256],
    "nonlinearity": "relu",
    "batch_norm": False,
    "stem": None,
    # optimisation
    "epochs": 20,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "optimizer": "adam",
    "momentum": 0.9,
    "betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "schedule": "cosine",
    "warmup": 0.0,
    "start_factor": 0.1,
    "end_factor": 0.0,
    "bias_lr_scale": 1.0,
    "whiten_epochs": 3,
    "lookahead": False,
    "tta": False,
    "lr_range_test": None,
    # measures
    "nc": True,
    "dib": True,
    "rank": False,
    "measure_every": 1,
    "measure_at": None,
    "layers": None,
    "measure_sets": ["train", "test"],
    "cache_gb": None,
    "dib_layers": None,
    "dib_steps": 980,
    "dib_epochs": None,
    "dib_lr": 3e-3,
    "dib_batch_size": 512,
    "dib_optimizer": "adam",
    "dib_init": "reset",
    "dib_save": False,
}

# What makes the bare command good. A pair (model, dataset) goes before the model alone. Steps of the heads are head
# epochs times batches: 118 of 512 on MNIST, 98 on CIFAR-10, 28 of 128 on SZT.
MLP = {"epochs": 10, "learning_rate": 2e-3, "warmup": 0.2, "dib_steps": 5 * 118}
PRESETS = {
    ("MLP",): MLP,
    ("MLP", "MNIST"): MLP | {"dib_steps": 15 * 118},
    ("MLP", "SZT"): {
        "widths": [10, 7, 5, 4, 3],
        "nonlinearity": "tanh",
        "epochs": 200,
        "learning_rate": 1e-2,
        "warmup": 0.1,
        "dib_steps": 10 * 28,
        "dib_lr": 3e-2,
        "dib_batch_size": 128,
    },
    ("MNISTNet",): {
        "epochs": 3,
        "learning_rate": 1e-2,
        "betas": [0.7, 0.9],
        "warmup": 0.3,
        "augment": False,
        "dib_steps": 2 * 118,
    },
    ("CIFARNet",): {
        "epochs": 10,
        "batch_size": 1024,
        "optimizer": "sgd",
        "learning_rate": 1.5,
        "momentum": 0.85,
        "weight_decay": 1.33e-3,
        "label_smoothing": 0.2,
        "schedule": "linear",
        "warmup": 0.23,
        "start_factor": 0.2,
        "end_factor": 0.07,
        "bias_lr_scale": 64.0,
        "lookahead": True,
        "tta": True,
        "alternate_flip": True,
    },
    ("ResNet",): {
        "epochs": 60,
        "batch_size": 512,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
        "warmup": 0.15,
        "measure_at": ["log:12"],
        "dib_layers": ["layer2.1", "layer3.1", "layer4.1", "avgpool"],
        "dib_steps": 2 * 98,
    },
    ("ConvNeXt",): {
        "epochs": 80,
        "batch_size": 256,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "warmup": 0.1,
        "measure_at": ["log:12"],
        "dib_layers": ["features.3.2", "features.5.8", "features.7.2", "classifier.1"],
        "dib_steps": 2 * 98,
    },
}

# Flags of a single call: they say what to do, not what the run is.
OF_ONE_CALL = ("config", "resume", "measure", "list_layers", "quiet")
# What a resumed run may change without becoming another run.
FREE_ON_RESUME = (*OF_ONE_CALL, "accelerator", "compile", "data_dir", "devices", "epochs", "log_dir",
                  "num_nodes", "plots", "strategy", "threads")  # fmt: skip
OF_SEVERAL = ("seed", "widths", "betas", "measure_at", "layers", "measure_sets", "dib_layers")
MAX_EPOCHS = 10**6  # the epochs to measure are listed
MAX_COUNT = 10**9  # of samples, units of a layer, gigabytes: beyond what any machine holds
MAX_RATE = 1e30  # rates and decays: float32 ends at 3e38, and optimizers multiply
MAX_SCALE = 1e6
MAX_NODES = 10**4
MAX_THREADS = 10**4
PROCESSES_PER_CPU = 4  # more of them only wait for each other
MAX_DIB = 10**9  # head epochs or steps: beyond it no computer comes to an end
MAX_NAME = 255  # bytes in a file's name
DIB_BUDGET = ("dib_steps", "dib_epochs")  # two ways to say how long the heads train: one of them counts
MLP_FLAGS = {"widths": "-w/--widths", "nonlinearity": "-nl/--nonlinearity", "batch_norm": "--batch-norm"}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every flag with its value. A wrong flag ends the program with status 2 and one sentence."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _build_parser()
    if {"-h", "--help"} & set(argv):
        chosen, _ = _selection().parse_known_args(argv)
        parser.set_defaults(**DEFAULTS | preset(chosen.model, chosen.dataset))
    given = vars(parser.parse_args(argv))
    stored = _stored_flags(parser, given)
    chosen = DEFAULTS | stored | given
    flags = merged(DEFAULTS, preset(chosen["model"], chosen["dataset"]), stored, given)
    if "measure_every" in given and "measure_at" not in given:
        flags["measure_at"] = None  # the preset's epochs give way to the user's
    _refuse_bad_combinations(parser, given, flags)
    args = argparse.Namespace(**flags)
    begun = None if args.resume or args.measure or args.list_layers else slurm.run_to_go_on_with(flags_of_run(args))
    return get_args(["--resume", str(begun), *["--quiet"] * args.quiet]) if begun else args


def preset(model: str, dataset: str) -> dict:
    """The flags that the preset of a model on a dataset sets."""
    return PRESETS.get((model, dataset), PRESETS.get((model,), {}))


def merged(*levels: dict) -> dict:
    """Flags from several places, of which later ones go before; there is one budget of the heads, the last named."""
    flags: dict = {}
    for level in levels:
        if any(level.get(name) is not None for name in DIB_BUDGET):
            flags |= dict.fromkeys(DIB_BUDGET)
        flags |= level
    return flags


def flags_of_run(args: argparse.Namespace) -> dict:
    """What `hparams.yaml` keeps: every flag but those of a single call."""
    return {name: value for name, value in vars(args).items() if name not in OF_ONE_CALL}


def epochs_to_measure(args: argparse.Namespace) -> frozenset[int]:
    """The epochs after which to measure; 0 is before training. The last epoch always counts."""
    if args.measure_at is None:
        return frozenset({*range(0, args.epochs + 1, args.measure_every), args.epochs})
    epochs = set()
    for item in args.measure_at:
        if item.startswith("log:"):
            num = int(item.removeprefix("log:"))
            epochs |= {0, args.epochs}
            epochs |= {round(args.epochs ** (i / max(num - 2, 1))) for i in range(num - 1)}
        else:
            epochs.add(int(item))
    return frozenset(epochs)


def why_of_one_length(args: argparse.Namespace, planned: int, done: int) -> str:
    """Why what a run of `planned` epochs has `done` is not what one of `args.epochs` does; empty if it is."""
    if args.epochs == planned:
        return ""
    if args.schedule != "constant":
        return f"--schedule {args.schedule} spreads the learning rate over all of them"
    if args.warmup > 0:
        return "--warmup is a share of all of them"
    if args.lookahead:
        return "--lookahead averages by the share of them that is done"
    plans = (argparse.Namespace(**vars(args) | {"epochs": epochs}) for epochs in (planned, args.epochs))
    before, now = ({epoch for epoch in epochs_to_measure(plan) if epoch <= done} for plan in plans)
    return "" if before == now else "their number decides which are measured (--measure-at, --measure-every)"


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every help text, save where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or isinstance(action, argparse._HelpAction):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says in every error where the wrong value came from: the command line or a file."""

    source = ""

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> object:
        """All flags; a word that is none or belongs to none is an error, which knows a flag of a similar name."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                self.error(f"{unknown[0]!r} belongs to no flag; --help lists all flags")
            flags = (flag for flag in self._option_string_actions if len(flag) > 2 or len(word) == 2)
            self.error(f"unknown flag {word}" + (perhaps(word, flags) or "; --help lists all flags"))
        return values

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = ", ".join(action.choices) + perhaps(value, action.choices, "; ")
            raise argparse.ArgumentError(action, f"{value!r} is none of {allowed}")

    def error(self, message: str) -> None:
        known = ranks.name_by_environment()  # then the first rank says the same
        self.exit(2, None if known else f"{self.prog}: error: {self.source}{message}\n")


def perhaps(word: str, names: Iterable[str], comma: str = ", ") -> str:
    """`, perhaps NAME` with the name that a mistyped word resembles most, whatever its case; else nothing."""
    by_letters = {name.lstrip("-").lower(): name for name in names}
    close = difflib.get_close_matches(word.lstrip("-").lower(), by_letters, n=1)
    return f"{comma}perhaps {by_letters[close[0]]}" if close else ""


class _OneOrSeveral(argparse.Action):
    """A single value as itself, several as a list without repetitions."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: list, flag: str | None = None) -> None:
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise argparse.ArgumentError(self, f"{twice[0]} comes twice")
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def _number(kind: type, low: float, high: float = MAX_COUNT, *, open_low: bool = False) -> Callable:
    """A converter for a number in [low, high], or (low, high] with `open_low`."""
    word = "whole number" if kind is int else "number"
    lowest, highest = (f"{bound:g}" if isinstance(bound, float) else f"{bound}" for bound in (low, high))
    allowed = f"a {word} {'above' if open_low else 'of at least'} {lowest} and at most {highest}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {allowed}") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {allowed}")
        return value + 0  # makes 0 of -0.0

    return convert


def _rate() -> Callable:
    """A converter for a learning rate."""
    return _number(float, 0, MAX_RATE, open_low=True)


def _text(text: str) -> str:
    """Text that can name a file and stand in `hparams.yaml`."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} holds what is no text in UTF-8")
    return text


def _epochs(text: str) -> str:
    """An epoch, or `log:N` for about N epochs at even steps of the logarithm."""
    number = text.removeprefix("log:")
    least = 2 if text.startswith("log:") else 0
    if not (number.isascii() and number.isdigit() and least <= int(number) <= MAX_EPOCHS):
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)} is neither an epoch (0, 1, …) nor log:N with N of at least 2, up to {MAX_EPOCHS}"
        )
    return text


def _selection() -> argparse.ArgumentParser:
    """Just the flags that choose the preset, for `--help`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--model", default=DEFAULTS["model"])
    parser.add_argument("-d", "--dataset", default=DEFAULTS["dataset"])
    return parser


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="main.py",
        usage="%(prog)s [-m MODEL] [-d DATASET] [flag ...]",
        description="Train an image classifier and measure, after every epoch, how its layers organise the data.\n"
        "`-m ResNet -d CIFAR10 --help` shows the defaults for that model and dataset.",
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.register("type", None, _text)  # for flags without a type of their own
    for add_group in (_add_run, _add_data, _add_network, _add_optimisation, _add_measures):
        add_group(parser)
    return parser


# fmt: off
def _add_run(parser: _Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("-c", "--config", metavar="FILE", help="take flags from a YAML file; a run's own hparams.yaml repeats that run")
    add("--resume", metavar="RUN", help="go on with the run in this folder; `last`: the newest one in --log-dir")
    add("--measure", metavar="CHECKPOINT", help="measure a saved network instead of training one")
    add("--list-layers", action="store_true", help="print the measured layers with shape and dimension, and stop")
    add("--log-dir", metavar="DIR", help="where the runs' folders lie")
    add("--name", help="name of the run's folder (else version_0, version_1, …)")
    add("--seed", type=_number(int, 0, 2**32 - 1), nargs="+", action=_OneOrSeveral, metavar="N",
        help="seed of everything random; several: one run for each, and their means")
    add("--accelerator", choices=("auto", "cpu", "gpu"), help="where to compute")
    add("--devices", type=_number(int, 1), metavar="N", help="number of devices per machine")
    add("--num-nodes", type=_number(int, 1, MAX_NODES), metavar="N", help="number of machines")
    add("--threads", type=_number(int, 1, MAX_THREADS), metavar="N",
        help="threads of each process on the CPU (else 1 for networks below 10,000 parameters, for others all)")
    add("--strategy", choices=STRATEGIES, help="Lightning's strategy; for several devices auto is ddp")
    add("--precision", choices=PRECISIONS, help="number format of training")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the network with torch.compile")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format that convolutions on GPUs like")
    add("--deterministic", action=argparse.BooleanOptionalAction, help="only operations that repeat bit for bit")
    add("--save-every", type=_number(int, 1), metavar="K", help="keep a checkpoint of every K-th epoch as well")
    add("--keep-going", action=argparse.BooleanOptionalAction, help="go on when the loss is nan or infinite")
    add("--plots", action=argparse.BooleanOptionalAction, help="leave summary.png in the run's folder")
    add("--quiet", action="store_true", help="for batch jobs: nothing but warnings, errors and where the results lie")


def _add_data(parser: _Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("-d", "--dataset", metavar="NAME",
        help=f"{', '.join(DATASETS)}, or a folder with train/CLASS/* and test/CLASS/*")
    add("--data-dir", metavar="DIR", help="where datasets lie or are downloaded to")
    add("--limit", type=_number(int, 1), metavar="N", help="only the first N samples of each set, for trying things")
    add("--augment", action=argparse.BooleanOptionalAction, help="random shifts, and flips where the data allow it")
    add("--alternate-flip", action=argparse.BooleanOptionalAction, help="flip every sample in every other epoch")


def _add_network(parser: _Parser) -> None:
    add = parser.add_argument_group("network").add_argument
    add("-m", "--model", choices=MODELS, help="architecture")
    add("-w", "--widths", type=_number(int, 1), nargs="+", metavar="N", help="MLP: widths of the hidden layers")
    add("-nl", "--nonlinearity", choices=NONLINEARITIES, help="MLP: non-linearity of the hidden layers")
    add("--batch-norm", action=argparse.BooleanOptionalAction, help="MLP: batch norm before the non-linearity")
    add("--stem", choices=("small", "imagenet"),
        help="ResNet, ConvNeXt: first layers that keep the resolution, or torchvision's (else small up to 64 × 64)")


def _add_optimisation(parser: _Parser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    fraction = _number(float, 0, 1)
    add("-e", "--epochs", type=_number(int, 1, MAX_EPOCHS), metavar="N", help="passes over the training set")
    add("-b", "--batch-size", type=_number(int, 1), metavar="N", help="samples a step, over all devices together")
    add("-lr", "--learning-rate", type=_rate(), metavar="RATE", help="highest learning rate")
    add("--optimizer", choices=OPTIMIZERS, help="sgd is with Nesterov momentum")
    add("--momentum", type=_number(float, 0, 1), metavar="M", help="momentum of sgd")
    add("--betas", type=fraction, nargs=2, metavar="B", help="decay rates of adam and adamw")
    add("--weight-decay", type=_number(float, 0, MAX_RATE), metavar="WD", help="weight decay")
    add("--label-smoothing", type=fraction, metavar="S", help="label smoothing of the cross-entropy")
    add("--schedule", choices=SCHEDULES, help="how the rate falls after the warm-up")
    add("--warmup", type=fraction, metavar="F", help="share of the steps in which the rate rises")
    add("--start-factor", type=fraction, metavar="F", help="rate at the start of the warm-up, relative to the highest")
    add("--end-factor", type=fraction, metavar="F", help="rate at the end, relative to the highest")
    add("--bias-lr-scale", type=_number(float, 1 / MAX_SCALE, MAX_SCALE), metavar="X",
        help="rate of batch norms' biases, relative")
    add("--whiten-epochs", type=_number(int, 0), metavar="N", help="CIFARNet: epochs that train the whitening's bias")
    add("--lookahead", action=argparse.BooleanOptionalAction, help="average the weights over every five steps")
    add("--tta", action=argparse.BooleanOptionalAction, help="test on mirrored and shifted copies, averaged")
    add("--lr-range-test", nargs="?", const="train", choices=("train", "only"), metavar="only",
        help="find the learning rate before training; `only`: and stop there")


def _add_measures(parser: _Parser) -> None:
    group = parser.add_argument_group("measures")
    add = group.add_argument
    add("--nc", action=argparse.BooleanOptionalAction, help="neural collapse, NC1")
    add("--dib", action=argparse.BooleanOptionalAction, help="decodable information")
    add("--rank", action=argparse.BooleanOptionalAction, help="rank of activations and class means")
    add("--measure-every", type=_number(int, 1), metavar="K", help="measure before training and after every K-th epoch")
    add("--measure-at", type=_epochs, nargs="+", metavar="EPOCH",
        help="measure after these epochs; log:N: N at even log steps")
    add("--layers", nargs="+", metavar="PATTERN", help="layers to measure, shell patterns over their names (else all)")
    add("--measure-sets", nargs="+", choices=("train", "test"), help="sets to measure")
    add("--cache-gb", type=_number(float, 0), metavar="GB",
        help="memory for activations (else a quarter of what is free); what does not fit is computed twice")
    add("--dib-layers", nargs="+", metavar="PATTERN", help="layers for DIB, of those measured (else all)")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--dib-steps", type=_number(int, 1, MAX_DIB), metavar="N",
        help="steps that train the heads, rounded up to whole epochs over the samples")
    budget.add_argument("--dib-epochs", type=_number(int, 1, MAX_DIB), metavar="E",
        help="epochs that train the heads, instead of steps")
    add("--dib-lr", type=_rate(), metavar="RATE", help="learning rate of the heads, falls to 1/100")
    add("--dib-batch-size", type=_number(int, 2), metavar="N", help="samples a step of the heads")
    add("--dib-optimizer", choices=("sgd", "adam"), help="optimizer of the heads")
    add("--dib-init", choices=("reset", "copy"), help="heads start anew or from the network's own decoder")
    add("--dib-save", action=argparse.BooleanOptionalAction, help="keep the heads' weights under checkpoints/")


# fmt: on


def _stored_flags(parser: _Parser, given: dict) -> dict:
    """Flags from a config file, from the run to resume, or from the run that a checkpoint belongs to."""
    if "config" in given and "resume" in given:
        parser.error("argument -c/--config: not allowed with --resume, which takes the run's own flags")
    if "resume" in given:
        given["resume"] = str(_run_to_resume(parser, given))
        stored = _read_config(parser, Path(given["resume"]) / "hparams.yaml", "--resume")
        _refuse_changes(parser, stored, given)
        return stored
    if "config" in given:
        return _read_config(parser, Path(given["config"]), "-c/--config")
    if "measure" in given:
        neighbour = Path(given["measure"]).parent.parent / "hparams.yaml"
        stored = _read_config(parser, neighbour, "--measure") if neighbour.is_file() else {}
        return {flag: value for flag, value in stored.items() if flag != "name"}  # that folder is the run's own
    return {}


def _run_to_resume(parser: _Parser, given: dict) -> Path:
    if given["resume"] != "last":
        folder = Path(given["resume"])
    else:
        log_dir = Path(given.get("log_dir", DEFAULTS["log_dir"]))
        newest_first = sorted(log_dir.glob("*/hparams.yaml"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        folder = next((path.parent for path in newest_first if not slurm.is_measurement(path.parent)), None)
        if folder is None:
            parser.error(f"argument --resume: there is no run in {log_dir} to go on with")
    if not (folder / "hparams.yaml").is_file():
        parser.error(f"argument --resume: {folder} is no run's folder: it has no hparams.yaml")
    if slurm.is_measurement(folder):
        parser.error(f"argument --resume: {folder} holds what --measure found: no run that could go on")
    return folder


def _refuse_changes(parser: _Parser, stored: dict, given: dict) -> None:
    own = merged(DEFAULTS, stored)
    changed = [name for name in given if name not in FREE_ON_RESUME and given[name] != own[name]]
    if changed:
        name = changed[0]
        kept = next(other for other in DIB_BUDGET if own[other] is not None) if name in DIB_BUDGET else name
        parser.error(
            f"argument --{name.replace('_', '-')}: a resumed run keeps its {kept}={own[kept]}; "
            "start a new run to change it"
        )


def _read_config(parser: _Parser, path: Path, flag: str) -> dict:
    """The flags in a YAML mapping from flag names to values, checked as the command line is."""
    import yaml  # only where a file is read: the rest of the command line does without

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"argument {flag}: cannot read {path}: {getattr(error, 'strerror', None) or error}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        parser.error(f"argument {flag}: {path} is not plain YAML: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"argument {flag}: {path} must hold a mapping from flag names to values")
    parser.source = f"{path}: "
    known = [name for name in DEFAULTS if name not in OF_ONE_CALL]
    argv: list[str] = []
    for name, value in content.items():
        if name == "provenance":
            if not isinstance(value, dict):
                parser.error("provenance is no mapping, as a run writes it")
            continue
        if name not in known:
            parser.error(f"unknown key {name!r}" + (perhaps(str(name), known) or f"; known are {known}"))
        argv += _as_argv(parser, name, value)
    values = vars(parser.parse_args(argv))
    parser.source = ""
    return values


def _as_argv(parser: _Parser, name: str, value: object) -> list[str]:
    """The words on the command line that mean `name: value`."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(DEFAULTS[name], bool):
        if not isinstance(value, bool):
            parser.error(f"argument {flag}: {value!r} is neither true nor false")
        return [flag if value else "--no-" + flag.removeprefix("--")]
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and name not in OF_SEVERAL:
        parser.error(f"argument {flag}: {reprlib.repr(value)} is a list, allowed is one value")
    if isinstance(value, dict | bool) or any(isinstance(item, dict | list | bool | None) for item in items):
        parser.error(f"argument {flag}: {reprlib.repr(value)} is no value for it")
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def too_many_processes(num: int) -> str | None:
    """Why this machine does not start so many processes that compute on its CPUs; None where it does."""
    num_cpus = os.cpu_count() or 1
    if num <= PROCESSES_PER_CPU * num_cpus:
        return None
    return (
        f"argument --devices: {num} processes are too many for the {num_cpus} CPUs here, allowed are "
        f"{PROCESSES_PER_CPU} for each: {PROCESSES_PER_CPU * num_cpus}"
    )


def _refuse_small_batches(parser: _Parser, flags: dict) -> None:
    """Each device needs a sample of every batch, and two where an MLP has batch norm."""
    num_devices = flags["devices"] * flags["num_nodes"]
    has_norm = flags["batch_norm"] and flags["model"] == "MLP"
    needed = num_devices * (2 if has_norm else 1)
    if flags["batch_size"] < needed:
        parser.error(
            f"argument -b/--batch-size: {flags['batch_size']} is too few for {num_devices} device(s) (--devices × "
            f"--num-nodes){' with --batch-norm' if has_norm else ''}: at least {needed} are needed"
        )


def _names_a_folder(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and len(name.encode()) <= MAX_NAME


def _refuse_bad_combinations(parser: _Parser, given: dict, flags: dict) -> None:
    error = parser.error
    dataset, model = flags["dataset"], flags["model"]
    if dataset not in DATASETS and not Path(dataset).is_dir():
        close = perhaps(dataset, DATASETS, "; ")
        error(f"argument -d/--dataset: {dataset!r} is neither one of {', '.join(DATASETS)} nor a folder{close}")
    if dataset == "SZT" and model in IMAGE_MODELS and not flags["measure"]:
        error(f"argument -m/--model: {model} needs images, and SZT has patterns of 12 bits: use -m MLP")
    for name, flag in MLP_FLAGS.items():
        if name in given and model != "MLP":
            error(f"argument {flag}: is for -m MLP; {model} has none")
    if "stem" in given and model not in ("ResNet", "ConvNeXt"):
        error(f"argument --stem: is for -m ResNet and -m ConvNeXt; {model} has none")
    if "learning_rate" in given and "lr_range_test" in given:
        error("argument --lr-range-test: not allowed with -lr/--learning-rate: the test chooses the rate")
    if "measure_every" in given and "measure_at" in given:
        error("argument --measure-at: not allowed with --measure-every")
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
    late = [item for item in flags["measure_at"] or [] if item.isdigit() and int(item) > flags["epochs"]]
    if late:
        error(f"argument --measure-at: epoch {late[0]} is behind the last one, {flags['epochs']}")
    if flags["name"] is not None and not _names_a_folder(flags["name"]):
        error(f"argument --name: {flags['name']!r} is not the name of a folder")
    if flags["resume"] and flags["measure"]:
        error("argument --measure: not allowed with --resume")
