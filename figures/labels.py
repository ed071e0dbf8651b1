"""How each measure is drawn: one table. A measure that is not in it is drawn under its own name."""

from __future__ import annotations

from typing import NamedTuple

from figures.runs import SPLITS
from figures.style import plain


class Label(NamedTuple):
    """What an axis says, and whether it is logarithmic, as it is for every ratio."""

    text: str
    log: bool = False


RANKS = ("numerical", "stable", "effective")
LABELS = {
    "loss": Label("cross-entropy (nats)"),
    "acc": Label("accuracy (%)"),
    "nc1": Label("NC1 = tr(Σ_W Σ_B⁺)", log=True),
    "dib/loss": Label("cross-entropy of the heads (nats)"),
    "dib/minimality": Label("minimality (nats)"),
    "dib/sufficiency": Label("sufficiency (nats)"),
    **{f"rank/{kind}": Label(f"{kind} rank", log=True) for kind in RANKS},
    **{f"rank/means_{kind}": Label(f"{kind} rank of class means", log=True) for kind in RANKS},
}


def label_of(measure: str) -> Label:
    """What the axis of a measure says: the quantity with its unit, and the split."""
    name, _, split = measure.rpartition("/")
    if split not in SPLITS:
        return LABELS.get(measure, Label(plain(measure)))
    text, log = LABELS.get(name, Label(plain(name)))
    return Label(f"{text}, {split} set", log)
