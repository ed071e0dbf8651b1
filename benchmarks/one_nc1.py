"""NC1 of random activations in a process of its own; prints seconds, megabytes and the value as JSON.

    python benchmarks/one_nc1.py streamed 8192 1000 100     # ours: d = 8192, 1000 samples in batches of 100
    python benchmarks/one_nc1.py dense 8192 1000 100        # with Σ_W and Σ_B as d × d matrices

Megabytes are what the peak of the process lies above what it held before. The batches are drawn anew in each pass,
which is part of the seconds, so that no data lie in memory. The dense route is that of the first publications:
float32, Σ_B⁺ from its C - 1 largest eigenvalues, the trace of a product of two d × d matrices.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from measures.neural_collapse import neural_collapse

NUM_CLASSES = 10


class Drawn:
    """Batches of random activations around class means, the same ones in each pass."""

    def __init__(self, d: int, num_samples: int, batch_size: int):
        self.num_samples, self.batch_size = num_samples, batch_size
        self.means = torch.randn(NUM_CLASSES, d, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.num_samples, self.batch_size):
            y = torch.arange(start, min(start + self.batch_size, self.num_samples)) % NUM_CLASSES
            yield torch.randn(len(y), self.means.shape[1], generator=generator).add_(self.means[y]), y


def main() -> None:
    route, d, num_samples, batch_size = sys.argv[1], *map(int, sys.argv[2:])
    nc1 = {"streamed": streamed, "dense": dense}[route]
    nc1(Drawn(8, 100, 50))  # what the first call sets up is not counted
    batches = Drawn(d, num_samples, batch_size)
    before, start = resident("VmRSS"), time.perf_counter()
    value = nc1(batches)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": resident("VmHWM") - before, "nc1": value}))


def streamed(batches: Drawn) -> float:
    return neural_collapse(lambda x: {"h": x}, batches, NUM_CLASSES, cache_bytes=0)["h"]


def dense(batches: Drawn) -> float:
    """tr(Σ_W Σ_B⁺), all of it written out."""
    d = batches.means.shape[1]
    sums, within = torch.zeros(NUM_CLASSES, d), torch.zeros(d, d)
    for h, y in batches:
        sums.index_add_(0, y, h)
    mu = sums * NUM_CLASSES / batches.num_samples  # (C, d), of equal classes
    for h, y in batches:
        within.addmm_((h - mu[y]).T, h - mu[y], alpha=1 / batches.num_samples)
    M = mu - mu.mean(0)
    between = M.T @ M / NUM_CLASSES  # (d, d)
    _, eigenvalues, v = torch.svd_lowrank(between, q=NUM_CLASSES - 1)
    inverse = v / eigenvalues @ v.T
    return torch.trace(within @ inverse).item()


def resident(entry: str) -> float:
    """Megabytes that the process holds (VmRSS) or held at its peak (VmHWM). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024 / 1e6


if __name__ == "__main__":
    main()
