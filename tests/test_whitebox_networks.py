"""White-box networks as the program trains them: weights in bounds, a falling temperature, variants, measures."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from processes import assert_killed_ends_as_whole
from test_classifier import fitted, toy_images
from test_robustness import make_images

import networks
from classifier import new_classifier
from datasets import Data
from flags import get_args
from measures.decodable_information import decodable_information
from run.between_steps import between_steps
from run.checkpoints import read_checkpoint
from run.presets import NORMS, WHITE_BOXES, flags_of_run
from whitebox import GumbelConv2d, PositiveConv2d


class After(Callback):
    """Keeps what a function says of the network after every step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(pl_module.network))


def layer_of(network, kind):
    return next(layer for layer in network.modules() if isinstance(layer, kind))


def trained(line, look, epochs=2):
    """A few steps of a network as `main` trains it."""
    from classifier import Classifier

    line = f"{line} -e {epochs} -b 32 -lr 0.1"
    dataset, after = toy_images(num_train=90, num_test=10, size=32, channels=1), After(look)
    like = Classifier.from_flags(flags_of_run(get_args(["-d", "MNIST", *line.split()])), (1, 32, 32), 3)
    module, *_ = fitted(line, dataset, callbacks=[*between_steps(like), after])
    return module, after.seen


def test_positive_weights_are_at_least_zero_after_every_step():
    module, seen = trained("-m Positive", lambda network: network.conv2.weight.min().item())
    assert len(seen) == 6 and all(least == 0 for least in seen)
    assert (module.network.conv1.conv.weight < 0).any()


def test_positive_weights_are_at_least_zero_where_slow_weights_follow():
    _, seen = trained("-m Positive --lookahead", lambda network: network.conv2.weight.min().item(), epochs=4)
    assert len(seen) == 12 and all(least >= 0 for least in seen)


def test_the_temperature_falls_by_the_same_factor_at_every_step():
    _, seen = trained("-m Gumbel --tau 2:0.5", lambda network: network.conv2.tau.item())
    assert seen == pytest.approx([2 * 0.25 ** (step / 5) for step in range(6)], rel=1e-6)  # kept in float32


def test_networks_without_such_layers_need_nothing_between_steps():
    assert between_steps(fitted("-m MNISTNet -e 1", toy_images())[0]) == []


VARIANTS = (
    "-m DisjConj --augmax flip rot15",
    "-m Directions --branches 2 --norm iternorm",
    "-m Gumbel --topk 3 --norm percentile --augmax flip --branches 2",
    "-m Positive --first-conv scaled",
    "-m Directions --first-conv perspective",
    "-m DisjConj --first-conv projective",
    "-m MNISTNet --head prototypes",
)


@pytest.mark.parametrize("line", VARIANTS)
def test_every_variant_trains_on_its_data(line):
    module, *_ = fitted(f"{line} -e 2 -b 30", toy_images(num_train=60, num_test=12, size=28))
    assert module.values["train_loss"] < 1.5  # of log 3 = 1.1 for guessing
    assert all(parameter.isfinite().all() for parameter in module.network.parameters())


@pytest.mark.parametrize(("norm", "first_conv"), [("iternorm", "plain"), ("batch", "projective")])
def test_networks_of_any_layers_train_with_channels_last_in_mixed_precision(norm, first_conv):
    dataset = toy_images(num_train=12, num_test=4, size=12, num_classes=2)
    line = f"-m DisjConj -d MNIST -e 1 -b 12 --channels-last --norm {norm} --first-conv {first_conv}"
    flags = flags_of_run(get_args(line.split()))
    data = Data(dataset, 12)
    module = new_classifier(flags, data)
    formats = [p.is_contiguous(memory_format=torch.channels_last) for p in module.network.parameters() if p.dim() == 4]
    assert all(formats) and len(formats) == (first_conv == "plain")
    Trainer(max_epochs=1, precision="bf16-mixed", accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False).fit(module, datamodule=data)  # fmt: skip
    assert all(value.dtype != torch.bfloat16 and value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("norm", NORMS)
def test_whatever_normalises_over_samples_needs_two_where_each_has_one_value(norm):
    for model, trains_on_one in (("DisjConj", False), ("Directions", True)):
        assert networks.build_network(model, (1, 12, 12), 2, norm=norm).trains_on_one((1, 12, 12)) == trains_on_one


def test_units_of_a_class_lie_together_whatever_the_variant():
    """What raises one unit raises the score of its class alone."""
    for options in ({}, {"branches": 2}, {"augmax": ["flip"]}):
        network = networks.build_network("Directions", (3, 32, 32), 3, **options).eval()
        _, decoder = network.get_encoder_decoder("units")
        units = torch.zeros(1, 180 * options.get("branches", 1))
        before = decoder(units)
        for j in (0, units.shape[1] - 1):
            raised = units.clone()
            raised[0, j] = 5
            changed = (decoder(raised) != before)[0].tolist()
            assert changed == [j == 0, False, j != 0]


@pytest.mark.parametrize("model", WHITE_BOXES)
def test_decodable_information_is_read_from_every_layer(model):
    torch.manual_seed(0)
    network = networks.build_network(model, (1, 12, 12), 2).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = torch.randn(24, 1, 12, 12), torch.arange(24) % 2
    found = decodable_information(network, x, y, 2, epochs=2, learning_rate=1e-2, batch_size=12)
    assert set(found.minimality) == set(network.layers)
    assert all(abs(value) < 5 for value in found.minimality.values())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_heads_of_positive_layers_are_positive():
    torch.manual_seed(0)
    network = networks.build_network("Positive", (1, 12, 12), 2).eval()
    x, y = torch.randn(24, 1, 12, 12), torch.arange(24) % 2
    found = decodable_information(network, x, y, 2, epochs=2, learning_rate=1e-2, batch_size=12, keep_states=True)
    weights = [state["conv2.weight"] for (layer, _), state in found.states.items() if layer == "conv1"]
    assert weights and all(weight.min() >= 0 for weight in weights)


@pytest.mark.parametrize("kind", [GumbelConv2d, PositiveConv2d])
def test_layers_serve_in_anybodys_network(kind):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), kind(4, 2, 3), torch.nn.Flatten())
    network(torch.randn(2, 1, 7, 7)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    "options", ["Gumbel --topk 2 --tau 1:0.2", "Positive --lookahead --norm iternorm --augmax flip"]
)
def test_a_killed_run_ends_as_one_that_nothing_disturbed(options, tmp_path):
    make_images(tmp_path / "images")
    line = f"-m {options} -d {tmp_path / 'images'} -e 3 -b 16 --no-dib --no-plots".split()
    assert_killed_ends_as_whole(line, tmp_path, 7)
    state = read_checkpoint(tmp_path / "lightning_logs/cut/checkpoints/last.ckpt")["state_dict"]
    if "Positive" in options:
        assert min(value.min() for name, value in state.items() if name.endswith("conv2.weight")) >= 0
    else:
        assert state["network.conv2.tau"] == pytest.approx(0.2)  # where it has fallen to
