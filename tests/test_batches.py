"""Batches: every sample once, in an order and under an augmentation that depend on seed and epoch alone."""

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import augmentation
from augmentation import Crops
from batches import Batches, Data, ahead
from datasets import Dataset, Split
from run.errors import UserError


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


def cropped_by_hand(images, choices):
    """The slow definition, (N, C, H, W): cut whole pixels out, scale them up, mirror."""
    size = images.shape[-1]
    results = []
    for image, (left, top, across, down, is_flipped) in zip(images.double(), choices.T.tolist(), strict=True):
        width, height = (max(1, round(length * size)) for length in (across, down))
        left, top = (min(round(first * size), size - length) for first, length in ((left, width), (top, height)))
        part = image[None, :, top : top + height, left : left + width]
        scaled = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", align_corners=False)[0]
        results.append(scaled.flip(-1) if is_flipped else scaled)
    return torch.stack(results)


def test_crops_are_cut_out_scaled_up_and_flipped():
    images = numbered(40, shape=(2, 9, 9)).train.inputs
    crops = Crops(flip=True, alternate_flip=False)
    choices = crops.draw(40, seed=1, epoch=0)
    assert 8 < choices[4].sum() < 32  # 40 tosses
    # positions in float32, relative to 9 pixels: 1e-6 of a pixel, between which are up to 255 grey levels
    torch.testing.assert_close(
        crops(images, None, choices).double(), cropped_by_hand(images, choices), rtol=0, atol=2e-3
    )
    some = torch.tensor([7, 3])
    torch.testing.assert_close(
        crops(images, some, choices[:, some]), crops(images, None, choices)[some], rtol=0, atol=0
    )


def test_crops_are_the_same_however_many_images_are_cut_at_once(monkeypatch):
    images, crops = numbered(40, shape=(2, 9, 9)).train.inputs, Crops(flip=True, alternate_flip=False)
    choices = crops.draw(40, seed=1, epoch=0)
    whole = crops(images, None, choices)
    for num_values in (1, 500, 2000):
        monkeypatch.setattr(augmentation, "AT_ONCE", num_values)
        assert torch.equal(crops(images, None, choices), whole)


def test_crops_have_the_areas_and_shapes_of_inception_and_lie_within_the_image():
    left, top, across, down, _ = Crops(flip=True, alternate_flip=False).draw(20_000, seed=0, epoch=3).double()
    assert min(left.min(), top.min()) >= 0 and max((left + across).max(), (top + down).max()) <= 1 + 1e-6
    area, ratio = across * down, across / down
    assert area.min() >= 0.0799 and ratio.min() >= 0.7499 and ratio.max() <= 1.3334  # float32
    # A uniform area, rejected where the crop is too large: below 3/4 none is, as 3/4 · 4/3 = 1.
    small = area[area < 0.75]
    assert small.mean() == pytest.approx((0.08 + 0.75) / 2, abs=0.01)  # its deviation is 0.19 / √10000
    assert ratio.log().mean() == pytest.approx(0, abs=0.01) and ratio.log().std() == pytest.approx(0.16, abs=0.01)
    assert torch.corrcoef(torch.stack([left / (1 - across), top / (1 - down)]).nan_to_num())[0, 1].abs() < 0.03


def test_a_cropped_sample_depends_on_seed_and_epoch_alone():
    dataset = replace(numbered(23, shape=(3, 8, 8), shift=0), crop=True)

    def augmented(epoch=2, **options):
        batches = Batches(dataset, "train", shuffle=True, augment=True, seed=5, **options)
        batches.set_epoch(epoch)
        return images_by_label(batches)

    reference = augmented(batch_size=23)
    halves = augmented(batch_size=4, world_size=2, rank=0) | augmented(batch_size=4, world_size=2, rank=1)
    for other in (augmented(batch_size=5), halves):
        assert all(torch.equal(other[label], reference[label]) for label in reference)
    assert not torch.equal(augmented(3, batch_size=23)[0], reference[0])
    plain = Batches(dataset, "train", 23)[torch.arange(23)]
    assert not any(torch.equal(plain[label], reference[label]) for label in reference)


# Samples that lie elsewhere


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_mapped_samples_give_the_same_batches(crop, augment, tmp_path):
    dataset = replace(numbered(23, shape=(3, 8, 8)), crop=crop)
    dataset.train.inputs.numpy().tofile(tmp_path / "bytes")
    mapped = torch.from_numpy(np.memmap(tmp_path / "bytes", np.uint8, "c", shape=(23, 3, 8, 8)))
    beside = replace(dataset, train=Split(mapped, dataset.train.labels, is_mapped=True))
    ways = [
        Batches(data, "train", 4, shuffle=True, augment=augment, rank=1, world_size=2) for data in (dataset, beside)
    ]
    for (x, y), (other_x, other_y) in zip(*ways, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    assert torch.equal(ways[0][torch.tensor([3, 1])], ways[1][torch.tensor([3, 1])])


def test_batches_are_fetched_ahead_by_a_thread_and_in_turn():
    started, parts = [], list(range(7))

    def fetch(part):
        started.append((part, threading.current_thread() is threading.main_thread()))
        return part

    fetched = ahead(fetch, parts)
    assert next(fetched) == 0
    deadline = time.monotonic() + 60
    while len(started) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert started == [(0, False), (1, False), (2, False)]  # two ahead, and no more until they are used
    assert list(fetched) == parts[1:]


def test_a_reader_that_stops_early_or_fails_leaves_no_thread():
    def fetch(part):
        if part == 3:
            raise OSError("gone")
        return part

    num_threads = threading.active_count()
    fetched = ahead(fetch, range(9))
    assert next(fetched) == 0
    fetched.close()
    with pytest.raises(OSError, match="gone"):
        list(ahead(fetch, range(9)))
    assert threading.active_count() == num_threads


def test_the_first_images_are_fewer_where_they_are_large(monkeypatch):
    data = Data(numbered(9), batch_size=4)
    assert len(data.first_images(5)) == 5
    monkeypatch.setattr("batches.FIRST_VALUES", 2 * 3 * 8 * 7)
    assert len(data.first_images(5)) == 2
