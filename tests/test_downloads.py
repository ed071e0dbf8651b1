"""Published sets, downloaded from a server of our own: whole, damaged, killed half-way."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import signal
import socket
import struct
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
import warm
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import downloads
from datasets import load
from run.errors import UserError


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
    line = [sys.executable, "-c", script, arguments]
    return warm.Popen(line, cwd=Path(datasets.__file__).parent, stdout=warm.PIPE, stderr=warm.PIPE)


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
