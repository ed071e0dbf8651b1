"""The update of slots by half of the test set: few labels, no training, nothing forgotten.

Of that half only the samples that no slot matches are labelled, and become slots with thresholds that are exact on the
training set and them together. The other half is held out: what it loses, the update has forgotten.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from run.between_steps import features_and_labels, grown_in, layers_with
from run.checkpoints import save_whole
from run.errors import UserError
from run.files import write_whole
from run.seeds import seed_from

if TYPE_CHECKING:
    from run.run_folder import RunFolder

STEPS = 20  # in which the fewest labels are looked for
HALVES = "updated", "held_out"
UPDATED = "updated.ckpt"

Half = tuple[Tensor, Tensor]  # h (N, d), labels (N,)


def update_from(
    content: Mapping[str, Any], trainer: Trainer, module: LightningModule, folder: RunFolder, target: float | None
) -> str:
    """Update the slots of a network that was read from a checkpoint's content; what came out, for the terminal.

    Leaves in the run's folder `checkpoints/updated.ckpt`, the network with its new slots, `slot_update.json`, and, as
    arrays, the accuracy of either half by the number of new slots.
    """
    module.to(trainer.strategy.root_device).eval()
    if not layers_with("await_batch", module):
        raise UserError(f"--slot-update: {module.source} has no slots to add to: it was trained with another head")
    slots = grown_in(module)
    training = features_and_labels(trainer, module, "train")
    seen = features_and_labels(trainer, module, "test")
    if len(seen[1]) < len(HALVES):
        raise UserError("--slot-update: needs at least 2 test samples, one to learn from and one to hold out")
    halves = in_halves(*seen, seed_from("slot update", module.hparams.seed))
    before = copy.deepcopy(slots)
    report, curves = updated(slots, training, halves)
    if target is not None:
        slots_needed = {name: fewest(curve, target) for name, curve in curves.items()}
        labels_needed = fewest_labels(before, training, halves, target)
        report |= {"target": target, "fewest_slots": slots_needed, "fewest_labels": labels_needed}
    new = {**content, "state_dict": module.state_dict(), "slot_update": report}
    save_whole(folder.path / "checkpoints" / UPDATED, new)
    folder.arrays.write(content["epoch"] + 1, "slot_update", curves, report)
    write_whole(folder.path / "slot_update.json", json.dumps(report, indent=2) + "\n")
    return told(report)


def in_halves(h: Tensor, y: Tensor, seed: int) -> dict[str, Half]:
    """The samples in two halves, as the seed deals them."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    parts = order[: len(y) // 2], order[len(y) // 2 :]
    return {name: (h[part], y[part]) for name, part in zip(HALVES, parts, strict=True)}


def updated(slots: Any, training: Half, halves: Mapping[str, Half]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Update the layer; the report, and by half the accuracies with none, one, … all of the new slots."""
    report: dict[str, Any] = {
        "slots_before": len(slots),
        "before": {},
        "after": {},
        "scores_before": {},
        "scores_after": {},
    }
    for name, (h, y) in halves.items():
        report["scores_before"][name] = share(slots(h).argmax(1) == y)
        report["before"][name] = share(slots.predict(h) == y)
    h, y = halves["updated"]
    is_asked = ~slots.matched(h)
    gains = slots.update(*training, h[is_asked], y[is_asked])
    curves = {name: slots.accuracies(*half, report["slots_before"]) for name, half in halves.items()}
    for name, (h, y) in halves.items():
        report["after"][name] = share(slots.predict(h) == y)
        report["scores_after"][name] = share(slots(h).argmax(1) == y)
    report |= {"samples": len(is_asked), "labels": int(is_asked.sum()), "slots_added": len(gains)}
    return report, curves


def fewest(curve: Tensor, target: float) -> int | None:
    """The least number of new slots with which an accuracy is reached; None if it is out of reach."""
    reached = (curve >= target).nonzero()
    return int(reached[0]) if len(reached) else None


def fewest_labels(slots: Any, training: Half, halves: Mapping[str, Half], target: float) -> dict[str, int | None]:
    """The least number of labels with which either half reaches an accuracy, in twentieths of all that are asked for.

    They are asked for in the order of the samples, which the seed dealt.
    """
    (h, y), found = halves["updated"], dict.fromkeys(halves)
    places = (~slots.matched(h)).nonzero()[:, 0]
    for i in range(STEPS + 1):
        chosen = places[: -(-len(places) * i // STEPS)]
        other = copy.deepcopy(slots)
        if len(chosen):
            other.update(*training, h[chosen], y[chosen])
        for name, (seen, labels) in halves.items():
            if found[name] is None and share(other.predict(seen) == labels) >= target:
                found[name] = len(chosen)
        if None not in found.values():
            break
    return found


def share(is_right: Tensor) -> float:
    """Of true values."""
    return float(is_right.double().mean())


def told(report: Mapping[str, Any]) -> str:
    """The report in lines."""
    lines = [
        f"slot update: {report['labels']:,} labels asked for of {report['samples']:,} samples, "
        f"{report['slots_before']:,} + {report['slots_added']:,} slots"
    ]
    for name, words in zip(HALVES, ("on that half", "held-out half"), strict=True):
        by_slots, by_logits = (
            f"{report[before][name]:.2%} → {report[after][name]:.2%}"
            for before, after in (("before", "after"), ("scores_before", "scores_after"))
        )
        lines.append(f"{words:<14}{by_slots} where slots decide, {by_logits} by logits")
    for name, words in zip(HALVES, ("on that half", "on the held-out half"), strict=True):
        if "target" in report:
            slots, labels = report["fewest_slots"][name], report["fewest_labels"][name]
            reached = "out of reach" if slots is None and labels is None else (
                f"{'out of reach by slots' if slots is None else f'{slots:,} new slots'}, "
                f"{'out of reach by labels' if labels is None else f'{labels:,} labels'}"
            )  # fmt: skip
            lines.append(f"{report['target']:.2%} {words}: {reached}")
    return "\n".join(lines)
