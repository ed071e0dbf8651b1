"""What NC1 of all layers costs: next to the forward passes over the same data, and next to d × d matrices.

    OMP_NUM_THREADS=1 python benchmarks/nc1.py
    python benchmarks/nc1.py --models ResNet --samples 1000

Claims: at most 1.3 times the plain forward passes (MLP on SZT, whose forward pass is under a millisecond: 6 times);
no d × d matrix, so that d = 10⁶ needs little more than what a batch and the class sums take. Kept: all activations
fit into the cache, one forward pass serves both of NC1's, relative to one. Not kept: relative to two. "with chance" is
what a run does: NC1 under the labels and under permuted ones, from the same passes. "again" is the same thing measured
twice: what differs from 1 there is noise.
"""

import json
from collections.abc import Callable, Iterable

import torch
from common import ROOT, Row, Times, arguments, in_fresh_process, made_up, report, side_by_side
from torch import Tensor

from datasets import Batches, load
from measures.neural_collapse import nc1_of_labelings
from networks import build_network

Batched = list[tuple[Tensor, Tensor]]

CASES = {  # model → shape of a sample, batch size, samples that a CPU is through with in seconds
    "MLP": ((12,), 4096, 3481),
    "MNISTNet": ((1, 28, 28), 1337, 2674),
    "CIFARNet": ((3, 32, 32), 341, 341),
    "ResNet": ((3, 32, 32), 128, 128),
}
DENSE = ((512, 1000, 100), (2048, 1000, 100), (8192, 1000, 100))  # d, samples, batch size
WIDE = ((100_000, 1000, 100), (1_000_000, 200, 20))


def main() -> None:
    models = {"nargs": "*", "default": list(CASES), "choices": CASES}
    args = arguments(__doc__, models=models, samples={"type": int})
    if args.quick:
        quick = {"NC1 next to d × d matrices": dense_table(DENSE[:1]), "MLP": forward_table(["MLP"], None, rounds=1)}
        report("nc1", quick, args)
        return
    tables = {
        "NC1 next to the forward pass": forward_table(args.models, args.samples, rounds=2),
        "NC1 next to d × d matrices": dense_table(DENSE),
        "NC1 of wide layers": wide_table(WIDE),
    }
    report("nc1", tables, args)


def forward_table(models: list[str], samples: int | None, rounds: int) -> list[Row]:
    return [forward_row(model, samples or CASES[model][2], rounds) for model in models]


def forward_row(model: str, samples: int, rounds: int) -> Row:
    times = beside_forward(model, samples, rounds)
    return {
        "model": model,
        "samples": samples,
        "forward, s": times.median("forward"),
        "again": times.ratio("again", "forward"),
        "kept": times.ratio("kept", "forward"),
        "with chance": times.ratio("kept, chance", "forward"),
        "not kept": times.ratio("not kept", "twice"),
        "not kept, with chance": times.ratio("not kept, chance", "twice"),
    }


def beside_forward(model: str, samples: int, rounds: int, device: str = "cpu") -> Times:
    """Seconds of one and two forward passes, and of NC1 with and without room to keep activations."""
    shape, batch_size, _ = CASES[model]
    batches = samples_of(model, shape, samples, batch_size, device)
    options = {"widths": (10, 7, 5, 4, 3), "nonlinearity": "tanh"} if model == "MLP" else {}
    num_classes = 2 if model == "MLP" else 10
    network = build_network(model, shape, num_classes, **options).to(device).eval()

    @torch.no_grad()
    def forward() -> None:
        for x, _ in batches:
            network(x)

    def twice() -> None:
        forward()
        forward()

    labelled_twice = [(x, torch.stack([y, y.flip(0)], 1)) for x, y in batches]

    def nc1(batches: Batched, cache_bytes: int) -> Callable[[], object]:
        return lambda: nc1_of_labelings(network.feature_extractor, batches, num_classes, cache_bytes)

    ways = {"forward": forward, "again": forward, "twice": twice}
    for name, cache_bytes in (("kept", 2**62), ("not kept", 0)):
        ways |= {name: nc1(batches, cache_bytes), f"{name}, chance": nc1(labelled_twice, cache_bytes)}
    return side_by_side(ways, rounds, device)


def samples_of(model: str, shape: tuple[int, ...], num: int, batch_size: int, device: str) -> Batched:
    """Batches of SZT for the MLP, else of random images, on the device."""
    dataset = load("SZT") if model == "MLP" else made_up(num, 10, shape)
    return list(Batches(dataset, "train", batch_size, device=device))


def dense_table(sizes: Iterable[tuple[int, int, int]]) -> list[Row]:
    rows = []
    for d, samples, batch_size in sizes:
        ours, again, dense = (measured(route, d, samples, batch_size) for route in ("streamed", "streamed", "dense"))
        rows.append(
            {
                "d": d,
                "ours, s": ours["seconds"],
                "again": again["seconds"] / ours["seconds"],
                "d × d": dense["seconds"] / ours["seconds"],
                "ours, MB": ours["megabytes"],
                "d × d, MB": dense["megabytes"],
                "they differ by": f"{abs(dense['nc1'] / ours['nc1'] - 1):.0e}",
            }
        )
    return rows


def wide_table(sizes: Iterable[tuple[int, int, int]]) -> list[Row]:
    """Peak memory above what the process held before, next to what a batch takes and what a d × d matrix would."""
    return [
        {
            "d": d,
            "samples": samples,
            "a batch, MB": 4e-6 * batch_size * d,
            "peak, MB": peak("streamed", d, samples, batch_size),
            "one d × d matrix, GB": 4e-9 * d * d,
        }
        for d, samples, batch_size in sizes
    ]


def peak(route: str, d: int, samples: int, batch_size: int) -> float:
    """Megabytes of a process that gives freed memory back at once, where glibc would keep as much again."""
    return measured(route, d, samples, batch_size, MALLOC_MMAP_THRESHOLD_="65536")["megabytes"]


def measured(route: str, d: int, samples: int, batch_size: int, **env: str) -> dict[str, float]:
    """Seconds, megabytes and value from a process of its own."""
    done = in_fresh_process(ROOT / "benchmarks" / "one_nc1.py", route, d, samples, batch_size, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
