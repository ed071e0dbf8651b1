"""Noise and missing channels: closed forms on linear networks, and in runs."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import finish
from torch import nn

from classifier import squared_error
from measures.derivatives import View
from measures.layers import gives_variants
from measures.perturb import changed, resumed, root_mean_squares, standard_normal, with_noise, without_channels
from networks import build_network
from run.arrays import read

RUN = Path("lightning_logs")
LINE = ["-e", "1", "--limit", "300", "--no-dib", "--no-nc", "--no-plots", "--quiet", "--look-samples", "60"]


def linear(num=50, chunk=None):
    """A linear network of two layers with the squared error."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    x, y = torch.randn(num, 6, dtype=torch.float64), torch.randint(0, 3, (num,))
    return View(network, x, y, loss=partial(squared_error, reduction="none"), chunk=chunk)


def test_noise_of_size_0_changes_nothing():
    view = linear()
    for place in ("input", "0", "output"):
        found = with_noise(view, place, 1.3, (0.0, 1.0), seed=0)
        assert tuple(found[0].tolist()) == view.loss_and_accuracy() and found[1, 0] != found[0, 0]


def test_noise_on_a_linear_network_raises_the_squared_error_by_half_its_variance_times_the_weights():
    view = linear(2000)
    W = [layer.weight.detach() for layer in view.network]
    clean = view.loss_and_accuracy()[0]
    for place, A in (("input", W[1] @ W[0]), ("0", W[1]), ("1", torch.eye(3).double()), ("output", torch.eye(3))):
        rises = torch.stack([with_noise(view, place, 2.0, (0.5,), seed)[0, 0] for seed in range(20)]) - clean
        expected = float(A.square().sum()) / 2  # ½ σ² ‖A‖², with σ = 2 · 0.5
        assert abs(float(rises.mean()) - expected) < 5 * float(rises.std()) / 20**0.5


def test_noise_is_what_it_is_said_to_be():
    view = linear()
    z = standard_normal(slice(0, 50), (4,), seed=3).double()
    torch.manual_seed(0)
    h = view.network[0](view.x) + 0.7 * 1.5 * z
    expected = squared_error(view.network[1](h), view.y).item()
    assert float(with_noise(view, "0", 1.5, (0.7,), seed=3)[0, 0]) == pytest.approx(expected, rel=1e-12)
    assert not torch.equal(z, standard_normal(slice(0, 50), (4,), seed=4).double())


def test_noise_of_a_sample_is_the_same_whatever_chunk_it_comes_in():
    found = [with_noise(linear(chunk=chunk), "0", 1.0, (1.0,), seed=0) for chunk in (None, 7)]
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)  # other orders of sums


def test_the_size_of_noise_is_relative_to_the_root_mean_square():
    view = linear(chunk=7)
    found = root_mean_squares(view, ["input", "0", "output"])
    h = view.network[0](view.x)
    for name, expected in (("input", view.x), ("0", h), ("output", view.network[1](h))):
        assert found[name] == pytest.approx(float(expected.detach().square().mean().sqrt()), rel=1e-12)


def test_a_channel_zeroed_is_its_outgoing_weights_zeroed():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    view = View(network, torch.randn(30, 1, 4, 4, dtype=torch.float64), torch.randint(0, 2, (30,)))
    found = without_channels(view, "1")
    assert found.shape == (3, 2)
    weight = network[3].weight.detach().clone()
    for c in range(3):
        with torch.no_grad():
            network[3].weight.view(2, 3, 4)[:, c] = 0
        assert found[c].tolist() == pytest.approx(view.loss_and_accuracy(), rel=1e-12)
        network[3].weight.data.copy_(weight)


def test_a_channel_of_variants_is_zeroed_in_all_of_them():
    network = build_network("MLP", (1, 3, 3), 2, head="slots", widths=[], augmax=["flip"]).eval()
    x, y = torch.randn(6, 1, 3, 3), torch.arange(6) % 2
    network.head.grow(network.flatten(x), y)
    found, lacking = without_channels(View(network, x, y), "flatten"), network.flatten(x)
    lacking[..., 4] = 0
    torch.testing.assert_close(found[4, 0], nn.functional.cross_entropy(network.head(lacking), y).double())
    assert len(found) == 9


def test_one_call_of_a_layer_that_runs_twice_is_changed_and_no_hook_is_left():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x) - 1)

    network, x = Twice(), torch.tensor([[3.0]])
    assert [float(changed(network, place, x, lambda h: h + 10)) for place in ("relu:0", "relu:1")] == [12, 12]
    assert float(changed(network, "relu:0", x, lambda h: 0 * h)) == 0
    with pytest.raises(ZeroDivisionError):
        changed(network, "relu:0", x, lambda h: 1 / 0)
    assert not network.relu._forward_hooks and float(network(x)) == 2


@pytest.mark.parametrize("model", ["MLP", "MNISTNet", "ResNet"])
def test_running_a_network_from_the_changed_block_on_gives_the_bits_of_the_whole(model):
    torch.manual_seed(0)
    network = build_network(model, (1, 12, 12), 3).eval()
    x = torch.randn(2, 1, 12, 12)
    seen = x.clone()
    inner = {"ResNet": ["bn1", "layer2.0.relu:1", "layer3.0.downsample.1"], "MNISTNet": ["conv2.conv", "flatten"]}
    ran: list[nn.Module] = []
    first = network.get_submodule(network.sequence[0]).register_forward_hook(lambda *args: ran.append(args[0]))
    for place in ("input", *network.sequence, *inner.get(model, ()), "output"):
        with torch.no_grad():
            with_change = resumed(network, place, x)
            ran.clear()
            for factor in (1.0, 2.0):
                change = lambda h, f=factor: f * h if f != 1 else h  # noqa: E731
                found = with_change(change)
                is_rerun = bool(ran)
                torch.testing.assert_close(found, changed(network, place, x, change), rtol=0, atol=0)
                ran.clear()
                assert is_rerun == (place in ("input", network.sequence[0]))
    assert torch.equal(x, seen)
    first.remove()
    assert not any(part._forward_hooks for part in network.modules())


def test_a_network_of_no_blocks_runs_as_a_whole():
    view = linear()
    for place in ("input", "0", "1", "output"):
        with_change = resumed(view.network, place, view.x)
        for factor in (0.0, 2.0):
            mine, whole = (run(lambda h, f=factor: f * h) for run in (
                with_change, partial(changed, view.network, place, view.x)))  # fmt: skip
            assert torch.equal(mine, whole)


class OwnWay(nn.Module):
    """A network of others, in which words of this program's networks mean something else."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.layers = ("sequence",)
        self.output = nn.Linear(4, 2)

    def forward(self, x):
        return self.output(x + self.sequence(x))


def test_a_network_of_others_is_taken_for_no_sequence_of_blocks():
    network, x = OwnWay(), torch.randn(3, 4)
    assert torch.equal(resumed(network, "sequence.0", x)(torch.neg), changed(network, "sequence.0", x, torch.neg))
    assert not gives_variants(network, "sequence")
    shapes = {"input": (4,), "sequence.0": (4,), "sequence.1": (4,), "output": (2,)}
    assert View(network, x, torch.tensor([0, 1, 0])).shapes == shapes


def test_a_run_logs_its_arrays_against_the_network_as_it_is(in_an_empty_folder):
    argv = [*LINE, "--perturb", "--perturb-noise", "0.5", "--perturb-draws", "2", "--look", "loss", "--name", "run"]
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    [first, row] = csv.DictReader((RUN / "run/metrics.csv").read_text().splitlines())
    arrays, settings = read(RUN / "run/arrays/epoch0001/perturb.npz")
    assert settings["places"] == ["input", *(f"hidden{i}" for i in range(1, 6))]
    loss, accuracy = arrays["clean"]
    assert loss == float(row["look/loss/loss"]) and arrays["sizes"].tolist() == [0, 0.5, 1]
    for place in settings["places"]:
        noisy, lacking = arrays[f"noise/{place}/losses"], arrays[f"channels/{place}/losses"]
        assert noisy.shape == (2, 3) and (noisy[:, 0] == loss).all()
        assert float(row[f"perturb/noise_rise/{place}"]) == pytest.approx(noisy[:, 2].mean() - loss)
        assert float(row[f"perturb/channel_rise/{place}"]) == pytest.approx(lacking.mean() - loss)
        assert float(row[f"perturb/channel_worst_rise/{place}"]) == lacking.max() - loss
        worst = accuracy - arrays[f"channels/{place}/accuracies"].min()
        assert float(row[f"perturb/channel_worst_drop/{place}"]) == pytest.approx(worst, abs=1e-15)
    assert len(arrays["channels/input/losses"]) == 12 and len(arrays["channels/hidden2/losses"]) == 7
    assert settings["draws"] == 2 and float(first["perturb/noise_rise/input"])


def test_layers_are_those_that_are_named_and_channels_can_be_left_out(in_an_empty_folder):
    argv = [
        *LINE,
        "--perturb",
        "hidden1.linear",
        "output",
        "--no-perturb-channels",
        "--measure-at",
        "0",
        "--name",
        "run",
    ]
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    [first, _] = csv.DictReader((RUN / "run/metrics.csv").read_text().splitlines())
    columns = [name for name in first if name.startswith("perturb/")]
    assert columns == [
        f"perturb/noise_{of}/{place}" for place in ("hidden1.linear", "output") for of in ("drop", "rise")
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--perturb", "hiden1"], "argument --perturb: there is no layer 'hiden1'; perhaps hidden1"),
        (["--perturb", "input", "--perturb-draws", "0"], "--perturb-draws"),
        (["--perturb", "--perturb-noise", "-1"], "--perturb-noise"),
        (["--perturb-channels"], "argument --perturb-channels: belongs to --perturb, which is not asked for"),
        (["--perturb-noise", "1"], "argument --perturb-noise: belongs to --perturb, which is not asked for"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_before_anything_is_written(argv, words, in_an_empty_folder):
    line = [*LINE[:-2], *argv]
    found, told = finish(line, Path.cwd())
    assert found == 2 and words in told and told.count("\n") == 1 and not RUN.exists()
