"""The measures of a run, chosen by the flags; and in one place what other programs import from this one."""

from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from console import Console
from decodable_information import COLUMNS, DecodableInformation, decodable_information
from errors import WrongFlag
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


def dib_budget(args: Namespace) -> dict[str, Any]:
    """How the heads are trained, by the names of `decodable_information`'s arguments."""
    return {
        "epochs": args.dib_epochs,
        "learning_rate": args.dib_lr,
        "batch_size": args.dib_batch_size,
        "optimizer": args.dib_optimizer,
        "init": args.dib_init,
    }
