"""The measures of a run, chosen by the flags; and in one place what other programs import from this one."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from classifier import Classifier
from datasets import Dataset
from flags import get_args
from measures.clusters import Clusters
from measures.decodable_information import DecodableInformation, decodable_information
from measures.grouping import cluster
from measures.input_gradients import input_gradients, roughness, separation, stability
from measures.landscape import Landscape
from measures.layers import chosen, features_of, hookable_layers
from measures.look import Look
from measures.measure import Measure
from measures.neural_collapse import NeuralCollapse, neural_collapse
from measures.perturb import Perturb
from measures.quantities import look
from measures.rank import Rank, rank
from measures.reduction import reduce
from measures.similarity import alignment, cka
from measures.views import Views
from networks import Network
from run.catalogue import MEASURES, found
from run.console import Console
from run.epochs import epochs_to_measure
from run.run_folder import RunFolder

__all__ = [
    "Classifier", "Clusters", "DecodableInformation", "Landscape", "Look", "Measure", "NeuralCollapse", "Perturb",
    "Rank", "Views", "alignment", "cka", "cluster", "decodable_information", "features_of", "get_args",
    "hookable_layers", "input_gradients", "layers_to_measure", "look", "measures", "neural_collapse", "plans", "rank",
    "reduce", "roughness", "separation", "stability",
]  # fmt: skip


def measures(args: Namespace, layers: Sequence[str], folder: RunFolder, console: Console) -> list[Measure]:
    """The callbacks that the flags ask for, one for each entry of the catalogue that is wanted."""
    common = {
        "epochs": epochs_to_measure(args),
        "layers": list(layers),
        "sets": args.measure_sets,
        "cache_bytes": None if args.cache_gb is None else int(args.cache_gb * 1e9),
        "progress": console.progress,
        "store": folder.arrays,
    }
    return [kind.from_flags(args, common, folder, console) for kind in kinds(args)]


def plans(args: Namespace, dataset: Dataset) -> dict[str, Any]:
    """What the measures derive from flags and data; each refuses, while nothing is written yet, what it cannot do."""
    return {name: value for kind in kinds(args) for name, value in kind.plan(args, dataset).items()}


def kinds(args: Namespace) -> list[type[Measure]]:
    """The classes of the measures that the flags ask for."""
    return [found(about.callback) for about in MEASURES if about.is_asked(vars(args))]


def layers_to_measure(args: Namespace, network: Network, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The layers that `--layers` names and the shapes of their activations.

    Refuses, while nothing is written yet, patterns that name none.
    """
    layers = chosen(args.layers, network, shape)
    for kind in kinds(args):
        kind.refuse_layers(args, layers, network, shape)
    return layers
