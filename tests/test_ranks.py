"""Runs of several processes: the same numbers as with one, one folder, one voice, and no process left behind."""

import csv
import multiprocessing
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import warm
import yaml
from PIL import Image
from processes import (
    ROOT,
    Run,
    assert_same_run,
    at_call,
    finish,
    free_port,
    run_tasks,
    signal_at,
    start_tasks,
    task,
)
from torch import nn

from datasets import Batches, Dataset, Split
from measures.decodable_information import decodable_information
from measures.neural_collapse import neural_collapse
from measures.rank import rank
from networks import build_network
from run import ranks
from run.batch_norm import over_all_ranks
from run.ranks import Ranks, is_lost_rank, name_by_environment
from run.run_folder import RunFolder

LOGS = Path("lightning_logs")
TINY = ["-w", "6", "5", "4", "--batch-norm", "--limit", "203", "-b", "64", "-e", "2", "--dib-epochs", "1", "--no-plots"]
# Where numbers of two computations are compared: what a processor rounds in float32 grows to 1e-4 where Adam divides it
# by its own size, as with a bias before batch norm, whose gradient is zero. In float64 it is far below Adam's eps.
EXACT = ["--precision", "64-true"]
OF_HEADS = 1e-8  # nats: 1e-16 of a zero gradient over Adam's eps of 1e-8 is what a bias moves by, relative to the rate
LONG = [*TINY, "-e", "500", "--no-dib", "--measure-at", "0", "500", "--quiet"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def last_row(folder):
    with open(folder / "metrics.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return {name: float(cell) for name, cell in row.items() if cell and not name.startswith("time/")}


# The same numbers


def test_a_run_of_two_processes_measures_what_one_process_finds_in_its_checkpoint(tmp_path):
    """203 samples, so that ranks have 102 and 101, and batch norm, whose statistics differ between ranks."""
    command = [sys.executable, ROOT / "main.py", *TINY, *EXACT, "--rank", "--accelerator", "cpu"]
    run = warm.run([*command, "--devices", "2", "--strategy", "ddp"], capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("results in") == 1 and run.stdout.count("epoch 1/2") == 1
    assert run.stderr.count("warning") == 1 and "trained too short" in run.stderr  # of 1 head epoch, by one process
    assert sorted(path.name for path in LOGS.iterdir()) == ["version_0"]
    assert finish(["--measure", "lightning_logs/version_0/checkpoints/last.ckpt", "--devices", "1"], tmp_path)[0] == 0
    together, alone = last_row(LOGS / "version_0"), last_row(LOGS / "version_1")
    measured = [name for name in alone if "/" in name]
    assert {name.partition("/")[0] for name in measured} == {"nc1", "nc1_chance", "equiseparation", "rank", "dib"}
    for name in measured:  # a head's rounding errors are relative to nats, and Adam makes them larger
        is_of_heads = name.startswith("dib")
        assert together[name] == pytest.approx(alone[name], rel=1e-9, abs=OF_HEADS if is_of_heads else 0), name


def image_folder(folder):
    """Two classes of 32 × 32 images in color."""
    generator = torch.Generator().manual_seed(0)
    for split, num in (("train", 11), ("test", 6)):
        for name, low in (("dark", 0), ("light", 90)):
            (folder / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = torch.randint(low, low + 160, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{i}.png")
    return folder


def test_convolutions_and_look_ahead_leave_the_ranks_with_the_buffers_of_the_checkpoint(tmp_path):
    argv = ["-m", "CIFARNet", "-d", str(image_folder(tmp_path / "images")), "-b", "9", "-e", "2", "-lr", "0.01"]
    argv += [*EXACT, "--no-dib", "--no-tta", "--no-plots", "--quiet"]
    statuses, text = run_tasks(argv, tmp_path)
    assert statuses == [0, 0], text
    together = last_row(LOGS / "version_0")
    assert finish(["--measure", "lightning_logs/version_0/checkpoints/last.ckpt", "--devices", "1"], tmp_path)[0] == 0
    alone = last_row(LOGS / "version_1")
    for name in alone:
        assert together[name] == pytest.approx(alone[name], rel=1e-9), name


def test_training_with_batch_norm_over_all_is_that_of_one_process_also_with_shares_of_different_size(tmp_path):
    argv = [*TINY, *EXACT, "--sync-batch-norm", "-b", "51", "-e", "4", "--optimizer", "sgd", "--no-dib", "--quiet"]
    statuses, text = run_tasks([*argv, "--name", "two"], tmp_path)
    assert statuses == [0, 0], text
    assert finish([*argv, "--name", "one"], tmp_path)[0] == 0
    states = [torch.load(LOGS / name / "checkpoints/last.ckpt", weights_only=True) for name in ("one", "two")]
    for name, tensor in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], tensor, rtol=1e-9, atol=1e-12)
    two, one = last_row(LOGS / "two"), last_row(LOGS / "one")
    assert two == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize(("num", "nodes"), [(3, 1), (2, 2)])
def test_three_and_more_processes_killed_and_resumed_end_on_the_same_bytes(num, nodes, tmp_path):
    """Two processes would always: a + b is b + a, but of three numbers it matters which two are added first."""
    argv = [*TINY, "-e", "3", "--no-dib", "--quiet"]
    statuses, text = run_tasks([*argv, "--name", "whole"], tmp_path, num=num, nodes=nodes)
    assert set(statuses) == {0}, text
    killed = partial(signal_at, "classifier:Classifier.training_step", 6, signal.SIGKILL)  # in epoch 2
    statuses, text = run_tasks([*argv, "--name", "cut"], tmp_path, num=num, nodes=nodes, meddle=killed)
    assert 0 not in statuses, text
    statuses, text = run_tasks(["--resume", "lightning_logs/cut"], tmp_path, num=num, nodes=nodes)
    assert set(statuses) == {0}, text
    assert_same_run(LOGS / "cut", LOGS / "whole")


def test_two_processes_train_batch_norm_on_four_samples_which_is_the_least(tmp_path):
    statuses, text = run_tasks([*TINY, "--limit", "4", "-b", "4", "--no-dib", "--quiet"], tmp_path)
    assert statuses == [0, 0], text


def test_the_range_test_finds_one_rate_for_all(tmp_path):
    statuses, text = run_tasks([*TINY, "--lr-range-test", "--no-dib", "-e", "1"], tmp_path)
    assert statuses == [0, 0] and text.count("the range test chose") == 1
    assert len((LOGS / "version_0/lr_range_test.csv").read_text().splitlines()) > 10


def toy_network():
    torch.manual_seed(0)
    return build_network("MLP", (6,), 3, widths=(7, 5), nonlinearity="tanh", batch_norm=True).double().eval()


def toy_batches(sizes):
    """Batches of these sizes, one after the other from the same 60 samples."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=generator).double(), torch.arange(60) % 3
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [(x[start:stop], y[start:stop]) for start, stop in pairwise(bounds)]


def measured(batches, x, y, ranks):
    """All measures of the toy network; `batches` are this rank's, x and y all data."""
    network = toy_network()
    budget = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 16}
    dib = decodable_information(network, x, y, 3, **budget, keep_states=True, ranks=ranks)
    return {
        "nc1": neural_collapse(network.feature_extractor, batches, 3, ranks=ranks),
        "rank": rank(network.feature_extractor, batches, 3, ranks=ranks),
        "wide": rank(lambda x: {"wide": x @ torch.ones(6, 90).triu().double()}, batches, 3, ranks=ranks),
        "dib": {layer: curve.tolist() for layer, curve in dib.curves.items()},
        "heads": sorted(dib.states),
    }


def measure_on_a_rank(index, port, queue):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2
    )  # fmt: skip
    batches = toy_batches([3, 20, 10, 1, 7, 19])
    own = [batches[:1], batches[1:]][index]  # 1 batch and 5, 3 samples and 57
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    queue.put((index, measured(own, x, y, Ranks(index, 2))))
    torch.distributed.destroy_process_group()


def test_ranks_with_different_numbers_of_batches_find_what_one_process_finds():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_ranks"])
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=measure_on_a_rank, args=(index, port, queue)) for index in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    batches = toy_batches([60])
    alone = measured(batches, *batches[0], Ranks())
    assert found[0].pop("heads") == alone.pop("heads") and found[1].pop("heads") == []
    assert found[0] == found[1]
    for measure in alone:
        tolerance = {"rtol": 0, "atol": OF_HEADS} if measure == "dib" else {"rtol": 1e-9, "atol": 1e-12}
        for layer, value in alone[measure].items():
            torch.testing.assert_close(found[0][measure][layer], value, **tolerance)


# Batch norm


def normalised(x, together):
    """Output, gradients and statistics of two norms after two steps on x (B, 3, 5)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3, momentum=None, affine=False)).double()
    x = x.clone().requires_grad_()
    for _ in range(2):
        with over_all_ranks(network) if together else nullcontext():
            y = network(x)
        (y * torch.linspace(-1, 2, 5)).pow(3).sum().backward()
    parameters = [parameter.grad.tolist() for parameter in network.parameters()]
    statistics = {name: buffer.tolist() for name, buffer in network.named_buffers()}
    return y.tolist(), x.grad.tolist(), parameters, statistics, network.eval()(x).tolist()


def normalise_on_a_rank(index, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    queue.put((index, normalised(samples_to_normalise()[[slice(0, 2), slice(2, 9)][index]], together=True)))
    torch.distributed.destroy_process_group()


def samples_to_normalise():
    return torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(1)).double() + 4


def test_batch_norm_over_all_ranks_is_that_of_the_whole_batch():
    """2 and 7 samples; in float64, where sums in another order differ by 1e-16."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_ranks"])
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=normalise_on_a_rank, args=(index, port, queue)) for index in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    y, gradient, parameters, statistics, evaluated = normalised(samples_to_normalise(), together=False)
    tensor, close = (
        partial(torch.tensor, dtype=torch.float64),
        partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11),
    )
    for place, expected in ((0, y), (1, gradient), (4, evaluated)):
        close(tensor(found[0][place] + found[1][place]), tensor(expected))
    assert found[0][3] == found[1][3]
    for name, expected in statistics.items():
        close(tensor(found[0][3][name]), tensor(expected))
    for first, second, expected in zip(found[0][2], found[1][2], parameters, strict=True):
        close(tensor(first) + tensor(second), tensor(expected))


def test_batch_norm_is_its_own_again_afterwards():
    network = nn.Sequential(nn.BatchNorm1d(3))
    with over_all_ranks(network):
        assert "forward" in vars(network[0])
    assert "forward" not in vars(network[0])
    network(torch.randn(4, 3))


# Threads


def note_threads():
    """Leave the number of threads that training has in a file."""
    at_call("classifier:Classifier.training_step", 1, lambda: Path("threads").write_text(str(torch.get_num_threads())))


@pytest.mark.parametrize(("asked", "said"), [(["--threads", "2"], "2 threads"), ([], "1 thread")])
def test_each_process_computes_with_the_threads_that_it_says(asked, said, tmp_path):
    argv = [*TINY, *asked, "-e", "1", "--no-dib", "--no-nc"]
    statuses, together = run_tasks(argv, tmp_path, meddle=note_threads)
    assert Path("threads").read_text() == said[0]
    status, alone = finish(argv, tmp_path, meddle=note_threads)
    assert [status, *statuses] == [0, 0, 0] and Path("threads").read_text() == said[0]
    for name, device, text in (("version_0", "2 × CPU", together), ("version_1", "CPU", alone)):
        assert yaml.safe_load((LOGS / name / "hparams.yaml").read_text())["provenance"]["device"] == f"{device}, {said}"
        assert f"device   {device}, {said}, 32-true" in text


# Shares


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_make_the_mean_over_ranks_that_of_the_global_batch(world_size):
    x = torch.arange(27, dtype=torch.uint8)[:, None]
    split = Split(x, x[:, 0].long() % 2)
    dataset = Dataset("", ("even", "odd"), split, split, torch.zeros(1), torch.ones(1), shift=0, flip=False)
    shares = [Batches(dataset, "train", 7, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = Batches(dataset, "train", 7)
    for i, batches in enumerate(zip(whole, *shares, strict=True)):
        (x, _), *parts = batches
        means = [part.mean() * share.weight(i) for (part, _), share in zip(parts, shares, strict=True)]
        assert torch.stack(means).mean() == pytest.approx(x.mean().item(), rel=1e-6)


# One folder, one voice


def test_tasks_of_a_job_make_one_folder_and_go_on_in_it_after_their_requeue(tmp_path):
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    argv = [*TINY, "-e", "6"]
    statuses, text = run_tasks([*argv, "--name", "whole"], tmp_path)
    assert statuses == [0, 0] and text.count("results in") == 1, text
    meddle = partial(signal_at, "classifier:Classifier.training_step", 14, signal.SIGUSR1)  # epoch 4, on both
    statuses, text = run_tasks([*argv], tmp_path, env=env, meddle=meddle)
    assert statuses == [138, 138]
    assert Path("asked").read_text() == "requeue 77\n" and text.count("ended by SIGUSR1") == 1
    statuses, text = run_tasks([*argv], tmp_path, env=env | {"SLURM_RESTART_COUNT": "1"})
    assert statuses == [0, 0], text
    assert sorted(path.name for path in LOGS.iterdir()) == ["version_0", "whole"]
    assert_same_run(LOGS / "version_0", LOGS / "whole")


def test_a_wrong_flag_is_said_once(tmp_path):
    statuses, text = run_tasks([*TINY, "--epochs", "none"], tmp_path)
    assert statuses == [2, 2] and text.count("\n") == 1


def test_a_name_that_is_taken_is_said_and_no_task_waits(tmp_path):
    (LOGS / "taken/checkpoints").mkdir(parents=True)
    start = time.monotonic()
    statuses, text = run_tasks([*TINY, "--name", "taken"], tmp_path)
    assert statuses == [1, 1] and "main.py: --name: lightning_logs/taken exists already" in text
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("devices", "num_tasks"), [(2, 1), (1, 2)])
def test_another_number_of_devices_than_of_tasks_is_one_sentence(devices, num_tasks, tmp_path):
    run = Run([*TINY, "--devices", str(devices), "--accelerator", "cpu"], tmp_path, env=task(0, num=num_tasks))
    status, text = run.end()
    assert status == 1 and text.count("\n") == 1 and not LOGS.exists()
    assert f"devices={devices}" in text and f"--ntasks-per-node={num_tasks}" in text


def test_a_checkpoint_that_not_every_machine_sees_is_refused(tmp_path):
    class Elsewhere(Ranks):
        def from_first(self, thing):
            return tmp_path, 3

    with pytest.raises(Exception, match="does not hold the same checkpoint on every machine"):
        RunFolder.of(Namespace(resume=None), Elsewhere(1, 2))


# None outlives the others


def test_a_process_that_dies_ends_the_run_with_a_sentence(tmp_path):
    first, second = start_tasks(LONG, tmp_path)
    first.wait((LOGS / "version_0/checkpoints/last.ckpt").exists)
    second.send(signal.SIGKILL)
    start = time.monotonic()
    status, text = first.end(60)
    assert status == 1 and time.monotonic() - start < 20
    assert text.count("\n") == 1 and "another process of this run ended early" in text
    assert "python main.py --resume lightning_logs/version_0` goes on" in text


def wait_for(condition, process, seconds=120):
    """Until something holds, which must be before the process ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sentences(text):
    """What was said, but for that others are not there yet: on a busy machine they take long to start."""
    return [line for line in text.splitlines() if not line.startswith("main.py: waiting for all")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_with_the_first_process_the_ones_it_started_end(number, tmp_path):
    command = [sys.executable, ROOT / "main.py", *LONG, "--devices", "2", "--accelerator", "cpu"]
    process = warm.Popen(command, stderr=warm.PIPE, start_new_session=True)
    wait_for((LOGS / "version_0/checkpoints/last.ckpt").exists, process)
    if number == signal.SIGINT:  # as from a terminal: to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, text = process.communicate(timeout=30)  # until the last one that holds the pipe has ended
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert len(sentences(text)) == 1 and "goes on" in text


def is_listened_to(port):
    """Whether a process of this machine waits for others at a port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in lines[1:])  # 0A: it listens


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_also_while_the_processes_wait_for_each_other_all_end(number, tmp_path):
    command = [sys.executable, ROOT / "main.py", *LONG, "--devices", "1", "--num-nodes", "2", "--accelerator", "cpu"]
    port = free_port()
    env = os.environ | {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = warm.Popen(command, stderr=warm.PIPE, env=env)
    wait_for(partial(is_listened_to, port), process)
    time.sleep(1)  # the other machine never comes
    assert process.poll() is None
    process.send_signal(number)
    start = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert time.monotonic() - start < 10 and not LOGS.exists()


def test_a_process_that_dies_while_the_first_computes_on_its_own_ends_the_run_too(tmp_path):
    command = [sys.executable, ROOT / "main.py", *TINY, "--dib-epochs", "20000", "--devices", "2", "--quiet"]
    process = warm.Popen([*command, "--accelerator", "cpu"], stderr=warm.PIPE)
    wait_for((LOGS / "version_0/hparams.yaml").exists, process)
    time.sleep(2)
    children = [
        pid for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()
    ]
    os.kill(int(children[0]), signal.SIGKILL)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 1 and len(sentences(text)) == 1
    assert "another process of this run ended early" in text and "lightning_logs/version_0` goes on" in text


def test_who_asks_for_another_turn_is_not_ended_because_the_others_have_left(monkeypatch):
    monkeypatch.setattr(ranks, "COURTESY", 0)
    monkeypatch.setattr(ranks, "_is_ending", threading.Event())
    monkeypatch.setattr(ranks.os, "_exit", lambda status: pytest.fail("it was ended"))
    ranks.end_by_itself()
    ranks._end_without([Namespace(poll=lambda: 138)], Ranks())


def test_ranks_with_other_flags_are_refused(tmp_path):
    env = {"MASTER_PORT": str(free_port())}
    argv = [*TINY, "--devices", "2", "--accelerator", "cpu"]
    runs = [Run([*argv, "--seed", str(seed)], tmp_path, env=task(seed) | env) for seed in range(2)]
    ends = [run.end() for run in runs]
    assert [status for status, _ in ends] == [1, 1]
    assert "the processes of this run were started with different flags" in ends[1][1]


def test_only_the_words_of_lost_connections_mean_a_lost_rank():
    assert is_lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"))
    assert not is_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, ""),
        ({"RANK": "0"}, ""),
        ({"SLURM_PROCID": "3"}, "slurm procid 3: "),
        ({"LOCAL_RANK": "1"}, "local rank 1: "),
    ],
)
def test_only_processes_that_are_not_the_first_have_a_name(env, name, monkeypatch):
    for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert name_by_environment() == name


def test_one_process_needs_no_other():
    tensor = torch.ones(3)
    assert Ranks().sum(tensor) is tensor and Ranks().gathered("x") == ["x"] and Ranks().from_first("x") == "x"
    Ranks().share_buffers(nn.BatchNorm1d(3))
