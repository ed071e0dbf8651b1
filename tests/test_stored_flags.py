from pathlib import Path

import pytest
import yaml

from flags import get_args
from run.presets import DEFAULTS, flags_of_run


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


def test_notes_and_tags_are_kept_repeated_and_may_change_on_resume(tmp_path):
    argv = ["--note", "two\nlines: – 'quoted'", "--tag", "paper", "draft"]
    content = yaml.safe_dump(flags_of_run(get_args(argv)) | {"provenance": {}}, allow_unicode=True)
    (tmp_path / "hparams.yaml").write_text(content)
    for source in ("-c", str(tmp_path / "hparams.yaml")), ("--resume", str(tmp_path)):
        args = get_args([*source])
        assert (args.note, args.tag) == ("two\nlines: – 'quoted'", ["paper", "draft"])
    args = get_args(["--resume", str(tmp_path), "--note", "another", "--tag", "x"])
    assert (args.note, args.tag) == ("another", ["x"])


@pytest.mark.parametrize("word", ["no", "'no'", "false"])
def test_a_no_without_quotation_marks_is_the_word(word, tmp_path):
    (tmp_path / "run.yaml").write_text(f"dataset: {tmp_path}\nin_memory: {word}\n")
    assert get_args(["-c", str(tmp_path / "run.yaml")]).in_memory == "no"


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
