"""Look at a run's network: quantities by expression, `--look`, in every measured epoch; also by group of samples.

Letters: N samples, p parameters, G groups.
"""

from __future__ import annotations

import copy
import math
import warnings
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from classifier import loss_of
from measures.derivatives import Loss, View
from measures.layers import example_of
from measures.measure import Measure
from measures.quantities import Hessian, Quantity, Rows, Vector, Wanted, average, quantity
from measures.rank import Fold
from measures.samples import Chosen, labels_in, stratified
from run.errors import UserError, WrongFlag
from run.expressions import SHORT, Expression, Name, parse
from run.ranks import Ranks
from run.seeds import seed_from

if TYPE_CHECKING:
    from datasets import Dataset
    from run.console import Console
    from run.run_folder import RunFolder

SAMPLES = 1000
TRAINING_TRACE_PROBES = 10  # per epoch; with --look-probes P it is 20 P, as with --measure
PATH = 100_000  # parameters up to which a path is kept as it is, and numbers of its sketch beyond
GROUPS = ("class", "cluster", "batch")


class Look(Measure):
    """Logs quantities of the network, `look/NAME/STATISTIC` and `look/NAME/GROUP/STATISTIC`, NAME an expression's.

    The samples are the same in every epoch: at most `samples` of a set, stratified by class from the run's seed. They
    are looked at in eval mode and in float32 (float64 where the network has it); a network of a coarser type is copied.
    `by` are the kinds of groups whose averages are looked at beside that of all samples.

    Eigenvalues, singular values and densities are kept as arrays, `NAME/ARRAY` and `NAME/GROUP/ARRAY`; between the
    groups also `NAME/cosines/KIND` (G × G) of vectors; of `theta` its path, `NAME/path`.
    """

    name = "look"

    def __init__(
        self,
        expressions: Sequence[str],
        *,
        samples: int = SAMPLES,
        by: Sequence[str] = (),
        batch_size: int = 256,
        wanted: Wanted | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**{"sets": ("train",)} | common)
        self.expressions, self.samples, self.by = list(expressions), samples, tuple(by)
        self.batch_size, self.wanted = batch_size, wanted or Wanted()
        self._paths: dict[str, dict[int, Tensor]] = {}
        self._has_told = False

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Look:
        """The measure as the run's flags want it."""
        probes = args.look_probes
        if probes is None:
            probes = Wanted().probes if args.measure else 0
        wanted = Wanted(
            top=args.look_top,
            bottom=args.look_bottom,
            dense=args.look_dense,
            tolerance=args.look_tolerance,
            trace_probes=20 * probes or TRAINING_TRACE_PROBES,
            probes=probes,
            parts=dict(part.split(":") for part in args.look_parts or ()),
            tail=args.look_tail,
            keep=args.look_arrays,
        )
        wanted = wanted._replace(parts={kind: int(k) for kind, k in wanted.parts.items()})
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
            for expression in expanded(args.look, view, layers):
                view.check(expression)
                view.refuse_large(expression, args.look_samples)
        except UserError as error:
            raise WrongFlag(f"argument --look: {error}") from None
        for expression in expanded(args.look, view, layers):
            other = columns.setdefault(expression.column, expression)
            if other != expression:
                raise WrongFlag(f"argument --look: {other} and {expression} have one name: {expression.column}")

    def line(self) -> str:
        """`hess-loss-theta: 13.65 12.89 11.58, trace 129.9 ± 5.3`, of every Hessian."""
        lines = []
        for column in (name.removesuffix("/eig1") for name in self.values if name.endswith("/eig1")):
            if column.count("/") == 1:  # of all samples, not of a group
                top = [self.values[f"{column}/eig{i}"] for i in range(1, 4) if f"{column}/eig{i}" in self.values]
                trace, error = (self.values[f"{column}/{name}"] for name in ("trace", "trace_error"))
                sure = f" ± {error:.2g}" if error > 0 else ""
                shown = " ".join(f"{value:.4g}" for value in top)
                lines.append(f"{column.removeprefix('look/')}: {shown}, trace {trace:.4g}{sure}")
        return "\n".join(lines)

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The figures of all expressions, of all samples and of their groups."""
        [split] = self.sets
        view, groups = self.view_and_groups(trainer, pl_module, split)
        expressions = expanded(self.expressions, view, self.layers or ())
        self.arrays, values = {}, {}
        self.settings = {
            "expressions": {expression.column: str(expression) for expression in expressions},
            "math": {expression.column: expression.math for expression in expressions},
            "groups": {kind: list(members) for kind, members in groups.items()},
            "samples": len(view),
            "dtype": str(view.dtype),
            **{name: value for name, value in self.wanted._asdict().items() if name != "seed"},
        }
        by_expression = {}
        for expression in expressions:
            figures, found = self._of_all(view, expression, epoch)
            by_expression[expression] = found
            figures |= self._of_groups(view, groups, expression, found)
            values |= {f"look/{expression.column}/{name}": value for name, value in figures.items()}
        for expression, found in by_expression.items():
            values |= self._share(expression, found, by_expression)
        return values

    def measure_average(self, trainer: Trainer, modules: Sequence[LightningModule]) -> dict[str, float]:
        """The figures of the quantities' averages over several networks."""
        [split] = self.sets
        views = [self.view_and_groups(trainer, module, split)[0] for module in modules]
        by_expression, values = {}, {}
        self.arrays = {}
        for expression in expanded(self.expressions, views[0], self.layers or ()):
            found = average([self._quantity(view, expression) for view in views])
            figures, arrays = found.found(self.wanted)
            by_expression[expression] = found
            self.arrays |= {f"{expression.column}/{name}": array for name, array in arrays.items()}
            values |= {f"look/{expression.column}/{name}": value for name, value in figures.items()}
        for expression, found in by_expression.items():
            values |= self._share(expression, found, by_expression)
        return values

    def view_and_groups(
        self, trainer: Trainer, pl_module: LightningModule, split: str
    ) -> tuple[View, dict[str, dict[str, Tensor]]]:
        """The network and the samples that are looked at, and by kind the groups' samples by name."""
        batches = self.batches(trainer, split)
        labels, seed = labels_in(batches).cpu(), pl_module.hparams.get("seed")
        self.wanted = self.wanted._replace(seed=seed_from("look", seed))
        index = stratified(labels, self.samples or len(labels), seed_from("look samples", seed, split))
        x = torch.cat([x for _, x in Chosen(batches, index)])
        network = self._precise(pl_module.network)
        view = View(network, x, labels[index], chunk=self._chunk(), keeps_graphs=self._parts == 1,
                    ranks=Ranks.of(trainer), loss=loss_of_training(pl_module))  # fmt: skip
        return view, {kind: self._groups(kind, trainer, labels[index], index, split) for kind in self.by}

    def _chunk(self) -> int | None:
        return None if self._parts == 1 else max(1, 256 // self._parts)

    def _precise(self, network: nn.Module) -> nn.Module:
        """The network, or a copy of it in float32 where its own type is coarser."""
        dtype = next(network.parameters()).dtype
        if dtype.itemsize >= 4:
            return network
        if not self._has_told:
            self._has_told = True
            warnings.warn(
                f"{self.name}: the network is {dtype}; it is looked at in float32.".replace("torch.", ""), stacklevel=2
            )
        return copy.deepcopy(network).float()

    def _groups(self, kind: str, trainer: Trainer, y: Tensor, index: Tensor, split: str) -> dict[str, Tensor]:
        """Places among the samples, by the group's name."""
        if kind == "class":
            return {f"class{c}": (y == c).nonzero()[:, 0] for c in y.unique().tolist()}
        if kind == "batch":
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.wanted.seed))
            return {f"batch{i}": part.sort().values for i, part in enumerate(order.split(self.batch_size))}
        return clusters_of(trainer, index, split)

    def _of_all(self, view: View, expression: Expression, epoch: int) -> tuple[dict[str, float], Quantity]:
        quantity_of_all = self._quantity(view, expression)
        figures, arrays = quantity_of_all.found(self.wanted)
        self.arrays |= {f"{expression.column}/{name}": array for name, array in arrays.items()}
        if not expression.derivative and expression.of.kind == "theta" and not expression.norms_only:
            figures |= self._path(expression.column, quantity_of_all.values, epoch)
        return figures, quantity_of_all

    def _of_groups(
        self, view: View, groups: Mapping[str, Mapping[str, Tensor]], expression: Expression, whole: Quantity
    ) -> dict[str, float]:
        """Each group's figures, and of vectors what the groups have in common."""
        values: dict[str, float] = {}
        if not expression.derivative and expression.of.kind == "theta":
            return values  # no sample has a part in it
        for kind, members in groups.items():
            vectors = []
            for name, places in members.items():
                found = self._quantity(view.of(places), expression)
                figures, arrays = found.found(self.wanted)
                values |= {f"{name}/{statistic}": value for statistic, value in figures.items()}
                self.arrays |= {f"{expression.column}/{name}/{key}": array for key, array in arrays.items()}
                if isinstance(found, Vector | Rows):
                    vectors.append(found.values if isinstance(found, Vector) else found.values.double().mean(0))
            if vectors:
                weights = torch.tensor([len(places) for places in members.values()], dtype=torch.float64)
                more, cosines = between_groups(torch.stack(vectors).double(), weights)
                values |= {f"{name}_{kind}": value for name, value in more.items()}
                self.arrays[f"{expression.column}/cosines/{kind}"] = cosines
        return values

    def _quantity(self, view: View, expression: Expression) -> Quantity:
        return quantity(view, expression, self.wanted)

    def _share(
        self, expression: Expression, found: Quantity, others: Mapping[Expression, Quantity]
    ) -> dict[str, float]:
        """`top_share`: the share of a gradient in the span of the top eigenvectors of the Hessian at the same place."""
        if not (isinstance(found, Vector) and expression.derivative == "grad"):
            return {}
        hessian = others.get(Expression(expression.of, "hess", expression.at))
        if not isinstance(hessian, Hessian):
            return {}
        return {f"look/{expression.column}/top_share": hessian.share(found.values, self.wanted)}

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
        steps = [points[i] - points[i - 1] for i in range(max(1, len(points) - 2), len(points))]
        figures = {"distance": float((points[-1] - points[0]).norm())}
        if steps:
            figures["step"] = float(steps[-1].norm())
        if len(steps) == 2:
            figures["step_cosine"] = float(nn.functional.cosine_similarity(steps[0], steps[1], dim=0))
        return figures


def loss_of_training(pl_module: LightningModule) -> Loss:
    """The loss that the network trains with, of each sample, without label smoothing."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return loss_of(logits, y, pl_module.hparams, reduction="none")

    return loss


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
