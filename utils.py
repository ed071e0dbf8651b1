"""The measures of a run, chosen by the flags; and in one place what other programs import from this one."""

import warnings
from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from console import Console
from datasets import Dataset
from decodable_information import COLUMNS, DecodableInformation, decodable_information, digits_and_epochs
from errors import UserError, WrongFlag
from flags import epochs_to_measure, get_args, perhaps
from measures import Measure
from neural_collapse import NeuralCollapse, neural_collapse
from rank import Rank, rank
from run_folder import RunFolder

__all__ = [
    "DecodableInformation", "Measure", "NeuralCollapse", "Rank", "decodable_information", "get_args",
    "layers_to_measure", "measures", "neural_collapse", "rank",
]  # fmt: skip


def measures(args: Namespace, layers: Sequence[str], folder: RunFolder, console: Console) -> list[Measure]:
    """The callbacks that the flags ask for."""
    common = {
        "epochs": epochs_to_measure(args),
        "layers": layers,
        "cache_bytes": None if args.cache_gb is None else int(args.cache_gb * 1e9),
        "progress": console.progress,
    }
    chosen: list[Measure] = []
    if args.nc:
        chosen.append(NeuralCollapse(**common, sets=args.measure_sets))
    if args.rank:
        chosen.append(Rank(**common, sets=args.measure_sets))
    if args.dib:
        _warn_of_other_dib(folder)
        heads = {
            "layers": layers_matching(args.dib_layers, layers, "--dib-layers"),
            "table": folder.table("dib.csv", COLUMNS),
            "states": folder.path / "checkpoints" if args.dib_save else None,
            "say": console.say,
        }
        chosen.append(DecodableInformation(dib_budget(args), **common | heads, sets=args.measure_sets))
    return chosen


def layers_to_measure(args: Namespace, layers: Sequence[str]) -> list[str]:
    """The layers that `--layers` names; refuses, while nothing is written yet, patterns that name none."""
    chosen = layers_matching(args.layers, layers, "--layers")
    layers_matching(args.dib_layers, chosen, "--dib-layers")
    return chosen


def layers_matching(patterns: Sequence[str] | None, layers: Sequence[str], flag: str) -> list[str]:
    """The layers, in their order, that match one of the shell patterns; without patterns all of them."""
    if patterns is None:
        return list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            names = ", ".join(layers) + perhaps(pattern, layers, "; ")
            raise WrongFlag(f"argument {flag}: {pattern!r} matches none of the layers {names}")
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def dib_plan(args: Namespace, dataset: Dataset) -> dict[str, int]:
    """How many heads DIB trains at a layer and for how many epochs; refuses, while nothing is written yet, if none."""
    if not args.dib:
        return {}
    labels, budget = dataset.train.labels, dib_budget(args)
    length = {name: budget[name] for name in ("batch_size", "epochs", "steps")}
    digits, epochs = digits_and_epochs(labels, dataset.num_classes, **length)
    if digits == 0:
        lack = f"no class has two of the {len(labels)} training samples, so DIB has nothing to tell apart"
        if args.limit is None:
            raise UserError(f"-d/--dataset {args.dataset}: {lack}: leave it out with --no-dib")
        raise WrongFlag(f"argument --limit: {lack}: raise it, or leave DIB out with --no-dib")
    return {"dib_heads": digits, "dib_head_epochs": epochs}


def _warn_of_other_dib(folder: RunFolder) -> None:
    """A run that began before minimality had its present meaning does not go on silently with the other one."""
    if folder.checkpoint and "dib_head_epochs" not in (folder.before or {}):
        warnings.warn(
            f"From epoch {folder.epoch + 1} on the dib/ columns of {folder.path} mean something else than before: "
            "samples are numbered at random and minimality counts from H(Y_k | Y). To compare epochs, start anew.",
            stacklevel=3,
        )


def dib_budget(args: Namespace) -> dict[str, Any]:
    """How the heads are trained, by the names of `decodable_information`'s arguments."""
    return {
        "epochs": args.dib_epochs,
        "steps": args.dib_steps,
        "learning_rate": args.dib_lr,
        "batch_size": args.dib_batch_size,
        "optimizer": args.dib_optimizer,
        "init": args.dib_init,
    }
