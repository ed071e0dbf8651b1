"""Matches of slots: how many samples one knows, of which sets, and how right it is about them.

Letters: N samples, B batch, S slots, n of them shown.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from datasets import Batches, load
from measures.grouping import agreement
from measures.measure import Measure
from measures.neural_collapse import neural_collapse
from run.errors import UserError, WrongFlag
from run.seeds import seed_from
from slots import Slots, similarities_in, slots_of

if TYPE_CHECKING:
    from datasets import Dataset
    from run.console import Console
    from run.run_folder import RunFolder

SHOWN = 60  # slots, and samples, whose pictures are kept
NOISE_IMAGES = 16  # over which a slot's gradient is averaged
UNMATCHED = -1

Seen = Iterable[tuple[Tensor, Tensor, Tensor]]  # similarities (B, S), labels (B,), indices (B,), batch by batch


class Matches(Measure):
    """Logs which share of each set some slot matches, and accuracies by slots and by scores; see `accuracies`.

    The sets are those measured, Gaussian noise, test images whose pixels are permuted (all in the same way), and with
    `ood` the test sets of other data, normalised as the training data are. What no slot matches is out of distribution.

    With `groups`, each sample's slot is a group for other measures: NC1 with slots as classes, at every measured layer,
    and how the clusters agree with them, where clusters are looked for.

    Kept as arrays: of every slot label, threshold, hits, and its nearest training image of its class; and at the end of
    training some of these images, the slots' mean gradients on noise, and the training samples that no slot of their
    class matches, first those that another class's slots resemble more than their own.
    """

    name = "slots"

    def __init__(self, *, ood: Mapping[str, Dataset] | None = None, groups: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.ood, self.groups = dict(ood or {}), groups

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Matches:
        """The measure as the run's flags want it."""
        ood = {Path(name).name: load(name, args.data_dir, args.limit) for name in args.ood or ()}
        return cls(ood=ood, groups=args.slot_groups, **common)

    @staticmethod
    def plan(args: Namespace, dataset: Dataset) -> dict[str, Any]:
        """Nothing; refuses other data whose samples have another shape."""
        for name in args.ood or ():
            try:
                shape = load(name, args.data_dir, args.limit).shape
            except UserError as error:
                raise WrongFlag(f"argument --ood: {error}") from None
            if shape != dataset.shape:
                raise WrongFlag(f"argument --ood: samples of {name} have shape {shape}, those here {dataset.shape}")
        return {}

    @staticmethod
    def refuse_layers(args: Namespace, layers: object, network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse a network that ends otherwise."""
        if slots_of(network) is None:
            raise WrongFlag("argument --slots: is for networks with --head slots, and this one has none")

    def line(self) -> str:
        """Which share of each set is matched."""
        shares = {name.removeprefix("slots/matched/"): value for name, value in self.values.items()
                  if name.startswith("slots/matched/")}  # fmt: skip
        return "slots match " + ", ".join(f"{share:.2%} of {name}" for name, share in shares.items())

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Matched shares and accuracies of every set."""
        slots, network = slots_of(pl_module.network), pl_module.network
        self.arrays = {name: getattr(slots, name) for name in ("label", "threshold", "hits", "update_of")}
        self.settings = {"scale": slots.scale, "pool": slots.pool}

        def seen(batches: Any) -> Seen:
            start = 0
            for x, y in batches:
                with trainer.precision_plugin.forward_context():
                    s = similarities_in(network, trainer.precision_plugin.convert_input(x))
                yield s, y, torch.arange(start, start + len(y), device=y.device)
                start += len(y)

        values = {}
        for split in self.sets:
            figures = accuracies(slots, seen(self.batches(trainer, split)))
            values |= {f"slots/{name}/{split}": value for name, value in figures.items()}
        seed = pl_module.hparams.get("seed")
        for name, batches in self._others(trainer, seed).items():
            values[f"slots/matched/{name}"] = accuracies(slots, seen(batches))["matched"]
        if self.groups:
            for split in self.sets:
                values |= self._as_groups(trainer, pl_module, split, seen)
        if len(slots) and is_last(trainer, epoch):
            self._keep_pictures(trainer, network, slots, seen, seed)
        return values

    def _others(self, trainer: Trainer, seed: int | None) -> dict[str, Any]:
        """Sets that nothing was learnt of, by name."""
        test = self.batches(trainer, "test")
        others = {
            "noise": Changed(test, lambda x, i: noise_like(x, seed_from("slots noise", seed, i))),
            "permuted": Changed(test, lambda x, i: permuted(x, seed_from("slots permutation", seed))),
        }
        own = getattr(trainer.datamodule, "dataset", None)
        for name, dataset in self.ood.items():
            batches = Batches(replace(own, test=dataset.test), "test", 1000, device=trainer.strategy.root_device)
            others[f"ood/{name}"] = batches
        return others

    def _as_groups(
        self, trainer: Trainer, pl_module: LightningModule, split: str, seen: Callable[[Any], Seen]
    ) -> dict[str, float]:
        """NC1 of the samples with a slot, with slots as classes; and clusters' agreement with slots."""
        slots, batches = slots_of(pl_module.network), self.batches(trainer, split)
        slot = torch.cat([slots.deciding(s) for s, _, _ in seen(batches)])  # (N,)
        values = {}
        if len(slot.unique()) > 2:
            grouped = Grouped(batches, slot)
            nc1 = neural_collapse(self.features(trainer, pl_module), grouped, len(slots), self.cache_bytes)
            values |= {f"nc1_slots/{split}/{layer}": value for layer, value in nc1.items()}
        for layer, index, clusters in clusters_in(trainer, split):
            found = agreement(clusters.cpu().numpy(), slot[index.to(slot.device)].cpu().numpy())
            values[f"ami_slots/{split}/{layer}"] = found["ami"]
        return values

    def _keep_pictures(
        self, trainer: Trainer, network: nn.Module, slots: Slots, seen: Callable[[Any], Seen], seed: int | None
    ) -> None:
        """The arrays that figures show."""
        batches = self.batches(trainer, "train")
        near, doubtful = nearest_and_uncovered(slots, seen(batches))
        shown = most_hit(slots, SHOWN)
        self.arrays |= {"nearest": near, "shown": shown, "nearest_inputs": batches[near[shown]]}
        self.arrays["gradients"] = gradients_on_noise(network, shown, batches[near[:1]], seed_from("slots look", seed))
        self.arrays |= doubtful
        if len(doubtful["uncovered"]):
            self.arrays["uncovered_inputs"] = batches[doubtful["uncovered"][:SHOWN]]


def accuracies(slots: Slots, seen: Seen) -> dict[str, float]:
    """Which share of samples some slot matches, and of which accuracies are right: `acc_predict` that of `predict`.

    `acc_pooled` is by scores alone, on all samples; `acc_pooled_on_matched` and `acc_by_slot` are by scores and by the
    matching slot on the samples that one matches, nan where there are none.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for s, y, _ in seen:
        slot, pooled = slots.deciding(s), slots.scores(s).argmax(1) == y
        is_matched = slot >= 0
        by_slot = is_matched & (slots.label[slot] == y) if len(slots) else is_matched
        predicted = torch.where(is_matched, by_slot, pooled)
        figures = (torch.ones_like(is_matched), is_matched, pooled, pooled & is_matched, by_slot, predicted)
        sums += torch.stack([figure.sum() for figure in figures]).double().cpu()
    num, num_matched, pooled, pooled_on_matched, by_slot, predicted = sums.tolist()
    return {
        "matched": num_matched / num,
        "acc_pooled": pooled / num,
        "acc_pooled_on_matched": pooled_on_matched / num_matched if num_matched else math.nan,
        "acc_by_slot": by_slot / num_matched if num_matched else math.nan,
        "acc_predict": predicted / num,
    }


def nearest_and_uncovered(slots: Slots, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
    """The training sample nearest to every slot, of its class (S,), and the samples that no slot of theirs matches.

    Of these `uncovered` is the index, `uncovered_label` the label, `uncovered_as` the class of the most similar slot of
    another one, by whose lead over their own they are sorted, `uncovered_lead`.
    """
    best = torch.full((len(slots),), -torch.inf)
    near = torch.zeros(len(slots), dtype=torch.long)
    found = []
    for s, y, index in seen:
        is_own = y[:, None] == slots.label
        own, others = s.masked_fill(~is_own, -torch.inf), s.masked_fill(is_own, -torch.inf)
        value, at = own.max(0)
        is_nearer = value.cpu() > best
        best = torch.where(is_nearer, value.cpu(), best)
        near = torch.where(is_nearer, index[at].cpu(), near)
        lead = others.amax(1) - own.amax(1)
        is_open = ~(own >= slots.threshold).any(1)
        found.append([part[is_open].cpu() for part in (index, y, slots.label[others.argmax(1)], lead)])
    index, label, other, lead = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = lead.argsort(descending=True, stable=True)
    names = ("uncovered", "uncovered_label", "uncovered_as", "uncovered_lead")
    return near, {name: part[order] for name, part in zip(names, (index, label, other, lead), strict=True)}


def most_hit(slots: Slots, num: int) -> Tensor:
    """Slots (n,), at most `num`, as many of each class, those first that match the most training samples."""
    each = max(1, num // slots.num_classes)
    by_class = [(slots.label == c).nonzero()[:, 0] for c in range(slots.num_classes)]
    kept = [of[slots.hits[of].argsort(descending=True, stable=True)[:each]] for of in by_class]
    return torch.cat(kept)[:num].cpu()


def gradients_on_noise(network: nn.Module, shown: Tensor, like: Tensor, seed: int) -> Tensor:
    """∂s_j/∂x of the slots `shown`, (n, …), mean over Gaussian noise inputs of the shape of `like` (1, …)."""
    noise = noise_like(like.expand(NOISE_IMAGES, *like.shape[1:]), seed).to(next(network.parameters()).dtype)
    with torch.enable_grad():
        x = noise.requires_grad_()
        s = similarities_in(network, x)
        found = [torch.autograd.grad(s[:, j].mean(), x, retain_graph=True)[0].sum(0) for j in shown.tolist()]
    return torch.stack(found)


def noise_like(x: Tensor, seed: int) -> Tensor:
    """Standard normal inputs of this shape."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def permuted(x: Tensor, seed: int) -> Tensor:
    """The same pixels (B, C, H, W), or entries (B, d), at other places, in all samples alike."""
    flat = x.flatten(2) if x.ndim > 2 else x
    order = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(seed))
    return flat[..., order.to(x.device)].view(x.shape)


def is_last(trainer: Trainer, epoch: int) -> bool:
    """Whether training ends with this epoch, or there is none."""
    return epoch == trainer.max_epochs or trainer.state.fn != "fit"


def clusters_in(trainer: Trainer, split: str) -> list[tuple[str, Tensor, Tensor]]:
    """(layer, indices of samples, their clusters) that the clusters measure found in this epoch, if it is asked for."""
    arrays = next(
        (callback.arrays for callback in trainer.callbacks if getattr(callback, "name", "") == "clusters"), {}
    )
    start = f"clusters/{split}/"
    return [(name.removeprefix(start), arrays[f"index/{split}"], found) for name, found in arrays.items()
            if name.startswith(start)]  # fmt: skip


class Changed:
    """Batches whose inputs are changed, by a function of them and of the batch's number."""

    def __init__(self, batches: Any, change: Callable[[Tensor, int], Tensor]) -> None:
        self.batches, self.change = batches, change

    def __iter__(self) -> Any:
        return ((self.change(x, i), y) for i, (x, y) in enumerate(self.batches))


class Grouped:
    """Those samples of batches that have a group, (N,), with it in place of their label."""

    def __init__(self, batches: Any, group: Tensor) -> None:
        self.batches, self.group = batches, group

    def __iter__(self) -> Any:
        start = 0
        for x, y in self.batches:
            group = self.group[start : start + len(y)]
            start += len(y)
            if (group != UNMATCHED).any():
                yield x[group != UNMATCHED], group[group != UNMATCHED]
