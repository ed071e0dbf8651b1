"""The datasets: SZT's facts, downloads that break, bad folders, batches, augmentation, decodable labels."""

import hashlib
import math
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
from datasets import Batches, Dataset, Split, decodable_labels, digit_entropies, load, szt
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


# Published sets, downloaded from a server of our own


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


# Folders of images


# Batches


def numbered(num_samples, shape=(3, 8, 7), shift=2, flip=True):
    """A dataset of random images in which sample i has the label i."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (num_samples, *shape), generator=generator, dtype=torch.uint8)
    split = Split(inputs, torch.arange(num_samples))
    offset, scale = torch.tensor([3.0, 5.0, 7.0])[: shape[0]], torch.tensor([2.0, 0.5, 4.0])[: shape[0]]
    return Dataset("numbered", ("a", "b"), split, split, offset, scale, shift, flip)


def labels_of(batches):
    return [y.tolist() for _, y in batches]


def images_by_label(batches):
    return {int(label): x for xs, ys in batches for x, label in zip(xs, ys, strict=True)}


def test_batches_without_shuffling_come_in_order_and_whole():
    batches = Batches(numbered(10), "test", 4)
    assert labels_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3 and batches.num_samples == 10
    assert labels_of(batches) == labels_of(batches)


def test_a_batch_is_normalised_per_channel():
    dataset = numbered(5)
    x, _ = next(iter(Batches(dataset, "train", 5)))
    offset, scale = dataset.offset[:, None, None], dataset.scale[:, None, None]
    assert x.dtype == torch.float32
    assert torch.equal(x, (dataset.train.inputs.float() - offset) * scale)


def test_random_access_gives_the_samples_as_evaluation_sees_them():
    batches = Batches(numbered(9), "train", 4, shuffle=True, augment=True)
    plain = images_by_label(Batches(numbered(9), "train", 4))
    indices = torch.tensor([7, 0, 7])
    for x, i in zip(batches[indices], indices.tolist(), strict=True):
        assert torch.equal(x, plain[i])
    assert torch.equal(batches[2:5], batches[torch.tensor([2, 3, 4])])
    assert torch.equal(batches.labels, torch.arange(9))


@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 4),
    shuffle=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_every_sample_comes_once_per_epoch_over_all_ranks(num_samples, batch_size, world_size, shuffle):
    if batch_size < world_size or num_samples < world_size:
        with pytest.raises(UserError):
            Batches(numbered(num_samples), "train", batch_size, world_size=world_size)
        return
    ranks = [
        Batches(numbered(num_samples), "train", batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [labels_of(batches) for batches in ranks]
    assert {len(labels) for labels in seen} == {len(batches) for batches in ranks}
    assert sorted(y for labels in seen for batch in labels for y in batch) == list(range(num_samples))
    for rank, labels in enumerate(seen):
        assert all(labels), "a rank without a sample in some batch"
        if batch_size >= 2 * world_size and num_samples >= 2 * world_size:
            assert min(map(len, labels)) >= 2, "batch norm needs two"
        if not shuffle and batch_size % world_size == 0:
            assert [y for batch in labels for y in batch] == list(range(rank, num_samples, world_size))


def test_a_last_batch_of_one_sample_joins_the_batch_before():
    assert labels_of(Batches(numbered(9), "train", 4)) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert labels_of(Batches(numbered(3), "train", 1)) == [[0], [1], [2]]  # as asked for


def test_shuffling_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, batch_size=4):
        batches = Batches(numbered(50), "train", batch_size, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        torch.rand(epoch + 1)  # global random numbers drawn in between
        return [y for batch in labels_of(batches) for y in batch]

    assert order(0, 3) == order(0, 3) == order(0, 3, batch_size=7)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_leave_global_random_state_alone():
    state = torch.get_rng_state()
    for _ in Batches(numbered(9), "train", 4, shuffle=True, augment=True):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_of_a_sample_depends_on_neither_batch_size_nor_rank():
    def augmented(**options):
        batches = Batches(numbered(23), "train", shuffle=True, augment=True, seed=5, **options)
        batches.set_epoch(2)
        return images_by_label(batches)

    reference = augmented(batch_size=23)
    halves = augmented(batch_size=4, world_size=2, rank=0) | augmented(batch_size=4, world_size=2, rank=1)
    for other in (augmented(batch_size=5), halves):
        assert other.keys() == reference.keys()
        assert all(torch.equal(other[label], reference[label]) for label in reference)


def moved_by_hand(images, down, right, flip):
    """The slow definition, (N, C, H, W): pad by reflection, cut out, mirror."""
    padded = torch.nn.functional.pad(images.double(), (2, 2, 2, 2), mode="reflect")
    height, width = images.shape[2:]
    cut = padded[:, :, 2 + down : 2 + down + height, 2 + right : 2 + right + width]
    return cut.flip(-1) if flip else cut


def which_moves(dataset):
    """For every sample after augmentation: the (down, right, flip) that it can be explained by."""
    offset, scale = dataset.offset[:, None, None], dataset.scale[:, None, None]
    moves = [(down, right, flip) for down in range(-2, 3) for right in range(-2, 3) for flip in (False, True)]
    candidates = [(moved_by_hand(dataset.train.inputs, *move).float() - offset) * scale for move in moves]
    images = images_by_label(Batches(dataset, "train", 512, augment=True))
    augmented = torch.stack([images[label] for label in range(len(images))])
    is_equal = torch.stack([(candidate == augmented).flatten(1).all(1) for candidate in candidates])  # (50, N)
    return [[moves[i] for i in column.nonzero().flatten().tolist()] for column in is_equal.T]


def test_augmented_images_are_reflected_shifts_and_flips_each_equally_often():
    moves = which_moves(numbered(3000, shape=(2, 5, 6)))
    assert {len(explanations) for explanations in moves} == {1}
    counts = Counter(explanations[0] for explanations in moves)
    assert len(counts) == 50
    # 60 of each expected, deviation 7.7; six of these are exceeded once in 10 million draws
    assert all(14 <= count <= 106 for count in counts.values())


def test_digits_are_shifted_but_never_flipped():
    moves = which_moves(numbered(200, shape=(1, 5, 6), flip=False))
    assert not any(flip for explanations in moves for _, _, flip in explanations)
    assert len({explanations[0] for explanations in moves}) == 25


def test_alternating_flips_mirror_each_sample_every_other_epoch():
    dataset = numbered(64, shift=0)
    batches = Batches(dataset, "train", 16, augment=True, alternate_flip=True, seed=1)
    plain = images_by_label(Batches(dataset, "train", 16))
    is_flipped = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        images = images_by_label(batches)
        is_flipped.append([torch.equal(images[i], plain[i].flip(-1)) for i in range(64)])
        assert all(f or torch.equal(images[i], plain[i]) for i, f in enumerate(is_flipped[-1]))
    assert 16 < sum(is_flipped[0]) < 48  # tossed, not all alike
    assert is_flipped[1] == [not f for f in is_flipped[0]]
    assert is_flipped[2] == is_flipped[0] and is_flipped[3] == is_flipped[1]


def test_data_that_stay_beside_the_device_give_the_same_batches():
    batches = Batches(numbered(9), "train", 4, shuffle=True, augment=True)
    resident = list(batches)
    batches.device = torch.device("cpu", 0)  # another name of the place: batches are now copied one by one
    for (x, y), (copied_x, copied_y) in zip(resident, batches, strict=True):
        assert torch.equal(x, copied_x) and torch.equal(y, copied_y)


def test_set_epoch_reaches_the_batches_through_their_sampler():
    batches = Batches(numbered(20), "train", 20, shuffle=True)
    assert batches.sampler is batches and batches.batch_sampler is None  # Lightning asks for both
    first = labels_of(batches)
    iterator = iter(batches)
    batches.sampler.set_epoch(1)  # Lightning calls it after iter(), and before the first batch
    second = [y.tolist() for _, y in iterator]
    assert second != first and second == labels_of(batches)


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
