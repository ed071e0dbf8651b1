"""How each measure is drawn, as the catalogue of measures has it; one that it lacks is drawn under its own name."""

from __future__ import annotations

from figures.style import plain
from run.catalogue import MEASURES, About, Column, column, measure_of

RANKS = ("numerical", "stable", "effective")
OF_TRAINING = {
    "loss": Column("cross-entropy", "nats"),
    "loss mse": Column("half the squared error"),
    "losses": Column("loss"),
    "acc": Column("accuracy", "%", scale=0.01),
}
OF_LOOKS = {  # statistics that do not say themselves what they are
    "condition": "condition number",
    "cosine_batch": "mean cosine between batches",
    "cosine_class": "mean cosine between classes",
    "cosine_cluster": "mean cosine between clusters",
    "distance": "distance from the start",
    "effective_rank": "effective rank",
    "fro": "Frobenius norm",
    "nuclear": "nuclear norm",
    "participation": "participation ratio",
    "sample_fro": "Frobenius norm, mean over samples",
    "sample_largest": "largest eigenvalue, mean over samples",
    "sample_norm": "norm, mean over samples",
    "sample_smallest": "smallest singular value, mean over samples",
    "sample_spectral": "spectral norm, mean over samples",
    "sample_trace": "trace, mean over samples",
    "snr": "signal to noise over samples",
    "snr_batch": "signal to noise over batches",
    "snr_class": "signal to noise over classes",
    "snr_cluster": "signal to noise over clusters",
    "spectral": "spectral norm",
    "stable_rank": "stable rank",
    "step": "length of the last step",
    "step_cosine": "cosine of the last two steps",
    "top_share": "share in the Hessian's top eigenvectors",
    "zeros": "share of zeros",
}


def label_of(measure: str) -> Column:
    """The label of a measure, with the set where its name ends in one."""
    if measure.startswith("look/"):
        return Column(plain(_in_words(measure)))
    label, split = (OF_TRAINING[measure], "") if measure in OF_TRAINING else column(measure)
    text = label.text if is_known(measure) else plain(label.text)
    return label._replace(text=f"{text}, {split} set" if split else text)


def _in_words(measure: str) -> str:
    """`norm of grad-loss-theta, class3` for look/grad-loss-theta/class3/norm."""
    _, name, *group, statistic = measure.split("/") if measure.count("/") > 1 else [*measure.split("/"), ""]
    return ", ".join([f"{OF_LOOKS.get(statistic, statistic)} of {name}", *group])


def is_known(measure: str) -> bool:
    """Whether a figure of its own draws it: others are drawn as whatever is measured layer by layer can be."""
    return measure in OF_TRAINING or any(family_of(measure) in about.columns for about in MEASURES if about.figures)


def family_of(measure: str) -> str:
    """A measure without its set: norm of norm/train."""
    name, _, split = measure.rpartition("/")
    return name if split in ("train", "test") and name else measure


def not_measured(measures: list[str]) -> str:
    """A sentence that names what a figure lacks, and the flags that measure it."""
    names = ", ".join(plain(name) for name in dict.fromkeys(map(family_of, measures)))
    flags = dict.fromkeys(_flag_of(about, measures) for about in map(measure_of, measures) if about)
    return f"Not measured: {names}" + (f"; main.py measures it with {' '.join(flags)}." if flags else ".")


def _flag_of(about: About, measures: list[str]) -> str:
    """The flag that asks for a measure; of what is looked at, with the first of the gradients as an example."""
    return f"--{about.flag}" + (" gradients" if about.name == "look" and "grad" in measures[0] else "")
