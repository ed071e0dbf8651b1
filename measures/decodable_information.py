"""Decodable information (DIB): how much of a sample's identity the decoder after a layer can still read from it.

Within every class the samples are numbered at random and the number is written in base C; each digit is a new label
of the sample. For every layer, one fresh copy of the network's decoder per digit (a head) learns that label from the
frozen layer's activations. What the heads learn beyond what the class alone tells of the digits is the layer's
minimality, in nats. How they are trained stands in `heads.py`.

Letters: N samples, B batch, C classes, K digits (N_D in the paper), E head epochs, A heads that are trained together.
"""

from __future__ import annotations

import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import Dataset, conditional_entropies, decodable_labels, digit_entropies
from measures.engines import ENGINES, fastest
from measures.heads import Budget, Family, Head, Samples, bundles, groups, head_epochs, own_copy, parts, train
from measures.layers import matching
from measures.measure import Measure
from measures.passes import untouched
from measures.teams import shared_out
from run.checkpoints import save_whole
from run.errors import UserError, WrongFlag
from run.ranks import ALONE, Ranks
from run.record import EpochTable
from run.seeds import seed_from

if TYPE_CHECKING:
    from run.console import Console
    from run.run_folder import RunFolder

COLUMNS = ("epoch", "layer", "digit", "head_epoch", "cross_entropy")
RARE = 1e-12  # frequency given to a value that a digit never takes: its logarithm must be finite


@dataclass(frozen=True)
class DIB:
    """The heads' cross-entropies in nats, and what follows from them.

    `curves[layer]` is float64 (E + 1, K): over the whole training set, after 0, 1, … E head epochs. A head
    that diverged is nan there, and so is one left out by `heads`; `states` holds the weights, where they were
    asked for, on the first rank.
    """

    digit_entropies: Tensor  # H(Y_k), float64 (K,): what a head leaves that ignores its layer
    conditional_entropies: Tensor  # H(Y_k | Y), float64 (K,): what a head leaves that knows the class and no more
    curves: dict[str, Tensor]
    states: dict[Head, dict[str, Tensor]]

    @property
    def loss(self) -> dict[str, float]:
        """loss(l) = (1/K) Σ_k CE_k after the last head epoch."""
        return {layer: curve[-1].mean().item() for layer, curve in self.curves.items()}

    @property
    def minimality(self) -> dict[str, float]:
        """minimality(l) = (1/K) Σ_k (H(Y_k | Y) − CE_k): 0 where only the class is read, low is minimal."""
        entropy = self.conditional_entropies.mean().item()
        return {layer: entropy - loss for layer, loss in self.loss.items()}

    @property
    def excess(self) -> dict[str, float]:
        """(1/K) Σ_k (CE_k − H(Y_k)): above 0 the heads do worse than those that ignore their layer."""
        entropy = self.digit_entropies.mean().item()
        return {layer: loss - entropy for layer, loss in self.loss.items()}


def decodable_information(
    network: nn.Module,
    inputs: Any,
    labels: Tensor,
    num_classes: int,
    *,
    layers: Sequence[str] | None = None,
    heads: Iterable[Head] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    learning_rate: float,
    batch_size: int,
    optimizer: str = "adam",
    init: str = "reset",
    seed: int = 0,
    epoch: int = 0,
    cache_bytes: int | None = None,
    autocast: torch.dtype | None = None,
    engine: str | None = None,
    keep_states: bool = False,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> DIB:
    """What fresh decoders after each layer learn about each digit of the samples' indices in their classes.

    For layer l the encoder E = blocks up to l is frozen (eval mode, no gradient). Head k is a reset copy of the
    decoder D = blocks after l, trained on digit k; CE_k is its cross-entropy over all samples, in eval mode.

        loss(l) = (1/K) Σ_k CE_k        minimality(l) = (1/K) Σ_k (H(Y_k | Y) − CE_k)

    with H(Y_k | Y) the empirical entropy that the class leaves, all in nats: `conditional_entropies` has an example.
    0 is a layer that tells the class alone. One that tells nothing, not even that, reads −I(Y; Y_k), which is 0
    for classes of equal size. A reset head's last bias starts at log p(Y_k), what there is to know without a layer;
    where the last map has no bias, log p(Y_k) is added to the logits for good. The rate falls exponentially to 1/100.
    The samples' numbers depend on the seed alone, minibatches on seed, epoch and head epoch alone, a head's random
    numbers on seed, epoch, layer and digit alone: which other heads are trained changes no number. Nothing outside
    is touched.

    Deviation from the paper's Algorithm 1: the samples of a class are numbered in a random order. Files have
    neighbours that resemble each other, and heads would read a sample's place in the file.

    Args:
        network: has `layers`, `feature_extractor(x)`, `get_encoder_decoder(layer)` and, if its modules' own
            `reset_parameters()` are not how it starts, `reset(module)`.
        inputs: gives the samples for a LongTensor of indices: a tensor, or `datasets.Batches`.
        heads: the (layer, digit) pairs to train (default all).
        epochs: of the heads over the samples; or else `steps`, which are rounded up to whole epochs.
        init: "copy" starts from the network's own decoder as it is, last bias and statistics included.
        epoch: the network's; every one draws its own heads and minibatches.
        cache_bytes: for activations (default: a quarter of the free memory). Layers that do not fit are
            computed again for every minibatch, all of them by one forward pass.
        autocast: dtype for the heads' forward passes, else that of their weights (at least float32). The
            encoder runs under the caller's autocast.
        engine: a key of ENGINES for all heads instead of the fastest one for each; numbers agree to rounding.
        keep_states: return the heads' weights as well, on the CPU.
        progress: is told (steps done, steps in all) after every training step.
        ranks: the processes that share out the heads, and where these do not keep all of them busy, the samples
            (see `teams.py`). All need all inputs, and get all values.
    """
    num_digits, epochs = digits_and_epochs(labels, num_classes, batch_size, epochs, steps)
    if num_digits == 0:
        raise UserError("No class has two samples, so DIB has no index to decode; take more samples.")
    budget = Budget(epochs, learning_rate, batch_size, optimizer, init, seed, epoch)
    layers = tuple(network.layers if layers is None else layers)
    device = next(network.parameters()).device
    labels = labels.to(device)
    digits = numbered_at_random(labels, num_classes, seed)  # (N, K)
    wanted = {(layer, k) for layer in layers for k in range(num_digits)} if heads is None else set(heads)
    courses: dict[Head, Tensor] = {}
    states: dict[Head, dict[str, Tensor]] = {}
    with torch.inference_mode(False), untouched(network):
        samples = Samples(network, inputs, digits.T.contiguous())
        log_p = log_frequencies(digits, num_classes)
        own = own_copy(network)
        mine, team = shared_out(own, samples, wanted, budget, ranks, cache_bytes)
        samples.team = team
        families = [Family(own, samples.pair, heads, log_p, budget) for heads in by_layer(layers, mine)]
        plan = bundles(groups(families, engine), samples, cache_bytes)
        advance = counter(progress, len(plan) * epochs * len(parts(len(digits), batch_size)))
        for bundle, keep in plan:
            samples.keep([family.layer for group in bundle for family in group] if keep else [])
            stacks = [ENGINES[engine or fastest(group, team)](group, autocast, team) for group in bundle]
            losses = train(stacks, samples, budget, advance)  # (E + 1, A)
            courses |= zip((head for heads in stacks for head in heads.heads), losses.T, strict=True)
            if keep_states and team.is_first:
                states |= {head: state for heads in stacks for head, state in heads.states().items()}

    def course(head: Head) -> Tensor:
        """(E + 1,): this rank's terms; nan for a head that nobody trains, zeros for one that other ranks do."""
        if head in courses:
            return courses[head]
        return torch.full((epochs + 1,), 0.0 if head in wanted else torch.nan, dtype=torch.float64)

    curves = {layer: ranks.sum(torch.stack([course((layer, k)) for k in range(num_digits)], 1)) for layer in layers}
    warn_of_diverged(curves, wanted)
    if keep_states:
        states = {head: state for of_rank in ranks.gathered(states) for head, state in of_rank.items()}
    entropies = digit_entropies(digits, num_classes), conditional_entropies(digits, labels, num_classes)
    return DIB(*(entropy.cpu() for entropy in entropies), curves, states)


def numbered_at_random(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """The decodable labels (N, K) of samples that are numbered within their class in an order of the seed's."""
    generator = torch.Generator().manual_seed(seed_from("dib numbers", seed))
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    in_order = decodable_labels(labels[order], num_classes)
    digits = torch.empty_like(in_order)
    digits[order] = in_order
    return digits


def digits_and_epochs(
    labels: Tensor, num_classes: int, batch_size: int, epochs: int | None = None, steps: int | None = None
) -> tuple[int, int]:
    """How many heads a layer has, one per digit, and how many epochs they train. No digit: no class has two samples."""
    num_digits = decodable_labels(labels, num_classes).shape[1]
    return num_digits, head_epochs(len(labels), batch_size, epochs, steps)


def sufficiency(cross_entropy: float, labels: Tensor, num_classes: int) -> float:
    """H(Y) − CE in nats, CE being the network's own mean cross-entropy over the samples with these labels."""
    return digit_entropies(labels[:, None], num_classes).item() - cross_entropy


def by_layer(layers: Sequence[str], heads: set[Head]) -> list[list[Head]]:
    """The heads of each layer that has any, in the order of layers and digits."""
    together = [sorted(head for head in heads if head[0] == layer) for layer in layers]
    return [heads for heads in together if heads]


def log_frequencies(digits: Tensor, num_classes: int) -> Tensor:
    """log p(Y_k = c), float64 (K, C), of digits (N, K); finite also for values that never occur."""
    counts = torch.stack([digit.bincount(minlength=num_classes) for digit in digits.T])
    return (counts.double() / len(digits)).clamp_min(RARE).log()


def counter(progress: Callable[[int, int], None] | None, num_steps: int) -> Callable[[], None]:
    """A function to call after every step."""
    if progress is None:
        return lambda: None
    steps = iter(range(1, num_steps + 1))
    return lambda: progress(next(steps), num_steps)


def warn_of_diverged(curves: dict[str, Tensor], heads: Iterable[Head]) -> None:
    """One warning that names the heads whose cross-entropy is not a number at the end."""
    diverged = [f"{layer} digit {k}" for layer, k in sorted(heads) if curves[layer][-1, k].isnan()]
    if diverged:
        warnings.warn(f"DIB heads diverged and read nan: {', '.join(diverged)}. A lower rate may help.", stacklevel=3)


class DecodableInformation(Measure):
    """Logs `dib/loss/LAYER`, `dib/minimality/LAYER` and `dib/sufficiency/SET`; the heads learn the training set.

    `budget` is what `decodable_information` needs to know of the heads. The cross-entropy of every head after every
    head epoch becomes a line in `table`; their weights go into the folder `states`, if one is given. `say` is told
    what a run will cost.
    """

    name = "dib"

    def __init__(
        self,
        budget: Mapping[str, Any],
        *,
        table: EpochTable | None = None,
        states: Path | None = None,
        say: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.budget, self.table, self.states, self.say = dict(budget), table, states, say
        self._is_warned = False

    @classmethod
    def from_flags(
        cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console
    ) -> DecodableInformation:
        """As a run's flags want it, with a table of all heads' losses in the run's folder."""
        warn_of_other_meaning(folder)
        heads = {
            "layers": matching(args.dib_layers, common["layers"], "--dib-layers"),
            "table": folder.table("dib.csv", COLUMNS),
            "states": folder.path / "checkpoints" if args.dib_save else None,
            "say": console.say,
        }
        return cls(budget(args), **common | heads)

    @staticmethod
    def plan(args: Namespace, dataset: Dataset) -> dict[str, Any]:
        """How many heads there are at a layer, and for how many epochs they train; refuses data without any."""
        labels = dataset.train.labels
        length = {name: budget(args)[name] for name in ("batch_size", "epochs", "steps")}
        digits, epochs = digits_and_epochs(labels, dataset.num_classes, **length)
        if digits == 0:
            lack = f"no class has two of the {len(labels)} training samples, so DIB has nothing to tell apart"
            if args.limit is None:
                raise UserError(f"-d/--dataset {args.dataset}: {lack}: leave it out with --no-dib")
            raise WrongFlag(f"argument --limit: {lack}: raise it, or leave DIB out with --no-dib")
        return {"dib_heads": digits, "dib_head_epochs": epochs}

    @staticmethod
    def refuse_layers(args: Namespace, layers: Collection[str], network: nn.Module, shape: Sequence[int]) -> None:
        """Heads need a layer that splits the network: a measured block."""
        blocks = [layer for layer in layers if layer in network.layers]
        if not blocks:
            raise WrongFlag(
                f"argument --layers: DIB needs layers that split the network, {', '.join(network.layers)}, and none of "
                "these is named: name one, or leave DIB out with --no-dib"
            )
        matching(args.dib_layers, blocks, "--dib-layers")

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Train this epoch's heads."""
        start = time.perf_counter()
        dib = self._heads(trainer, pl_module, epoch)
        self._warn_of_unfinished(dib, len(self.batches(trainer, "train").labels), pl_module.hparams.num_classes, epoch)
        if trainer.is_global_zero:
            self._write(dib, epoch)
            self._tell_cost(time.perf_counter() - start, epoch)
        loss = {f"dib/loss/{layer}": value for layer, value in dib.loss.items()}
        minimality = {f"dib/minimality/{layer}": value for layer, value in dib.minimality.items()}
        return loss | minimality | self._sufficiency(trainer, pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say, before anything is trained, how much there will be to train."""
        if self.say and stage == "fit":
            layers = self.splits(pl_module)
            labels = trainer.datamodule.dataset.train.labels
            length = {name: self.budget.get(name) for name in ("batch_size", "epochs", "steps")}
            digits, epochs = digits_and_epochs(labels, pl_module.hparams.num_classes, **length)
            times = "every epoch" if self.epochs is None else f"{len(self.epochs)} of {trainer.max_epochs + 1} epochs"
            self.say(
                f"DIB      {len(layers)} layers × {digits} heads × {epochs} head epochs at {times}; "
                "cheaper with --dib-layers, --dib-steps, --measure-at, --no-dib"
            )

    def splits(self, pl_module: LightningModule) -> list[str]:
        """Those of the layers at which the network can be split."""
        blocks = pl_module.network.layers
        return [layer for layer in self.layers or blocks if layer in blocks]

    def _warn_of_unfinished(self, dib: DIB, num_samples: int, num_classes: int, epoch: int) -> None:
        """Once a run: which heads had too little training, as they do worse than heads that ignore their layer.

        Behind a layer that tells nothing, heads end within (C − 1) / 2B nats of the entropy: that much frequencies
        miss that were counted on one minibatch of B samples, and the falling rate averages over many.
        """
        noise = (num_classes - 1) / (2 * min(self.budget["batch_size"], num_samples))
        unfinished = {layer: excess for layer, excess in dib.excess.items() if excess > noise}
        if unfinished and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"DIB heads trained too short at epoch {epoch}: those of {', '.join(unfinished)} end up to "
                f"{max(unfinished.values()):.2g} nats above the entropy of their labels, more than if they ignored "
                "the layer. Raise --dib-steps (or --dib-epochs), or lower --dib-batch-size.",
                stacklevel=2,
            )

    def _tell_cost(self, seconds: float, epoch: int) -> None:
        """After the first measurement: how long the others will take."""
        left = sum(due > epoch for due in self.epochs or ())
        if self.say and left:
            self.say(
                f"DIB      took {seconds:.3g} s at epoch {epoch}: about {seconds * left:.3g} s for the {left} to come"
            )
        self.say = None

    def _heads(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> DIB:
        precision, hparams = trainer.precision_plugin, pl_module.hparams
        batches = self.batches(trainer, "train")
        with precision.forward_context():
            return decodable_information(
                pl_module.network,
                Converted(batches, precision.convert_input),
                batches.labels,
                hparams.num_classes,
                layers=self.splits(pl_module),
                seed=hparams.seed,
                epoch=epoch,
                cache_bytes=self.cache_bytes,
                keep_states=self.states is not None,
                progress=self._bar(),
                ranks=Ranks.of(trainer),
                **self.budget,
            )

    def _sufficiency(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        values, precision = {}, trainer.precision_plugin
        for split in self.sets:
            batches, total = self.batches(trainer, split), 0.0
            for x, y in self.shown(batches, split):
                with precision.forward_context():
                    logits = pl_module.network(precision.convert_input(x))
                total = total + F.cross_entropy(logits.double(), y, reduction="sum")
            cross_entropy = float(Ranks.of(trainer).sum(total)) / len(batches.labels)
            values[f"dib/sufficiency/{split}"] = sufficiency(
                cross_entropy, batches.labels, pl_module.hparams.num_classes
            )
        return values

    def _write(self, dib: DIB, epoch: int) -> None:
        if self.table is not None:
            lines = (
                (epoch, layer, digit, head_epoch, value)
                for layer, curve in dib.curves.items()
                for digit, course in enumerate(curve.T.tolist())
                for head_epoch, value in enumerate(course)
            )
            self.table.add(*(dict(zip(COLUMNS, line, strict=True)) for line in lines))
        if self.states is not None:
            heads = {f"{layer}/{digit}": state for (layer, digit), state in dib.states.items()}
            save_whole(self.states / f"dib_epoch{epoch:04d}.ckpt", heads)

    def _bar(self) -> Callable[[int, int], None] | None:
        """Moves a progress bar by a step whenever it is called."""
        if self.progress is None:
            return None
        bar: list[Iterator] = []

        def move(done: int, total: int) -> None:
            if done == 1:
                bar.append(self.progress(range(total), self.name))
                next(bar[0])
            next(bar[0], None)

        return move


def budget(args: Namespace) -> dict[str, Any]:
    """How the heads are trained, by the names of `decodable_information`'s arguments."""
    return {
        "epochs": args.dib_epochs,
        "steps": args.dib_steps,
        "learning_rate": args.dib_lr,
        "batch_size": args.dib_batch_size,
        "optimizer": args.dib_optimizer,
        "init": args.dib_init,
    }


def warn_of_other_meaning(folder: RunFolder) -> None:
    """A run that began before minimality had its present meaning does not go on silently with the other one."""
    if folder.checkpoint and "dib_head_epochs" not in (folder.before or {}).get("provenance", {}):
        warnings.warn(
            f"From epoch {folder.epoch + 1} on the dib/ columns of {folder.path} mean something else than before: "
            "samples are numbered at random and minimality counts from H(Y_k | Y). To compare epochs, start anew.",
            stacklevel=3,
        )


class Converted:
    """Inputs in the number format of the network: `inputs[indices]`, converted."""

    def __init__(self, inputs: Any, convert: Callable[[Tensor], Tensor]) -> None:
        self.inputs, self.convert = inputs, convert

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.convert(self.inputs[indices])
