"""How long DIB's heads take: a plain loop with one optimizer per head against the engines, side by side.

    python benchmarks/dib_heads.py                  # on the CPU: SZT, then a training step of every decoder
    python benchmarks/dib_heads.py --device cuda --batch-size 256
    python benchmarks/dib_heads.py --models ResNet --batch-size 16

The first table is a whole measurement of the MLP on SZT, everything included. The second is one training step of one
layer's heads; its last column names the engine that `decodable_information` takes by itself.
"""

import argparse
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Batches, decodable_labels, load
from decodable_information import decodable_information
from heads import ENGINES, Budget, Family, fastest, own_copy, vmappable
from networks import MLP, NETWORKS

SHAPES = {"MNISTNet": (1, 28, 28), "CIFARNet": (3, 32, 32), "ResNet": (3, 32, 32), "ConvNeXt": (3, 32, 32)}
NUM_DIGITS = 4  # as CIFAR-10 has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", default=["MNISTNet", "CIFARNet", "ResNet"], choices=SHAPES)
    parser.add_argument("--batch-size", type=int, default=32, help="of the second table")
    parser.add_argument("--head-epochs", type=int, default=10, help="of the first table")
    parser.add_argument("--no-szt", action="store_true", help="leave out the first table")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    if not args.no_szt:
        szt_table(args.device, args.head_epochs)
    steps_table(args.models, args.device, args.batch_size)


def szt_table(device: str, head_epochs: int) -> None:
    """A whole DIB measurement of the 12-10-7-5-4-3-2 network."""
    batches = Batches(load("SZT"), "train", 256, device=device)
    network = MLP((12,), 2, (10, 7, 5, 4, 3), "tanh").to(device)
    for batch_size in (256, 512, 1024):
        budget = {"epochs": head_epochs, "learning_rate": 1e-2, "batch_size": batch_size}
        runs = {"plain loop": lambda budget=budget: plain_loop(network, batches, **budget)}
        for engine in ENGINES:
            runs[engine] = lambda engine=engine, budget=budget: decodable_information(
                network, batches, batches.labels, 2, **budget, engine=engine
            )
        seconds = {name: fastest_of(3, run, device) for name, run in runs.items()}
        cells = (f"{name} {s:.3f} s ({seconds['plain loop'] / s:.1f} ×)" for name, s in seconds.items())
        print(f"SZT, 5 layers × 11 digits, {head_epochs} head epochs of {batch_size}: {', '.join(cells)}")


def plain_loop(network: MLP, batches: Batches, epochs: int, learning_rate: float, batch_size: int) -> None:
    """What one would write first: every head on its own, with its own optimizer."""
    x, digits = batches[torch.arange(batches.num_samples)], decodable_labels(batches.labels, 2)
    with torch.no_grad():
        features = network.feature_extractor(x)
    for layer, h in features.items():
        for digit in digits.T:
            head = deepcopy(network.get_encoder_decoder(layer)[1])
            network.reset(head)
            optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
            for _ in range(epochs):
                for rows in torch.randperm(len(h)).to(h.device).split(batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(head(h[rows]), digit[rows]).backward()
                    optimizer.step()
                with torch.no_grad():
                    F.cross_entropy(head(h), digit)


def steps_table(models: list[str], device: str, batch_size: int) -> None:
    """One training step of one layer's heads, engine by engine."""
    print(f"\nms a step of {NUM_DIGITS} heads, {batch_size} samples")
    print(f"{'model':10}{'layer':16}" + "".join(f"{engine:>10}" for engine in ENGINES) + "  chosen")
    for name in models:
        shape = SHAPES[name]
        network = own_copy(NETWORKS[name](shape, 10).to(device))
        with torch.no_grad():
            features = network.eval().feature_extractor(torch.randn(batch_size, *shape, device=device))
        for layer in network.layers:
            with torch.no_grad():
                cells, choice = layer_times(network, layer, features, device)
            print(f"{name:10}{layer:16}" + "".join(f"{cell:>10}" for cell in cells) + f"  {choice}", flush=True)


def layer_times(
    network: torch.nn.Module, layer: str, features: dict[str, torch.Tensor], device: str
) -> tuple[list[str], str]:
    """Milliseconds a step for each engine, "-" where it cannot, and the engine chosen."""
    budget = Budget(epochs=1, learning_rate=1e-3, batch_size=len(features[layer]))
    heads = [(layer, digit) for digit in range(NUM_DIGITS)]
    log_p = torch.full((NUM_DIGITS, 10), 0.1, device=device).log()
    pair = {layer: features[layer][:2]}
    digits = torch.randint(10, (NUM_DIGITS, len(features[layer])), device=device)
    cells = []
    for engine, kind in ENGINES.items():
        family = Family(network, pair, heads, log_p, budget)
        able = {"products": family.chain, "vmap": vmappable(family.decoder, family.pair), "loop": True}
        if not able[engine]:
            cells.append("-")
            continue
        trained = kind((family,), None)
        step = lambda trained=trained: trained.step({layer: features[layer]}, digits, 1e-3, 0)  # noqa: E731
        cells.append(f"{1e3 * fastest_of(3, step, device):.2f}")
    return cells, fastest((family,))


def fastest_of(repeats: int, run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some runs after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
