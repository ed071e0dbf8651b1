"""The datasets: SZT's facts, names and limits, decodable labels."""

import hashlib
import math
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
from datasets import Batches, decodable_labels, digit_entropies, load, szt
from run.errors import UserError

MNIST_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


# SZT


def icosahedron_symmetries():
    """All permutations of the vertices that keep neighbours neighbours, extended one vertex at a time."""
    neighbours = [set(row) for row in datasets.NEIGHBOURS]

    def extend(images):
        vertex = len(images)
        if vertex == 12:
            yield images
            return
        for image in set(range(12)) - set(images):
            if all((image in neighbours[images[v]]) == (vertex in neighbours[v]) for v in range(vertex)):
                yield from extend([*images, image])

    return list(extend([]))


def test_szt_lists_all_patterns_in_counting_order():
    patterns, labels = szt()
    assert patterns.shape == (4096, 12) and patterns.dtype == torch.uint8
    assert labels.shape == (4096,) and labels.dtype == torch.int64
    assert [int("".join(map(str, row)), 2) for row in patterns.tolist()] == list(range(4096))


def test_szt_has_the_published_number_of_ones_for_every_number_of_bits():
    patterns, labels = szt()
    assert labels.bincount().tolist() == [1978, 2118]
    ones = torch.bincount(patterns.sum(1), weights=labels.double(), minlength=13).tolist()
    assert ones == [0, 0, 0, 0, 0, 60, 532, 732, 495, 220, 66, 12, 1]


def test_szt_neighbours_and_opposites_are_those_of_an_icosahedron():
    for vertex, row in enumerate(datasets.NEIGHBOURS):
        assert len(set(row)) == 5
        assert all(vertex in datasets.NEIGHBOURS[neighbour] for neighbour in row)
    for first, second in datasets.OPPOSITES:
        assert not {first, *datasets.NEIGHBOURS[first]} & {second, *datasets.NEIGHBOURS[second]}
    assert sorted(sum(datasets.OPPOSITES, ())) == list(range(12))


def test_szt_patterns_fall_into_64_orbits():
    patterns, labels = szt()
    singles, opposites = [(v,) for v in range(12)], datasets.OPPOSITES
    edges = [(v, w) for v, row in enumerate(datasets.NEIGHBOURS) for w in row if v < w]
    keys = [
        tuple(sum(math.prod(p[v] for v in group) for group in groups) for groups in (singles, edges, opposites))
        for p in patterns.tolist()
    ]
    assert len(set(keys)) == 64
    assert len(set(zip(keys, labels.tolist(), strict=True))) == 64  # one label per orbit


def test_szt_labels_are_invariant_under_every_symmetry_of_the_icosahedron():
    patterns, labels = szt()
    symmetries = icosahedron_symmetries()
    assert len(symmetries) == 120
    place_values = 2 ** torch.arange(11, -1, -1)
    for permutation in symmetries:
        rotated = (patterns[:, permutation].long() * place_values).sum(1)
        assert torch.equal(labels[rotated], labels)


def test_szt_split_is_stratified_complete_and_fixed():
    state = torch.get_rng_state()
    dataset = load("SZT")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(dataset.train.labels) == 3481  # 85% of 2118 and of 1978, rounded down
    assert dataset.train.labels.bincount().tolist() == [1681, 1800]
    _, labels = szt()
    both = torch.cat([dataset.train.inputs, dataset.test.inputs]).long() @ 2 ** torch.arange(11, -1, -1)
    assert torch.equal(both.sort().values, torch.arange(4096))
    assert torch.equal(torch.cat([dataset.train.labels, dataset.test.labels]), labels[both])
    # Every version of every library must split alike: these are the first training patterns, and all of them.
    assert both[:5].tolist() == [241, 2045, 1103, 1294, 1200]
    assert hashlib.md5(both[:3481].numpy().astype("<i8").tobytes()).hexdigest() == "3bec7ddcc48ef6fb575dec1bbaac297f"


def test_szt_inputs_are_plus_and_minus_one():
    dataset = load("SZT", limit=100)
    assert dataset.shape == (12,) and dataset.num_classes == 2
    x, y = next(iter(Batches(dataset, "train", 100, shuffle=True, augment=True)))
    assert x.shape == (100, 12) and x.dtype == torch.float32
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert 30 < y.sum() < 70  # mixed, because stored shuffled


# Names and limits


@pytest.mark.parametrize("name", ["mnist", "", "no/such/folder", "a" * 5000, "nul\0"])
def test_an_unknown_name_is_refused_with_the_allowed_ones(name):
    with pytest.raises(UserError, match="SZT, MNIST, FashionMNIST, CIFAR10"):
        load(name)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(UserError, match=f"--limit {limit}"):
        load("SZT", limit=limit)


def test_a_limit_keeps_the_first_samples_of_both_halves():
    whole, limited = load("SZT"), load("SZT", limit=700)
    assert torch.equal(limited.train.inputs, whole.train.inputs[:700])
    assert torch.equal(limited.test.labels, whole.test.labels)  # of which there are fewer
    assert limited.train.inputs.untyped_storage().nbytes() == 700 * 12


# Decodable labels


def decodable_labels_slowly(labels, num_classes):
    """Algorithm 1 word by word, with Python's integers."""
    indices, seen = [], Counter()
    for label in labels:
        indices.append(seen[label])
        seen[label] += 1
    num_digits = 0
    while num_classes**num_digits < max(seen.values()):
        num_digits += 1
    rows = []
    for index in indices:
        row = []
        for _ in range(num_digits):
            index, digit = divmod(index, num_classes)
            row.insert(0, digit)
        rows.append(row)
    return rows


def labels_with_counts(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def test_decodable_labels_of_the_worked_example():
    digits = decodable_labels(torch.tensor([0, 0, 0, 1, 1, 3, 4, 4, 4, 4, 4, 4]), 5)
    assert digits.T.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 0]]
    assert digits.dtype == torch.int64


@given(st.integers(2, 6).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c - 1), min_size=1))))
@settings(deadline=None)
def test_decodable_labels_equal_the_slow_algorithm(case):
    num_classes, labels = case
    digits = decodable_labels(torch.tensor(labels), num_classes)
    assert digits.tolist() == decodable_labels_slowly(labels, num_classes)


@given(st.integers(2, 12), st.lists(st.integers(0, 300), min_size=2, max_size=12), st.randoms())
@settings(deadline=None)
def test_digits_and_class_together_identify_every_sample(num_classes, counts, random):
    counts = [*counts[:num_classes], 1]
    labels = labels_with_counts(counts[:num_classes]).tolist() or [0]
    random.shuffle(labels)
    digits = decodable_labels(torch.tensor(labels), num_classes)
    assert digits.numel() == 0 or (digits.min() >= 0 and digits.max() < num_classes)
    place_values = torch.tensor([num_classes**k for k in reversed(range(digits.shape[1]))], dtype=torch.int64)
    index = (digits * place_values).sum(1)
    for label in set(labels):
        of_class = index[torch.tensor(labels) == label]
        assert of_class.tolist() == list(range(len(of_class)))


@pytest.mark.parametrize(("num_classes", "power"), [(5, 3), (2, 10), (3, 5), (10, 3), (7, 4)])
def test_exact_powers_need_no_further_digit(num_classes, power):
    largest = num_classes**power
    for count, num_digits in ((largest - 1, power), (largest, power), (largest + 1, power + 1)):
        assert decodable_labels(torch.zeros(count, dtype=torch.int64), num_classes).shape == (
            count,
            num_digits,
        )


def test_one_sample_per_class_needs_no_digit():
    assert decodable_labels(torch.tensor([3, 0, 1]), 5).shape == (3, 0)


def test_empty_classes_and_narrow_integers_are_fine():
    labels = torch.tensor([9, 9, 9], dtype=torch.uint8)
    assert decodable_labels(labels, 10).tolist() == [[0], [1], [2]]
    assert decodable_labels(labels.tolist(), 2**40).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("labels", "num_classes", "complaint"),
    [
        ([0, 0], 1, "at least 2 classes"),
        ([0, 0], 0, "at least 2 classes"),
        ([], 3, "at least one entry"),
        ([[0, 1]], 3, "vector"),
        ([0, 3], 3, "0 … 2, got 0 … 3"),
        ([-1, 2], 3, "got -1 … 2"),
        ([0.0, 1.0], 3, "integers"),
        ([True, False], 3, "integers"),
    ],
)
def test_impossible_labels_are_refused(labels, num_classes, complaint):
    with pytest.raises(ValueError, match=complaint):
        decodable_labels(torch.tensor(labels), num_classes)


def test_fifty_thousand_labels_take_milliseconds():
    labels = torch.randint(10, (50_000,), generator=torch.Generator().manual_seed(0))
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        decodable_labels(labels, 10)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.1  # 3 ms on an idle core; other work may be going on


def test_digit_entropies_of_cifar10_are_the_known_ones():
    entropies = digit_entropies(decodable_labels(labels_with_counts([5000] * 10), 10), 10)
    assert entropies.dtype == torch.float64
    assert entropies.sum().item() / math.log(2) == pytest.approx(12.28771, abs=5e-6)  # as printed


def test_digit_entropies_of_mnist_are_the_known_ones():
    entropies = digit_entropies(decodable_labels(labels_with_counts(MNIST_COUNTS), 10), 10)
    assert entropies.mean().item() == pytest.approx(2.18945, abs=5e-6)  # as printed
    assert entropies.flip(0).tolist() == pytest.approx([2.3026, 2.3026, 2.3018, 1.8508], abs=5e-5)


def test_digit_entropies_of_fashion_mnist_are_the_known_ones():
    entropies = digit_entropies(decodable_labels(labels_with_counts([6000] * 10), 10), 10)
    assert entropies.mean().item() == pytest.approx(2.17488, abs=5e-6)  # as printed


def test_digit_entropies_by_hand():
    digits = torch.tensor([[0, 2], [0, 1], [0, 0], [0, 0]])
    expected = [0.0, 0.5 * math.log(2) + 0.5 * math.log(4)]
    assert digit_entropies(digits, 3).tolist() == pytest.approx(expected, abs=1e-15)  # float64 rounding
    assert digit_entropies(torch.empty(4, 0, dtype=torch.int64), 3).tolist() == []


def test_the_shapes_known_without_data_are_those_of_the_data():
    assert set(datasets.PUBLISHED) == set(datasets.DATASETS)
    szt = datasets.load("SZT")
    assert datasets.shape_and_classes("SZT") == (szt.shape, szt.num_classes)
