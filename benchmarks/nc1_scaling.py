"""How NC1's time grows with samples, layers and dimension, and its memory with the samples; draws docs/nc1_scaling.png.

    OMP_NUM_THREADS=1 python benchmarks/nc1_scaling.py

Claims: doubling any of the three doubles the time: the slope over two decades in log-log is 1; peak memory does not
depend on the number of samples. That is without a cache; with one (the default), activations are kept as far as a
quarter of the free memory goes.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import ROOT, Row, arguments, report, side_by_side
from nc1 import peak
from torch import Tensor

from measures.neural_collapse import neural_collapse

SAMPLES, LAYERS, DIMENSION, BATCH_SIZE = 500, 1, 512, 500  # from here each is doubled alone
FACTORS = [2**i for i in range(8)]
MEMORY_BATCH = 100
Course = dict[int, float]  # size → seconds or megabytes


def main() -> None:
    args = arguments(__doc__)
    factors, rounds = (FACTORS[:2], 1) if args.quick else (FACTORS, 3)
    seconds = times(factors, rounds)
    memory = {SAMPLES * k: peak("streamed", 4096, SAMPLES * k, MEMORY_BATCH) for k in factors[::3]}
    rows = [time_row(name, course) for name, course in seconds.items()]
    memory_rows = [{"samples": size, "peak, MB": megabytes} for size, megabytes in memory.items()]
    tables = {"Slope of NC1's time in log-log": rows, "Peak memory at d = 4096, batches of 100": memory_rows}
    report("nc1_scaling", tables, args)
    if not args.quick:
        draw(seconds, memory, ROOT / "docs" / "nc1_scaling.png")


def times(factors: Sequence[int], rounds: int) -> dict[str, Course]:
    """Seconds by size, for each of the three."""
    grown = {
        "samples": {SAMPLES * k: nc1_of(SAMPLES * k, LAYERS, DIMENSION) for k in factors},
        "layers": {LAYERS * k: nc1_of(SAMPLES, LAYERS * k, DIMENSION) for k in factors},
        "dimension": {DIMENSION * k: nc1_of(SAMPLES, LAYERS, DIMENSION * k) for k in factors},
    }
    timed = side_by_side({(name, size): run for name, runs in grown.items() for size, run in runs.items()}, rounds)
    return {name: {size: timed.median((name, size)) for size in runs} for name, runs in grown.items()}


def nc1_of(samples: int, layers: int, d: int) -> Callable[[], object]:
    """NC1 of random activations, which are made beforehand; the layers share theirs."""
    h, y = torch.randn(samples, d, generator=torch.Generator().manual_seed(0)), torch.arange(samples) % 10
    batches = list(zip(h.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True))

    def features(x: Tensor) -> dict[str, Tensor]:
        return {f"layer{i}": x for i in range(layers)}

    return lambda: neural_collapse(features, batches, 10, cache_bytes=0)


def time_row(name: str, course: Course) -> Row:
    sizes = list(course)
    return {
        "doubled": name,
        "from": sizes[0],
        "to": sizes[-1],
        "ms at first": 1e3 * course[sizes[0]],
        "ms at last": 1e3 * course[sizes[-1]],
        "slope": slope(course),
    }


def slope(course: Course) -> float:
    """Of the least-squares line through the logarithms."""
    logs = [[math.log(value) for value in values] for values in (course.keys(), course.values())]
    return statistics.linear_regression(*logs).slope


def draw(seconds: dict[str, Course], memory: Course, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, course in seconds.items():
        start = next(iter(course))
        left.loglog(
            [size / start for size in course], course.values(), "o-", label=f"{name}, slope {slope(course):.2f}"
        )
    left.set(xlabel="times the smallest size", ylabel="seconds", title="NC1's time")
    left.legend()
    right.semilogx(memory.keys(), memory.values(), "o-")
    right.set(xlabel="samples", ylabel="MB", title="NC1's peak memory, d = 4096", ylim=(0, 1.3 * max(memory.values())))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
