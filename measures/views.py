"""Views: pictures and scores of input gradients, of classes on images and noise, of hidden units and slots, `--views`.

Letters: n inputs, M pictured images, C classes, K of them pictured, U units of a layer, S slots, E examples of noise,
*shape that of an input.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from measures.derivatives import View
from measures.input_gradients import (
    agreement,
    directions,
    first_filters,
    gradients_at,
    is_not_zero,
    mean_cosine,
    num_units,
    roughness,
    stability,
    white_roughness,
)
from measures.layers import blocks_of, example_of, gives_variants
from measures.perturb import standard_normal
from measures.samples import Chosen, labels_in
from measures.viewing import Viewing
from run.errors import NotFinite, UserError, WrongFlag
from run.expressions import OUTPUT, Expression, Name
from run.ranks import Ranks
from run.seeds import seed_from
from slots import Similarities, slots_of

if TYPE_CHECKING:
    from run.console import Console
    from run.run_folder import RunFolder

IMAGES, SAMPLES, UNITS = 60, 64, 60
EXAMPLES = 2  # gradients on noise that are kept beside their mean
AT_ONCE = 2**22  # numbers of the gradients that are held at once
KEPT = 2**22  # numbers of all classes' gradients on images that are kept; of more, those of two classes
NAMED = 100  # classes up to which each has columns
CHUNK = 64  # inputs of a pass
KINDS = ("noise", "images")


class Views(Viewing):
    """Logs how well a person can read the network's input gradients, and keeps them to be looked at.

    Inputs are `samples` of Gaussian noise, standard normal in the normalised space and drawn from the run's seed, and
    as many images, the first of the set: the same in every epoch. With KIND for `noise` or `images`, columns are

    - `views/stability/KIND`, `views/roughness/KIND`, `views/zeros/KIND` (the share of gradients that are zero) and
      `views/agreement`, means over classes; of each class, up to a hundred, the same with `/class0`, … behind
    - `views/separation/KIND`
    - `views/units/stability/KIND/LAYER`, … and `views/units/agreement/LAYER`, means over the units of each of `places`,
      or of the last measured layer: `units` of them at even steps, 0 for all
    - of a network that ends with slots, `views/slots/stability/KIND`, … and `views/slots/agreement`, likewise of the
      similarities with its slots: at even steps, too, through all of them class by class

    Roughness is of images alone. Arrays: `images` (M, *shape), `labels` and `logits` (M, C) of those pictured, with
    `gradients` (M, K, *shape) of the classes `gradients_of` (M, K), which are all or, where that is too much, an
    image's own and the wrong one of the largest logit; `filters` of the first layer; `classes/SCORE/KIND` (C,);
    `units/LAYER/SCORE/KIND` (U,) of the units `units/LAYER/index`; `slots/SCORE/KIND` (U,) of the slots `slots/index`
    with the classes `slots/label`. Under `classes/`, `units/LAYER/` and `slots/` also, of those at the positions
    `pictured`, `examples` (…, E, *shape), the gradients on the first inputs of noise where they are not zero, and
    `mean/KIND`, the means over all inputs.
    """

    name = "views"

    def __init__(
        self,
        places: Sequence[str] = (),
        *,
        images: int = IMAGES,
        units: int = UNITS,
        samples: int = SAMPLES,
        **common: Any,
    ) -> None:
        super().__init__(**{"sets": ("test",)} | common | {"samples": samples})
        self.places, self.images, self.units = list(dict.fromkeys(places)), images, units

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Views:
        """The measure as the run's flags want it."""
        return cls(
            args.views_layers or (),
            images=args.views_images,
            units=args.views_units,
            samples=args.views_samples,
            **common | {"sets": ("test",)},
        )

    @staticmethod
    def refuse_layers(args: Namespace, layers: Collection[str], network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse names that are none of this network's layers."""
        try:
            view = View(network, example_of(network, shape), torch.zeros(2, dtype=torch.int64))
            for place in args.views_layers or ():
                num_units(view, place)
        except UserError as error:
            sentence, *_ = str(error).splitlines()  # without the mark under a place in an expression
            raise WrongFlag(f"argument --views-layers: {sentence}") from None

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The columns, and the arrays of the pictures."""
        network = self._precise(pl_module.network)
        x, y = self._first_samples(trainer)
        shape = tuple(x.shape[1:])
        noise = standard_normal(slice(0, self.samples), shape, seed_from("views", pl_module.hparams.get("seed")))
        options = {"chunk": max(1, CHUNK // self._parts), "ranks": Ranks.of(trainer)}
        looks = {kind: View(network, inputs, torch.zeros(len(inputs)), **options)
                 for kind, inputs in (("noise", noise), ("images", x))}  # fmt: skip
        filters = first_filters(network, shape)
        self.arrays = {} if filters is None else {"filters": filters}
        if self.images:
            self.arrays["images"] = self._as_stored(trainer, x)
        values = self._classes(looks, y)
        places = self.places or (list(self.layers or network.layers)[-1:] if learns_features(network) else [])
        for place in places:
            values |= self._units(looks, place)
        if slots_of(network):
            values |= self._slots(looks)
        self.settings = {
            "samples": self.samples,
            "dtype": str(looks["noise"].dtype),
            "layers": places,
            "classes": self._class_names(trainer),
            "white_roughness": white_roughness(*shape[1:]) if len(shape) == 3 else None,
        }
        return values

    def _first_samples(self, trainer: Trainer) -> tuple[Tensor, Tensor]:
        [split] = self.sets
        batches = self.batches(trainer, split)
        y = labels_in(batches).cpu()[: max(self.images, self.samples)]
        return torch.cat([x for _, x in Chosen(batches, torch.arange(len(y)))]), y

    def _as_stored(self, trainer: Trainer, x: Tensor) -> Tensor:
        """The pictured images in bytes, or where only normalised ones are known those."""
        if self._batches:
            return x[: self.images]
        return getattr(trainer.datamodule.dataset, self.sets[0]).inputs[: self.images]

    def _class_names(self, trainer: Trainer) -> list[str] | None:
        return None if self._batches else list(trainer.datamodule.dataset.classes)

    def _classes(self, looks: Mapping[str, View], y: Tensor) -> dict[str, float]:
        """The columns of the classes, y (…,) those of the images."""
        output = Name("f", OUTPUT)
        logits = looks["images"].activations(output, Expression(output))  # (…, C)
        classes = torch.arange(logits.shape[1])
        pictures = Pictures(y[: self.images], logits[: self.images], looks["images"].x.shape[1:])
        separation = Separation(len(classes))

        def also(part: slice, g: Mapping[str, Tensor], on_all_images: Tensor) -> None:
            pictures.add(part, on_all_images)
            separation.add(g)

        scores, arrays = self._look(looks, OUTPUT, classes, also)
        self.arrays |= {f"classes/{name}": array for name, array in arrays.items()}
        self.arrays |= pictures.arrays if self.images else {}
        values = {f"views/{name}": mean(score) for name, score in scores.items()} | separation.values()
        if len(classes) <= NAMED:
            values |= {f"views/{name}/class{c}": float(score[c]) for name, score in scores.items()
                       for c in range(len(classes))}  # fmt: skip
        return values

    def _units(self, looks: Mapping[str, View], place: str) -> dict[str, float]:
        """The columns of a layer's units; of a layer that has none, none."""
        network, layer = looks["noise"].network, place
        if gives_variants(network, place):
            looks, layer = through(OfInputItself(network, place), looks), OUTPUT
        index = at_even_steps(num_units(looks["noise"], layer), self.units)
        if not len(index):
            return {}
        scores, arrays = self._look(looks, layer, index)
        self.arrays |= {f"units/{place}/{name}": array for name, array in (arrays | {"index": index}).items()}
        return {f"views/units/{name}/{place}": mean(score) for name, score in scores.items()}

    def _slots(self, looks: Mapping[str, View]) -> dict[str, float]:
        """The columns of the slots; while there are none, none."""
        network = looks["noise"].network
        label = slots_of(network).label
        by_class = label.argsort(stable=True)
        index = by_class[at_even_steps(len(by_class), self.units)]
        if not len(index):
            return {}
        scores, arrays = self._look(through(Similarities(network), looks), OUTPUT, index)
        arrays |= {"index": index, "label": label[index]}
        self.arrays |= {f"slots/{name}": array for name, array in arrays.items()}
        return {f"views/slots/{name}": mean(score) for name, score in scores.items()}

    def _look(
        self, looks: Mapping[str, View], layer: str, index: Tensor, also: Callable = lambda *_: None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of units of a layer their scores (U,), and the arrays: these, and of the pictured ones gradients and means.

        `also` sees each part of the units with the gradients of all of them by kind, and on all images.
        """
        size = math.prod(looks["images"].x.shape[1:])
        shown = at_even_steps(len(index), max(1, KEPT // (size * (EXAMPLES + len(KINDS)))))
        scores: dict[str, list[Tensor]] = {}
        kept: dict[str, list[Tensor]] = {}
        at_once = max(1, AT_ONCE // (self._parts * size * max(map(len, looks.values()))))
        for start in range(0, len(index), at_once):
            part = slice(start, min(start + at_once, len(index)))
            found = {kind: finite(gradients_at(look, layer, index[part]), layer) for kind, look in looks.items()}
            g = {kind: of_kind[: self.samples] for kind, of_kind in found.items()}
            also(part, g, found["images"])
            mine = shown[(shown >= part.start) & (shown < part.stop)] - part.start
            pictures = {"examples": examples_of(g["noise"][:, mine])}
            pictures |= {f"mean/{kind}": of_kind[:, mine].mean(0) for kind, of_kind in g.items()}
            for into, arrays in ((scores, scores_of(g)), (kept, pictures)):
                for name, array in arrays.items():
                    into.setdefault(name, []).append(array)
        scores = {name: torch.cat(parts) for name, parts in scores.items()}
        return scores, scores | {name: torch.cat(parts) for name, parts in kept.items()} | {"pictured": shown}


class Pictures:
    """Gradients on images towards all classes; where these are too many, towards its own and the strongest wrong."""

    def __init__(self, y: Tensor, logits: Tensor, shape: tuple[int, ...]) -> None:
        y, (num, num_classes) = y.to(logits.device), logits.shape
        self.of = torch.arange(num_classes, device=logits.device).expand(num, -1)  # (M, K)
        if num * num_classes * math.prod(shape) > KEPT:
            wrong = logits.scatter(1, y[:, None], -math.inf).argmax(1)
            self.of = torch.stack([y, wrong], 1)
        self.gradients = logits.new_zeros(*self.of.shape, *shape)
        self.arrays = {"labels": y, "logits": logits, "gradients": self.gradients, "gradients_of": self.of}

    def add(self, classes: slice, g: Tensor) -> None:
        """Take what is wanted of gradients towards some classes, on at least these images."""
        i, k = ((self.of >= classes.start) & (self.of < classes.stop)).nonzero(as_tuple=True)
        self.gradients[i, k] = g[i, self.of[i, k] - classes.start]


class Separation:
    """The separation of classes whose gradients come in parts."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.sums: dict[str, Tensor | int] = dict.fromkeys(KINDS, 0)  # of directions, (n, D)
        self.counts: dict[str, Tensor | int] = dict.fromkeys(KINDS, 0)  # of those that are not zero, (n,)

    def add(self, g: Mapping[str, Tensor]) -> None:
        for kind, of_kind in g.items():
            self.sums[kind] = self.sums[kind] + directions(of_kind).sum(1)
            self.counts[kind] = self.counts[kind] + is_not_zero(of_kind).sum(1)

    def values(self) -> dict[str, float]:
        """The columns."""
        cosines = {kind: mean_cosine(self.sums[kind], self.num_classes, self.counts[kind]).mean() for kind in KINDS}
        return {f"views/separation/{kind}": 1 - float(cosine) for kind, cosine in cosines.items()}


def learns_features(network: nn.Module) -> bool:
    """Whether anything is learnt in front of the head; else units are the input's pixels, as with `-w` and slots."""
    features = [network.get_submodule(name) for name in blocks_of(network)[:-1]]
    return not features or any(True for block in features for _ in block.parameters())


class OfInputItself(nn.Module):
    """A network up to a measured layer that gives variants, (B, V, d), as a function to the first of them, (B, d)."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.network.feature_extractor(x)[self.layer][:, 0]


def through(network: nn.Module, looks: Mapping[str, View]) -> dict[str, View]:
    """The same inputs, seen by another network."""
    return {kind: View(network, look.x, look.y, chunk=look.chunk, ranks=look.ranks) for kind, look in looks.items()}


def scores_of(g: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of gradients on noise and on images, (n, U, *shape) each, the scores of each unit, (U,)."""
    found = {}
    for kind, of_kind in g.items():
        found[f"stability/{kind}"] = stability(of_kind)
        found[f"zeros/{kind}"] = 1 - is_not_zero(of_kind).double().mean(0)
        if of_kind.dim() == 5:
            found[f"roughness/{kind}"] = roughness(of_kind).nanmean(0)
    return found | {"agreement": agreement(g["noise"], g["images"])}


def examples_of(g: Tensor) -> Tensor:
    """Of gradients (n, U, *shape) for each unit the first ones that are not zero, (U, E, *shape)."""
    order = is_not_zero(g).byte().sort(dim=0, descending=True, stable=True).indices[:EXAMPLES]  # (E, U)
    return g[order, torch.arange(g.shape[1], device=g.device)].transpose(0, 1)


def at_even_steps(num: int, limit: int) -> Tensor:
    """At most `limit` of so many indices, from the first on, at even steps; 0: all.

    >>> at_even_steps(120, 4), at_even_steps(3, 4), at_even_steps(2, 0)
    (tensor([ 0, 30, 60, 90]), tensor([0, 1, 2]), tensor([0, 1]))
    """
    limit = min(limit or num, num)
    return torch.arange(limit) * num // max(limit, 1)


def mean(score: Tensor) -> float:
    """Over the units that have one."""
    return float(score.nanmean())


def finite(g: Tensor, layer: str) -> Tensor:
    """Gradients that are neither infinite nor nan."""
    if not g.isfinite().all():
        raise NotFinite(f"the gradient of {layer} by the input is infinite or nan.")
    return g
