"""What the top of a Hessian's spectrum costs: five eigenpairs of ∇²L, next to curvlinops with SciPy's eigsh.

    OMP_NUM_THREADS=1 python benchmarks/quantities.py

Claims: at most the time of 60 gradient passes over the same samples, residuals below 10⁻³ of the largest eigenvalue, at
least 3 times faster than curvlinops for an MLP and 1.5 times for ResNet-18. Each search starts anew, with an object of
its own, so that what it builds once counts, and in a process of its own, which then times gradient passes; megabytes
are what the peak lies above what the process held before the search. Seconds are the CPU's, all threads together: other
work on the machine counts less there. Residuals ‖Hv - λv‖ are those of one more product each, by double backward, which
is no code of either. The two do not stop at the same point: of eigsh each residual is to fall below 10⁻³ of its own
eigenvalue, and ours looks a second time whether an eigenvalue has copies. curvlinops is of requirements-test.txt.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Row, Times, arguments, cpu_seconds_of, in_fresh_process, report, timed_by
from curvlinops import HessianLinearOperator
from one_nc1 import resident
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from utils import look

SIDE = 28  # pixels
NUM_CLASSES = 10
NUM_PAIRS = 5
TOLERANCE = 1e-3
PASSES = 5  # gradient passes timed at a time


class Case(NamedTuple):
    network: nn.Module
    x: Tensor
    y: Tensor


class Found(NamedTuple):
    """Eigenvalues (k,), descending, their vectors in rows (k, p), and the number of products they took."""

    values: Tensor
    vectors: Tensor
    num_products: int


def main() -> None:
    alone = {"nargs": 2, "metavar": ("WAY", "CASE"), "help": "search one way in a saved case, and print its figures"}
    args = arguments(__doc__, alone=alone)
    if args.alone:
        print(json.dumps(searched(*args.alone)))
        return
    tables = {}
    for name, make, rounds in cases(args.quick):
        case = make()
        num = sum(p.numel() for p in case.network.parameters())
        tables[f"{name}: {num:,} parameters, {len(case.x)} samples, rounds: {rounds}"] = compared(case, rounds)
    report("quantities", tables, args)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Case], int]]:
    """What each is called, what makes it, and how many rounds are timed."""
    if quick:
        yield "MLP, trained", partial(trained, partial(perceptron, (SIDE**2, 8, NUM_CLASSES)), 20, 5), 1
        yield "MNISTNet, trained", partial(trained, partial(convolutional, "MNISTNet"), 4, 1), 1
        return
    mlp = partial(perceptron, (SIDE**2, 256, 128, NUM_CLASSES))
    yield "MLP 784-256-128-10, trained", partial(trained, mlp, 1000, 200), 3
    yield "MLP 784-256-128-10, untrained", partial(trained, mlp, 1000, 0), 3
    yield "ResNet-18, trained", partial(trained, partial(convolutional, "ResNet", stem="imagenet"), 128, 30), 1


def perceptron(widths: tuple[int, ...]) -> nn.Module:
    layers = [part for n, m in pairwise(widths) for part in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def convolutional(model: str, **options: str) -> nn.Module:
    return build_network(model, (1, SIDE, SIDE), NUM_CLASSES, **options)


def trained(build: Callable[[], nn.Module], num: int, steps: int) -> Case:
    """A network after so many steps of Adam, each on 64 new images, and `num` others to look at."""
    torch.manual_seed(0)
    network = build()
    means = F.interpolate(torch.randn(NUM_CLASSES, 1, 7, 7), size=(SIDE, SIDE), mode="bilinear") / 5

    def images(num: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(num) % NUM_CLASSES
        return means[y] + torch.randn(num, 1, SIDE, SIDE), y

    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        x, y = images(64)
        F.cross_entropy(network(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return Case(network.eval(), *images(num))


def ours(case: Case) -> Found:
    H = look(case.network, case.x, case.y, "hess(loss, theta)")
    pairs = H.top(NUM_PAIRS, TOLERANCE)
    return Found(pairs.values, pairs.vectors, H.operator.num_products)


def curvlinops(case: Case) -> Found:
    """Its product in SciPy's Lanczos method. Its own test of the samples' order, some products more, is left out."""
    parameters = list(case.network.parameters())
    data = [(case.x, case.y)]
    H = HessianLinearOperator(case.network, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    product, num_products = H.to_scipy(), 0

    def counted(v: np.ndarray) -> np.ndarray:
        nonlocal num_products
        num_products += 1
        return product @ v

    start = np.random.default_rng(0).standard_normal(product.shape[0]).astype(product.dtype)
    operator = LinearOperator(product.shape, matvec=counted, dtype=product.dtype)
    values, vectors = eigsh(operator, k=NUM_PAIRS, which="LA", tol=TOLERANCE, v0=start)
    order = values.argsort()[::-1]
    return Found(torch.tensor(values[order]), torch.tensor(vectors.T[order]), num_products)


WAYS = {"ours": ours, "curvlinops": curvlinops}


def compared(case: Case, rounds: int) -> list[Row]:
    """Each way: CPU time, in gradient passes too, products, the largest residual, and the peak of its memory."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(tuple(case), path)

        def clock(way: str) -> float:
            done = in_fresh_process(__file__, "--alone", way, path)
            if done.returncode:
                sys.exit(done.stderr)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            return found[way][-1]["seconds"]

        times = timed_by({way: partial(clock, way) for way in WAYS}, rounds, warm_up=False)
    return [row(way, times, found[way]) for way in WAYS]


def row(way: str, times: Times, found: Sequence[Mapping[str, Any]]) -> Row:
    """Medians over the rounds; a residual above the tolerance is marked."""
    residual = max(each["residual"] for each in found)
    return {
        "": way,
        "CPU s": times.median(way),
        "gradient passes": statistics.median(each["seconds"] / each["pass_seconds"] for each in found),
        "times ours": times.ratio(way, "ours"),
        "products": found[0]["num_products"],
        "residual": f"{residual:.1e}" + f", above {TOLERANCE:.0e}" * (residual > TOLERANCE),
        "λ₁": found[0]["largest"],
        "λ₅": found[0]["least"],
        "peak, MB": statistics.median(each["megabytes"] for each in found),
    }


def searched(way: str, path: str) -> dict[str, Any]:
    """What one search in a saved case takes and finds."""
    WAYS[way](trained(partial(perceptron, (SIDE**2, 8, NUM_CLASSES)), 10, 0))  # what the first call sets up
    case = Case(*torch.load(path, weights_only=False))
    found: list[Found] = []
    before = resident("VmRSS")
    seconds = cpu_seconds_of(lambda: found.append(WAYS[way](case)))
    return {
        "seconds": seconds,
        "megabytes": resident("VmHWM") - before,
        "pass_seconds": pass_seconds(case),
        "num_products": found[0].num_products,
        "residual": largest_residual(case, found[0]),
        "largest": float(found[0].values[0]),
        "least": float(found[0].values[-1]),
    }


def pass_seconds(case: Case) -> float:
    """CPU seconds of one gradient of the mean loss over all samples."""
    parameters = list(case.network.parameters())

    def passes() -> None:
        for _ in range(PASSES):
            torch.autograd.grad(F.cross_entropy(case.network(case.x), case.y), parameters)

    return cpu_seconds_of(passes) / PASSES


def largest_residual(case: Case, found: Found) -> float:
    """max ‖Hv - λv‖ / |λ₁| over the eigenpairs, each by one product of double backward."""
    parameters = list(case.network.parameters())
    loss = F.cross_entropy(case.network(case.x), case.y)
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))

    def residual(value: Tensor, v: Tensor) -> float:
        Hv = flat(torch.autograd.grad(gradient @ v.float(), parameters, retain_graph=True))
        return float(torch.linalg.vector_norm(Hv.double() - value * v.double()) / torch.linalg.vector_norm(v.double()))

    largest = float(found.values.abs().max())
    return max(map(residual, found.values, found.vectors)) / largest


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


if __name__ == "__main__":
    main()
