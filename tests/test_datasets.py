"""The datasets: SZT's facts, downloads that break, bad folders, batches, augmentation, decodable labels."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import datasets
import downloads
import image_folders
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


class Server:
    """Serves `files` (path → bytes) on this machine, counts the requests, and misbehaves on demand."""

    def __init__(self):
        self.files, self.requests = {}, Counter()
        self.truncated, self.stalled = set(), set()
        self.reached_stall, self.go_on = threading.Event(), threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200 if self.path in server.files else 404)
                self.send_header("Content-Length", str(len(server.files.get(self.path, b""))))
                self.end_headers()

            def do_GET(self):
                if self.headers["Method"] == "HEAD":  # torchvision means HEAD when it looks for redirections
                    return self.do_HEAD()
                server.requests[self.path] += 1
                content = server.files[self.path]
                self.do_HEAD()
                half = len(content) // 2
                self.wfile.write(content[:half])
                if self.path in server.stalled:
                    server.reached_stall.set()
                    server.go_on.wait(20)
                if self.path not in server.truncated:
                    self.wfile.write(content[half:])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.go_on.set()
    server.http.shutdown()
    server.http.server_close()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_mnist(num_train=30, num_test=12):
    random = np.random.default_rng(0)
    files = {}
    for half, num_samples in (("train", num_train), ("t10k", num_test)):
        images = random.integers(0, 256, (num_samples, 28, 28), dtype=np.uint8)
        files[f"{half}-images-idx3-ubyte"] = idx(images)
        files[f"{half}-labels-idx1-ubyte"] = idx(np.arange(num_samples, dtype=np.uint8) % 10)
    return files


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def mnist(server, monkeypatch):
    """torchvision's MNIST, pointed at our server with small archives."""
    archives = {f"{name}.gz": gzip.compress(content) for name, content in small_mnist().items()}
    server.files = {f"/{name}": content for name, content in archives.items()}
    resources = [(name, md5(content)) for name, content in archives.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.url])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    return archives


@pytest.fixture
def cifar10(server, monkeypatch):
    """torchvision's CIFAR10, pointed at our server with a small archive, whose bytes are returned."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {
        name: pickle.dumps(
            {
                "data": random.integers(0, 256, (4, 3072), dtype=np.uint8),
                "labels": random.integers(10, size=4).tolist(),
            }
        )
        for name in names
    }
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    server.files["/cifar-10-python.tar.gz"] = buffer.getvalue()
    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "url", server.url + "cifar-10-python.tar.gz")
    monkeypatch.setattr(dataset, "tgz_md5", md5(buffer.getvalue()))
    monkeypatch.setattr(dataset, "train_list", [[name, md5(files[name])] for name in names[:5]])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", md5(files["test_batch"])]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(files["batches.meta"])}
    monkeypatch.setattr(dataset, "meta", meta)
    return files


@pytest.fixture
def offline(mnist, monkeypatch):
    """MNIST's server is gone: port 1 refuses connections."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])


def put_mnist(folder, **changes):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in {**small_mnist(), **changes}.items():
        (raw / name).write_bytes(content)
    return raw


def everything_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_mnist_is_downloaded_on_first_use_and_read_from_disk_afterwards(mnist, server, tmp_path):
    dataset = load("MNIST", tmp_path / "data")
    assert dataset.train.inputs.shape == (30, 1, 28, 28) and dataset.train.inputs.dtype == torch.uint8
    assert dataset.test.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert dataset.shape == (1, 28, 28) and dataset.num_classes == 10
    assert idx(dataset.train.inputs[:, 0].numpy()) == small_mnist()["train-images-idx3-ubyte"]
    assert everything_below(tmp_path / "data") == {
        "MNIST",
        "MNIST/raw",
        *(f"MNIST/raw/{f}" for f in small_mnist()),
    }
    load("MNIST", tmp_path / "data")
    assert set(server.requests.values()) == {1}


def test_cifar10_is_downloaded_and_keeps_its_channels(cifar10, server, tmp_path):
    dataset = load("CIFAR10", tmp_path)
    reference = torchvision.datasets.CIFAR10(tmp_path, train=True)
    assert torch.equal(dataset.train.inputs, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
    assert dataset.train.labels.tolist() == reference.targets
    assert len(dataset.test.labels) == 4 and dataset.classes[:2] == ("airplane", "automobile")
    assert everything_below(tmp_path) == {
        "cifar-10-batches-py",
        *(f"cifar-10-batches-py/{f}" for f in cifar10),
    }


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "header", "empty"])
def test_a_damaged_mnist_file_is_named_and_downloaded_again(mnist, tmp_path, capsys, name, damage):
    whole = small_mnist()[name]
    broken = {"truncated": whole[:-7], "longer": whole + b"\0", "header": b"\1" + whole[1:], "empty": b""}
    raw = put_mnist(tmp_path, **{name: broken.get(damage, whole)})
    if damage == "missing":
        (raw / name).unlink()
    load("MNIST", tmp_path)
    assert name in capsys.readouterr().err
    assert (raw / name).read_bytes() == whole


@pytest.mark.parametrize("position", range(16))
def test_no_flipped_byte_in_a_header_gets_through(offline, tmp_path, position):
    whole = small_mnist()["train-images-idx3-ubyte"]
    flipped = bytes([*whole[:position], whole[position] ^ 0xFF]) + whole[position + 1 :]
    put_mnist(tmp_path, **{"train-images-idx3-ubyte": flipped})
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte is damaged"):
        load("MNIST", tmp_path)


def test_a_flipped_byte_in_a_file_of_the_published_length_is_noticed(offline, tmp_path):
    labels = np.zeros(10_000, dtype=np.uint8)
    images = np.zeros((10_000, 28, 28), dtype=np.uint8)
    changes = {"t10k-labels-idx1-ubyte": idx(labels), "t10k-images-idx3-ubyte": idx(images)}
    put_mnist(tmp_path, **changes)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte is damaged .wrong checksum."):
        load("MNIST", tmp_path)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [(np.arange(30, dtype=np.uint8), "label 29"), (np.zeros(29, np.uint8), "29 labels")],
)
def test_impossible_mnist_labels_are_refused(offline, tmp_path, labels, complaint):
    put_mnist(tmp_path, **{"train-labels-idx1-ubyte": idx(labels)})
    with pytest.raises(UserError, match=f"train-labels-idx1-ubyte is damaged .{complaint}"):
        load("MNIST", tmp_path)


def test_a_flipped_byte_in_cifar10_is_named_and_mended(cifar10, tmp_path, capsys):
    load("CIFAR10", tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(cifar10["data_batch_3"][:-1] + b"x")
    load("CIFAR10", tmp_path)
    assert "data_batch_3 is damaged" in capsys.readouterr().err
    assert path.read_bytes() == cifar10["data_batch_3"]


def test_a_hostile_cifar10_pickle_is_never_unpickled(cifar10, server, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickle ran"),)

    load("CIFAR10", tmp_path)
    server.files.clear()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="test_batch is damaged"):
        load("CIFAR10", tmp_path)
    assert not (tmp_path / "pickle ran").exists()


@given(st.binary(max_size=40), st.booleans(), st.sampled_from([1, 3]))
@settings(deadline=None)
def test_any_bytes_are_an_idx_file_or_damaged(tmp_path_factory, content, has_magic, num_dimensions):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(bytes([0, 0, 8, num_dimensions]) * has_magic + content)
    with contextlib.suppress(downloads.Damaged):
        assert downloads._read_idx(path, num_dimensions, "").ndim == num_dimensions


def test_offline_without_data_is_one_sentence_and_leaves_nothing(offline, tmp_path):
    with pytest.raises(UserError) as error:
        load("MNIST", tmp_path / "data")
    message = str(error.value)
    assert "train-images-idx3-ubyte is missing" in message  # what is missing
    assert str(tmp_path / "data" / "MNIST" / "raw") in message  # where it was looked for
    assert "t10k-labels-idx1-ubyte.gz" in message and "--data-dir" in message  # how to bring it there
    assert "\n" not in message
    assert everything_below(tmp_path) == set()


def test_archives_brought_by_hand_are_unpacked_without_a_network(offline, mnist, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist.items():
        (raw / name).write_bytes(content)
    assert len(load("MNIST", tmp_path).train.labels) == 30


def test_a_damaged_archive_brought_by_hand_is_named(offline, mnist, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist.items():
        (raw / name).write_bytes(content[:-3] if name.startswith("t10k-labels") else content)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.gz is damaged"):
        load("MNIST", tmp_path)


def test_a_truncated_download_is_an_error_and_the_next_start_mends_it(mnist, server, tmp_path, capsys):
    server.truncated.add("/t10k-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz"):
        load("MNIST", tmp_path)
    server.truncated.clear()
    assert len(load("MNIST", tmp_path).test.labels) == 12
    assert "was interrupted" in capsys.readouterr().err
    assert server.requests["/train-images-idx3-ubyte.gz"] == 1  # what was whole is not fetched twice


def test_a_truncated_cifar10_archive_is_an_error_and_the_next_start_mends_it(cifar10, server, tmp_path):
    server.truncated.add("/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"CIFAR10 cannot be loaded: .* the download failed"):
        load("CIFAR10", tmp_path)
    server.truncated.clear()
    assert len(load("CIFAR10", tmp_path).train.labels) == 20


def test_a_server_that_never_answers_is_given_up_soon(mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        start = time.monotonic()
        with pytest.raises(UserError, match="the download failed"):
            load("MNIST", tmp_path)
    assert time.monotonic() - start < 5


def test_a_server_that_falls_silent_half_way_is_given_up_soon(mnist, server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.3)
    server.stalled.add("/train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"the download failed .*timed out"):
        load("MNIST", tmp_path)
    assert socket.getdefaulttimeout() is None


def loading_process(tmp_path, mnist, server):
    """Another process that loads this MNIST into the same folder."""
    script = (
        "import json, sys, torchvision, datasets\n"
        "url, resources, folder = json.loads(sys.argv[1])\n"
        "torchvision.datasets.MNIST.mirrors = [url]\n"
        "torchvision.datasets.MNIST.resources = resources\n"
        "print(len(datasets.load('MNIST', folder).train.labels))\n"
    )
    resources = [(name, md5(content)) for name, content in mnist.items()]
    arguments = json.dumps([server.url, resources, str(tmp_path)])
    return subprocess.Popen(
        [sys.executable, "-c", script, arguments],
        cwd=Path(datasets.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_on_the_first_download_share_one(mnist, server, tmp_path):
    server.stalled.add("/train-images-idx3-ubyte.gz")
    processes = [loading_process(tmp_path, mnist, server) for _ in range(2)]
    for process in processes:
        assert "downloading MNIST" in process.stderr.readline()  # both are on their way
    server.go_on.set()
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "30\n"), errors
    assert set(server.requests.values()) == {1}
    assert everything_below(tmp_path) == {"MNIST", "MNIST/raw", *(f"MNIST/raw/{f}" for f in small_mnist())}


def test_a_download_killed_half_way_is_mended_by_the_next_start(mnist, server, tmp_path):
    server.stalled.add("/t10k-images-idx3-ubyte.gz")
    process = loading_process(tmp_path, mnist, server)
    assert server.reached_stall.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    server.go_on.set()
    assert len(load("MNIST", tmp_path).train.labels) == 30
    assert everything_below(tmp_path) == {"MNIST", "MNIST/raw", *(f"MNIST/raw/{f}" for f in small_mnist())}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_folder_without_permission_is_one_sentence(mnist, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        load("MNIST", tmp_path / "data")


def test_a_data_folder_that_is_a_file_is_one_sentence(mnist, tmp_path):
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(UserError, match="MNIST cannot be loaded"):
        load("MNIST", tmp_path / "data")


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


def test_a_test_half_without_some_class_keeps_the_training_halfs_labels(folder):
    (folder / "test" / "cat" / "0.png").unlink()
    (folder / "test" / "cat").rmdir()
    assert load(str(folder)).test.labels.tolist() == [1, 2]


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
    "train/dog/1.png is 5 × 6": lambda f: Image.new("RGB", (5, 6)).save(f / "train/dog/1.png"),
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
        image_folders._decode([str(path)])


def test_links_inside_the_folder_are_followed(folder):
    (folder / "train" / "emu" / "link.png").symlink_to(folder / "train" / "emu" / "0.png")
    (folder.parent / "alias").symlink_to(folder)
    assert load(str(folder.parent / "alias")).train.labels.bincount().tolist() == [3, 2, 2]


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
    assert set(datasets.PUBLISHED_SHAPES) == set(datasets.DATASETS)
    szt = datasets.load("SZT")
    assert datasets.shape_and_classes("SZT") == (szt.shape, szt.num_classes)
