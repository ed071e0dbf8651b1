"""The command line: what a flag means, where its value comes from, and how a wrong one is answered."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import datasets
import flags
import networks
from flags import get_args
from measures.heads import head_epochs
from run import presets, values
from run.epochs import epochs_to_measure
from run.presets import DEFAULTS, PRESETS, flags_of_run

MAIN = Path(__file__).parent.parent / "main.py"


def test_choices_are_the_names_that_the_modules_know():
    assert set(networks.NETWORKS) == set(presets.MODELS)
    assert set(datasets.DATASETS) == set(presets.DATASETS)
    assert set(networks.NONLINEARITIES) == set(presets.NONLINEARITIES)


def test_bare_command_trains_the_mlp_of_the_paper_on_szt():
    args = get_args([])
    assert (args.model, args.dataset, args.widths, args.nonlinearity) == ("MLP", "SZT", [10, 7, 5, 4, 3], "tanh")


def test_every_flag_has_a_default_and_every_preset_value_is_a_flag():
    assert set(vars(get_args([]))) == set(DEFAULTS)
    for preset in PRESETS.values():
        assert set(preset) <= set(DEFAULTS) - set(presets.OF_ONE_CALL)


def test_the_command_line_goes_before_the_config_before_the_preset(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: MNISTNet\ndataset: MNIST\nepochs: 7\nlearning_rate: 1e-3\n")
    args = get_args(["-c", str(config), "-e", "8"])
    assert args.epochs == 8  # command line
    assert args.learning_rate == 1e-3  # config; YAML 1.1 reads 1e-3 as a word, which must not matter
    assert args.betas == [0.7, 0.9]  # preset
    assert args.weight_decay == DEFAULTS["weight_decay"]


@pytest.mark.parametrize("line", ["", "-m ResNet -d CIFAR10 --no-augment --layers layer?.0 avgpool"])
def test_the_flags_of_a_run_are_a_config_that_repeats_it(line, tmp_path):
    args = get_args(line.split())
    config = tmp_path / "hparams.yaml"
    config.write_text(yaml.safe_dump(flags_of_run(args) | {"provenance": {"python": "3.11"}}))
    assert flags_of_run(get_args(["-c", str(config)])) == flags_of_run(args)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-e", "4"], {0, 1, 2, 3, 4}),
        (["-e", "7", "--measure-every", "3"], {0, 3, 6, 7}),
        (["-e", "50", "--measure-at", "0", "10"], {0, 10}),
        (["-e", "100", "--measure-at", "log:4"], {0, 1, 10, 100}),
        (["-e", "1", "--measure-at", "log:9"], {0, 1}),
        (["-m", "ResNet", "-d", "CIFAR10", "-e", "2", "--measure-every", "1"], {0, 1, 2}),  # not the preset's
    ],
)
def test_epochs_to_measure(argv, expected):
    assert epochs_to_measure(get_args(argv)) == expected


@pytest.mark.parametrize("model", [[], ["-m", "MNISTNet", "-d", "MNIST"], ["-m", "CIFARNet", "-d", "CIFAR10"]])
def test_heads_train_for_steps_unless_epochs_are_asked_for(model):
    args = get_args(model)
    assert args.dib_steps >= 1 and args.dib_epochs is None
    args = get_args([*model, "--dib-epochs", "3"])
    assert args.dib_steps is None and args.dib_epochs == 3


@pytest.mark.parametrize(
    ("stored", "line", "steps", "epochs"),
    [
        ("dib_epochs: 7", "", None, 7),  # as every run before there were steps
        ("dib_epochs: 7", "--dib-steps 50", 50, None),
        ("dib_epochs: null\ndib_steps: 50", "", 50, None),
        ("dib_epochs: null\ndib_steps: 50", "--dib-epochs 7", None, 7),
        ("dib_epochs: 7\ndib_steps: null", "", None, 7),
    ],
)
def test_of_steps_and_epochs_of_the_heads_the_last_word_counts(stored, line, steps, epochs, tmp_path):
    (tmp_path / "run.yaml").write_text(stored)
    args = get_args(["-c", str(tmp_path / "run.yaml"), *line.split()])
    assert (args.dib_steps, args.dib_epochs) == (steps, epochs)


def test_presets_train_the_heads_on_the_published_sets_for_these_epochs():
    published = {
        ("MLP", "SZT"): (3481, 10),
        ("MLP", "MNIST"): (60_000, 15),
        ("MLP", "FashionMNIST"): (60_000, 5),
        ("MNISTNet", "MNIST"): (60_000, 2),
        ("CIFARNet", "CIFAR10"): (50_000, 10),
        ("ResNet", "CIFAR10"): (50_000, 2),
        ("ConvNeXt", "CIFAR10"): (50_000, 2),
    }
    for (model, dataset), (num_samples, epochs) in published.items():
        args = get_args(["-m", model, "-d", dataset])
        assert head_epochs(num_samples, args.dib_batch_size, args.dib_epochs, args.dib_steps) == epochs


WRONG = [
    ("-m Foo", "--model", "ResNet"),
    ("-d nowhere", "--dataset", "CIFAR10"),
    ("-m ResNet", "--model", "-m MLP"),
    ("-m ResNet -d CIFAR10 -w 10", "--widths", "MLP"),
    ("-m ResNet -d CIFAR10 -nl relu", "--nonlinearity", "MLP"),
    ("-m MNISTNet -d MNIST --batch-norm", "--batch-norm", "MLP"),
    ("--stem small", "--stem", "ResNet"),
    ("-nl step", "--nonlinearity", "tanh"),
    ("-w", "--widths", "at least one"),
    ("-w 10 x", "--widths", "whole number"),
    ("-w 0", "--widths", "at least 1"),
    ("-e 0", "--epochs", "at least 1"),
    ("-e 2.5", "--epochs", "whole number"),
    ("-e", "--epochs", "expected one argument"),
    ("-b 0", "--batch-size", "at least 1"),
    ("-b many", "--batch-size", "whole number"),
    ("-lr 0", "--learning-rate", "above 0"),
    ("-lr nan", "--learning-rate", "above 0"),
    ("-lr inf", "--learning-rate", "above 0"),
    ("-lr fast", "--learning-rate", "number"),
    ("--momentum 1", "--momentum", "below 1"),
    ("--betas 0.9", "--betas", "2 arguments"),
    ("--betas 0.9 1", "--betas", "below 1"),
    ("--weight-decay -1", "--weight-decay", "at least 0"),
    ("--label-smoothing 1", "--label-smoothing", "below 1"),
    ("--warmup 1.5", "--warmup", "at most 1"),
    ("--optimizer lbfgs", "--optimizer", "adamw"),
    ("--schedule steps", "--schedule", "cosine"),
    ("--seed -1", "--seed", "at least 0"),
    ("--strategy nonsense", "--strategy", "ddp_find_unused_parameters_true"),
    ("--seed 4294967296", "--seed", "at most"),
    ("--limit 0", "--limit", "at least 1"),
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


NUMERIC = {action.option_strings[-1]: action for action in flags._build_parser()._actions if action.type}
EXTREMES = ["0", "-0.0", "1e-320", "1e300", "-1e300", "nan", "inf", "-1", "9" * 400]


@pytest.mark.parametrize("text", EXTREMES, ids=[text[:8] for text in EXTREMES])
@pytest.mark.parametrize("flag", NUMERIC)
def test_an_extreme_number_is_a_finite_value_or_refused_in_a_sentence_with_the_flag(flag, text, capsys):
    count = NUMERIC[flag].nargs if isinstance(NUMERIC[flag].nargs, int) else 1
    argv = [flag, *[text] * count] if count > 1 else [f"{flag}={text}"]
    try:
        value = getattr(get_args(argv), NUMERIC[flag].dest)
    except SystemExit as end:
        told = capsys.readouterr().err
        assert end.code == 2 and flag in told and told.count("\n") == 1 and len(told) < 300
    else:
        for item in value if isinstance(value, list) else [value]:
            assert 0 <= float(item) <= values.MAX_RATE and not str(item).startswith("-")


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("--learning-rate", {"1e-320"}),
        ("--dib-lr", {"1e-320"}),
        ("--weight-decay", {"0", "-0.0", "1e-320"}),
        ("--cache-gb", {"0", "-0.0", "1e-320"}),
        ("--warmup", {"0", "-0.0", "1e-320"}),
        ("--momentum", {"0", "-0.0", "1e-320"}),
        ("--betas", {"0", "-0.0", "1e-320"}),
        ("--end-factor", {"0", "-0.0", "1e-320"}),
        ("--bias-lr-scale", set()),
        ("--whiten-epochs", {"0"}),
        ("--seed", {"0"}),
        ("--limit", set()),
        ("--batch-size", set()),
        ("--devices", set()),
    ],
)
def test_which_extreme_numbers_a_flag_takes(flag, allowed):
    taken = set()
    for text in EXTREMES:
        try:
            NUMERIC[flag].type(text)
        except flags.argparse.ArgumentTypeError:
            continue
        taken.add(text)
    assert taken == allowed


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


BAD_CONFIGS = [
    ("epoch: 3", "'epoch'", "perhaps epochs"),  # misspelt
    ("epochs: 2.7", "--epochs", "whole number"),
    ("epochs: [3]", "--epochs", "one value"),
    ("epochs: {}", "--epochs", "{}"),
    ("epochs: true", "--epochs", "True"),
    ("batch_norm: 1", "--batch-norm", "neither true nor false"),
    ("model: Foo", "--model", "ResNet"),
    ("- epochs", "run.yaml", "mapping"),
    ("epochs", "run.yaml", "mapping"),
    ("", "run.yaml", "mapping"),
    ("a: [", "run.yaml", "YAML"),
    ("epochs: !!python/object/apply:os.system ['touch hacked']", "run.yaml", "YAML"),
    ("\x00", "run.yaml", "YAML"),
    ("learning_rate: 1e-3e", "--learning-rate", "number"),
    ("widths: [10, null]", "--widths", "None"),
    ("1: 2", "1", "unknown key"),
    ("resume: x", "'resume'", "unknown key"),
    ("dib_epochs: 2\ndib_steps: 10", "--dib-steps", "not allowed with argument --dib-epochs"),
]


@pytest.mark.parametrize(("text", "names", "allows"), BAD_CONFIGS, ids=[repr(case[0]) for case in BAD_CONFIGS])
def test_a_wrong_config_ends_with_status_2_and_names_the_file(text, names, allows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        get_args(["-c", "run.yaml"])
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "run.yaml" in told and names in told and allows in told and told.count("\n") == 1
    assert not Path("hacked").exists()


def test_a_config_that_is_no_text_or_a_folder_is_named(tmp_path, capsys):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "bytes.yaml", tmp_path):
        with pytest.raises(SystemExit) as end:
            get_args(["-c", str(path)])
        assert end.value.code == 2 and str(path) in capsys.readouterr().err


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


def test_a_resumed_run_keeps_its_budget_of_the_heads_however_it_was_given(tmp_path, capsys):
    flags_then = flags_of_run(get_args([])) | {"dib_epochs": 7, "provenance": {}}
    del flags_then["dib_steps"]  # a run from before there were steps
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump(flags_then))
    resume = ["--resume", str(tmp_path)]
    args = get_args(resume)
    assert (args.dib_steps, args.dib_epochs) == (None, 7)
    assert get_args([*resume, "--dib-epochs", "7"]).dib_epochs == 7
    with pytest.raises(SystemExit) as end:
        get_args([*resume, "--dib-steps", str(DEFAULTS["dib_steps"])])
    assert end.value.code == 2 and "keeps its dib_epochs=7" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["-e 3 -lr 0.5", "-m MNISTNet", "-w 3"])
def test_a_resumed_run_keeps_what_makes_it_that_run(line, tmp_path, capsys):
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump(flags_of_run(get_args([])) | {"provenance": {}}))
    with pytest.raises(SystemExit) as end:
        get_args(["--resume", str(tmp_path), *line.split()])
    assert end.value.code == 2 and "resumed run keeps" in capsys.readouterr().err
    assert get_args(["--resume", str(tmp_path), "-e", "500"]).epochs == 500
