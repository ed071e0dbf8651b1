"""--classes: which samples stay and how they are labelled, and which words are refused."""

import doctest

import pytest
import torch
import yaml

import classes
import datasets
from classes import chosen
from datasets import Dataset, Split, load
from flags import get_args
from main import main
from run.errors import WrongFlag
from run.presets import flags_of_run

ZOO = ("ape", "bee", "dog", "3")


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(classes).failed == 0 and "dog" in classes.chosen.__doc__


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (None, [0, 1, 2, 3]),
        (["dog", "ape"], [0, 2]),  # in the dataset's order
        (["2", "0"], [0, 2]),
        (["bee", "0"], [0, 1]),
        (["3", "0"], [0, 3]),  # a name of digits
    ],
)
def test_classes_are_chosen_by_name_or_number_in_the_datasets_order(wanted, numbers):
    assert chosen(wanted, ZOO, "zoo") == numbers


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (
            ["Dgo", "ape"],
            "'Dgo' is no class of zoo, perhaps dog; its classes are ape, bee, dog, 3, or by number 0 to 3",
        ),
        (["4", "ape"], "'4' is no class of zoo"),
        (["-1", "ape"], "'-1' is no class of zoo"),
        (["²", "ape"], "'²' is no class of zoo"),
        (["dog"], "dog is one class, at least 2 are needed"),
        (["dog", "2", "ape"], "dog comes twice, as dog and 2"),
        (["dog", "dog"], "dog comes twice"),
    ],
)
def test_wrong_classes_are_refused_in_a_sentence(wanted, complaint):
    with pytest.raises(WrongFlag, match=f"--classes: {complaint}"):
        chosen(wanted, ZOO, "zoo")


@pytest.fixture
def zoo(monkeypatch):
    """A published set of four classes, in which the byte of a sample tells its number."""
    labels = torch.tensor([3, 2, 0, 1, 2, 0, 0, 3, 2, 1])
    train = Split(torch.arange(10, dtype=torch.uint8)[:, None], labels)
    test = Split(train.inputs[:6] + 100, labels[:6])
    dataset = Dataset("zoo", ZOO, train, test, torch.tensor([0.0]), torch.tensor([1.0]), shift=0, flip=False)
    monkeypatch.setitem(datasets.DATASETS, "zoo", lambda data_dir: dataset)
    return dataset


def test_the_samples_of_other_classes_are_left_out_and_the_rest_labelled_anew(zoo):
    some = load("zoo", classes=["dog", "ape"])
    assert some.classes == ("ape", "dog") and some.num_classes == 2
    assert some.train.inputs.flatten().tolist() == [1, 2, 4, 5, 6, 8]
    assert some.train.labels.tolist() == [1, 0, 1, 0, 0, 1]
    assert some.test.inputs.flatten().tolist() == [101, 102, 104, 105]
    assert some.counts == {"ape": [3, 2], "dog": [3, 2]}
    assert datasets.shape_and_classes("zoo", ["0", "2"]) == ((1,), 2)


def test_a_limit_counts_samples_of_the_classes_alone(zoo):
    some = load("zoo", limit=3, classes=["2", "3"])
    assert some.train.inputs.flatten().tolist() == [0, 1, 4]
    assert some.train.labels.tolist() == [1, 0, 0]


def test_all_classes_are_the_dataset_as_it_is():
    whole, named = load("SZT"), load("SZT", classes=["1", "0"])
    for split in ("train", "test"):
        ours, theirs = getattr(named, split), getattr(whole, split)
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.labels, theirs.labels)


def test_wrong_classes_of_a_published_set_are_refused_before_it_is_downloaded(tmp_path):
    with pytest.raises(WrongFlag, match="'airplan' is no class of CIFAR10, perhaps airplane"):
        load("CIFAR10", tmp_path, classes=["airplan", "ship"])
    assert not list(tmp_path.iterdir())
    assert datasets.shape_and_classes("CIFAR10", ["airplane", "automobile"]) == ((3, 32, 32), 2)


@pytest.fixture
def stored(tmp_path):
    """The folder of a run on two classes, and that of one on all."""
    for name, line in (("two", "-d CIFAR10 --classes cat dog"), ("all", "-d CIFAR10")):
        (tmp_path / name).mkdir()
        hparams = flags_of_run(get_args(line.split())) | {"provenance": {}}
        (tmp_path / name / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    return tmp_path


def test_a_run_keeps_its_classes_when_it_goes_on_or_is_measured(stored):
    for flag in ("--resume", "--measure"):
        assert get_args([flag, str(stored / "two")]).classes == ["cat", "dog"]
        assert get_args([flag, str(stored / "two"), "--classes", "cat", "dog"]).classes == ["cat", "dog"]
        assert get_args([flag, str(stored / "all")]).classes is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--resume {}/two --classes 0 1", "--classes: a resumed run keeps its classes=['cat', 'dog']"),
        ("--resume {}/all --classes 0 1", "--classes: a resumed run keeps its classes=None"),
        ("--measure {}/two --classes 0 1", "was trained on cat dog, not on 0 1"),
        ("--measure {}/all --classes 0 1", "was trained on all, not on 0 1"),
        ("--measure {0}/two {0}/all", "--classes"),
        ("--classes", "--classes: expected at least one argument"),
    ],
)
def test_other_classes_than_a_runs_own_are_refused(stored, line, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(line.format(stored).split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and complaint in told and told.count("\n") == 1


def test_a_run_on_some_classes_says_and_keeps_them(zoo, in_an_empty_folder, monkeypatch, capsys):
    monkeypatch.setattr("flags.DATASETS", ("zoo",))
    line = "-d zoo --classes 2 ape --epochs 1 --no-nc --no-dib --no-plots -w 3 --log-dir logs --name run"
    assert main(line.split()) == 0
    assert "6 training and 4 test samples, 2 classes: ape 3 + 2, dog 3 + 2\n" in capsys.readouterr().out
    with open("logs/run/hparams.yaml") as file:
        hparams = yaml.safe_load(file)
    assert hparams["classes"] == ["2", "ape"]
    assert hparams["provenance"]["num_classes"] == 2
    assert hparams["provenance"]["classes"] == {"ape": [3, 2], "dog": [3, 2]}
