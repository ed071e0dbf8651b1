"""Images as bytes: the same in memory and mapped from a file, which is whole or not there, and made once."""

import csv
import os
import signal
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import transforms

import datasets
import decoding
import image_folders
from decoding import Sources, decoded
from main import main
from run.errors import UserError, WrongFlag

SIZES = [(9, 7), (7, 9), (12, 8), (8, 8), (8, 31), (5, 6), (16, 9)]  # width, height


def put_pictures(folder, num=9, sizes=SIZES, grey=False):
    """Noise of many sizes, in two classes; returns the folder."""
    random = np.random.default_rng(0)
    for half, share in (("train", num), ("test", num // 2)):
        for name in ("cat", "dog"):
            (folder / half / name).mkdir(parents=True)
            for i in range(share):
                width, height = sizes[i % len(sizes)]
                pixels = random.integers(256, size=(height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels[:, :, 0] if grey else pixels).save(folder / half / name / f"{i}.png")
    return folder


def sources_of(folder, image_size=8, **options):
    listing = image_folders.listed(folder)
    return Sources(folder, listing.train.files + listing.test.files, len(listing.train.files), image_size, **options)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(decoding, "PART_IMAGES", 4)


@pytest.fixture
def asked(monkeypatch):
    """The parts that were decoded, (first, last + 1)."""
    asked, decode = [], Sources.decode

    def noted(self, start, stop, into):
        asked.append((start, stop))
        decode(self, start, stop, into)

    monkeypatch.setattr(Sources, "decode", noted)
    return asked


@pytest.fixture
def folder(tmp_path):
    return put_pictures(tmp_path / "set")


def mapped(folder, tmp_path, **options):
    return decoded(sources_of(folder, **options), tmp_path / "data", in_memory=False)


def test_images_are_scaled_and_cropped_as_torchvision_does_it(folder, tmp_path):
    sources = sources_of(folder)
    images = decoded(sources, tmp_path, in_memory=True)
    reference = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.PILToTensor()])
    assert images.inputs.shape == (26, 3, 8, 8) and not images.is_mapped
    for image, file in zip(images.inputs, sources.files, strict=True):
        assert torch.equal(image, reference(Image.open(folder / file.name)))


def test_the_file_holds_the_same_bytes_as_memory(folder, tmp_path):
    there, here = mapped(folder, tmp_path), decoded(sources_of(folder), tmp_path, in_memory=True)
    assert there.is_mapped and torch.equal(there.inputs, here.inputs) and torch.equal(there.counts, here.counts)
    [file] = (folder / ".decoded").iterdir()  # nothing is left beside it
    assert file.name == "8.bytes" and file.stat().st_size == decoding.HEADER + here.inputs.numel()
    assert file.read_bytes()[decoding.HEADER :] == here.inputs.numpy().tobytes()


def test_values_are_counted_over_the_training_images_alone(folder, tmp_path):
    images = decoded(sources_of(folder), tmp_path, in_memory=True)
    expected = torch.stack([images.inputs[:18, c].flatten().bincount(minlength=256) for c in range(3)])
    assert torch.equal(images.counts, expected)


def test_a_file_is_made_once_and_serves_memory_as_well(folder, tmp_path, asked):
    first = mapped(folder, tmp_path)
    assert sorted(asked) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 18), (18, 22), (22, 26)]
    asked.clear()
    again, copy = mapped(folder, tmp_path), decoded(sources_of(folder), tmp_path, in_memory=True)
    assert not asked and again.is_mapped and not copy.is_mapped
    assert torch.equal(again.inputs, first.inputs) and torch.equal(copy.inputs, first.inputs)


def change(folder):
    path = folder / "train" / "cat" / "0.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(path)


CHANGES = {
    "another image": change,
    "touched": lambda folder: os.utime(folder / "test" / "dog" / "1.png", ns=(1, 1)),
    "one image less": lambda folder: (folder / "train" / "dog" / "3.png").unlink(),
    "one moved": lambda folder: (folder / "train" / "dog" / "3.png").rename(folder / "train" / "cat" / "x.png"),
    "the file cut off": lambda folder: os.truncate(folder / ".decoded" / "8.bytes", 70_000),
    "the file overwritten": lambda folder: (folder / ".decoded" / "8.bytes").write_bytes(b"{}" + bytes(70_000)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_file_is_renewed_when_the_images_change_or_it_is_broken(what, folder, tmp_path):
    before = mapped(folder, tmp_path)
    kept = before.inputs.clone()
    CHANGES[what](folder)
    after = mapped(folder, tmp_path)
    assert torch.equal(after.inputs, decoded(sources_of(folder), tmp_path, in_memory=True).inputs)
    if "file" not in what:
        assert torch.equal(before.inputs, kept)  # who has it mapped goes on with it
        assert not torch.equal(after.inputs, kept) or what == "touched"


def test_sizes_and_selections_have_files_of_their_own(folder, tmp_path):
    mapped(folder, tmp_path)
    mapped(folder, tmp_path, image_size=4)
    mapped(folder, tmp_path, selection="1a2b")
    assert sorted(os.listdir(folder / ".decoded")) == ["4.bytes", "8-1a2b.bytes", "8.bytes"]


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(folder, tmp_path, monkeypatch, asked):
    monkeypatch.setattr(decoding, "num_cpus", lambda: 1)
    decode = Sources.decode
    child = os.fork()
    if not child:  # pragma: no cover

        def killed(self, start, stop, into):
            if start == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            decode(self, start, stop, into)

        Sources.decode = killed
        mapped(folder, tmp_path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(os.listdir(folder / ".decoded")) == ["8.lock", "8.partial"]
    images = mapped(folder, tmp_path)
    assert asked == [(12, 16), (16, 18), (18, 22), (22, 26)]
    assert os.listdir(folder / ".decoded") == ["8.bytes"]
    reference = decoded(sources_of(folder), tmp_path, in_memory=True)
    assert torch.equal(images.inputs, reference.inputs) and torch.equal(images.counts, reference.counts)


def test_what_a_killed_process_left_of_other_images_is_not_gone_on_with(folder, tmp_path, monkeypatch, asked):
    with monkeypatch.context() as patch:
        patch.setattr(decoding.Partial, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mapped(folder, tmp_path)
    asked.clear()
    change(folder)
    images = mapped(folder, tmp_path)
    assert len(asked) == 7
    assert torch.equal(images.inputs, decoded(sources_of(folder), tmp_path, in_memory=True).inputs)


def test_of_several_processes_one_decodes_and_all_share(folder, tmp_path, asked):
    """Threads, whose locks exclude each other as those of processes do."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(mapped(folder, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 7 and len(found) == 4
    assert all(torch.equal(images.inputs, found[0].inputs) for images in found)


def test_a_broken_image_is_named_and_leaves_no_file(folder, tmp_path):
    (folder / "test" / "dog" / "2.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"test/dog/2\.png cannot be read as an image"):
        mapped(folder, tmp_path)
    assert not (folder / ".decoded" / "8.bytes").exists()


def test_images_of_several_sizes_are_refused_by_naming_the_flag(folder, tmp_path):
    for in_memory in (True, False):
        with pytest.raises(UserError, match=r"is 7 × 9 but .*0.png is 9 × 7: .*--image-size N scales and crops"):
            decoded(sources_of(folder, image_size=None), tmp_path, in_memory=in_memory)


def test_grey_images_have_one_channel_in_the_file_too(tmp_path):
    grey = put_pictures(tmp_path / "grey", grey=True)
    assert mapped(grey, tmp_path).inputs.shape == (26, 1, 8, 8)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(grey / "test" / "dog" / "3.png")
    assert mapped(grey, tmp_path).inputs.shape == (26, 3, 8, 8)


@pytest.mark.parametrize(
    ("free", "num_processes", "is_mapped"), [(10_000, 1, False), (9_983, 1, True), (10_000, 2, True)]
)
def test_free_memory_decides_where_images_lie(free, num_processes, is_mapped, folder, tmp_path, monkeypatch):
    """26 images of 192 bytes take 4992: half of what is free is allowed."""
    monkeypatch.setattr(decoding, "machine_memory", lambda: free)
    assert decoded(sources_of(folder), tmp_path, num_processes=num_processes).is_mapped == is_mapped


def test_memory_that_there_is_not_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "machine_memory", lambda: 9_000)
    with pytest.raises(WrongFlag, match=r"--in-memory: 26 images of 8 × 8 take .* in 2 process"):
        decoded(sources_of(folder), tmp_path, in_memory=True, num_processes=2)


def test_the_file_lies_in_the_data_folder_where_the_images_may_not_be_touched(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert mapped(folder, tmp_path).is_mapped
    [place] = (tmp_path / "data" / ".decoded").iterdir()
    assert place.name.startswith("set-") and os.listdir(place) == ["8.bytes"]
    assert not (folder / ".decoded").exists()


def test_a_full_disk_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6, 5000))
    with pytest.raises(UserError, match=r"decoded has 0\.0 GB left and the decoded images take"):
        mapped(folder, tmp_path)
    assert os.listdir(folder / ".decoded") == []


def test_layers_are_listed_without_decoding(folder, asked):
    assert datasets.shape_and_classes(str(folder), image_size=8) == ((3, 8, 8), 2) and not asked


def test_a_run_on_mapped_images_is_that_on_images_in_memory(folder, in_an_empty_folder, capsys):
    line = f"-m MLP -w 5 4 -d {folder} --image-size 8 -b 5 -e 2 --no-dib --no-plots --log-dir logs"
    for name, where in (("memory", "yes"), ("mapped", "no")):
        assert main([*line.split(), "--name", name, "--in-memory", where]) == 0
    said = capsys.readouterr()
    assert "18 training and 8 test samples, 2 classes: cat 9 + 4, dog 9 + 4\n" in said.out
    assert said.err.count("decoding 26 images once into") == 1
    numbers = []
    for name in ("memory", "mapped"):
        with open(f"logs/{name}/metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        numbers.append([{key: row[key] for key in row if not key.startswith("time/")} for row in rows])
    assert numbers[0] == numbers[1] and len(numbers[0]) == 3
    states = [torch.load(f"logs/{name}/checkpoints/last.ckpt")["state_dict"] for name in ("memory", "mapped")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert yaml.safe_load(Path("logs/mapped/hparams.yaml").read_text())["in_memory"] == "no"
