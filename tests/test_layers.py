"""Layers by name: what hooks read is what the layer returned, whatever the network does with it afterwards."""

import doctest
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from main import main
from measures import layers as module
from measures.layers import by_module, chosen, features_of, hookable_layers, shapes_of_layers
from measures.passes import untouched
from networks import build_network
from run.errors import UserError, WrongFlag
from utils import neural_collapse

LOGS = Path("lightning_logs")


@pytest.fixture(scope="module")
def torchvisions():
    torch.manual_seed(0)
    return resnet18(num_classes=10).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_docstrings_examples_hold():
    results = doctest.testmod(module)
    assert results.failed == 0 and results.attempted > 5


def test_layers_are_what_hooks_read_before_the_network_writes_into_it(torchvisions, images):
    """torchvision's ReLU and its residual sum both work in place: half of bn1's values would be gone, and bn2's too."""
    with torch.no_grad():
        h = features_of(torchvisions, ["conv1", "bn1", "layer1.0.bn2", "layer1.0"])(images)
        conv1 = torchvisions.conv1(images)
        bn1 = torchvisions.bn1(conv1)
        x = torchvisions.maxpool(bn1.relu())
        block = torchvisions.layer1[0]
        bn2 = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    assert torch.equal(h["conv1"], conv1) and torch.equal(h["bn1"], bn1) and torch.equal(h["layer1.0.bn2"], bn2)
    assert torch.equal(h["layer1.0"], (bn2 + x).relu())
    assert 0.4 < (h["bn1"] < 0).float().mean() < 0.6


def test_a_module_that_runs_twice_has_two_outputs(torchvisions, images):
    with torch.no_grad():
        h = features_of(torchvisions, ["layer1.0.relu", "layer1.0"])(images)
        second = features_of(torchvisions, ["layer1.0.relu:1"])(images)
    assert list(h) == ["layer1.0.relu:0", "layer1.0.relu:1", "layer1.0"]
    assert torch.equal(h["layer1.0.relu:1"], h["layer1.0"]) and not torch.equal(h["layer1.0.relu:0"], h["layer1.0"])
    assert list(second) == ["layer1.0.relu:1"] and torch.equal(second["layer1.0.relu:1"], h["layer1.0"])


def test_shapes_come_in_the_order_in_which_layers_run(torchvisions, images):
    shapes = shapes_of_layers(torchvisions, images)
    assert list(shapes)[:5] == ["conv1", "bn1", "relu", "maxpool", "layer1.0.conv1"]
    block = [name.removeprefix("layer2.0.") for name in shapes if name.startswith("layer2.0.")]
    assert block == ["conv1", "bn1", "relu:0", "conv2", "bn2", "downsample.0", "downsample.1", "relu:1"]
    assert shapes["avgpool"] == (512, 1, 1) and len(by_module(shapes)) == 52


@pytest.mark.parametrize("inference", [False, True])
def test_hooks_leave_no_trace_and_gradients_are_up_to_the_caller(torchvisions, images, inference):
    features = features_of(torchvisions, ["bn1"])
    with torch.inference_mode(inference):
        h = features(images)
    assert h["bn1"].requires_grad is not inference and bool((h["bn1"] < 0).any())
    assert not any(part._forward_hooks for part in torchvisions.modules())


def test_hooks_are_gone_also_after_an_error(torchvisions):
    with pytest.raises(RuntimeError):
        features_of(torchvisions, ["conv1"])(torch.randn(2, 5, 8, 8))
    assert not any(part._forward_hooks for part in torchvisions.modules())


def test_a_compiled_network_is_read_as_it_was_written():
    torch.manual_seed(0)
    network = build_network("MLP", (6,), 3, widths=(5, 4)).eval()
    x = torch.randn(7, 6)
    expected = features_of(network, ["hidden1.linear"])(x)["hidden1.linear"]
    network.compile(backend="eager")
    network(x)  # from now on its graph is known, and hooks into it would be passed over
    with untouched(network):
        assert torch.equal(features_of(network, ["hidden1.linear"])(x)["hidden1.linear"], expected)


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare, self.several = nn.Linear(3, 3), nn.Linear(3, 3), Several()

    def forward(self, x):
        return self.used(x) + self.several(x)[0]


class Several(nn.Module):
    def forward(self, x):
        return x, x


def test_what_does_not_run_or_returns_no_tensor_is_an_error_that_names_it():
    network, x = Forgetful(), torch.randn(2, 3)
    for layer in ("spare", "several"):
        with pytest.raises(RuntimeError, match=repr(layer)):
            features_of(network, ["used", layer])(x)
    with pytest.raises(RuntimeError, match="'used:1'"):
        features_of(network, ["used:1"])(x)
    assert list(shapes_of_layers(network, x)) == ["used"] and hookable_layers(network) == ["used", "spare", "several"]


def test_an_unknown_layer_is_an_error_with_the_names_that_are_close(torchvisions):
    with pytest.raises(UserError, match=r"no layer 'layer1\.0\.con1'; perhaps layer1\.0\.conv1"):
        features_of(torchvisions, ["layer1.0.con1"])


def resnet():
    return build_network("ResNet", (1, 28, 28), 10).eval()


def test_a_pattern_means_blocks_and_where_it_matches_none_other_layers_in_network_order():
    network = resnet()
    assert list(chosen(None, network, (1, 28, 28))) == list(network.layers)
    assert list(chosen(["avgpool", "layer1.*"], network, (1, 28, 28))) == ["layer1.0", "layer1.1", "avgpool"]
    mixed = chosen(["avgpool", "layer1.*", "conv1", "layer1.1.relu"], network, (1, 28, 28))
    assert list(mixed) == ["conv1", "layer1.0", "layer1.1.relu:0", "layer1.1.relu:1", "layer1.1", "avgpool"]
    assert mixed["conv1"] == (64, 28, 28)
    with pytest.raises(WrongFlag, match=r"argument --layers: 'layer9' matches none of the layers layer1\.0.*perhaps"):
        chosen(["layer9"], network, (1, 28, 28))


@pytest.mark.parametrize("model", ["MLP", "MNISTNet", "CIFARNet", "ConvNeXt", "ResNet"])
def test_every_layer_of_every_network_can_be_read(model):
    network = build_network(model, (3, 32, 32), 10).eval()
    x = torch.randn(2, 3, 32, 32)
    shapes = shapes_of_layers(network, x)
    assert list(by_module(shapes)) and {name.partition(":")[0] for name in shapes} == set(hookable_layers(network))
    with torch.no_grad():
        h = features_of(network, list(shapes))(x)
        blocks = network.feature_extractor(x)
    assert {name: tuple(value.shape[1:]) for name, value in h.items()} == shapes
    for name in set(blocks) & set(h):
        assert torch.equal(h[name].flatten(1), blocks[name].flatten(1)), name


def made_images(folder):
    generator = torch.Generator().manual_seed(0)
    for split, num in (("train", 12), ("test", 5)):
        for name, low in (("dark", 0), ("light", 60)):
            (folder / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = torch.randint(low, low + 190, (8, 8), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{i}.png")
    return str(folder)


def test_nc1_and_rank_are_measured_at_any_layer_and_dib_at_those_that_split(in_an_empty_folder, tmp_path):
    argv = ["-m", "ResNet", "-d", made_images(tmp_path / "images"), "-b", "8", "-e", "1", "-lr", "0.01", "--rank"]
    argv += ["--dib-epochs", "1", "--measure-at", "1", "--measure-sets", "test", "--no-plots", "--quiet"]
    assert main([*argv, "--layers", "bn1", "layer4.1", "layer4.1.bn2", "avgpool"]) == 0
    columns = list(pd.read_csv(LOGS / "version_0/metrics.csv").columns)
    layers = ["bn1", "layer4.1.bn2", "layer4.1", "avgpool"]
    assert [name for name in columns if name.startswith("nc1/test/")] == [f"nc1/test/{layer}" for layer in layers]
    assert [name for name in columns if name.startswith("rank/stable/")] == [
        f"rank/stable/test/{layer}" for layer in layers
    ]
    assert [name for name in columns if name.startswith("dib/loss/")] == ["dib/loss/layer4.1", "dib/loss/avgpool"]


def test_nc1_at_a_hooked_layer_is_that_of_its_activations():
    network = resnet()
    x, y = torch.randn(30, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    batches = list(zip(x.split(8), y.split(8), strict=True))
    with torch.no_grad():
        hooked = neural_collapse(features_of(network, ["bn1"]), batches, 3)["bn1"]
        by_hand = neural_collapse(lambda x: {"bn1": network.bn1(network.conv1(x))}, batches, 3)["bn1"]
    assert hooked == pytest.approx(by_hand, rel=1e-9)  # the same float32 activations, batch by batch


def test_dib_without_a_layer_that_splits_the_network_is_refused_before_a_folder_is_made(in_an_empty_folder, capsys):
    assert main(["--layers", "hidden1.linear", "--no-plots"]) == 2
    assert "argument --layers: DIB needs layers that split the network, hidden1" in capsys.readouterr().err
    assert not LOGS.exists()
    assert main(["--layers", "hidden1.linear", "--no-dib", "-e", "1", "--limit", "50", "--no-plots", "--quiet"]) == 0


def test_all_layers_are_listed_with_their_shapes(capsys):
    assert main(["--list-layers", "all", "-m", "ResNet", "-d", "MNIST"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "shape", "dimension"] and len(lines) == 52
    assert lines[0].split() == ["conv1", "64", "×", "28", "×", "28", "50176"]
    assert any(line.startswith("layer1.0.relu:0, :1  ") for line in lines)


def test_a_functional_write_is_noticed_too():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            h = self.linear(x)
            return F.relu_(h.mul_(2))

    network, x = Doubling(), torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(features_of(network, ["linear"])(x)["linear"], network.linear(x))
