"""Folders of images: what is read, and what is refused by naming the culprit."""

import contextlib
import os

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import decoding
import image_folders
from datasets import Batches, load
from run.errors import UserError


def put_images(folder, counts, size=(6, 5), mode="RGB", suffix="png"):
    """counts[class] images each, of which number i has the value 10 · class + i everywhere."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            value = 10 * label + i
            color = (value, value + 1, value + 2) if mode == "RGB" else value
            Image.new(mode, size, color).save(folder / name / f"{i}.{suffix}")


@pytest.fixture
def folder(tmp_path):
    put_images(tmp_path / "set" / "train", {"cat": 3, "dog": 2, "emu": 1})
    put_images(tmp_path / "set" / "test", {"cat": 1, "dog": 1, "emu": 1})
    return tmp_path / "set"


def test_a_folder_is_read_with_its_classes_interleaved(folder):
    dataset = load(str(folder))
    assert dataset.classes == ("cat", "dog", "emu") and dataset.shape == (3, 5, 6) and dataset.flip
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 0]
    assert dataset.train.inputs[:, :, 0, 0].tolist() == [[v, v + 1, v + 2] for v in (0, 10, 20, 1, 11, 2)]
    assert load(str(folder), limit=4).train.labels.tolist() == [0, 1, 2, 0]


def test_a_folder_has_the_classes_of_torchvisions_image_folder(folder):
    reference = torchvision.datasets.ImageFolder(str(folder / "train"))
    dataset = load(str(folder))
    assert dataset.classes == tuple(reference.classes)
    ours = {(int(x[0, 0, 0]), int(y)) for x, y in zip(dataset.train.inputs, dataset.train.labels, strict=True)}
    assert ours == {(image.getpixel((0, 0))[0], label) for image, label in reference}


def test_a_test_half_without_some_class_keeps_the_training_halfs_labels_and_says_so(folder):
    (folder / "test" / "cat" / "0.png").unlink()
    (folder / "test" / "cat").rmdir()
    with pytest.warns(UserWarning, match="test has no images of cat: only training images show these classes"):
        assert load(str(folder)).test.labels.tolist() == [1, 2]


def test_what_is_hidden_is_passed_over_at_any_depth(folder):
    for half in ("train", "test"):
        put_images(folder / half, {".ipynb_checkpoints": 1, ".git": 1, "dog/.ipynb_checkpoints": 1})
        (folder / half / "cat" / "._0.png").write_bytes(b"of a Mac")
        (folder / half / "cat" / ".hidden.png").write_bytes(b"")
        (folder / half / "cat" / ".link").symlink_to("/")
    dataset = load(str(folder))
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.counts == {"cat": [3, 1], "dog": [2, 1], "emu": [1, 1]}


def test_images_at_any_depth_are_of_the_class_in_torchvisions_order(folder):
    put_images(folder / "train" / "emu", {"young-1": 1, "young": 2, "young/very": 2})
    listing = image_folders.listed(folder)
    names = [
        file.name for file, label in zip(listing.train.files, listing.train.labels.tolist(), strict=True) if label == 2
    ]
    reference = torchvision.datasets.ImageFolder(str(folder / "train"))
    assert [str(folder / name) for name in names] == [path for path, label in reference.samples if label == 2]
    assert len(names) == 6


def test_val_serves_where_test_is_missing(folder):
    put_images(folder / "val", {"cat": 2, "dog": 2, "emu": 2})
    assert len(load(str(folder)).test.labels) == 3
    move_away(folder / "test")
    assert len(load(str(folder)).test.labels) == 6


def test_images_beside_the_folders_of_classes_are_said_to_be_left_out(folder):
    Image.new("RGB", (6, 5)).save(folder / "train" / "stray.png")
    with pytest.warns(UserWarning, match="train/stray.png lies in no folder of a class"):
        assert len(load(str(folder)).train.labels) == 6


def test_a_folder_is_restricted_to_some_classes_before_it_is_read(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"nonsense")
    dataset = load(str(folder), classes=["2", "dog"])
    assert dataset.classes == ("dog", "emu") and dataset.train.labels.tolist() == [0, 1, 0]
    assert dataset.counts == {"dog": [2, 1], "emu": [1, 1]}


def test_the_working_folder_may_be_the_dataset(folder, monkeypatch):
    whole = load(str(folder))
    monkeypatch.chdir(folder)
    assert torch.equal(load(".").train.inputs, whole.train.inputs)


def test_a_folder_is_normalised_by_its_training_images(folder):
    dataset = load(str(folder))
    x = Batches(dataset, "train", 6)[torch.arange(6)]
    values = dataset.train.inputs.double()
    expected = (values - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), False, keepdim=True)
    # float32: offset and scale are rounded once, and two operations follow
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)


def test_images_of_one_colour_do_not_divide_by_zero(tmp_path):
    for half in ("train", "test"):
        put_images(tmp_path / half, {"a": 1, "b": 1}, size=(1, 1), mode="L")
    Image.new("L", (1, 1), 0).save(tmp_path / "train" / "b" / "0.png")
    dataset = load(str(tmp_path))
    assert dataset.shift == 0  # nothing to reflect in one pixel
    assert Batches(dataset, "train", 2, augment=True)[torch.arange(2)].tolist() == [[[[0.0]]], [[[0.0]]]]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("P", 3), ("RGB", 3)])
def test_grey_folders_have_one_channel_and_others_three(tmp_path, mode, channels):
    for half in ("train", "test"):
        put_images(tmp_path / half, {"a": 2, "b": 2}, mode=mode)
    assert load(str(tmp_path)).shape == (channels, 5, 6)


def test_one_coloured_image_makes_the_folder_coloured(tmp_path):
    for half in ("train", "test"):
        put_images(tmp_path / half, {"a": 2, "b": 2}, mode="L")
    Image.new("RGB", (6, 5), (1, 2, 3)).save(tmp_path / "test" / "b" / "1.png")
    dataset = load(str(tmp_path))
    assert dataset.shape == (3, 5, 6)
    assert dataset.test.inputs[3, :, 0, 0].tolist() == [1, 2, 3]
    assert dataset.train.inputs[1, :, 0, 0].tolist() == [10, 10, 10]


def remove_images(folder):
    for path in folder.iterdir():
        path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def move_away(folder, leave_empty=False):
    folder.rename(folder.with_name(f"{folder.name} away"))
    if leave_empty:
        folder.mkdir()


def keep_one_class(half):
    for name in ("dog", "emu"):
        move_away(half / name)
        (half / f"{name} away").rename(half.parent / name)


def link_out(link):
    """Makes `link`, in the set, a link to a file or (without suffix) a folder beside the set."""
    outside = next(parent for parent in link.parents if parent.name == "set").parent / "outside"
    put_images(outside, {"gnu": 1})
    link.symlink_to(outside / "gnu" / "0.png" if link.suffix else outside)


def link_out_behind_a_link_in(train):
    (train.parent / "more").mkdir()
    link_out(train.parent / "more" / "link.png")
    (train / "more").symlink_to(train.parent / "more")


def replace_by_link_out(half):
    move_away(half)
    link_out(half)


SIXTEEN_BITS = Image.fromarray(np.zeros((5, 6), dtype=np.uint16))


BREAKAGES = {  # what the error must say, and how the folder is broken for real
    "train/dog/1.png is 5 × 6.*--image-size N": lambda f: Image.new("RGB", (5, 6)).save(f / "train/dog/1.png"),
    "test/emu/0.png is 7 × 7": lambda f: Image.new("RGB", (7, 7)).save(f / "test/emu/0.png"),
    "train/dog holds no image": lambda f: remove_images(f / "train/dog"),
    "test/dog holds no image": lambda f: (f / "test/dog/0.png").rename(f / "test/dog/0.txt"),
    "train/emu/0.png cannot be read": lambda f: truncate(f / "train/emu/0.png"),
    "train/cat/2.png cannot be read": lambda f: (f / "train/cat/2.png").write_bytes(b"nonsense"),
    "test/cat/0.png cannot be read": lambda f: (f / "test/cat/0.png").write_bytes(b""),
    "train/cat/0.png has more than 8 bits": lambda f: SIXTEEN_BITS.save(f / "train/cat/0.png"),
    "test/yak is a class that .*train lacks": lambda f: put_images(f / "test", {"yak": 1}),
    "set is no dataset: no folder train/": lambda f: move_away(f / "train"),
    "set is no dataset: no folder test/": lambda f: move_away(f / "test"),
    "train is empty": lambda f: move_away(f / "train", leave_empty=True),
    "test is empty": lambda f: move_away(f / "test", leave_empty=True),
    "train holds the one class cat": lambda f: keep_one_class(f / "train"),
    "train/cat/link.png is a link to a place outside": lambda f: link_out(f / "train/cat/link.png"),
    "train/gnu is a link to a place outside": lambda f: link_out(f / "train/gnu"),
    "set/test is a link to a place outside": lambda f: replace_by_link_out(f / "test"),
    "train/more/link.png is a link to a place": lambda f: link_out_behind_a_link_in(f / "train"),
    "loop is a link to a folder that is read": lambda f: (f / "train/cat/loop").symlink_to(f / "train"),
    "link.png is neither a file nor a folder": lambda f: (f / "test/cat/link.png").symlink_to(f / "nothing"),
    "pipe.png is neither a file nor a folder": lambda f: os.mkfifo(f / "train/cat/pipe.png"),
}


@pytest.mark.parametrize("complaint", BREAKAGES)
def test_a_bad_folder_is_refused_by_naming_the_culprit(folder, complaint):
    BREAKAGES[complaint](folder)
    with pytest.raises(UserError, match=complaint) as error:
        load(str(folder))
    assert "\n" not in str(error.value)


@given(
    suffix=st.sampled_from(["png", "jpg", "bmp", "webp", "tif"]),
    flips=st.dictionaries(st.integers(0, 999), st.integers(1, 255), max_size=3),
)
@settings(deadline=None, max_examples=200)
@pytest.mark.filterwarnings("ignore")  # PIL warns of strange files, which is not what is asked here
def test_an_image_with_flipped_bytes_is_read_or_refused(tmp_path_factory, suffix, flips):
    path = tmp_path_factory.mktemp("flipped") / f"image.{suffix}"
    Image.new("RGB", (6, 5), (10, 200, 30)).save(path)
    content = bytearray(path.read_bytes())
    for position, change in flips.items():
        content[position % len(content)] ^= change
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        decoding._pixels(path, None)


def test_links_inside_the_folder_are_followed(folder):
    (folder / "train" / "emu" / "link.png").symlink_to(folder / "train" / "emu" / "0.png")
    (folder.parent / "alias").symlink_to(folder)
    assert load(str(folder.parent / "alias")).train.labels.bincount().tolist() == [3, 2, 2]
