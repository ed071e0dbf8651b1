"""Look at a run's network: quantities by expression, `--look`, in every measured epoch; also by group of samples.

Letters: N samples, p parameters, G groups.
"""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from measures.derivatives import View
from measures.layers import example_of
from measures.quantities import Hessian, Quantity, Rows, Vector, Wanted, average, quantity, share_in
from measures.rank import Fold
from measures.viewing import Viewing
from run.catalogue import eigenvalues
from run.errors import UserError, WrongFlag
from run.expressions import SHORT, Expression, Name, parse
from run.seeds import seed_from
from slots import similarities_in, slots_of

if TYPE_CHECKING:
    from datasets import Dataset
    from run.console import Console
    from run.run_folder import RunFolder

TRAINING_TRACE_PROBES = 10  # per epoch; with --look-probes P it is 20 P, as with --measure
MOST_SLOTS = 20  # whose averages are looked at
PATH = 100_000  # parameters up to which a path is kept as it is, and numbers of its sketch beyond


class Look(Viewing):
    """Logs quantities of the network, `look/NAME/STATISTIC` and `look/NAME/GROUP/STATISTIC`, NAME an expression's.

    `by` are the kinds of groups whose averages are looked at beside that of all samples.

    Eigenvalues, singular values and densities are kept as arrays, `NAME/ARRAY` and `NAME/GROUP/ARRAY`; between the
    groups also `NAME/cosines/KIND` (G × G) of vectors; of `theta` its path, `NAME/path`.
    """

    name = "look"

    def __init__(
        self,
        expressions: Sequence[str],
        *,
        by: Sequence[str] = (),
        batch_size: int = 256,
        wanted: Wanted | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.expressions, self.by = list(expressions), tuple(by)
        self.batch_size, self.wanted = batch_size, wanted or Wanted()
        self._paths: dict[str, dict[int, Tensor]] = {}

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Look:
        """The measure as the run's flags want it."""
        probes, bottom = args.look_probes, args.look_bottom
        if probes is None:
            probes = Wanted().probes if args.measure else 0
        if bottom is None:
            bottom = Wanted().bottom if args.measure else 0
        wanted = Wanted(
            top=args.look_top,
            bottom=bottom,
            dense=args.look_dense,
            tolerance=args.look_tolerance,
            trace_probes=20 * probes or TRAINING_TRACE_PROBES,
            probes=probes,
            parts={kind: int(k) for kind, _, k in (part.partition(":") for part in args.look_parts or ())},
            tail=args.look_tail,
            keep=args.look_arrays,
        )
        batch_size = args.batch_size if isinstance(args.batch_size, int) else 256
        return cls(
            args.look,
            samples=args.look_samples,
            by=args.look_by or (),
            batch_size=batch_size,
            wanted=wanted,
            **common | {"sets": (args.look_set,)},
        )

    @staticmethod
    def plan(args: Namespace, dataset: Dataset) -> dict[str, Any]:
        """Nothing; refuses groups that nothing makes."""
        if "cluster" in (args.look_by or ()) and not args.clusters:
            raise WrongFlag("argument --look-by: clusters are found by --clusters, which is not asked for")
        if "cluster" in (args.look_by or ()) and args.look_set not in args.cluster_sets:
            raise WrongFlag(
                f"argument --look-by: clusters of the {args.look_set} set are needed: --cluster-sets {args.look_set}, "
                f"or --look-set {args.cluster_sets[0]}"
            )
        return {}

    @staticmethod
    def refuse_layers(args: Namespace, layers: Collection[str], network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse expressions that this network has nothing for, and such as have one name in `metrics.csv`."""
        columns: dict[str, Expression] = {}
        try:
            view = View(network, example_of(network, shape), torch.zeros(2, dtype=torch.int64))
            expressions = expanded(args.look, view, layers)
            for expression in expressions:
                view.check(expression)
                view.refuse_large(expression, args.look_samples)
        except UserError as error:
            raise WrongFlag(f"argument --look: {error}") from None
        for expression in expressions:
            other = columns.setdefault(expression.column, expression)
            if other != expression:
                raise WrongFlag(f"argument --look: {other} and {expression} have one name: {expression.column}")

    def line(self) -> str:
        """The largest eigenvalues of every Hessian."""
        return eigenvalues(self.values)

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The figures of all expressions, of all samples and of their groups."""
        view, index = self._seen(trainer, pl_module)
        groups = {kind: self._groups(kind, trainer, view, index) for kind in self.by}
        expressions = expanded(self.expressions, view, self.layers or ())
        self.arrays, values, overlaps = {}, {}, Overlaps()
        self.settings = self._about(view, expressions)
        self.settings["groups"] = {kind: list(members) for kind, members in groups.items()}
        for expression in expressions:
            found = quantity(view, expression, self.wanted)
            values |= self._kept(expression, found, overlaps)
            if expression.of.kind != "theta":  # in parameters no sample has a part
                values |= self._of_groups(groups, expression)
            elif not expression.norms_only:
                values |= under(expression, self._path(expression.column, found.values, epoch))
        return values | overlaps.shares()

    def measure_average(self, trainer: Trainer, modules: Sequence[LightningModule]) -> dict[str, float]:
        """The figures of the quantities' averages over several networks; of networks with slots, none."""
        modules = list(modules)
        if any(slots_of(module.network) for module in modules):
            warnings.warn("look: networks with slots have no average: no slot of one is one of another.", stacklevel=2)
            return {}
        views = [self._seen(trainer, module)[0] for module in modules]
        self.arrays, values, overlaps = {}, {}, Overlaps()
        expressions = expanded(self.expressions, views[0], self.layers or ())
        self.settings = self._about(views[0], expressions) | {"networks": [module.source for module in modules]}
        for expression in expressions:
            found = average([quantity(view, expression, self.wanted) for view in views])
            values |= self._kept(expression, found, overlaps)
        return values | overlaps.shares()

    def _about(self, view: View, expressions: Sequence[Expression]) -> dict[str, Any]:
        """What is written beside the arrays."""
        return {
            "expressions": {expression.column: str(expression) for expression in expressions},
            "math": {expression.column: expression.math for expression in expressions},
            "samples": len(view),
            "dtype": str(view.dtype),
            **{name: value for name, value in self.wanted._asdict().items() if name != "seed"},
        }

    def _seen(self, trainer: Trainer, pl_module: LightningModule) -> tuple[View, Tensor]:
        self.wanted = self.wanted._replace(seed=seed_from("look", pl_module.hparams.get("seed")))
        return self.view_of(trainer, pl_module)

    def _kept(self, expression: Expression, found: Quantity, overlaps: Overlaps) -> dict[str, float]:
        """The columns of a quantity of all samples; its arrays are kept."""
        figures, arrays = found.found(self.wanted)
        self.arrays |= {f"{expression.column}/{name}": array for name, array in arrays.items()}
        overlaps.note(expression, found, self.wanted)
        return under(expression, figures)

    def _groups(self, kind: str, trainer: Trainer, view: View, index: Tensor) -> dict[str, View]:
        """The network on the samples of each group, by the group's name."""
        y = view.y.cpu()
        if kind == "class":
            members = {f"class{c}": (y == c).nonzero()[:, 0] for c in y.unique().tolist()}
        elif kind == "batch":
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.wanted.seed))
            members = {f"batch{i}": part.sort().values for i, part in enumerate(order.split(self.batch_size))}
        else:
            members = slots_among(view) if kind == "slot" else clusters_of(trainer, index, self.sets[0])
        return {name: view.of(places) for name, places in members.items()}

    def _of_groups(self, groups: Mapping[str, Mapping[str, View]], expression: Expression) -> dict[str, float]:
        """The columns of each group, and of vectors what the groups have in common."""
        figures: dict[str, float] = {}
        for kind, members in groups.items():
            vectors = []
            for name, view in members.items():
                found = quantity(view, expression, self.wanted)
                of_group, arrays = found.found(self.wanted)
                figures |= {f"{name}/{statistic}": value for statistic, value in of_group.items()}
                self.arrays |= {f"{expression.column}/{name}/{key}": array for key, array in arrays.items()}
                if isinstance(found, Vector | Rows):
                    vectors.append(found.values if isinstance(found, Vector) else found.values.double().mean(0))
            if vectors:
                weights = torch.tensor([len(view) for view in members.values()], dtype=torch.float64)
                more, cosines = between_groups(torch.stack(vectors).double(), weights)
                figures |= {f"{name}_{kind}": value for name, value in more.items()}
                self.arrays[f"{expression.column}/cosines/{kind}"] = cosines
        return under(expression, figures)

    def _path(self, column: str, theta: Tensor, epoch: int) -> dict[str, float]:
        """How far the parameters went since the first measured epoch, and by the last step, and how it turned."""
        kept = self._paths.setdefault(column, {})
        for earlier in self.store.epochs(self.name) if self.store else ():
            if earlier < epoch and earlier not in kept:
                [kept[earlier]] = self.store.read(earlier, self.name, f"{column}/path").values()
        if len(theta) > PATH:
            theta = Fold(len(theta), PATH, seed_from("path"), theta.device)(theta[None].double())[0]
            self.settings["path_error"] = math.sqrt(2 / PATH)  # relative, of a distance, one standard deviation
        kept[epoch] = theta.float().cpu()
        self.arrays[f"{column}/path"] = kept[epoch]
        points = [kept[number].double() for number in sorted(kept) if number <= epoch]
        points = [point for point in points if len(point) == len(theta)]  # before a head grew there were fewer
        steps = [points[i] - points[i - 1] for i in range(max(1, len(points) - 2), len(points))]
        figures = {"distance": float((points[-1] - points[0]).norm())}
        if steps:
            figures["step"] = float(steps[-1].norm())
        if len(steps) == 2:
            figures["step_cosine"] = float(nn.functional.cosine_similarity(steps[0], steps[1], dim=0))
        return figures


class Overlaps:
    """Which share of each gradient lies in the span of the top eigenvectors of the Hessian at the same place.

    Keeps of the quantities no more than these vectors: the graphs of Hessians are large.
    """

    def __init__(self) -> None:
        self._gradients: dict[Expression, Tensor] = {}
        self._tops: dict[Expression, Tensor] = {}

    def note(self, expression: Expression, found: Quantity, wanted: Wanted) -> None:
        if isinstance(found, Vector) and expression.derivative == "grad":
            self._gradients[expression] = found.values
        elif isinstance(found, Hessian) and expression.derivative == "hess":
            self._tops[expression] = found.extremes(wanted)[0].vectors

    def shares(self) -> dict[str, float]:
        """The columns `top_share`."""
        pairs = {gradient: Expression(gradient.of, "hess", gradient.at) for gradient in self._gradients}
        return {
            f"look/{gradient.column}/top_share": share_in(self._tops[hessian], self._gradients[gradient])
            for gradient, hessian in pairs.items()
            if hessian in self._tops
        }


def under(expression: Expression, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as the columns of an expression."""
    return {f"look/{expression.column}/{name}": value for name, value in figures.items()}


def expanded(texts: Sequence[str], view: View, layers: Collection[str]) -> list[Expression]:
    """The expressions that texts and short names mean, each once."""
    found: dict[Expression, None] = {}
    for text in texts:
        parsed = parse(text)
        for expression in [parsed] if isinstance(parsed, Expression) else meant_by(parsed, view, layers):
            if not expression.norms_only:
                found.pop(expression, None)  # of two that are equal, the one that asks for more
            found.setdefault(expression)
    return list(found)


def meant_by(short: str, view: View, layers: Collection[str]) -> list[Expression]:
    """What a short name means for this network."""
    tensors = [name for name, tensor in view.network.named_parameters() if tensor.is_floating_point()]
    loss, theta = Name("loss"), Name("theta")
    if short == "gradients":
        places = [theta, *(Name("theta", name) for name in tensors), *(Name("f", layer) for layer in layers)]
        return [Expression(loss, "grad", (place,), norms_only=True) for place in places]
    if short == "parameters":
        return [Expression(theta), *(Expression(Name("theta", name)) for name in tensors)]
    return [parse(SHORT[short])]


def between_groups(vectors: Tensor, weights: Tensor) -> tuple[dict[str, float], Tensor]:
    """Of the groups' vectors (G, p), each with its number of samples (G,): figures, and the cosines (G, G).

    `cosine` is the mean over pairs of groups, `snr` ‖mean‖² / mean ‖v_g - mean‖², both means weighted by samples.
    """
    weights = (weights / weights.sum()).to(vectors)
    norms = torch.linalg.vector_norm(vectors, dim=1)
    cosines = vectors @ vectors.T / (norms[:, None] * norms)
    mean = weights @ vectors
    noise = float(weights @ (vectors - mean).square().sum(1))
    pairs = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
    return {
        "cosine": float(pairs.mean()) if len(pairs) else math.nan,
        "snr": float(mean.square().sum()) / noise if noise else math.nan,
    }, cosines


def slots_among(view: View) -> dict[str, Tensor]:
    """Places among a view's samples of those that each slot matches, of the slots that match the most of them."""
    layer = slots_of(view.network)
    if layer is None:
        raise UserError("--look-by slot: the network has no slots")
    with torch.no_grad():
        slot = layer.deciding(similarities_in(view.network, view.x)).cpu()
    counts = slot[slot >= 0].bincount(minlength=1)
    most = counts.argsort(descending=True, stable=True)[:MOST_SLOTS].sort().values
    return {f"slot{j}": (slot == j).nonzero()[:, 0] for j in most.tolist() if counts[j]}


def clusters_of(trainer: Trainer, index: Tensor, split: str) -> dict[str, Tensor]:
    """Places among the samples of each cluster that the clusters measure found at the last measured layer."""
    from measures.clusters import Clusters

    measures = [callback for callback in trainer.callbacks if isinstance(callback, Clusters)]
    arrays = measures[0].arrays if measures else {}
    if f"index/{split}" not in arrays:
        raise UserError("--look-by cluster: no clusters were found in this epoch")
    layer = measures[0].settings["layers"][-1]
    labels, known = arrays[f"clusters/{split}/{layer}"].cpu(), arrays[f"index/{split}"].cpu()
    at = torch.full((int(max(index.max(), known.max())) + 1,), -2)
    at[known] = labels.to(at.dtype)
    mine = at[index]
    names = {k: "noise" if k == -1 else f"cluster{k}" for k in mine.unique().tolist() if k >= -1}
    if not names:
        raise UserError("--look-by cluster: none of the samples looked at is among those that clusters were found in")
    return {name: (mine == k).nonzero()[:, 0] for k, name in names.items()}
