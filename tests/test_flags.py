"""The command line: what a flag means, where its value comes from, and how a wrong one is answered."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flags import get_args
from run.presets import PRESETS

MAIN = Path(__file__).parent.parent / "main.py"


WRONG = [
    ("-m Foo", "--model", "ResNet"),
    ("-d nowhere", "--dataset", "CIFAR10"),
    ("-m ResNet", "--model", "-m MLP"),
    ("-m ResNet -d CIFAR10 -w 10", "--widths", "MLP"),
    ("-m ResNet -d CIFAR10 -nl relu", "--nonlinearity", "MLP"),
    ("-m MNISTNet -d MNIST --batch-norm", "--batch-norm", "MLP"),
    ("--stem small", "--stem", "ResNet"),
    ("-nl step", "--nonlinearity", "tanh"),
    ("-w 10 x", "--widths", "whole number"),
    ("-w 0", "--widths", "at least 1"),
    ("-e 0", "--epochs", "at least 1"),
    ("-e 2.5", "--epochs", "whole number"),
    ("-e", "--epochs", "expected one argument"),
    ("-b 0", "--batch-size", "at least 1"),
    ("-b many", "--batch-size", "whole number"),
    ("-b ALL", "--batch-size", "or all"),
    ("-lr 0", "--learning-rate", "above 0"),
    ("-lr nan", "--learning-rate", "above 0"),
    ("-lr inf", "--learning-rate", "above 0"),
    ("-lr fast", "--learning-rate", "number"),
    ("--momentum 1", "--momentum", "below 1"),
    ("--betas 0.9", "--betas", "2 arguments"),
    ("--betas 0.9 1", "--betas", "below 1"),
    ("--weight-decay -1", "--weight-decay", "at least 0"),
    ("--label-smoothing 1", "--label-smoothing", "below 1"),
    ("--label-smoothing 0.1 --loss mse", "--label-smoothing", "only 0 is allowed, not 0.1"),
    ("--loss mes", "--loss", "perhaps mse"),
    ("--warmup 1.5", "--warmup", "at most 1"),
    ("--optimizer lbfgs", "--optimizer", "adamw"),
    ("--schedule steps", "--schedule", "cosine"),
    ("--seed -1", "--seed", "at least 0"),
    ("--strategy nonsense", "--strategy", "ddp_find_unused_parameters_true"),
    ("--seed 4294967296", "--seed", "at most"),
    ("--limit 0", "--limit", "at least 1"),
    ("--sync-batch-norm --compile --devices 2", "--sync-batch-norm", "not allowed with --compile"),
    ("-m Positive -d CIFAR10 --norm iternorm --sync-batch-norm --devices 2", "--sync-batch-norm", "--norm iternorm"),
    ("-m Positive -d CIFAR10 --augmax flip flip", "--augmax", "comes twice"),
    ("-m Positive -d CIFAR10 --augmax rot15 rot015", "--augmax", "'rot015' is neither flip nor rotD"),
    ("-m Gumbel -d CIFAR10 --topk 121", "--topk", "at most 120"),
    ("-m Gumbel -d CIFAR10 --tau 0:1", "--tau", "as 1:0.1"),
    ("-m Positive -d CIFAR10 --topk 2", "--topk", "is for -m Gumbel"),
    ("-m ResNet -d CIFAR10 --first-conv scaled", "--first-conv", "ResNet has none"),
    ("--image-size 0 -d .", "--image-size", "at least 1"),
    ("--image-size 32 -d MNIST", "--image-size", "folders of images"),
    ("--in-memory no -d MNIST", "--in-memory", "folders of images"),
    ("--in-memory maybe -d .", "--in-memory", "yes, no"),
    ("--devices 0", "--devices", "at least 1"),
    ("--num-nodes none", "--num-nodes", "whole number"),
    ("--accelerator abacus", "--accelerator", "gpu"),
    ("--precision 8", "--precision", "bf16-mixed"),
    ("--epoch 3", "--epoch", "perhaps --epochs"),  # no abbreviations: they break when a flag is added
    ("--no-dbi", "--no-dbi", "perhaps --no-dib"),
    ("--lr 0.1", "--lr", "perhaps -lr"),
    ("--batch_size=3", "--batch_size", "perhaps --batch-size"),
    ("--zzz", "--zzz", "--help"),
    ("-m resnet", "--model", "perhaps ResNet"),
    ("-d mnist", "--dataset", "perhaps MNIST"),
    ("-d CIFAR-10", "--dataset", "perhaps CIFAR10"),
    ("--optimizer adma", "--optimizer", "perhaps adam"),
    ("--measure-sets tset", "--measure-sets", "perhaps test"),
    ("-e 3 4", "'4'", "belongs to no flag"),
    ("--weight-decay 1e300", "--weight-decay", "at most 1e+30"),
    ("--cache-gb 1e300", "--cache-gb", "at most 1000000000"),
    ("--bias-lr-scale 1e300", "--bias-lr-scale", "at most 1e+06"),
    ("--bias-lr-scale 1e-320", "--bias-lr-scale", "at least 1e-06"),
    ("-b " + "9" * 400, "--batch-size", "at most 1000000000"),
    ("--num-nodes 100000", "--num-nodes", "at most 10000"),
    ("--num-nodes 300", "--batch-size", "at least 300"),
    ("-b 7 --devices 2 --num-nodes 4 --batch-norm", "--batch-size", "at least 16"),
    ("-b 1 --limit 20 --batch-norm", "--batch-norm", "at least 2"),
    ("--lr-range-test maybe", "--lr-range-test", "only"),
    ("--lr-range-test -lr 0.1", "--lr-range-test", "--learning-rate"),
    ("--measure-every 0", "--measure-every", "at least 1"),
    ("--measure-every 2 --measure-at 1", "--measure-at", "--measure-every"),
    ("--measure-at log:1", "--measure-at", "log:N"),
    ("--measure-at -1", "--measure-at", "log:N"),
    ("--measure-at 5 -e 3", "--measure-at", "3"),
    ("--measure-sets validation", "--measure-sets", "test"),
    ("--cache-gb -1", "--cache-gb", "at least 0"),
    ("--dib-epochs 0", "--dib-epochs", "at least 1"),
    ("--dib-epochs 2000000000", "--dib-epochs", "at most"),
    ("--dib-steps 0", "--dib-steps", "at least 1"),
    ("--dib-steps 10 --dib-epochs 2", "--dib-epochs", "not allowed with argument --dib-steps"),
    ("--dib-lr 0", "--dib-lr", "above 0"),
    ("--dib-batch-size 1", "--dib-batch-size", "at least 2"),
    ("--dib-optimizer muon", "--dib-optimizer", "adam"),
    ("--tsne", "--tsne", "--clusters"),
    ("--energy 1", "--energy", "below 1"),
    ("--energy nan", "--energy", "above 0"),
    ("--min-cluster-size 1", "--min-cluster-size", "at least 2"),
    ("--cluster-sets tset", "--cluster-sets", "perhaps test"),
    ("--dib-init zero", "--dib-init", "copy"),
    ("--save-every 0", "--save-every", "at least 1"),
    ("--name ../x", "--name", "folder"),
    ("--resume nowhere", "--resume", "hparams.yaml"),
    ("--resume last --log-dir nowhere", "--resume", "nowhere"),
    ("-c nowhere.yaml", "--config", "nowhere.yaml"),
    ("stray", "stray", "belongs to no flag"),
]


@pytest.mark.parametrize(("line", "names", "allows"), WRONG, ids=[case[0] for case in WRONG])
def test_a_wrong_flag_ends_with_status_2_and_one_sentence(line, names, allows, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(line.split())
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert names in told and allows in told and told.count("\n") == 1


def test_more_processes_than_cpus_can_serve_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert get_args(["--accelerator", "cpu", "--devices", "8"]).devices == 8
    with pytest.raises(SystemExit) as end:
        get_args(["--accelerator", "cpu", "--devices", "9"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and "--devices: 9 processes" in told and told.endswith("allowed are 4 for each: 8\n")
    assert get_args(["--devices", "9"]).devices == 9  # there may be GPUs
    assert get_args(["--accelerator", "gpu", "--devices", "9"]).devices == 9


def test_a_small_batch_is_no_mistake_where_nothing_is_trained():
    assert get_args(["--measure", "x.ckpt", "-b", "1", "--devices", "2", "--batch-norm"]).batch_size == 1


def test_the_presets_label_smoothing_gives_way_to_a_loss_that_has_none():
    assert get_args(["-m", "CIFARNet", "-d", "CIFAR10"]).label_smoothing == 0.2
    assert get_args(["-m", "CIFARNet", "-d", "CIFAR10", "--loss", "mse"]).label_smoothing == 0.0


def test_help_shows_the_defaults_of_the_chosen_model(capsys):
    with pytest.raises(SystemExit) as end:
        get_args(["-m", "ResNet", "-d", "CIFAR10", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert f"passes over the training set (default: {PRESETS['ResNet',]['epochs']})" in told
    assert "None" not in told


def test_a_wrong_flag_is_answered_before_anything_heavy_is_imported():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", MAIN, "--wrong"], capture_output=True, text=True)
    assert done.returncode == 2 and time.perf_counter() - start < 30
    assert "lightning" not in done.stderr and "| torch" not in done.stderr and "numpy" not in done.stderr
