"""What the clusters of a layer cost: its directions next to a full SVD, and each step of 10,000 samples.

    OMP_NUM_THREADS=1 python benchmarks/clusters.py

Claims: directions at least 100 times faster than by a full SVD, with singular values within 10⁻⁴ of the exact ones; the
clusters of a layer of 10,000 samples in at most 15 CPU-seconds where 64 directions are kept; the labels are those of
scikit-learn's HDBSCAN. The layer is conv1 of an untrained ResNet-18, 12,544 features, of made-up images whose spectrum
falls so that 100 directions hold 90% of the energy; of MNIST's images it takes 91. Seconds are the CPU's, all threads
together: other work on the machine counts less there. "again" is the same thing measured twice, for directions after
the SVD, which takes minutes.
"""

from functools import partial

import numpy as np
import torch
from common import Row, arguments, cpu_seconds_of, report, timed_by
from torch import Tensor

from measures.grouping import Recipe, agreement, hdbscan, of_layer
from measures.reduction import directions, fires, reduce, without_mean
from measures.similarity import alignment
from networks import build_network

SAMPLES = 10_000
SIDE = 28  # pixels
NUM_CLASSES = 10
RECIPE = Recipe(max_directions=64)


def main() -> None:
    args = arguments(__doc__)
    A, y = activations(300 if args.quick else SAMPLES)
    tables = {
        "Directions of a layer": directions_table(A, y),
        "Clusters of a layer, step by step": steps_table(A, y, rounds=1 if args.quick else 2),
    }
    report("clusters", tables, args)


@torch.no_grad()
def activations(num: int) -> tuple[Tensor, Tensor]:
    """What conv1 makes of `num` images, (N, d), and their classes."""
    torch.manual_seed(0)
    network = build_network("ResNet", (1, SIDE, SIDE), NUM_CLASSES, stem="imagenet")
    y = torch.arange(num) % NUM_CLASSES
    return network.conv1(blurs(NUM_CLASSES)[y] + blurs(num)).flatten(1), y


def blurs(num: int) -> Tensor:
    """Random images (num, 1, SIDE, SIDE) with amplitudes f^-1.25."""
    frequency = torch.hypot(torch.fft.fftfreq(SIDE)[:, None], torch.fft.rfftfreq(SIDE)).clamp(min=1 / SIDE)
    return torch.fft.irfft2(torch.fft.rfft2(torch.randn(num, 1, SIDE, SIDE)) / frequency**1.25, s=(SIDE, SIDE))


def directions_table(A: Tensor, y: Tensor) -> list[Row]:
    """Each way once: CPU seconds, times ours, and how far its singular values are from those of the Gram matrix."""
    centred, found = without_mean(A), {}

    def ours() -> Tensor:
        return reduce(A, RECIPE.energy, labels=y, max_directions=RECIPE.max_directions).singular_values

    def gram() -> Tensor:
        return directions(centred, RECIPE.energy, RECIPE.max_directions, exact_limit=max(A.shape)).singular_values

    ways = {
        "ours": ours,
        "Gram matrix, float64": gram,
        "full SVD, float32": lambda: torch.linalg.svd(centred.matrix, full_matrices=False).S,
        "ours, again": ours,
    }

    def clock(name: str) -> float:
        return cpu_seconds_of(lambda: found.update({name: ways[name]()}))

    reduce(A[:100])  # what the first call sets up is not counted
    times = timed_by({name: partial(clock, name) for name in ways}, rounds=1, warm_up=False)
    exact = found["Gram matrix, float64"]

    def differs(name: str) -> str | None:
        by = (found[name][: len(exact)] / exact - 1).abs().max()
        return f"{by:.0e}" if by else None

    return [
        {
            f"{len(A)} × {A.shape[1]}, {len(exact)} directions": name,
            "CPU s": times.median(name),
            "times ours": times.ratio(name, "ours"),
            "S differs by": differs(name),
        }
        for name in ways
    ]


def steps_table(A: Tensor, y: Tensor, rounds: int) -> list[Row]:
    classes = y.numpy()
    points = reduce(A, RECIPE.energy, labels=y, max_directions=RECIPE.max_directions).scores.float().numpy()
    labels = hdbscan(points, RECIPE.min_cluster_size)
    assert np.array_equal(labels, scikit_learn(points))
    steps = {
        "filter": lambda: fires(A, RECIPE.act_threshold, y),
        "filter and directions": lambda: reduce(A, RECIPE.energy, labels=y, max_directions=RECIPE.max_directions),
        "HDBSCAN": lambda: hdbscan(points, RECIPE.min_cluster_size),
        "HDBSCAN as scikit-learn has it": lambda: scikit_learn(points),
        "agreement with the classes": lambda: agreement(labels, classes),
        "alignment of the classes": lambda: alignment(A, y, num_classes=NUM_CLASSES),
        "all but scikit-learn's": lambda: of_layer(A, y, RECIPE, NUM_CLASSES),
        "again": lambda: of_layer(A, y, RECIPE, NUM_CLASSES),
    }
    times = timed_by({name: partial(cpu_seconds_of, step) for name, step in steps.items()}, rounds, warm_up=False)
    whole = "all but scikit-learn's"
    return [
        {
            f"{len(A)} samples, {points.shape[1]} directions": name,
            "CPU s": times.median(name),
            "of all": times.ratio(name, whole),
        }
        for name in steps
    ]


def scikit_learn(points: np.ndarray) -> np.ndarray:
    """The clusters by its HDBSCAN as a whole."""
    from sklearn.cluster import HDBSCAN

    size = RECIPE.min_cluster_size
    return HDBSCAN(min_cluster_size=size, min_samples=size, copy=True).fit_predict(points.astype(np.float64))


if __name__ == "__main__":
    main()
