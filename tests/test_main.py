"""The program as its users run it: what it prints, what it leaves, how it ends, and that it repeats itself."""

import csv
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
import yaml
from PIL import Image

import datasets
import main
from classifier import Classifier
from networks import MLP
from run.ending import in_a_sentence
from run.trainer import use_threads

MAIN = Path(__file__).parent.parent / "main.py"
SHORT = ["-e", "2", "--dib-epochs", "1", "--no-plots"]


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def rows_of(folder, *, with_times=False):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if with_times or not k.startswith("time/")} for row in rows]


def start(*argv):
    """The program in a process of its own."""
    return warm.Popen([sys.executable, MAIN, *argv], stdout=warm.PIPE, stderr=warm.PIPE)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of 28 × 28 grey images that differ in brightness."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, num in (("train", 20), ("test", 7)):
        for brightness, name in enumerate(("dark", "grey", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = random.integers(80 * brightness, 80 * brightness + 90, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_a_bare_run_leaves_what_the_readme_promises(capsys):
    assert main.main([*SHORT, "--rank"]) == 0
    told = capsys.readouterr()
    run = Path("lightning_logs/version_0")
    assert "epoch 2/2" in told.out and "test accuracy" in told.out and f"results in {run}" in told.out
    assert "litlogger" not in told.out + told.err and "Warning" not in told.err
    rows = rows_of(run, with_times=True)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["train_loss"] == "" and rows[0]["test_acc"] != ""
    for row in rows[1:]:
        assert all(row.values())
    for column in ("nc1/train/hidden1", "nc1/test/hidden5", "equiseparation/test/slope", "dib/loss/hidden5",
                   "dib/minimality/hidden1", "dib/sufficiency/test", "rank/numerical/train/hidden1",
                   "time/epoch", "time/nc1", "time/dib", "lr"):  # fmt: skip
        assert column in rows[0]
    hparams = yaml.safe_load((run / "hparams.yaml").read_text())
    assert hparams["learning_rate"] == 0.01 and hparams["seed"] == 0 and hparams["dib_epochs"] == 1
    assert {"python", "torch", "torchvision", "lightning", "git_commit", "device"} <= set(hparams["provenance"])
    for name in ("last.ckpt", "best.ckpt"):
        network = Classifier.load_from_checkpoint(run / "checkpoints" / name, weights_only=True).network
        assert network.layers == ("hidden1", "hidden2", "hidden3", "hidden4", "hidden5")
    digits = list(csv.DictReader((run / "dib.csv").open()))
    assert len(digits) == 3 * 5 * 11 * 2 and set(digits[0]) == {
        "epoch",
        "layer",
        "digit",
        "head_epoch",
        "cross_entropy",
    }


def test_the_same_seed_gives_the_same_numbers_and_so_does_its_own_hparams():
    assert main.main([*SHORT, "--quiet"]) == 0
    assert main.main([*SHORT, "--quiet"]) == 0
    assert main.main(["-c", "lightning_logs/version_0/hparams.yaml", "--quiet"]) == 0
    assert main.main([*SHORT, "--quiet", "--seed", "1"]) == 0
    runs = [rows_of(f"lightning_logs/version_{i}") for i in range(4)]
    assert runs[0] == runs[1] == runs[2] != runs[3]
    assert (
        Path("lightning_logs/version_0/dib.csv").read_bytes() == Path("lightning_logs/version_2/dib.csv").read_bytes()
    )


def test_measuring_leaves_no_trace_in_the_weights(image_folder):
    """For a network with batch norm and one with dropout's kin: with all measures and with none, the same bits."""
    for model in ("ResNet", "ConvNeXt"):
        line = ["-m", model, "-d", str(image_folder), "-e", "1", "-b", "4", "--limit", "8", "--quiet", "--no-plots"]
        measured = ["--measure-every", "1", "--rank", "--dib-epochs", "1", "--dib-layers", "layer4.1", "features.7.2"]
        measured[-2:] = [measured[-2 if model == "ResNet" else -1]]
        assert main.main([*line, *measured, "--name", f"{model}_with"]) == 0
        assert main.main([*line, "--no-nc", "--no-dib", "--name", f"{model}_without"]) == 0
        states = [
            torch.load(f"lightning_logs/{model}_{which}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for which in ("with", "without")
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("encoding", "course", "shape"),
    [("latin-1", "epoch 0 -> 2", "24 × 12 × 12"), ("ascii", "epoch 0 -> 2", "24 x 12 x 12")],
)
def test_a_terminal_that_lacks_letters_gets_plain_ones_and_loses_no_run(encoding, course, shape, image_folder):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    lists = ["--list-layers", "-m", "MNISTNet", "-d", str(image_folder)]
    for argv, expected in ((SHORT, course), (lists, shape)):
        done = warm.run([sys.executable, MAIN, *argv], capture_output=True, env=environment, encoding=encoding)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert len(rows_of("lightning_logs/version_0")) == 3


def test_quiet_says_only_where_the_results_are(capsys):
    assert main.main([*SHORT, "--quiet"]) == 0
    assert capsys.readouterr().out == "results in lightning_logs/version_0\n"


def test_list_layers(image_folder, capsys):
    assert main.main(["--list-layers", "-m", "ResNet", "-d", str(image_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "shape", "dimension"]
    assert lines[1].split() == ["layer1.0", "64", "×", "28", "×", "28", "50176"]
    assert lines[-1].split() == ["avgpool", "512", "512"] and len(lines) == 1 + 8 + 1
    assert not Path("lightning_logs").exists()


def test_list_layers_needs_no_download(capsys):
    assert main.main(["--list-layers", "-m", "ResNet", "-d", "CIFAR10", "--data-dir", "empty"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["layer1.0", "64", "×", "32", "×", "32", "65536"]


def test_range_test_then_training_is_training_at_that_rate(capsys):
    assert main.main([*SHORT, "--lr-range-test"]) == 0
    run = Path("lightning_logs/version_0")
    hparams = yaml.safe_load((run / "hparams.yaml").read_text())
    rate = hparams["learning_rate"]
    assert f"learning rate {rate:g}" in capsys.readouterr().out
    assert (run / "lr_range_test.csv").read_text().startswith("step,lr,loss,smoothed\n1,1e-06,")
    assert (run / "lr_range_test.png").stat().st_size > 5000
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["learning_rate"] == rate
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["initial_lr"] == rate
    assert main.main([*SHORT, "-lr", str(rate)]) == 0
    assert rows_of(run) == rows_of("lightning_logs/version_1")


def test_range_test_only_stops_there():
    assert main.main([*SHORT, "--lr-range-test", "only"]) == 0
    assert (Path("lightning_logs/version_0") / "lr_range_test.csv").exists()
    assert not (Path("lightning_logs/version_0") / "metrics.csv").exists()


def test_the_range_test_leaves_nothing_outside_the_runs_folder():
    """Also where an epoch ends within it, after which Lightning would save on its own."""
    assert main.main([*SHORT, "--lr-range-test", "only", "-b", "256"]) == 0
    assert [path.name for path in Path().iterdir()] == ["lightning_logs"]
    assert sorted(path.name for path in Path("lightning_logs").glob("*/*")) == [
        *(".lock", "hparams.yaml", "lr_range_test.csv", "lr_range_test.png")
    ]


def test_measuring_a_checkpoint_gives_the_numbers_that_the_run_gave():
    assert main.main([*SHORT, "--quiet"]) == 0
    assert main.main(["--measure", "lightning_logs/version_0/checkpoints/last.ckpt", "--quiet"]) == 0
    run, again = rows_of("lightning_logs/version_0")[-1], rows_of("lightning_logs/version_1")
    assert len(again) == 1 and again[0]["epoch"] == "2"
    measured = {name: value for name, value in again[0].items() if "/" in name}
    assert measured and measured.items() <= run.items()


REFUSED = [
    ("--layers nosuch*", 2, "hidden1, hidden2"),
    ("--dib-layers nosuch", 2, "hidden1"),
    ("--layers hidden1 --dib-layers hidden2", 2, "hidden1"),
    ("--measure nowhere.ckpt", 1, "nowhere.ckpt"),
    ("--accelerator gpu", 1, "--accelerator"),
    ("-m MNISTNet -d .", 1, "train"),
    ("-m MNISTNet -d MNIST --data-dir empty", 1, "empty"),
]


@pytest.mark.parametrize(("line", "status", "names"), REFUSED, ids=[case[0] for case in REFUSED])
def test_bad_input_is_one_sentence_and_leaves_nothing(line, status, names, capsys, monkeypatch):
    if "gpu" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main.main(line.split()) == status
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("main.py: ") and names in told[-1] and "Traceback" not in "".join(told)
    assert not Path("lightning_logs").exists()


def test_a_checkpoint_of_other_data_is_refused(capsys, image_folder):
    assert main.main([*SHORT, "--quiet", "--no-dib"]) == 0
    assert main.main(["--measure", "lightning_logs/version_0/checkpoints/last.ckpt", "-d", str(image_folder)]) == 1
    told = capsys.readouterr().err
    assert "shape (12,) in 2 classes" in told and "(1, 28, 28)" in told
    assert not Path("lightning_logs/version_1").exists()


LONG = ["-e", "30", "--dib-epochs", "2", "--limit", "1000", "--no-plots", "--quiet"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a long run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = warm.run([sys.executable, MAIN, *LONG, "--name", "whole"], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder / "lightning_logs/whole"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_soon_with_its_status_and_goes_on_where_it_was(number, status, whole):
    process = start(*LONG, "--name", "cut")
    wait_for(lambda: Path("lightning_logs/cut/checkpoints/last.ckpt").exists(), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert "--resume lightning_logs/cut" in err and "Traceback" not in err
    assert len(rows_of("lightning_logs/cut")) < 31
    assert main.main(["--resume", "lightning_logs/cut"]) == 0
    assert rows_of("lightning_logs/cut") == rows_of(whole)


def test_a_killed_run_goes_on_in_its_folder_as_if_nothing_had_been(whole):
    process = start(*LONG, "--name", "cut")
    wait_for(lambda: Path("lightning_logs/cut/checkpoints/last.ckpt").exists(), process)
    process.kill()
    process.communicate()
    assert len(rows_of("lightning_logs/cut")) < 31
    assert main.main(["--resume", "last"]) == 0
    assert Path("lightning_logs/cut/dib.csv").read_bytes() == (whole / "dib.csv").read_bytes()
    assert rows_of("lightning_logs/cut") == rows_of(whole)


def test_a_compiled_network_trains_and_measures_like_a_plain_one(monkeypatch):
    """With dynamo's own backend, which needs no C compiler: what is measured is never the compiled code."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend="eager")))  # fmt: skip
    assert main.main([*SHORT, "--quiet", "--compile"]) == 0
    assert main.main([*SHORT, "--quiet"]) == 0
    assert rows_of("lightning_logs/version_0") == rows_of("lightning_logs/version_1")


def brute_force_nc1(h, y):
    """From the definition in float64: C (tr Uᵀ Σ_W U S⁻²) with M = U S Vᵀ, an SVD where the program has none."""
    h = h.flatten(1).double()
    mu = torch.stack([h[y == c].mean(0) for c in y.unique()])
    U, S, _ = torch.linalg.svd((mu - h.mean(0)).T, full_matrices=False)
    rank = len(mu) - 1  # of M, whose columns sum to zero in balanced classes
    projected = (h - mu[y]) @ U[:, :rank]
    return float(len(mu) * (projected.square().mean(0) / S[:rank] ** 2).sum())


@pytest.mark.parametrize("model", ["MNISTNet", "ResNet"])
def test_nc1_in_the_table_is_that_of_the_saved_network_by_brute_force(model, image_folder):
    line = ["-m", model, "-d", str(image_folder), "-e", "2", "-b", "20", "-lr", "0.01", "--measure-at", "2"]
    assert main.main([*line, "--no-dib", "--quiet", "--no-plots"]) == 0
    run = Path("lightning_logs/version_0")
    network = Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt", map_location="cpu").network.eval()
    dataset = datasets.load(str(image_folder))
    for split in ("train", "test"):
        labels = getattr(dataset, split).labels
        x = datasets.Batches(dataset, split, 1000)[torch.arange(len(labels))]
        with torch.no_grad():
            features = network.feature_extractor(x)
        for layer, h in features.items():
            logged = float(rows_of(run)[-1][f"nc1/{split}/{layer}"])
            assert logged == pytest.approx(brute_force_nc1(h, labels), rel=1e-5)  # float32 passes of other batch sizes


@pytest.mark.parametrize(
    ("width", "asked", "devices", "chosen_outside", "num"),
    [
        (10, None, 1, False, 1),
        (10, None, 1, True, 1),
        (10, 3, 1, True, 3),
        (1000, None, 1, False, 16),
        (1000, None, 1, True, 16),
        (1000, None, 4, False, 4),  # of each process
        (1000, None, 4, True, 16),
        (1000, None, 99, False, 1),
        (1000, 1, 4, False, 1),
    ],
)
def test_small_networks_get_one_thread_and_others_their_share_unless_told(
    width, asked, devices, chosen_outside, num, monkeypatch
):
    used = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    if not chosen_outside:
        monkeypatch.delenv("OMP_NUM_THREADS")
    module = torch.nn.ModuleDict({"network": MLP((12,), 2, widths=[width])})
    use_threads({"threads": asked, "devices": devices}, module.network)
    use_threads({"threads": asked, "devices": devices}, module.network)  # as before and after a range test
    assert used == [16, num, num]
    assert os.environ["OMP_NUM_THREADS"] == ("16" if chosen_outside else str(num))


def test_a_warning_of_the_program_is_a_sentence_and_those_of_libraries_say_where_they_come_from(in_an_empty_folder):
    argv = ["-w", "6", "4", "--limit", "1", "-e", "1", "--measure-at", "0", "--measure-sets", "train", "--no-dib"]
    done = warm.run([sys.executable, MAIN, *argv, "--no-plots", "--quiet"], capture_output=True)
    assert done.stderr.startswith("main.py: warning: NC1 is not defined for layer") and done.stderr.count("\n") == 1
    assert "library.py:7: UserWarning: mind" in in_a_sentence("mind", UserWarning, "library.py", 7)
