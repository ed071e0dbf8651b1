"""Slots as the program trains them: growth, the last epoch, checkpoints, and what is refused."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from processes import assert_killed_ends_as_whole
from test_classifier import fitted, toy_images
from torch.nn import functional as F

from classifier import Classifier, growing_names
from flags import get_args
from main import main
from networks import NETWORKS, build_network
from run.between_steps import Grow, between_steps
from run.presets import WHITE_BOXES, flags_of_run
from slots import Slots, similarities, unit

LINE = "-m MLP --head slots -w -b 200 --no-plots --quiet"
SIZES = {"MLP": 8, "MNISTNet": 12, "CIFARNet": 32, "ConvNeXt": 32, "ResNet": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on raw patterns of SZT."""
    folder = tmp_path_factory.mktemp("run")
    argv = [
        *LINE.split(),
        "--schedule",
        "constant",
        "--warmup",
        "0",
        "-e",
        "3",
        "--slot-prune",
        "2",
        "--save-every",
        "1",
        "--log-dir",
        str(folder),
    ]
    assert main([*argv, "--name", "one"]) == 0
    return folder / "one"


def slots_in(path):
    return Classifier.load_from_checkpoint(path).network.head


@pytest.mark.parametrize("model", [*SIZES, *WHITE_BOXES])
def test_every_network_takes_slots_for_its_last_linear_map(model):
    shape = (3, SIZES.get(model, 32), SIZES.get(model, 32))
    network = build_network(model, shape, 3, head="slots", slot_scale=7.0, slot_pool="max").eval()
    x, y = torch.randn(4, *shape), torch.tensor([0, 1, 2, 0])
    h = network.feature_extractor(x)[network.layers[-1]].detach()
    assert (network.head.scale, network.head.pool, network.head.dimension) == (7.0, "max", h.shape[1])
    assert torch.equal(network(x), torch.full((4, 3), -7.0))
    network.head.grow(h, y)
    assert network.head.predict(h).tolist() == y.tolist()
    F.cross_entropy(network(x), y).backward()
    assert network.head.W.grad.isfinite().all()
    assert all(p.grad is not None for name, p in network.named_parameters() if name.startswith("conv1"))


def test_what_a_run_writes_adds_up(run):
    rows = pd.read_csv(run / "metrics.csv").set_index("epoch")
    by_class = rows.filter(like="slots/num/class")
    assert (by_class.sum(axis=1) == rows["slots/num"]).all() and rows["slots/num"][0] == 0
    assert (rows["slots/num"].diff()[1:] == rows["slots/added"][1:] - rows["slots/pruned"][1:]).all()
    assert rows["slots/added"][1] > 0 and rows["slots/added"][3] == 0  # no growth in the last epoch
    for epoch in (1, 2, 3):
        assert len(slots_in(run / f"checkpoints/epoch000{epoch}.ckpt")) == rows["slots/num"][epoch]


def test_slots_of_a_run_have_full_precision_on_its_training_set(run):
    from datasets import Batches, load

    slots, batches = slots_in(run / "checkpoints/last.ckpt"), Batches(load("SZT"), "train", 500)
    matched = []
    for x, y in batches:
        matched.append(similarities(unit(x), slots.W) >= slots.threshold)
        assert torch.equal(matched[-1], matched[-1] & (y[:, None] == slots.label))
    covered = torch.cat(matched)
    assert torch.equal(covered.sum(0), slots.hits)
    row = pd.read_csv(run / "metrics.csv").iloc[-1]
    assert covered.any(1).double().mean().item() == row["slots/covered"]


def test_a_killed_run_ends_with_the_slots_of_an_uninterrupted_one(in_an_empty_folder):
    assert_killed_ends_as_whole([*LINE.split(), "-e", "4"], Path.cwd(), 14)


def test_backbone_and_slots_are_trained_together():
    line = "-m MNISTNet --head slots -e 3 -b 30 -lr 1e-3 --slot-prune 0"
    dataset = toy_images(num_train=120, num_test=30, size=12)
    module, trainer, *_ = fitted(line, dataset, callbacks=[Grow(lr=20.0, prune=0)])
    start = Classifier.from_flags(flags_of_run(get_args(["-d", "MNIST", *line.split()])), dataset.shape, 3)
    assert not torch.equal(module.network.conv1.conv.weight, start.network.conv1.conv.weight)
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert id(module.network.head.W) not in trained and len(module.network.head) > 0


def test_lookahead_and_rates_of_their_own_leave_slots_alone():
    module = Classifier("CIFARNet", (3, 32, 32), 3, head="slots", lookahead=True, bias_lr_scale=64)
    groups = module._parameter_groups()
    assert not any(p is module.network.head.W for params in groups.values() for p in params)
    assert growing_names(module) == {f"network.head.{name}" for name in Slots(2, 2).state_dict()}


def test_networks_without_a_head_that_grows_bring_no_callback():
    assert between_steps(Classifier("MLP", (4,), 2)) == []
    assert growing_names(Classifier("MLP", (4,), 2)) == set()


def test_presets_of_slots_on_the_raw_input_and_behind_a_backbone():
    raw = get_args(["-m", "MLP", "-d", "MNIST", "--head", "slots", "-w"])
    assert (raw.widths, raw.epochs, raw.batch_size, raw.augment, raw.dib) == ([], 8, 1000, False, False)
    behind = get_args(["-m", "MNISTNet", "-d", "MNIST", "--head", "slots"])
    assert behind.epochs == get_args(["-m", "MNISTNet", "-d", "MNIST"]).epochs and not behind.dib
    other = get_args(["-m", "MLP", "-d", "FashionMNIST", "--head", "slots", "-w"])
    assert [args.slot_scale for args in (raw, other, behind)] == [20.0, 20.0, 30.0]
    assert [args.slot_lr for args in (raw, other, behind)] == [20.0, 5.0, 20.0]
    assert get_args(["-m", "MLP", "-d", "MNIST", "-w"]).epochs == get_args(["-m", "MLP", "-d", "MNIST"]).epochs


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--slot-lr 1", "--slot-lr: is for --head slots"),
        ("--head slots --dib", "--dib: a fresh decoder would have no slots"),
        ("--head slots --devices 2", "--devices: --head slots grows, and is measured, on one device alone"),
        ("--head slots --num-nodes 2", "on one device alone"),
        ("--head slots --precision bf16-true", "--precision: for --head slots it is one of 32-true"),
        ("--head slots --compile", "--compile: not allowed with --head slots"),
        ("--head slots --loss mse", "--loss: only cross-entropy"),
        ("--head slots -e 1", "needs at least 2"),
        ("--head slots -w --lr-range-test", "has no layer of this rate"),
        ("--head slots --slot-scale 0", "--slot-scale"),
        ("--head slots --slot-pool mean", "none of softmax, max"),
    ],
)
def test_what_slots_cannot_do_is_refused_in_a_sentence(line, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        get_args(line.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and reason in said and said.count("\n") == 1


def test_a_longer_run_is_another_one(run, capsys):
    assert main(["--resume", str(run), "-e", "5"]) == 2
    assert "grows in all of them but the last" in capsys.readouterr().err


def test_checkpoints_with_any_number_of_slots_are_measured_together(run, tmp_path):
    assert main(["--measure", str(run), "--nc", "--log-dir", str(tmp_path), "--quiet", "--name", "m"]) == 0
    measured = pd.read_csv(tmp_path / "m" / "metrics.csv").set_index("epoch")
    trained = pd.read_csv(run / "metrics.csv").set_index("epoch")
    assert measured["test_acc"].tolist() == trained["test_acc"][1:].tolist()


def test_a_network_that_is_not_like_its_checkpoint_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    argv = [*LINE.split(), "-e", "2", "--log-dir", str(tmp_path), "--name", "other", "--slot-scale", "10"]
    assert main(argv) == 0
    assert main(["--measure", str(run), str(other), "--log-dir", str(tmp_path), "--quiet"]) == 1
    assert "they differ in slot_scale" in capsys.readouterr().err


def test_names_of_networks_cover_all(run):
    assert set(SIZES) | set(WHITE_BOXES) == set(NETWORKS)
