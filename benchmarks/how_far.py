"""How the cost of an epoch grows, as formulas, against measured points; and what they say of ImageNet.

    OMP_NUM_THREADS=1 python benchmarks/how_far.py

With T the seconds of one forward pass over the N samples, T_l that of the decoder behind layer l alone, C classes, d_l
dimensions, K digits, E head epochs and R devices, of which S share the samples of the same heads; and per value of an
activation c seconds for a copy in float64, g for products with C columns, a for an addition to its class, which more
than 16 classes take instead of two of the g. NC1 is that under the labels and under permuted ones:

    training  3 T / R
    NC1       p T / R + Σ_l (2 N (c + 2 g) / R + 6 C g) d_l    p = 1 if activations are kept, else 2
    DIB       q T / S + K (4 E + 1) Σ_l T_l / R                q = 1 if activations are kept, else 2 E + 1

For DIB on ImageNet comes what `measures/teams.py` reckons for updates and for gradients that are added up; it decides
on S. The constants are measured first, the points after them; a ratio of 1 is a perfect prediction.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from common import Row, arguments, report, side_by_side
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from measures.decodable_information import decodable_information
from measures.means import MAX_ONE_HOT_CLASSES, add_to_classes, class_members, pieces
from measures.neural_collapse import nc1_of_labelings
from measures.teams import DEVICES, Cost, Work, costs, number_of_teams, predicted, shares
from networks import Network, build_network, dimensions

BATCH = 256
CONSTANTS_WIDTH = 2**16  # dimensions where the constants are measured: larger than caches
IMAGES, CLASSES, DIGITS, HEAD_EPOCHS = 1_281_167, 1000, 2, 2  # of ImageNet, and of the presets for large networks
# Assumed, not measured: what a recent GPU sustains of its peak, and a network link, in operations and bytes a second.
HALF, DOUBLE, LINK, LINK_BETWEEN_MACHINES = 50e12, 40e12, 200e9, 25e9
GPUS = 8  # of a machine
# Channels × height × width behind each block of a ResNet-50 for 224 × 224: its first blocks have 800 thousand values.
RESNET50 = [802_816] * 3 + [401_408] * 4 + [200_704] * 6 + [100_352] * 3 + [2048]


def main() -> None:
    args = arguments(__doc__)
    scale = 50 if args.quick else 1
    points = [*nc1_points(scale), *network_points(scale)]
    tables = {"Predicted and measured": points, "ImageNet, by the formulas": list(imagenet())}
    report("how_far", tables, args)


def nc1_points(scale: int) -> list[Row]:
    """NC1 of one wide layer, given as it is, so that there is no forward pass."""
    rows = []
    for num, d, num_classes in ((1000, 100_000, 10), (1000, 100_000, 100), (4000, 10_000, 10)):
        d //= scale
        h, y = torch.randn(num, d), torch.arange(num) % num_classes
        batches = labelled_twice(h, y)
        copy, product, addition = constants(num_classes)
        first = product if 2 * num_classes <= MAX_ONE_HOT_CLASSES else addition
        predicted = num * d * (2 * copy + 2 * first + 2 * product) + 6 * num_classes * d * product
        measured = lambda batches=batches, C=num_classes: nc1_of_labelings(lambda x: {"": x}, batches, C)  # noqa: E731
        rows.append(row(f"NC1, N = {num}, d = {d}, C = {num_classes}", predicted, measured))
    return rows


def labelled_twice(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches whose samples have a second label, for NC1's chance level."""
    return list(zip(x.split(BATCH), torch.stack([y, y.flip(0)], 1).split(BATCH), strict=True))


def constants(num_classes: int) -> tuple[float, float, float]:
    """Seconds per value of an activation: to copy it in float64, to multiply the copy, to add it to a class."""
    h, y = torch.randn(BATCH, CONSTANTS_WIDTH), torch.arange(BATCH) % num_classes
    sums, weights = torch.zeros(num_classes, CONSTANTS_WIDTH).double(), torch.randn(num_classes, BATCH).double()
    members = class_members(y, num_classes)

    def copy() -> None:
        for columns in pieces(h):
            h[:, columns].double()

    def multiply() -> None:
        for columns in pieces(h):
            sums[:, columns].addmm_(weights, h[:, columns].double())

    ways = {"copy": copy, "product": multiply, "addition": lambda: add_to_classes(sums, h, y, members)}
    times = side_by_side(ways, rounds=5)
    copied, *others = (times.median(name) / h.numel() for name in ways)
    return copied, *(other - copied for other in others)


def network_points(scale: int) -> list[Row]:
    """An epoch of training and measurements of two networks."""
    rows = []
    for name, num in (("MNISTNet", 1000), ("MLP", 10_000)):
        num //= scale
        torch.manual_seed(0)
        network = build_network(name, (1, 28, 28), 10).eval()
        x, y = torch.randn(num, 1, 28, 28), torch.arange(num) % 10
        forward = median(lambda network=network, x=x: passed(network, x))
        behind = sum(decoder_seconds(network, x))
        digits = math.ceil(math.log10(num / 10))
        title = f"{name}, N = {num}"
        rows.append(row(f"{title}: training", 3 * forward, lambda a=(network, x, y): trained(*a)))
        copy, product, _ = constants(10)
        values = num * sum(math.prod(shape) for shape in dimensions(network, (1, 28, 28)).values())
        batches = labelled_twice(x, y)
        for passes, cache_bytes in ((1, 2**62), (2, 0)):
            rows.append(
                row(
                    f"{title}: NC1, p = {passes}",
                    passes * forward + values * 2 * (copy + 2 * product),
                    lambda a=(network.feature_extractor, batches, 10, cache_bytes): nc1_of_labelings(*a),
                )
            )
        for epochs in (2, 4):
            budget = {"epochs": epochs, "learning_rate": 1e-3, "batch_size": BATCH}
            rows.append(
                row(
                    f"{title}: DIB, E = {epochs}, K = {digits}",
                    forward + digits * (4 * epochs + 1) * behind,
                    lambda a=(network, x, y, 10), budget=budget: decodable_information(*a, **budget),
                )
            )
    return rows


def row(what: str, predicted: float, run: Callable[[], object]) -> Row:
    measured = median(run)
    return {"": what, "predicted s": predicted, "measured s": measured, "measured / predicted": measured / predicted}


def median(run: Callable[[], object]) -> float:
    return side_by_side({"": run}, rounds=3).median("")


@torch.no_grad()
def passed(module: torch.nn.Module, x: Tensor) -> None:
    """A forward pass over all samples."""
    for batch in x.split(BATCH):
        module(batch)


def decoder_seconds(network: Network, x: Tensor) -> list[float]:
    """T_l of every layer."""
    with torch.no_grad():
        features = network.feature_extractor(x)
    decoders = {layer: network.get_encoder_decoder(layer)[1] for layer in network.layers}
    return [median(lambda layer=layer: passed(decoders[layer], features[layer])) for layer in network.layers]


def trained(network: Network, x: Tensor, y: Tensor) -> None:
    """An epoch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)
    for batch, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        optimizer.step()


def imagenet() -> Sequence[Row]:
    """Memory and bytes over the network for each GPU, and minutes, on 8 GPUs of one machine and on 64 of eight."""
    network = build_network("ResNet", (3, 224, 224), CLASSES)
    operations, behind = costs_of_two_samples(network)
    own = [math.prod(shape) for shape in dimensions(network, (3, 224, 224)).values()]
    cases = {"ResNet-18": own, "blocks as wide as ResNet-50's": RESNET50, "one layer of 800000": [800_000]}
    for name, dims in cases.items():
        for devices, link in ((GPUS, LINK), (8 * GPUS, LINK_BETWEEN_MACHINES)):
            forward = IMAGES * operations / 2 / HALF / devices
            sums = 2 * 8 * CLASSES * sum(dims)  # bytes, under both labelings; projections take as much again
            products = 4 * CLASSES * (IMAGES / devices + 3 * CLASSES) * sum(dims) / DOUBLE
            sent = 2 * (devices - 1) / devices * sums
            size, seconds = dib(operations, behind, devices)
            is_ours = name == "ResNet-18"
            yield {
                "": name,
                "GPUs": devices,
                "sum of d": f"{sum(dims):,}",
                "training, min": 3 * forward / 60 if is_ours else None,
                "NC1 memory, GB": 2 * sums / 1e9,
                "NC1 sent, GB": sent / 1e9,
                "NC1, min": (2 * forward + products + sent / link) / 60 if is_ours else (products + sent / link) / 60,
                "team": size if is_ours else None,
                "DIB, min": seconds / 60 if is_ours else None,
            }


def dib(operations: int, costs: Mapping[str, Cost], devices: int) -> tuple[int, float]:
    """How many devices share samples, and the seconds that the busiest ones take; no activations are kept."""
    heads = {(layer, digit) for layer in costs for digit in range(DIGITS)}
    work = Work(IMAGES, BATCH, HEAD_EPOCHS, operations, room=0)
    num = number_of_teams(heads, costs, work, devices, DEVICES["cuda"])
    size = devices // num
    device = DEVICES["cuda"]._replace(operations=HALF, link=LINK if size <= GPUS else LINK_BETWEEN_MACHINES)
    return size, max(predicted(share, costs, work, size, device) for share in shares(heads, costs, num))


def costs_of_two_samples(network: Network) -> tuple[int, dict[str, Cost]]:
    """Operations of a forward pass of the network, and what each of its decoders costs."""
    network = network.to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = network.feature_extractor(torch.empty(2, 3, 224, 224, device="meta"))
    with torch.no_grad():
        behind = costs(network, features, network.layers)
    return counter.get_total_flops(), behind


if __name__ == "__main__":
    main()
