"""How DIB is shared out among several devices: the heads, and where that leaves devices idle, the samples too.

Ranks form teams of equal size. A head belongs to a team, and each rank of the team takes a part of every batch.

Letters: N samples, B batch, E head epochs.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from measures.heads import Budget, Head, Samples, room
from measures.passes import untouched
from run.ranks import Ranks


class Cost(NamedTuple):
    """What a head costs."""

    operations: int  # of a forward pass of two samples
    parameters: int
    norms: int  # batch norms
    num_bytes: int  # of two samples' activations


class Work(NamedTuple):
    """What there is to do for all heads alike."""

    num_samples: int
    batch_size: int
    epochs: int
    encoding: int  # operations of a forward pass of the network on two samples
    room: int  # bytes in which a rank may keep activations


class Device(NamedTuple):
    """What decides whether sharing samples pays."""

    operations: float  # a second
    update: float  # seconds a parameter
    link: float  # bytes a second to another one
    call: float  # seconds until all have answered, whatever they send


# Of a thread of a CPU a cautious reading of `benchmarks/teams.py`; of a GPU assumed.
DEVICES = {"cpu": Device(1e11, 3e-9, 1e9, 5e-4), "cuda": Device(5e13, 3e-11, 1e11, 5e-5)}
WORTH = 0.8  # of the time that sharing the heads alone would take: what is hardly faster stays simple
ROUNDING = 1e-6  # of what differs between samples, in float64


def shared_out(
    network: nn.Module,
    samples: Samples,
    heads: Collection[Head],
    budget: Budget,
    ranks: Ranks,
    cache_bytes: int | None = None,
) -> tuple[set[Head], Ranks]:
    """This rank's heads, and the team with which it shares their samples: alone, where there is none to share with.

    All ranks must ask, with the same network, samples and heads.
    """
    if ranks.num == 1:
        return set(heads), ranks
    layers = sorted({layer for layer, _ in heads})
    cost = costs(network, samples.pair, layers)
    memory = ranks.least(room(samples, cache_bytes))
    work = Work(len(samples), budget.batch_size, budget.epochs, encoding(samples), memory)
    device = samples.digits.device
    num = ranks.num if is_crowded(device) else number_of_teams(heads, cost, work, ranks.num, DEVICES[device.type])
    decoders = (network.get_encoder_decoder(layer)[1] for layer in layers)
    if num < ranks.num and not all(map(is_divisible, decoders, (samples.pair[layer] for layer in layers))):
        num = ranks.num
    number, team = ranks.in_teams(ranks.from_first(num))
    return shares(heads, cost, ranks.num // team.num)[number], team


def costs(network: nn.Module, pair: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Cost]:
    """What a head of each layer costs."""
    from torch.utils.flop_counter import FlopCounterMode  # takes long to import, and one process does without

    found = {}
    for layer in layers:
        _, decoder = network.get_encoder_decoder(layer)
        with FlopCounterMode(display=False) as counter:
            decoder.eval()(pair[layer].to(next(decoder.parameters()).dtype))
        parameters = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
        norms = sum(map(is_batch_norm, decoder.modules()))
        found[layer] = Cost(counter.get_total_flops(), parameters, norms, pair[layer].nbytes)
    return found


def encoding(samples: Samples) -> int:
    """The operations of a forward pass of the network on two samples."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        samples.encode(torch.arange(2))
    return counter.get_total_flops()


def shares(heads: Iterable[Head], costs: Mapping[str, Cost], num: int) -> list[set[Head]]:
    """The heads of each of `num` teams: each head, the costliest first, goes to the team that has the least to do."""
    loads = [(0, index) for index in range(num)]
    shares: list[set[Head]] = [set() for _ in range(num)]
    for layer, digit in sorted(heads, key=lambda head: (-costs[head[0]].operations, head)):
        load, index = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[layer].operations, index))
        shares[index].add((layer, digit))
    return shares


def number_of_teams(
    heads: Collection[Head], costs: Mapping[str, Cost], work: Work, num_ranks: int, device: Device
) -> int:
    """How many teams should take the least time; as many as ranks, each alone, unless others are worth it."""

    def seconds(num: int) -> float:
        size = num_ranks // num
        return max(predicted(share, costs, work, size, device) for share in shares(heads, costs, num))

    best = min((num for num in range(num_ranks, 0, -1) if num_ranks % num == 0), key=seconds)
    return best if seconds(best) <= WORTH * seconds(num_ranks) else num_ranks


def predicted(heads: Collection[Head], costs: Mapping[str, Cost], work: Work, size: int, device: Device) -> float:
    """The seconds that a team of this size should take for its heads.

    The network's passes and the 4 E + 1 of the heads (a backward pass is two) are over a part of the samples. Of a step
    the update is for each rank to do, and before it the gradients are added up: 4 bytes a number, sent nearly twice.
    """
    if not heads:
        return 0.0
    num_samples, layers = work.num_samples / size, {layer for layer, _ in heads}
    own = [costs[layer] for layer, _ in heads]
    is_kept = num_samples * sum(costs[layer].num_bytes / 2 for layer in layers) <= work.room
    passes = 1 if is_kept else 2 * work.epochs + 1
    operations = passes * work.encoding / 2 + (4 * work.epochs + 1) * sum(cost.operations / 2 for cost in own)
    parameters = sum(cost.parameters for cost in own)
    answers = sum(1 + 4 * cost.norms for cost in own)  # two of a norm forward and two backward
    together = answers * device.call + 8 * parameters * (size - 1) / size / device.link if size > 1 else 0
    steps = work.epochs * math.ceil(work.num_samples / work.batch_size)
    return num_samples * operations / device.operations + steps * (parameters * device.update + together)


def is_crowded(device: torch.device) -> bool:
    """Whether processes take turns on the CPUs, so that an answer takes as long as all others' turns."""
    return device.type == "cpu" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > (os.cpu_count() or 1)


def is_batch_norm(part: nn.Module) -> bool:
    """Whether this is batch norm as torch has it: that of several ranks' samples is known."""
    is_torchs = isinstance(part, _BatchNorm) and type(part).forward is _BatchNorm.forward
    return is_torchs and part.running_mean is not None


def is_divisible(decoder: nn.Module, h: Tensor) -> bool:
    """Whether a decoder can be trained on parts of a batch: what it makes of a sample is the same whatever lies beside.

    Batch norm aside. A part may be empty. Who draws random numbers would draw others for a part, and who keeps
    statistics of what it sees would keep those of a part.
    """
    with untouched(decoder), torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
        decoder = deepcopy(decoder).double().train()
        for part in filter(is_batch_norm, decoder.modules()):
            part.eval()
        x = torch.randn(3, *h.shape[1:], dtype=torch.float64, device=h.device)
        before, kept = random_state(h.device), [buffer.clone() for buffer in decoder.buffers()]
        try:
            three, two = decoder(x), decoder(x[:2])
            decoder(x[:0]).sum().backward()
        except (RuntimeError, ValueError, IndexError):
            return False
        if not torch.equal(random_state(h.device), before) or not all(map(torch.equal, decoder.buffers(), kept)):
            return False
        difference, variation = (three[:2] - two).abs().max(), (three - three[0]).abs().max()
        return bool(difference < ROUNDING * variation)


def random_state(device: torch.device) -> Tensor:
    """Of the generators that a module on this device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
