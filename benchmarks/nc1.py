"""How long NC1 of all layers takes next to the plain forward passes over the same data, side by side.

    python benchmarks/nc1.py
    python benchmarks/nc1.py --device cuda --samples 50000

Kept: all activations fit into the cache, one forward pass serves both of NC1's. Not kept: two forward passes. The
column "again" is the forward pass against itself: what differs from 1 there is noise.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import load
from networks import build_network
from neural_collapse import neural_collapse

CASES = {  # model → shape of a sample, batch size, samples on a CPU
    "MLP": ((12,), 4096, 3481),
    "MNISTNet": ((1, 28, 28), 1337, 10_000),
    "CIFARNet": ((3, 32, 32), 341, 1000),
    "ResNet": ((3, 32, 32), 128, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--samples", type=int, help="instead of what a CPU is through with in seconds")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, medians of {args.repeats}")
    print(f"{'model':<10}{'samples':>9}{'forward':>10}{'again':>8}{'kept':>8}{'not kept':>10}")
    for model in args.models:
        print(row(model, args.device, args.samples, args.repeats), flush=True)


def row(model: str, device: str, samples: int | None, repeats: int) -> str:
    shape, batch_size, of_a_cpu = CASES[model]
    num = samples or of_a_cpu
    batches = made_up(model, shape, num, batch_size, device)
    options = {"widths": (10, 7, 5, 4, 3), "nonlinearity": "tanh"} if model == "MLP" else {}
    num_classes = 2 if model == "MLP" else 10
    network = build_network(model, shape, num_classes, **options).to(device).eval()

    @torch.no_grad()
    def forward() -> None:
        for x, _ in batches:
            network(x)

    def nc1(cache_bytes: int) -> Callable[[], object]:
        return lambda: neural_collapse(network.feature_extractor, batches, num_classes, cache_bytes)

    timed = {"forward": forward, "again": forward, "kept": nc1(2**62), "not kept": nc1(0)}
    seconds = side_by_side(timed, repeats, device)
    once = seconds["forward"]
    again, kept, twice = seconds["again"] / once, seconds["kept"] / once, seconds["not kept"] / (2 * once)
    return f"{model:<10}{num:>9}{once:>8.4f} s{again:>8.2f}{kept:>8.2f}{twice:>10.2f}"


def made_up(model: str, shape: tuple, num: int, batch_size: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """SZT for the MLP; else random images, whose values cost what real ones do."""
    if model == "MLP":
        train = load("SZT").train
        x, y = train.inputs.float().mul(2).sub(1), train.labels
    else:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(num, *shape, generator=generator), torch.arange(num) % 10
    return list(zip(x.to(device).split(batch_size), y.to(device).split(batch_size), strict=True))


def side_by_side(functions: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each, taken in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
