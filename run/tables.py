"""What a person reads, as text: the banner, a line per epoch, and tables of what came out."""

import math
import statistics
from argparse import Namespace
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from run.catalogue import MEASURES, column, measure_and_layer, measure_of
from run.presets import DATASETS

UNSUMMED = ("epoch", "lr", "time/", "checkpoint")
MOST_CLASSES = 12  # that the banner names


def banner(args: Namespace, facts: Mapping[str, Any], folder: Path) -> str:
    """What runs on what and where, in four lines."""
    lines = {
        "data": f"{args.dataset}: {facts['train_samples']:,} training and {facts['test_samples']:,} test samples, "
        f"{_classes(args, facts)}",
        "network": f"{args.model}: {facts['parameters']:,} parameters, measured at {', '.join(facts['layers'])}",
        "device": f"{facts['device']}, {args.precision}",
        "folder": str(folder),
    }
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def _classes(args: Namespace, facts: Mapping[str, Any]) -> str:
    """How many classes, and which where that is not known from the dataset's name: `NAME training + test samples`."""
    counts, num_classes = facts["classes"], facts["num_classes"]
    if args.dataset in DATASETS and args.classes is None:
        return f"{num_classes} classes"
    if num_classes <= MOST_CLASSES:
        return f"{num_classes} classes: " + ", ".join(
            f"{name} {train:,} + {test:,}" for name, (train, test) in counts.items()
        )
    sizes = (f"{min(sizes):,} to {max(sizes):,}" for sizes in zip(*counts.values(), strict=True))
    return f"{num_classes:,} classes, each of {' + '.join(sizes)}"


def epoch_line(epoch: int, num_epochs: int, values: Mapping[str, float], seconds: float) -> str:
    """`epoch  3/10   train loss 0.1034  acc  96.81%   test loss 0.0973  acc  97.02%   12.3 s`"""
    parts = [f"epoch {epoch:>{len(str(num_epochs))}}/{num_epochs}"]
    for split in ("train", "test"):
        if f"{split}_loss" in values:
            loss, accuracy = values[f"{split}_loss"], values[f"{split}_acc"]
            parts.append(f"{split} loss {loss:.4f}  acc {accuracy:7.2%}")
    return "   ".join([*parts, f"{seconds:.1f} s"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Columns below each other: the first to the left, or those of these numbers, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = enumerate(zip(cells, widths, strict=True))
        return "  ".join(f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in placed).rstrip()

    return "\n".join(map(line, [header, *rows]))


def layer_table(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name, shape and dimension of every layer."""
    rows = [[layer, " × ".join(map(str, shape)), str(math.prod(shape))] for layer, shape in shapes.items()]
    return table(["layer", "shape", "dimension"], rows)


def closing(rows: Sequence[Mapping[str, str]], layers: Sequence[str]) -> str:
    """What came out: accuracies, and per layer each measure, first epoch and last."""
    measured = [row for row in rows if any("/" in name and not name.startswith("time/") for name in row)]
    parts = [_accuracies(rows)]
    if measured:
        parts += [measure_table(measured[0], measured[-1], layers)]
        parts += [about.remark(measured[-1]) for about in MEASURES if about.remark]
    return "\n\n".join(part for part in parts if part) + "\n"


def measure_table(first: Mapping[str, str], last: Mapping[str, str], layers: Sequence[str]) -> str:
    """Per layer what the measures gave first and last, as `first → last`; empty where nothing was measured."""
    header, rows = measure_cells(first, last, layers)
    return table(header, rows) if rows else ""


def measure_cells(
    first: Mapping[str, str], last: Mapping[str, str], layers: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """The same as titles and cells."""
    shown = titles(last, layers)
    if not shown:
        return [], []
    header = [f"epoch {_course(first, last, 'epoch')}", *shown.values()]
    return header, [[layer, *(_course(first, last, f"{name}/{layer}") for name in shown)] for layer in layers]


def titles(row: Mapping[str, str], layers: Sequence[str]) -> dict[str, str]:
    """Which columns NAME/LAYER or NAME/SET/LAYER the closing table shows, and under which titles."""
    found = filter(None, (measure_and_layer(name, layers) for name in row))
    names = dict.fromkeys(name for name, _ in found if name != "time")
    families = {name: column(name) for name in names}
    shown = {name: family.closing[split] for name, (family, split) in families.items() if split in family.closing}
    return dict(sorted(shown.items(), key=lambda item: measure_of(item[0]) is None))  # those of the catalogue first


def seeds_table(seeds: Sequence[int], rows: Sequence[Mapping[str, str]]) -> str:
    """Mean, standard deviation (n - 1), lowest and highest of every column over the seeds' last epochs."""
    columns = list(dict.fromkeys(name for row in rows for name in row if not name.startswith(UNSUMMED)))
    lines = []
    for name in columns:
        values = [float(row.get(name, "nan")) for row in rows]
        if not all(map(math.isfinite, values)):
            lines.append([name, *["–"] * 4])
            continue
        figures = statistics.mean(values), statistics.stdev(values), min(values), max(values)
        lines.append([name, *(f"{figure:.4g}" for figure in figures)])
    return table([f"{len(rows)} seeds: {' '.join(map(str, seeds))}", "mean", "± std", "lowest", "highest"], lines)


def _course(first: Mapping[str, str], last: Mapping[str, str], name: str) -> str:
    """`first → last`, or the one value where there is one row."""
    before, after = (_short(row.get(name)) for row in (first, last))
    return after if first is last else f"{before} → {after}"


def _accuracies(rows: Sequence[Mapping[str, str]]) -> str:
    tested = [row for row in rows if "test_acc" in row]
    if not tested:
        return ""
    best = max(tested, key=lambda row: float(row["test_acc"]))
    return (
        f"test accuracy {float(tested[-1]['test_acc']):.2%} after epoch {tested[-1]['epoch']}, "
        f"at best {float(best['test_acc']):.2%} after epoch {best['epoch']}"
    )


def _short(number: str | None) -> str:
    return "–" if number is None else f"{float(number):.4g}"
