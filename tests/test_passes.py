import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from measures import passes
from measures.passes import Activations, untouched


def features(x):
    return {"first": x, "second": 2 * x[:, :2]}


def batches_of(x, size=4):
    return list(zip(x.split(size), torch.arange(len(x)).split(size), strict=True))


class Counting:
    """Batches that remember how many of them were asked for, and a feature function that does so too."""

    def __init__(self, batches):
        self.batches, self.num_read, self.num_computed = batches, 0, 0

    def __iter__(self):
        for batch in self.batches:
            self.num_read += 1
            yield batch

    def features(self, x):
        self.num_computed += 1
        return features(x)


def collected(activations):
    batches = list(activations)
    return {k: torch.cat([h[k] for h, _ in batches]) for k in batches[0][0]}, torch.cat([y for _, y in batches])


BYTES_OF_A_BATCH = 4 * (4 * (3 + 2) + 2 * 4)  # 4 samples: 3 + 2 float32 activations and an int64 label each


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_any_cache_gives_the_same_activations_and_computes_only_what_is_not_kept(kept):
    x = torch.randn(11, 3)  # the last of the three batches is short
    counting = Counting(batches_of(x))
    activations = Activations(counting.features, counting, cache_bytes=kept * BYTES_OF_A_BATCH)
    for _ in range(3):
        h, y = collected(activations)
        assert torch.equal(h["first"], x) and torch.equal(h["second"], 2 * x[:, :2])
        assert torch.equal(y, torch.arange(11))
    assert counting.num_computed == 3 + 2 * (3 - kept)


def test_a_short_last_batch_is_not_kept_out_of_order():
    counting = Counting(batches_of(torch.randn(5, 3)))
    activations = Activations(counting.features, counting, cache_bytes=BYTES_OF_A_BATCH - 1)  # fits only the last
    first, second = collected(activations), collected(activations)
    assert torch.equal(first[1], second[1]) and torch.equal(first[0]["first"], second[0]["first"])


def test_data_are_read_once_when_all_activations_fit_the_default_budget():
    counting = Counting(batches_of(torch.randn(11, 3)))
    activations = Activations(counting.features, counting)
    collected(activations), collected(activations)
    assert counting.num_read == counting.num_computed == 3


def test_an_iteration_that_is_left_early_does_no_harm():
    counting = Counting(batches_of(torch.arange(33.0).view(11, 3)))
    activations = Activations(counting.features, counting)
    next(iter(activations))
    assert torch.equal(collected(activations)[0]["first"], torch.arange(33.0).view(11, 3))


def test_activations_are_flat_and_without_gradients():
    linear = nn.Linear(3, 4)
    activations = Activations(lambda x: {"map": linear(x).view(-1, 2, 2)}, batches_of(torch.randn(5, 3)))
    for h, _ in activations:
        assert h["map"].shape[1:] == (4,) and not h["map"].requires_grad


def test_running_out_of_memory_drops_the_cache_with_one_warning_and_goes_on():
    x = torch.randn(11, 3)
    counting = Counting(batches_of(x))

    def scarce(x):
        h = counting.features(x)
        if counting.num_computed == 2:
            raise torch.OutOfMemoryError
        return h

    activations = Activations(scarce, counting, cache_bytes=10**6)
    with pytest.warns(UserWarning, match="Out of memory") as warned:
        h, _ = collected(activations)
        again, _ = collected(activations)
    assert len(warned) == 1
    assert torch.equal(h["first"], x) and torch.equal(again["first"], x)
    assert counting.num_computed == 4 + 3  # three batches and the failure; then nothing was kept


def test_running_out_of_memory_without_a_cache_is_an_error():
    def exhausted(x):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(Activations(exhausted, batches_of(torch.randn(4, 3))))


def varying(**last):
    """A feature function whose last batch, of 3 samples, differs."""
    return lambda x: {"first": x, "second": x} if len(x) == 4 else last


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (varying(first=torch.zeros(3, 3)), "second"),
        (varying(first=torch.zeros(3, 3), second=torch.zeros(3, 2)), "second"),
        (varying(first=torch.zeros(3, 3), second=torch.zeros(4, 3)), "second"),
        (lambda x: {}, "No layer"),
    ],
    ids=["a layer is missing", "another dimension", "another number of samples", "no layer at all"],
)
def test_what_did_not_arrive_is_an_error_that_names_the_layer(broken, named):
    with pytest.raises(RuntimeError, match=named):
        list(Activations(broken, batches_of(torch.randn(11, 3))))


def small_network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def random_numbers():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_untouched_restores_flags_statistics_gradients_and_random_state_also_after_an_error(fails):
    network = small_network()
    network[1].eval()  # a frozen batch norm must stay frozen
    flags = [part.training for part in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random_numbers()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    try:
        with untouched(network):
            assert not any(part.training for part in network.modules())
            assert not network(torch.randn(5, 3)).requires_grad
            random_numbers()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [part.training for part in network.modules()] == flags
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert random_numbers() == expected
    assert torch.is_grad_enabled()


def test_what_is_computed_inside_untouched_can_train_something_outside():
    with untouched(small_network()):
        h = torch.ones(2, 3) + 1
    nn.Linear(3, 1)(h).sum().backward()  # an inference tensor would refuse


def test_compiled_networks_run_uncompiled_inside_untouched():
    network, compiled_calls = small_network(), []

    def backend(graph, inputs):
        compiled_calls.append(graph)
        return graph.forward

    network.compile(backend=backend)
    with untouched(network):
        network(torch.randn(5, 3))
        assert "torch._dynamo" in sys.modules and not compiled_calls
    network(torch.randn(5, 3))
    assert compiled_calls


def test_small_batches_are_joined_in_order_and_large_ones_stay_as_they_are():
    x = torch.randn(11, 3)
    joined = list(passes.joined([({"layer": h}, y) for h, y in batches_of(x)]))
    assert len(joined) == 1 and torch.equal(joined[0][0]["layer"], x) and torch.equal(joined[0][1], torch.arange(11))
    large = [({"layer": torch.empty(1, passes.MIN_ELEMENTS)}, torch.zeros(1))] * 2
    assert all(a is b for a, b in zip(passes.joined(large), large, strict=True))
