"""Teams of devices: when samples are shared as well as heads, and that no number but rounding tells of it."""

import multiprocessing
import signal
from pathlib import Path

import pytest
import torch
from processes import assert_same_run, free_port, run_tasks, signal_at
from test_decodable_information import convolutional, data, mlp
from test_ranks import OF_HEADS, TINY
from torch import Tensor, nn

from measures import teams
from measures.decodable_information import decodable_information
from measures.teams import Cost, Device, Work, is_divisible, number_of_teams, predicted, shares
from run.ranks import ALONE, Ranks
from whitebox import IterNorm, PercentileNorm

LOGS = Path("lightning_logs")
FREE = Device(operations=1, update=0, link=float("inf"), call=0)  # one that computes slowly and sends for nothing


# The same numbers


def cases() -> dict[str, dict]:
    """Arguments of `decodable_information` by which its ways differ: engines, activations kept and not, batches.

    14 samples in batches of 3 or 8: the last one is shorter, and of 3 some ranks often have none.
    """
    (x, labels), (network, images, of_images) = data(14), convolutional()
    convolved = {"network": network, "inputs": images[:14], "labels": of_images[:14], "layers": ("block0", "block2")}
    plain, normed = mlp(), mlp(batch_norm=True)
    small, large = {"epochs": 1, "batch_size": 3}, {"epochs": 2, "batch_size": 8}
    return {
        "products": {"network": normed, "inputs": x, "labels": labels, **large},
        "products of small batches": {"network": normed, "inputs": x, "labels": labels, **small},
        "vmap": {"network": plain, "inputs": x, "labels": labels, "engine": "vmap", **small},
        "not kept": {"network": normed, "inputs": x, "labels": labels, "cache_bytes": 0, **small},
        "loop": {**convolved, "optimizer": "sgd", **small},
        "loop, not kept": {**convolved, "cache_bytes": 0, **large},
        "untrained": {"network": plain, "inputs": x, "labels": labels, "epochs": 0, "batch_size": 16},
    }


def found(ranks: Ranks) -> dict[str, tuple[dict[str, Tensor], dict]]:
    """Curves and states of every case."""
    results = {}
    for name, arguments in cases().items():
        dib = decodable_information(**arguments, num_classes=3, learning_rate=1e-2, keep_states=True, ranks=ranks)
        results[name] = dib.curves, dib.states
    return results


def find_in_teams(index: int, num: int, num_teams: int, port: int, queue: multiprocessing.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=num)
    torch.set_num_threads(1)
    teams.number_of_teams = lambda *_: num_teams
    results = found(Ranks(index, num))
    queue.put((index, {name: as_lists(*result) for name, result in results.items()}))
    torch.distributed.destroy_process_group()


def as_lists(curves: dict[str, Tensor], states: dict) -> tuple[dict, dict]:
    """What a queue carries without shared memory."""
    curves = {layer: curve.tolist() for layer, curve in curves.items()}
    return curves, {head: {name: t.tolist() for name, t in state.items()} for head, state in states.items()}


@pytest.fixture(scope="module")
def alone():
    return found(ALONE)


@pytest.mark.parametrize(("num", "num_teams"), [(3, 1), (4, 2)])
def test_heads_trained_by_a_team_are_those_of_one_device(num, num_teams, alone):
    """In float64, where a bias before batch norm, whose gradient is rounding, moves by 1e-8 and changes no output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_teams"])
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=find_in_teams, args=(i, num, num_teams, port, queue)) for i in range(num)]
    for process in processes:
        process.start()
    together = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    for name, (curves, states) in alone.items():
        for index in range(1, num):
            assert together[index][name] == (together[0][name][0], {}), name
        their_curves, their_states = together[0][name]
        assert their_states.keys() == states.keys()
        for layer, curve in curves.items():
            their = torch.tensor(their_curves[layer], dtype=torch.float64)
            torch.testing.assert_close(their, curve, rtol=0, atol=OF_HEADS, msg=lambda text, name=name: name + text)
        for head, state in states.items():
            for key, tensor in state.items():
                their = torch.tensor(their_states[head][key], dtype=tensor.dtype)
                torch.testing.assert_close(their, tensor, rtol=1e-7, atol=1e-6)


def share_samples() -> None:
    """All ranks are one team, also of more than there are CPUs."""
    teams.is_crowded, teams.number_of_teams = lambda _: False, lambda *_: 1


def share_samples_until_killed() -> None:
    """All are killed within the second of three measurements."""
    share_samples()
    signal_at("measures.heads:evaluate", 4, signal.SIGKILL)


def test_a_run_whose_devices_share_samples_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    """Of three: with two, a + b is b + a."""
    argv = [*TINY, "-w", "6", "--no-nc", "--dib-save", "--quiet"]
    statuses, text = run_tasks([*argv, "--name", "whole"], tmp_path, num=3, meddle=share_samples)
    assert set(statuses) == {0}, text

    statuses, text = run_tasks([*argv, "--name", "cut"], tmp_path, num=3, meddle=share_samples_until_killed)
    assert 0 not in statuses, text
    statuses, text = run_tasks(["--resume", "lightning_logs/cut"], tmp_path, num=3, meddle=share_samples)
    assert set(statuses) == {0}, text
    assert_same_run(LOGS / "cut", LOGS / "whole")


# When samples are shared


def heads_of(**digits: int) -> set[tuple[str, int]]:
    return {(layer, k) for layer, num in digits.items() for k in range(num)}


COSTS = {name: Cost(operations, 10, 1, 8) for name, operations in (("early", 900), ("middle", 300), ("late", 8))}
WORK = Work(num_samples=64, batch_size=16, epochs=2, encoding=0, room=10**6)


@pytest.mark.parametrize("num", [1, 2, 3, 7, 20])
def test_every_head_has_one_team_and_the_work_is_shared_evenly(num):
    heads = heads_of(early=5, middle=5, late=5)
    found = shares(heads, COSTS, num)
    assert sum(map(len, found)) == len(heads) and set().union(*found) == heads
    loads = [sum(COSTS[layer].operations for layer, _ in share) for share in found]
    assert max(loads) - min(loads) <= 900


@pytest.mark.parametrize(
    ("heads", "num_ranks", "num_teams"),
    [
        ({"early": 1}, 2, 1),  # one head, and a device that would be idle
        ({"early": 1}, 6, 1),
        ({"early": 2}, 2, 2),
        ({"early": 2}, 8, 2),  # four devices for each
        ({"early": 5}, 4, 1),  # 5 / 4 of a head's time instead of 2
        ({"early": 10}, 4, 4),  # 10 / 4 instead of 3 is a gain below a fifth
        ({"early": 1, "late": 3}, 3, 1),
        ({"early": 12, "middle": 12, "late": 12}, 8, 8),
    ],
)
def test_samples_are_shared_where_heads_leave_devices_idle(heads, num_ranks, num_teams):
    assert number_of_teams(heads_of(**heads), COSTS, WORK, num_ranks, FREE) == num_teams


def test_what_a_team_takes_is_solved_by_hand():
    """64 samples of 450 operations a head and 50 in the network; E = 2: 9 passes of a head, 4 steps an epoch."""
    heads, work = heads_of(early=2), WORK._replace(encoding=100)
    assert predicted(heads, COSTS, work, 1, FREE) == 64 * (50 + 9 * 2 * 450)
    assert predicted(heads, COSTS, work, 4, FREE) == 16 * (50 + 9 * 2 * 450)
    # Activations of 4 bytes a sample in 255 bytes: a rank alone computes them again, one of two keeps its half.
    little = work._replace(room=255)
    assert predicted(heads, COSTS, little, 1, FREE) == 64 * (5 * 50 + 9 * 2 * 450)
    assert predicted(heads, COSTS, little, 2, FREE) == 32 * (50 + 9 * 2 * 450)
    # 8 steps update 20 parameters; in a team they send 8 · 20 · ½ bytes and wait for 2 · (1 + 4) answers.
    slow = Device(operations=1, update=3, link=2, call=7)
    assert predicted(heads, COSTS, work, 1, slow) == 64 * 8150 + 8 * 60
    assert predicted(heads, COSTS, work, 2, slow) == 32 * 8150 + 8 * (60 + 40 + 70)
    assert predicted(set(), COSTS, work, 2, slow) == 0


def test_nobody_waits_for_answers_that_take_longer_than_the_head():
    assert number_of_teams(heads_of(late=1), COSTS, WORK, 2, FREE._replace(call=1000)) == 2


def test_processes_that_take_turns_on_the_cpus_do_not_share_samples(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for num, is_crowded in ((2, False), (3, True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num))
        assert teams.is_crowded(torch.device("cpu")) is is_crowded
    assert not teams.is_crowded(torch.device("cuda"))


class LessTheMean(nn.Module):
    """Looks at other samples and has no statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Flat(nn.Module):
    """Cannot do with no sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


@pytest.mark.parametrize(
    ("part", "is_shared"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4, momentum=None, affine=False), True),
        (nn.GroupNorm(2, 4), True),
        (nn.BatchNorm2d(4, track_running_stats=False), False),  # counts the batch also where nothing is trained
        (nn.InstanceNorm2d(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), False),
        (nn.Dropout(0.1), False),
        (IterNorm(4), False),
        (PercentileNorm(4), False),
        (LessTheMean(), False),
        (Flat(), False),
    ],
    ids=repr,
)
def test_only_decoders_that_treat_samples_alike_whatever_lies_beside_are_shared(part, is_shared):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(2, 4, 3), part, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    before, state = {name: t.clone() for name, t in decoder.state_dict().items()}, torch.get_rng_state()
    assert is_divisible(decoder, torch.zeros(2, 2, 4, 4)) is is_shared
    assert not decoder.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
