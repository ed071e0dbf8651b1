"""What measures there are. Of each: its name, the flags that ask for it, its columns in words, its figures.

The one place where a measure says what it is: the command line, the callbacks of a run, the closing table and the
figures read it here. A measure of one's own is a module in `measures/` and an entry in `MEASURES`; `docs/extending.md`
has one in ten lines. Imports nothing heavy: the command line answers with it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from run.expressions import expression
from run.values import MAX_DIB, MAX_RATE, MAX_SCALE, number, odd, parts, rate

SETS = ("train", "test")
MAX_TOP = 1000  # eigenpairs; more are a matter for whole matrices
MAX_PICTURED = 1000  # images
MAX_DENSE = 20_000  # rows of a matrix that is built: 3.2 GB


class Column(NamedTuple):
    """The columns NAME/LAYER, NAME/SET or NAME/SET/LAYER in words: what an axis says, and in which unit it counts.

    `scale` is the unit's size: minimality is kept in nats and drawn in thousandths. `log` is for every ratio. `closing`
    has the titles of the closing table, by set, or under "" where there is none. What is drawn `aside` stands beside
    another quantity and has no figure of its own.
    """

    text: str
    unit: str = ""
    scale: float = 1.0
    log: bool = False
    closing: Mapping[str, str] = {}
    aside: bool = False

    @property
    def axis(self) -> str:
        """`minimality (10⁻³ nats)`"""
        return f"{self.text} ({self.unit})" if self.unit else self.text


class Flag(NamedTuple):
    """A flag that says how to measure; `options` are those of argparse's `add_argument`."""

    name: str
    default: Any
    help: str
    options: Mapping[str, Any] = {}


@dataclass(frozen=True)
class About:
    """A measure: `callback` is its `module:Class`, `flag` asks for it, and a run measures it unasked if `is_default`.

    `takes` are the options, those of argparse's `add_argument`, of a flag that takes words; else it is a switch.

    Of flags that stand in `instead`, one excludes the others; `shares` are those of other measures that this one heeds,
    too. `remark` makes a line below the closing table from the last row of `metrics.csv`. `figures` are functions,
    `module:name`, which take runs; one that comes in several forms has `variants`, {file name: arguments}. Those of
    `pictures`, by their names in `plots.py`, are drawn into the run's folder, too. Not `by_layer`: its columns are
    named otherwise than MEASURE/LAYER, such as look/NAME/STATISTIC, and no layer's even where a layer is called as a
    statistic.
    """

    name: str
    callback: str
    flag: str
    help: str
    is_default: bool = False
    takes: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    instead: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)
    remark: Callable[[Mapping[str, str]], str] | None = None
    figures: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    by_layer: bool = True

    def is_asked(self, flags: Mapping[str, Any]) -> bool:
        """Whether flags ask for it; one that takes words may come without any."""
        return flags[self.flag] is not None and flags[self.flag] is not False


def equiseparation(row: Mapping[str, str]) -> str:
    """How log NC1 falls over the layers, where there are enough of them to say."""
    fits = []
    for split in SETS:
        r, slope = (float(row.get(f"equiseparation/{split}/{figure}", "nan")) for figure in ("r", "slope"))
        if math.isfinite(r):  # else there are fewer than three layers, or nothing changes over them
            fits.append(f"{split} r = {r:.3f}, slope {slope:.3f}")
    return "equi-separation, log NC1 over the layers: " + "; ".join(fits) if fits else ""


def eigenvalues(row: Mapping[str, Any]) -> str:
    """The largest eigenvalues of every Hessian of all samples, with its trace."""
    lines = []
    for name in (column.removesuffix("/eig1") for column in row if column.endswith("/eig1") and column.count("/") == 2):
        top = ", ".join(f"{float(row[f'{name}/eig{i}']):.4g}" for i in range(1, 4) if f"{name}/eig{i}" in row)
        trace, error = (float(row[f"{name}/{figure}"]) for figure in ("trace", "trace_error"))
        lines.append(f"{name}: largest eigenvalues {top}, trace {trace:.4g}{f' ± {error:.2g}' if error > 0 else ''}")
    return "\n".join(lines)


def curvatures(row: Mapping[str, str]) -> str:
    """The second derivative of the loss along the directions of its landscape."""
    names = [name.split("/")[1] for name in row if name.startswith("landscape/") and name.endswith("/curvature")]
    found = ", ".join(f"{name} {float(row[f'landscape/{name}/curvature']):.4g}" for name in names)
    return f"landscape: curvature along {found}" if found else ""


def readability(row: Mapping[str, str]) -> str:
    """How well the input gradients of the classes, of hidden units and of slots can be read."""

    def on_both(score: str, end: str = "") -> str:
        return ", ".join(f"{float(row[f'views/{score}/{kind}{end}']):.3g} on {kind}" for kind in ("noise", "images"))

    if "views/separation/noise" not in row:
        return ""
    scores = [score for score in ("stability", "separation", "roughness") if f"views/{score}/noise" in row]
    lines = [f"views of classes: {'; '.join(f'{score} {on_both(score)}' for score in scores)}"]
    start = "views/units/stability/noise/"
    places = [name.removeprefix(start) for name in row if name.startswith(start)]
    lines += [f"views of units of {place}: stability {on_both('units/stability', f'/{place}')}" for place in places]
    if "views/slots/stability/noise" in row:
        lines.append(f"views of slots: stability {on_both('slots/stability')}")
    return "\n".join(lines)


RANKS = ("numerical", "stable", "effective")


def titled(title: str) -> dict[str, str]:
    """The titles of a closing table for a column of the test set, and of the train set where that is measured."""
    return {"test": title, "train": f"{title} train"}


MEASURES = (
    About(
        name="nc1",
        callback="measures.neural_collapse:NeuralCollapse",
        flag="nc",
        help="neural collapse, NC1",
        is_default=True,
        columns={
            "nc1": Column("NC1 = tr(Σ_W Σ_B⁺)", log=True, closing={"train": "NC1 train", "test": "NC1 test"}),
            "nc1_chance": Column("NC1 under permuted labels", log=True, aside=True),
        },
        remark=equiseparation,
        figures=("figures.collapse:nc1_over_epochs", "figures.collapse:nc1_over_depth"),
    ),
    About(
        name="rank",
        callback="measures.rank:Rank",
        flag="rank",
        help="rank of activations and class means",
        columns={
            **{f"rank/{kind}": Column(f"{kind} rank", log=True, closing={"train": f"{kind} rank"}) for kind in RANKS},
            **{f"rank/means_{kind}": Column(f"{kind} rank of class means", log=True) for kind in RANKS},
        },
        figures=("figures.rank:rank_over_epochs", "figures.rank:rank_over_depth"),
    ),
    About(
        name="dib",
        callback="measures.decodable_information:DecodableInformation",
        flag="dib",
        help="decodable information",
        is_default=True,
        flags=(
            Flag("dib_layers", None, "layers for DIB, of those measured (else all)",
                 {"nargs": "+", "metavar": "PATTERN"}),
            Flag("dib_steps", 980, "steps that train the heads, rounded up to whole epochs over the samples",
                 {"type": number(int, 1, MAX_DIB), "metavar": "N"}),
            Flag("dib_epochs", None, "epochs that train the heads, instead of steps",
                 {"type": number(int, 1, MAX_DIB), "metavar": "E"}),
            Flag("dib_lr", 3e-3, "learning rate of the heads, falls to 1/100", {"type": rate(), "metavar": "RATE"}),
            Flag("dib_batch_size", 512, "samples a step of the heads", {"type": number(int, 2), "metavar": "N"}),
            Flag("dib_optimizer", "adam", "optimizer of the heads", {"choices": ("sgd", "adam")}),
            Flag("dib_init", "reset", "heads start anew or from the network's own decoder",
                 {"choices": ("reset", "copy")}),
            Flag("dib_save", False, "keep the heads' weights under checkpoints/"),
        ),
        instead=("dib_steps", "dib_epochs"),
        columns={
            "dib/loss": Column("cross-entropy of the heads", "nats"),
            "dib/minimality": Column("minimality", "10⁻³ nats", scale=1e-3, closing={"": "DIB minimality"}),
            "dib/sufficiency": Column("sufficiency", "nats"),
        },
        figures=(
            "figures.decodable:minimality_over_epochs",
            "figures.decodable:sufficiency_minimality",
            "figures.decodable:head_losses",
            "figures.decodable:nc1_against_minimality",
        ),
    ),
    About(
        name="clusters",
        callback="measures.clusters:Clusters",
        flag="clusters",
        help="clusters of activations, and whether they are the classes",
        flags=(
            Flag("act_threshold", 0.0, "clusters: features whose mean size exceeds it in some class are kept",
                 {"type": number(float, 0, MAX_RATE), "metavar": "X"}),
            Flag("filter_class", None, "clusters: choose features by this class alone (else by all)",
                 {"type": number(int, 0), "metavar": "C"}),
            Flag("energy", 0.9, "clusters: directions are kept until they hold more than this share of the energy",
                 {"type": number(float, 0, 1, open_low=True, open_high=True), "metavar": "E"}),
            Flag("max_directions", 256, "clusters: and no more than these",
                 {"type": number(int, 1), "metavar": "K"}),
            Flag("min_cluster_size", 50, "samples of the smallest cluster", {"type": number(int, 2), "metavar": "N"}),
            Flag("cluster_samples", 10_000, "samples of a set in which clusters are looked for",
                 {"type": number(int, 4), "metavar": "N"}),
            Flag("cluster_sets", ["test"], "sets whose clusters are looked for",
                 {"nargs": "+", "choices": ("train", "test")}),
            Flag("tsne", False, "clusters: draw a map of each layer by t-SNE, which takes the longest"),
            Flag("save_activations", False, "clusters: keep the samples' activations, a file for each layer and epoch"),
            Flag("activations_format", "npz", "format of these files", {"choices": ("npz", "mat")}),
        ),
        columns={
            "clusters/features": Column("features that fire", aside=True),
            "clusters/directions": Column("directions kept"),
            "clusters/energy": Column("energy of the directions kept", aside=True),
            "clusters/num_clusters": Column("clusters", aside=True),
            "clusters/coverage": Column("coverage", closing=titled("coverage")),
            "clusters/purity": Column("purity of clustered samples", closing=titled("purity")),
            "clusters/purity_all": Column("purity, noise as wrong", closing=titled("purity_all")),
            "clusters/homogeneity": Column("homogeneity"),
            "clusters/completeness": Column("completeness", aside=True),
            "clusters/ami": Column("adjusted mutual information"),
            "clusters/alignment": Column("alignment of the classes' subspaces"),
            "cka": Column("CKA with the next layer"),
        },
        figures=(
            "figures.clusters:clusters_over_epochs",
            "figures.clusters:directions_over_epochs",
            "figures.clusters:singular_values",
            "figures.clusters:alignment_of_classes",
            "figures.clusters:cka_of_layers",
            "figures.similarity:cka_between_epochs",
            "figures.similarity:cka_between_runs",
            "figures.clusters:tsne_maps",
        ),
    ),
    About(
        name="slots",
        callback="measures.matches:Matches",
        flag="slots",
        help="which samples slots match, and how right they are (on with --head slots)",
        flags=(
            Flag("ood", None, "slots: other data whose matched share to report, of samples of the same shape",
                 {"nargs": "+", "metavar": "DATA"}),
            Flag("slot_groups", False, "slots: NC1 with slots as classes, and how clusters agree with slots"),
        ),
        columns={
            "slots/matched": Column("share that some slot matches"),
            "slots/acc_pooled": Column("accuracy by scores", aside=True),
            "slots/acc_pooled_on_matched": Column("accuracy by scores where a slot matches", aside=True),
            "slots/acc_by_slot": Column("accuracy of the matching slot", aside=True),
            "slots/acc_predict": Column("accuracy of slots, else scores", aside=True),
            "nc1_slots": Column("NC1 with slots as classes", log=True),
            "ami_slots": Column("adjusted mutual information of clusters and slots"),
        },
        figures=(
            "figures.slots:slots_over_epochs",
            "figures.slots:slot_pictures",
            "figures.slots:accuracy_by_slots",
            "figures.slots:uncovered_samples",
        ),
    ),
    About(
        name="look",
        callback="measures.look:Look",
        flag="look",
        help="quantities of the network: hessian, gradients, jacobian, ntk, parameters, loss, or expressions such as "
        "'hess(loss, theta(fc))' and 'grad(f(output), f(input))'",
        takes={"nargs": "+", "type": expression, "metavar": "EXPRESSION"},
        flags=(
            Flag("look_by", None, "look: beside all samples, at the average over each of these groups",
                 {"nargs": "+", "choices": ("class", "cluster", "batch", "slot")}),
            Flag("look_set", "train", "set whose samples are looked at", {"choices": SETS}),
            Flag("look_samples", 1000, "how many of them, by class as in the set; 0: all",
                 {"type": number(int, 0), "metavar": "N"}),
            Flag("look_top", 5, "largest eigenvalues or singular values to look at",
                 {"type": number(int, 1, MAX_TOP), "metavar": "K"}),
            Flag("look_bottom", None, "least eigenvalues to look at (else 1 with --measure; none while training, where "
                 "they can take as long as all of the rest)", {"type": number(int, 0, MAX_TOP), "metavar": "K"}),
            Flag("look_dense", 2000, "matrices up to this many rows are built and solved exactly",
                 {"type": number(int, 0, MAX_DENSE), "metavar": "ROWS"}),
            Flag("look_tolerance", 1e-3, "residual of eigenvalues, relative to the largest",
                 {"type": number(float, 1e-6, 0.1), "metavar": "TOL"}),
            Flag("look_probes", None, "random vectors for spectral densities, 80 products each, and 20 times as many "
                 "for traces (else 5 with --measure; while training, the density that the eigenvalues' search saw, "
                 "and 10 for traces)", {"type": number(int, 1, MAX_TOP), "metavar": "P"}),
            Flag("look_parts", None, "parts of matrices: pca:K components, nmf:K non-negative factors",
                 {"nargs": "+", "type": parts, "metavar": "PART"}),
            Flag("look_tail", False, "look: fit a power law to the tail of weight matrices' spectra"),
            Flag("look_arrays", False, "look: keep eigenvectors and matrices too"),
        ),
        remark=eigenvalues,
        figures=(
            "figures.look:spectra",
            "figures.look:eigenvalues_over_epochs",
            "figures.look_groups:spectra_by_group",
            "figures.look_groups:spectra_of_average",
            "figures.look:look_over_epochs",
            "figures.look_matrices:matrices",
            "figures.look_matrices:gradient_cosines",
            "figures.look_matrices:jacobian_singular_values",
            "figures.look:ntk_spectrum",
            "figures.look_matrices:path",
        ),
        by_layer=False,
    ),
    About(
        name="landscape",
        callback="measures.landscape:Landscape",
        flag="landscape",
        help="loss along eigenvectors, the gradient and a random direction, and over a plane of two; with --measure "
        "of several checkpoints also around their path",
        flags=(
            Flag("landscape_span", 1.0, "how far to go on either side, in lengths of each direction",
                 {"type": number(float, 0, MAX_SCALE, open_low=True), "metavar": "A"}),
            Flag("landscape_steps", 41, "points along a direction", {"type": odd(3, 1001), "metavar": "N"}),
            Flag("landscape_map", 21, "points along each side of a map; 0: none",
                 {"type": odd(3, 301, or_none=True), "metavar": "N"}),
        ),
        shares=("look_set", "look_samples", "look_dense", "look_tolerance"),
        columns={"landscape": Column("loss around the network")},
        remark=curvatures,
        figures=("figures.landscape:landscape_curves", "figures.landscape:landscape_maps"),
    ),
    About(
        name="perturb",
        callback="measures.perturb:Perturb",
        flag="perturb",
        help="loss and accuracy with noise on the input or on a layer's output, and without each of its channels; "
        "without names: the input and the measured layers",
        takes={"nargs": "*", "metavar": "LAYER"},
        flags=(
            Flag("perturb_noise", [0.1, 0.2, 0.5, 1.0, 2.0, 5.0], "sizes of the noise, relative to the root mean "
                 "square of what it is added to; 0 and 1 are always among them",
                 {"nargs": "+", "type": number(float, 0, MAX_SCALE), "metavar": "S"}),
            Flag("perturb_draws", 5, "draws of the noise that are averaged",
                 {"type": number(int, 1, MAX_TOP), "metavar": "R"}),
            Flag("perturb_channels", True, "perturb: zero each channel in turn, too"),
        ),
        shares=("look_set", "look_samples"),
        columns={
            "perturb/noise_drop": Column("accuracy lost to noise of the activations' size", "%", scale=0.01,
                                         closing={"": "lost to noise"}),
            "perturb/noise_rise": Column("rise of the loss by noise of the activations' size", aside=True),
            "perturb/channel_drop": Column("accuracy lost without a channel, mean", "%", scale=0.01, aside=True),
            "perturb/channel_rise": Column("rise of the loss without a channel, mean", aside=True),
            "perturb/channel_worst_drop": Column("accuracy lost without the most needed channel", "%", scale=0.01,
                                                 closing={"": "lost to a channel"}),
            "perturb/channel_worst_rise": Column("rise of the loss without the most needed channel", aside=True),
        },
        figures=("figures.landscape:perturbation_curves", "figures.landscape:channel_importance"),
    ),
    About(
        name="views",
        callback="measures.views:Views",
        flag="views",
        help="gradients by the input, to be looked at: of each class on images and noise, of hidden units and slots; "
        "and the first layer's filters",
        flags=(
            Flag("views_images", 60, "views: images of the test set, the first ones, that are pictured; 0: none",
                 {"type": number(int, 0, MAX_PICTURED), "metavar": "N"}),
            Flag("views_samples", 64, "inputs of noise, and images, that the scores of views are means over",
                 {"type": number(int, 2), "metavar": "N"}),
            Flag("views_layers", None, "layers whose units are viewed (else the last measured one)",
                 {"nargs": "+", "metavar": "LAYER"}),
            Flag("views_units", 60, "units of a layer, and slots, that are viewed, at even steps; 0: all",
                 {"type": number(int, 0), "metavar": "N"}),
        ),
        columns={
            "views/stability/*": Column("stability of gradients"),
            "views/agreement": Column("agreement of noise and images"),
            "views/separation/*": Column("separation of classes"),
            "views/roughness/*": Column("roughness of gradients"),
        },
        remark=readability,
        figures=(
            "figures.views:views_over_epochs",
            "figures.views:views_images",
            "figures.views:views_classes",
            "figures.views:views_units",
            "figures.views:views_filters",
        ),
        pictures=("views_images", "views_classes", "views_units", "views_filters"),
        by_layer=False,
    ),
)  # fmt: skip


def found(reference: str) -> Any:
    """The class or function that `module:name` means, imported only now."""
    module, _, name = reference.partition(":")
    within = __package__.removesuffix("run")  # empty in a checkout
    return getattr(importlib.import_module(within + module), name)


def column(name: str) -> tuple[Column, str]:
    """What a family of columns, as `nc1/test` or `dib/minimality`, is in words, and its set if its name ends in one.

    One that no measure here has is known by its own name.
    """
    known = {name: column for about in MEASURES for name, column in about.columns.items()}
    family, _, split = name.rpartition("/")
    if split not in SETS:
        family, split = name, ""
    return known.get(family, Column(family, closing={split: name.replace("/", " ")})), split


def measure_of(name: str) -> About | None:
    """The measure that a family of columns belongs to, if it is one of these."""
    family = name.rpartition("/")[0] if name.rpartition("/")[2] in SETS else name
    owner = next((about for about in MEASURES if not about.by_layer and name.startswith(f"{about.name}/")), None)
    return owner or next((about for about in MEASURES if family in about.columns), None)


def measure_and_layer(column: str, layers: Container[str]) -> tuple[str, str] | None:
    """What a column MEASURE/LAYER is of; None for one that is of no layer.

    >>> measure_and_layer("nc1/test/norm", ["norm"]), measure_and_layer("look/grad-loss-theta/norm", ["norm"])
    (('nc1/test', 'norm'), None)
    """
    measure, _, layer = column.rpartition("/")
    owner = measure_of(measure)
    return (measure, layer) if measure and layer in layers and (owner is None or owner.by_layer) else None
