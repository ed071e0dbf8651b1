"""Clusters: do a layer's activations fall into groups, found without the labels, and are the groups the classes?

    python -m measures.clusters svd FILE LAYER         the same of activations that a run saved; or pca

Letters: N samples, d dimension of a layer's flattened activations, L layers.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from measures.embedding import MOST, tsne
from measures.grouping import Recipe, of_layer
from measures.measure import Measure
from measures.passes import Features
from measures.samples import Chosen, activations_of, labels_in, stratified
from measures.saved import Saved, from_shell
from measures.similarity import cka_matrix
from run.errors import UserError, WrongFlag
from run.ranks import Ranks
from run.seeds import seed_from

if TYPE_CHECKING:
    from datasets import Dataset
    from run.console import Console
    from run.run_folder import RunFolder

Found = TypeVar("Found")

SAMPLES = 10_000
PREDICTIONS = "the network's predictions"  # no layer has such a name


class Clusters(Measure):
    """Logs how every measured layer's activations fall into clusters, `clusters/FIGURE/SET/LAYER`, and layers' CKA.

    The figures are those of `cluster`, after `reduce`; beside them `features`, how many passed the filter,
    `directions`, the k kept, with the `energy` that they hold, and `alignment`, its mean over pairs of classes.
    `cka/SET/LAYER` is the similarity of a layer and the next measured one. The samples are the same in every epoch: at
    most `samples` of a set, stratified by class from the run's seed.

    Kept as arrays: by layer its scores, singular values, clusters, and alignment of classes; by set the CKA of all
    layers, and the samples' indices and labels. With `maps` also a t-SNE of each layer for 2000 of them, `mapped`, and
    the network's predictions.
    """

    name = "clusters"

    def __init__(
        self,
        *,
        samples: int = SAMPLES,
        recipe: Recipe | None = None,
        maps: bool = False,
        saved: Saved | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**{"sets": ("test",)} | common)
        self.samples, self.recipe, self.maps, self.saved = samples, recipe or Recipe(), maps, saved
        self._has_told = False  # where the directions do not hold the energy

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Clusters:
        """The measure with the recipe of the run's flags."""
        recipe = Recipe(**{name: getattr(args, name) for name in Recipe._fields})
        saved = Saved(folder.path / "arrays", args.activations_format, recipe) if args.save_activations else None
        return cls(
            samples=args.cluster_samples,
            recipe=recipe,
            maps=args.tsne,
            saved=saved,
            **common | {"sets": args.cluster_sets},
        )

    @staticmethod
    def plan(args: Namespace, dataset: Dataset) -> dict[str, Any]:
        """Nothing; refuses a class that there is not, and fewer samples than a cluster needs."""
        if args.filter_class is not None and args.filter_class >= dataset.num_classes:
            raise WrongFlag(
                f"argument --filter-class: {args.filter_class} is no class: they are 0 to {dataset.num_classes - 1}"
            )
        for split in args.cluster_sets:
            num = min(args.cluster_samples, len(getattr(dataset, split).labels))
            if num < args.min_cluster_size:
                raise WrongFlag(
                    f"argument --min-cluster-size: a cluster of {args.min_cluster_size} needs as many samples, and "
                    f"there are {num} of the {split} set (--cluster-samples, --limit)"
                )
        return {}

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The figures of the sets' samples in this epoch."""
        values, before, self.arrays = {}, self._maps_before(epoch), {}
        self.settings = {**self.recipe._asdict(), "samples": self.samples, "layers": []}
        for split in self.sets:
            values |= self._measure_set(trainer, pl_module, split, epoch, before)
        return values

    def _measure_set(
        self, trainer: Trainer, pl_module: LightningModule, split: str, epoch: int, before: Mapping[str, Tensor]
    ) -> dict[str, float]:
        ranks, hparams = Ranks.of(trainer), pl_module.hparams
        batches = self.batches(trainer, split)
        labels = labels_in(batches)
        index = stratified(labels, self.samples, seed_from("cluster samples", hparams.get("seed"), split))
        chosen = self.shown(Chosen(batches, index, ranks), split)
        features = self.features(trainer, pl_module)
        if self.maps or self.saved:  # else the second call of the network, about as long as the first, is not needed
            features = with_predictions(features, pl_module)
        activations = activations_of(features, chosen, len(index), ranks)
        predictions = activations.pop(PREDICTIONS, None)
        layers, y = list(activations), labels[index.to(labels.device)].cpu()
        if self.saved and ranks.is_first:
            for layer, A in activations.items():
                self.saved.write(A, y, predictions, index, layer, epoch, split)
        alike = cka_matrix(list(activations.values()))
        shown = stratified(y, MOST, seed_from("map", hparams.get("seed"), split))

        def look(layer: str, A: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
            figures, arrays = of_layer(A, y, self.recipe, hparams.num_classes)
            if self.maps:
                arrays["map"] = tsne(arrays["scores"][shown], before.get(f"map/{split}/{layer}"))
            return figures, arrays

        found = shared_among(ranks, activations, look)
        self._tell_low_energy(found)
        values = {
            f"clusters/{name}/{split}/{layer}": value
            for layer, (figures, _) in found.items()
            for name, value in figures.items()
        }
        values |= {f"cka/{split}/{layer}": float(alike[i, i + 1]) for i, layer in enumerate(layers[:-1])}
        for layer, (_, arrays) in found.items():
            self.arrays |= {f"{name}/{split}/{layer}": array for name, array in arrays.items()}
        self.arrays |= {f"cka/{split}": alike, f"index/{split}": index, f"labels/{split}": y}
        if self.maps:
            self.arrays |= {f"mapped/{split}": shown, f"predictions/{split}": predictions.flatten()}
        self.settings["layers"] = layers
        return values

    def _maps_before(self, epoch: int) -> dict[str, Tensor]:
        """The maps of the last measured epoch, from which this one's start; a resumed run finds them in its folder."""
        if not self.maps:
            return {}
        if not self.arrays and self.store:
            earlier = [number for number in self.store.epochs(self.name) if number < epoch]
            return self.store.read(max(earlier), self.name, "map/") if earlier else {}
        return {name: array for name, array in self.arrays.items() if name.startswith("map/")}

    def _tell_low_energy(self, found: Mapping[str, tuple[dict[str, float], dict]]) -> None:
        low = {layer: figures["energy"] for layer, (figures, _) in found.items()}
        low = {layer: energy for layer, energy in low.items() if energy <= self.recipe.energy}
        if low and not self._has_told:
            self._has_told = True
            layers = ", ".join(f"{layer} ({energy:.2f})" for layer, energy in low.items())
            warnings.warn(
                f"{self.recipe.max_directions} directions (--max-directions) hold less than the energy "
                f"{self.recipe.energy:g} (--energy) of {layers}.",
                stacklevel=2,
            )


def with_predictions(features: Features, pl_module: LightningModule) -> Features:
    """The same activations, and beside them the network's class of each sample, (B, 1)."""

    def extract(x: Tensor) -> dict[str, Tensor]:
        found = features(x)
        return found | {PREDICTIONS: pl_module.network(x.to(next(pl_module.parameters()).dtype)).argmax(1)[:, None]}

    return extract


def shared_among(
    ranks: Ranks, activations: dict[str, Tensor], look: Callable[[str, Tensor], Found]
) -> dict[str, Found]:
    """What `look` finds at each layer, on all ranks, each of which looks at some; frees the activations meanwhile.

    A mistake that one of them meets ends all of them.
    """
    layers, mine, error = list(activations), {}, None
    for i, layer in enumerate(layers):
        A = activations.pop(layer)
        if i % ranks.num != ranks.index or error:
            continue
        try:
            mine[layer] = look(layer, A)
        except UserError as mistake:
            error = type(mistake)(f"layer {layer}: {mistake}")
    results = ranks.from_first(ranks.gathered((mine, error)))
    for _, error in results:
        if error:
            raise error
    merged = {layer: found for part, _ in results for layer, found in part.items()}
    return {layer: merged[layer] for layer in layers}


if __name__ == "__main__":
    from_shell()
