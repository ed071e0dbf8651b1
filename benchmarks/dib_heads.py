"""What DIB costs: the program against a loop over heads as one would write it first, and kept activations against none.

    OMP_NUM_THREADS=1 python benchmarks/dib_heads.py
    OMP_NUM_THREADS=1 python benchmarks/dib_heads.py --models ResNet

Claim: the MLP on SZT at least 7 times faster than the loop, the others what the tables say. Every figure is a whole
measurement, heads' evaluation included. The loop gives every head its own optimizer and its own minibatches; it runs
the encoder for each of them, or ("kept") once for all. "none kept" is the program without room for activations, where
one forward pass serves all layers' heads. "again" is the program a second time: what differs from 1 there is noise.
The last table is one training step of the heads of a layer, engine by engine, and the one that the program chooses.
"""

from collections.abc import Iterable
from copy import deepcopy
from functools import partial

import torch
from common import Row, arguments, made_up, report, side_by_side
from torch import Tensor
from torch.nn import functional as F

from datasets import Batches, decodable_labels, load
from measures.decodable_information import decodable_information
from measures.engines import ENGINES, fastest, vmappable
from measures.heads import Budget, Family, own_copy
from networks import MLP, NETWORKS, Network
from run.presets import preset

# model → shape, samples, classes: all samples are of one class, so that it takes four digits to number them
CASES = {
    "MNISTNet": ((1, 28, 28), 512, 5),
    "CIFARNet": ((3, 32, 32), 32, 3),
    "ResNet": ((3, 32, 32), 16, 2),
}
NUM_DIGITS = 4


def main() -> None:
    models = {"nargs": "*", "default": list(CASES), "choices": CASES}
    device = {"default": "cpu"}
    args = arguments(__doc__, models=models, device=device)
    if args.quick:
        report("dib_heads", {"MLP on SZT": szt_table([1024], "cpu", rounds=1, epochs=1)}, args)
        return
    tables = {
        "MLP on SZT: 5 layers × 11 heads, 3 head epochs": szt_table([256, 512, 1024], args.device, rounds=3, epochs=3),
        "Convolutional networks: 4 heads a layer, 1 head epoch of 2 minibatches": [
            model_row(model, args.device, rounds=1) for model in args.models
        ],
        "One step of the heads of a layer": [
            row for model in args.models for row in step_rows(model, args.device, rounds=2)
        ],
    }
    report("dib_heads", {title: rows for title, rows in tables.items() if rows}, args)


def szt_table(batch_sizes: Iterable[int], device: str, rounds: int, epochs: int) -> list[Row]:
    """The 12-10-7-5-4-3-2 network, by the batch size of the heads."""
    batches = Batches(load("SZT"), "train", 256, device=device)
    network = MLP((12,), 2, (10, 7, 5, 4, 3), "tanh").to(device)
    budget = {"epochs": epochs, "learning_rate": 1e-2}
    engines = [engine for engine in ENGINES if engine != "products"]  # that is the program's own choice here
    return [
        {"batch": size, **measurement(network, batches, 2, budget | {"batch_size": size}, device, rounds, engines)}
        for size in batch_sizes
    ]


def model_row(model: str, device: str, rounds: int) -> Row:
    """A convolutional network on random images; of ResNet the layers that its preset takes."""
    shape, samples, num_classes = CASES[model]
    batches = Batches(made_up(samples, 10, shape), "train", samples, device=device)
    batches.labels.zero_()
    network = NETWORKS[model](shape, num_classes).to(device)
    budget = {"epochs": 1, "learning_rate": 1e-3, "batch_size": samples // 2, "layers": preset_layers(model, network)}
    about = {"model": model, "samples": samples, "layers": len(budget["layers"])}
    return about | measurement(network, batches, num_classes, budget, device, rounds)


def preset_layers(model: str, network: Network) -> tuple[str, ...]:
    return tuple(preset(model, "CIFAR10").get("dib_layers", network.layers))


def measurement(
    network: Network, batches: Batches, num_classes: int, budget: dict, device: str, rounds: int,
    engines: Iterable[str] = (),
) -> Row:  # fmt: skip
    """Seconds of the program, and how many times it the other ways take."""
    program = partial(decodable_information, network, batches, batches.labels, num_classes, **budget)
    loop = partial(loop_over_heads, network, batches, num_classes, **budget)
    ways = {
        "program": program,
        "again": program,
        "none kept": partial(program, cache_bytes=0),
        "loop": partial(loop, kept=False),
        "loop, kept": partial(loop, kept=True),
        **{f"engine {engine}": partial(program, engine=engine) for engine in engines},
    }
    times = side_by_side(ways, rounds, device)
    return {"program, s": times.median("program")} | {
        way: times.ratio(way, "program") for way in ways if way != "program"
    }


def loop_over_heads(
    network: Network, batches: Batches, num_classes: int, epochs: int, learning_rate: float, batch_size: int,
    *, layers: Iterable[str] | None = None, kept: bool,
) -> None:  # fmt: skip
    """What one would write first: every head on its own, with its own optimizer."""
    digits = decodable_labels(batches.labels, num_classes)
    for layer in layers or network.layers:
        encoder, decoder = network.eval().get_encoder_decoder(layer)
        h = encoded(encoder, batches[torch.arange(batches.num_samples)]) if kept else None
        for digit in digits.T:
            head = deepcopy(decoder)
            network.reset(head)
            optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
            evaluated(head.eval(), encoder, batches, h, digit, batch_size)
            for _ in range(epochs):
                head.train()
                for rows in torch.randperm(len(digit)).split(batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(head(h[rows] if kept else encoded(encoder, batches[rows])), digit[rows]).backward()
                    optimizer.step()
                evaluated(head.eval(), encoder, batches, h, digit, batch_size)


@torch.no_grad()
def encoded(encoder: torch.nn.Module, x: Tensor) -> Tensor:
    return encoder(x)


@torch.no_grad()
def evaluated(
    head: torch.nn.Module, encoder: torch.nn.Module, batches: Batches, h: Tensor | None, digit: Tensor, batch_size: int
) -> float:
    """The head's cross-entropy over all samples."""
    total = 0.0
    for rows in torch.arange(len(digit)).split(batch_size):
        features = encoder(batches[rows]) if h is None else h[rows]
        total += F.cross_entropy(head(features), digit[rows], reduction="sum").item()
    return total / len(digit)


def step_rows(model: str, device: str, rounds: int) -> list[Row]:
    """Milliseconds of a training step of each layer's heads by each engine that can."""
    shape, samples, num_classes = CASES[model]
    network = own_copy(NETWORKS[model](shape, num_classes).to(device))
    with torch.no_grad():
        features = network.eval().feature_extractor(torch.randn(samples // 2, *shape, device=device))
    return [step_row(network, model, layer, features[layer], device, rounds) for layer in preset_layers(model, network)]


@torch.no_grad()  # as a measurement is; an engine asks for gradients itself
def step_row(network: Network, model: str, layer: str, h: Tensor, device: str, rounds: int) -> Row:
    budget = Budget(epochs=1, learning_rate=1e-3, batch_size=len(h))
    heads = [(layer, digit) for digit in range(NUM_DIGITS)]
    num_classes = CASES[model][2]
    log_p = torch.full((NUM_DIGITS, num_classes), 1 / num_classes, device=device).log()
    digits = torch.randint(num_classes, (NUM_DIGITS, len(h)), device=device)
    steps = {}
    for engine, kind in ENGINES.items():
        family = Family(network, {layer: h[:2]}, heads, log_p, budget)
        able = {"products": family.chain, "vmap": vmappable(family.decoder, family.pair), "loop": True}
        if able[engine]:
            steps[engine] = partial(kind((family,), None).step, {layer: h}, digits, 1e-3, 0)
    times = side_by_side(steps, rounds, device)
    milliseconds = {f"{engine}, ms": 1e3 * times.median(engine) if engine in times else None for engine in ENGINES}
    return {"model": model, "batch": len(h), "layer": layer, **milliseconds, "chosen": fastest((family,))}


if __name__ == "__main__":
    main()
