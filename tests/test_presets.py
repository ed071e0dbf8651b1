import pytest

import datasets
import networks
import whitebox_networks
from flags import get_args
from measures.heads import head_epochs
from run import presets
from run.presets import DEFAULTS, PRESETS


def test_choices_are_the_names_that_the_modules_know():
    assert set(networks.NETWORKS) == set(presets.MODELS)
    assert set(datasets.DATASETS) == set(presets.DATASETS)
    assert set(networks.NONLINEARITIES) == set(presets.NONLINEARITIES)
    assert set(networks.HEADS) == set(presets.HEADS)
    assert set(whitebox_networks.NORMS) == set(presets.NORMS)
    assert set(whitebox_networks.FIRST_CONVS) == set(presets.FIRST_CONVS)


def test_bare_command_trains_the_mlp_of_the_paper_on_szt():
    args = get_args([])
    assert (args.model, args.dataset, args.widths, args.nonlinearity) == ("MLP", "SZT", [10, 7, 5, 4, 3], "tanh")


def test_every_flag_has_a_default_and_every_preset_value_is_a_flag():
    assert set(vars(get_args([]))) == set(DEFAULTS)
    for preset in PRESETS.values():
        assert set(preset) <= set(DEFAULTS) - set(presets.OF_ONE_CALL)


@pytest.mark.parametrize("model", [[], ["-m", "MNISTNet", "-d", "MNIST"], ["-m", "CIFARNet", "-d", "CIFAR10"]])
def test_heads_train_for_steps_unless_epochs_are_asked_for(model):
    args = get_args(model)
    assert args.dib_steps >= 1 and args.dib_epochs is None
    args = get_args([*model, "--dib-epochs", "3"])
    assert args.dib_steps is None and args.dib_epochs == 3


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
