"""How each measure is drawn: one table. A measure that is not in it is drawn under its own name, without more ado."""

from __future__ import annotations

from typing import NamedTuple

from figures.runs import SPLITS
from figures.style import plain


class Label(NamedTuple):
    """What an axis says, in which unit it counts, and whether it is logarithmic, as it is for every ratio.

    `scale` is the unit's size: minimality is kept in nats and shown in thousandths. `flag` of `main.py` measures it.
    What is drawn `aside` stands beside another measure and has no figure of its own.
    """

    text: str
    unit: str = ""
    scale: float = 1.0
    log: bool = False
    flag: str = ""
    aside: bool = False

    @property
    def axis(self) -> str:
        return f"{self.text} ({self.unit})" if self.unit else self.text


RANKS = ("numerical", "stable", "effective")
LABELS = {
    "loss": Label("cross-entropy", "nats"),
    "acc": Label("accuracy", "%", scale=0.01),
    "nc1": Label("NC1 = tr(Σ_W Σ_B⁺)", log=True, flag="--nc"),
    "nc1_chance": Label("NC1 under permuted labels", log=True, flag="--nc", aside=True),
    "dib/loss": Label("cross-entropy of the heads", "nats", flag="--dib"),
    "dib/minimality": Label("minimality", "10⁻³ nats", scale=1e-3, flag="--dib"),
    "dib/sufficiency": Label("sufficiency", "nats", flag="--dib"),
    **{f"rank/{kind}": Label(f"{kind} rank", log=True, flag="--rank") for kind in RANKS},
    **{f"rank/means_{kind}": Label(f"{kind} rank of class means", log=True, flag="--rank") for kind in RANKS},
}


def label_of(measure: str) -> Label:
    """The label of a measure, with the set where its name ends in one."""
    name, _, split = measure.rpartition("/")
    if split not in SPLITS:
        return LABELS.get(measure, Label(plain(measure)))
    label = LABELS.get(name, Label(plain(name)))
    return label._replace(text=f"{label.text}, {split} set")


def is_known(measure: str) -> bool:
    """Whether a figure of its own draws it: others are drawn as whatever is measured layer by layer can be."""
    return measure in LABELS or family_of(measure) in LABELS


def family_of(measure: str) -> str:
    """A measure without its set: norm of norm/train."""
    name, _, split = measure.rpartition("/")
    return name if split in SPLITS and name else measure


def not_measured(measures: list[str]) -> str:
    """A sentence that names what a figure lacks, and the flags that measure it."""
    names = ", ".join(plain(measure) for measure in measures)
    flags = list(dict.fromkeys(filter(None, (label_of(measure).flag for measure in measures))))
    return f"Not measured: {names}" + (f". main.py measures it with {' '.join(flags)}." if flags else ".")
