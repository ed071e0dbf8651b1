"""One head of DIB on two devices that share its samples, next to two of which one is idle.

    OMP_NUM_THREADS=1 python benchmarks/teams.py

A device is a process of one thread: two of them need two idle cores, as each waits for the other at every step. Seconds
are those of the slower process, by the clock and of its CPU, which other work on the machine hardly changes: medians
over rounds of both ways in turn. Claim: a head with convolutions is done about 1.5 times as fast, and a run shares
samples ("shared") only where that gains.
"""

import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Row, arguments, report
from torch import distributed as dist

from measures import teams
from measures.decodable_information import decodable_information
from networks import build_network
from run.ranks import Ranks

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
CASES = {  # network with its settings, shape, layer, samples, classes (so many that there is one digit), batch
    "MNISTNet, conv1": ("MNISTNet", {}, MNIST, "conv1", 1024, 32, 128),
    "CIFARNet, group1": ("CIFARNet", {}, CIFAR, "group1", 256, 16, 128),
    "MLP, hidden1, batches of 512": ("MLP", {}, MNIST, "hidden1", 4096, 64, 512),
    "MLP, hidden1, batches of 128": ("MLP", {}, MNIST, "hidden1", 4096, 64, 128),
    "MLP with batch norm, hidden1, batches of 512": ("MLP", {"batch_norm": True}, MNIST, "hidden1", 4096, 64, 512),
    "MLP, hidden2, batches of 128": ("MLP", {}, MNIST, "hidden2", 4096, 64, 128),
}


def main() -> None:
    args = arguments(__doc__)
    rounds, scale = (1, 4) if args.quick else (5, 1)
    report("teams", {"One head on two devices": [row(name, rounds, scale) for name in CASES]}, args)


def row(name: str, rounds: int, scale: int) -> Row:
    """A case, with a part of its samples."""
    context = multiprocessing.get_context("fork")  # nothing has computed yet, and nothing is imported anew
    queue, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=on_device, args=(i, port, name, rounds, scale, queue)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, name
    chosen, (clock, cpu) = queue.get()
    return {
        "": name,
        "s, one idle": clock[2],
        "times faster": clock[2] / clock[1],
        "s of CPU, one idle": cpu[2],
        "times less": cpu[2] / cpu[1],
        "shared": "yes" if chosen == 1 else "no",
    }


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def on_device(index: int, port: int, name: str, rounds: int, scale: int, queue: Any) -> None:
    """What one of two processes does; the first tells the slower one's seconds, {number of teams: seconds}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    model, settings, shape, layer, num, num_classes, batch_size = CASES[name]
    num //= scale
    torch.manual_seed(0)
    network = build_network(model, shape, num_classes, **settings).eval()
    x, y = torch.randn(num, *shape), torch.arange(num) % num_classes
    budget = {"layers": [layer], "epochs": 2, "learning_rate": 1e-3, "batch_size": batch_size}
    chosen: list[int] = []
    seconds: dict[int, list[list[float]]] = {1: [], 2: []}
    for _ in range(rounds + 1):
        for num_teams in (2, 1):
            with in_teams(num_teams, chosen):
                dist.barrier()
                start = time.perf_counter(), time.process_time()
                decodable_information(network, x, y, num_classes, **budget, ranks=Ranks(index, 2))
                taken = torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]]).double()
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds[num_teams].append(taken.tolist())
    if index == 0:
        after_first = {num: zip(*taken[1:], strict=True) for num, taken in seconds.items()}
        medians = {num: [statistics.median(each) for each in both] for num, both in after_first.items()}
        queue.put((chosen[0], [{num: both[i] for num, both in medians.items()} for i in (0, 1)]))
    dist.destroy_process_group()


@contextmanager
def in_teams(num: int, chosen: list[int]) -> Iterator[None]:
    """So many teams inside, whatever a run would choose; its choice is added to `chosen`."""
    choose = teams.number_of_teams

    def so_many(*work: object) -> int:
        chosen.append(choose(*work))
        return num

    teams.number_of_teams = so_many
    try:
        yield
    finally:
        teams.number_of_teams = choose


if __name__ == "__main__":
    main()
