"""Slots as the program trains them: growth, the last epoch, checkpoints, and what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import assert_killed_ends_as_whole
from test_classifier import fitted, toy_images
from test_views import make_mixed
from torch.nn import functional as F

import datasets
from classifier import Classifier, growing_names
from cover import similarities, unit
from flags import get_args
from main import main
from measures.perturb import standard_normal
from networks import NETWORKS, build_network
from run import arrays
from run.between_steps import Grow, between_steps
from run.errors import UserError
from run.presets import WHITE_BOXES, flags_of_run
from run.seeds import seed_from
from slots import Slots, similarities_in
from utils import input_gradients
from warps import rotated
from whitebox import Variants

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


AUGMAX = {"MLP": "-w --augmax flip rot15 -b 16", "Positive": "--augmax flip -b 16 --slot-norm batch"}


@pytest.fixture(scope="module", params=AUGMAX)
def with_variants(request, tmp_path_factory):
    """A run on images with variants of each, and an update of its slots; its last row too."""
    folder, model = tmp_path_factory.mktemp("variants"), request.param
    make_mixed(folder / "images")
    line = f"-m {model} -d {folder / 'images'} --head slots {AUGMAX[model]} -e 3 --slot-prune 0 --no-nc --quiet"
    line += " --views --views-samples 2 --views-units 3 --views-images 2 --slot-update --no-plots --name run"
    assert main([*line.split(), "--log-dir", str(folder)]) == 0
    return folder, pd.read_csv(folder / "run/metrics.csv").iloc[-1]


def without_variants(network):
    """What the network makes of the image itself, as slots get it."""
    blocks = [network.get_submodule(name) for name in network.sequence[:-1]]
    return torch.nn.Sequential(*(block.units if isinstance(block, Variants) else block for block in blocks)).eval()


@pytest.mark.parametrize("name", ["last", "updated"])
def test_a_mirrored_image_is_the_same_to_slots_with_flips_to_the_bit(with_variants, name):
    network = Classifier.load_from_checkpoint(with_variants[0] / f"run/checkpoints/{name}.ckpt").network.eval()
    x = torch.randn(40, 1, 32, 32)
    with torch.no_grad():
        s, mirrored = (similarities_in(network, images) for images in (x, x.flip(-1)))
        assert torch.equal(s, mirrored) and torch.equal(network(x), network(x.flip(-1)))
        h, other = (network.feature_extractor(images)[network.layers[-1]] for images in (x, x.flip(-1)))
    assert h.ndim == 3 and not torch.equal(h, other)
    assert torch.equal(network.head.predict(h), network.head.predict(other))
    assert torch.equal(network.head.matched(h), network.head.matched(other))


def test_a_sample_is_as_similar_to_a_slot_as_its_most_similar_variant(with_variants):
    folder, row = with_variants
    network = Classifier.load_from_checkpoint(folder / "run/checkpoints/last.ckpt").network.eval()
    dataset = datasets.load(str(folder / "images"))
    x = (dataset.train.inputs.float() - dataset.offset) * dataset.scale
    copies, encoder = [x, x.flip(3)], without_variants(network)
    if network.sequence == ("flatten", "head"):
        copies += [rotated(one, angle) for one in copies for angle in (15, -15)]
    with torch.no_grad():
        each = torch.stack([unit(encoder(copy)) for copy in copies])
        s, y = (each @ unit(network.head.W).T).amax(0), dataset.train.labels
        torch.testing.assert_close(similarities_in(network, x), s, rtol=0, atol=1e-6)  # float32, in other batches
    matched = s >= network.head.threshold
    assert (network.head.label == y[:, None])[matched].all() and matched.any()
    assert matched.any(1).double().mean().item() == row["slots/covered"] == row["slots/matched/train"]
    assert row["slots/acc_by_slot/train"] == 1 and row["views/slots/zeros/noise"] == 0


def test_units_behind_variants_are_those_of_the_image_itself(with_variants):
    folder, _ = with_variants
    network = Classifier.load_from_checkpoint(folder / "run/checkpoints/last.ckpt").network.eval()
    layer, plain = network.layers[-1], without_variants(network)
    found = arrays.read(folder / "run/arrays/epoch0003/views.npz")[0]
    if layer == "flatten":  # the image's own pixels, which nobody wants to see
        assert not any(name.startswith("units/") for name in found) and "slots/index" in found
        return
    x = standard_normal(slice(0, 2), (1, 32, 32), seed_from("views", 0))
    index = torch.from_numpy(found[f"units/{layer}/index"])
    expected = input_gradients(plain, x, units=index).mean(0)
    assert len(index) == 3 and expected.any()
    np.testing.assert_allclose(found[f"units/{layer}/mean/noise"], expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_saved_slots_with_variants_are_measured_and_updated_as_in_training(with_variants):
    folder, row = with_variants
    line = ["--measure", str(folder / "run/checkpoints/last.ckpt"), "--slot-update", "--no-plots", "--quiet"]
    assert main([*line, "--log-dir", str(folder), "--name", "m"]) == 0
    measured = pd.read_csv(folder / "m/metrics.csv").iloc[-1]
    names = [name for name in measured.index if name.startswith(("slots/", "views/")) and name in row.index]
    assert len(names) > 40
    np.testing.assert_array_equal(measured[names].astype(float), row[names].astype(float))
    assert (folder / "m/slot_update.json").read_bytes() == (folder / "run/slot_update.json").read_bytes()


def test_a_norm_in_front_of_slots_is_a_block_of_the_network_and_old_checkpoints_have_none(run):
    network = build_network("MNISTNet", (1, 12, 12), 2, head="slots", slot_norm="batch")
    assert network.sequence[-3:] == ("hidden", "norm", "head") and network.layers == (
        "conv1",
        "conv2",
        "hidden",
        "norm",
    )
    h = network.train().feature_extractor(torch.randn(50, 1, 12, 12))
    alive = h["hidden"].std(0) > 0.1
    assert h["norm"][:, alive].mean(0).abs().max() < 1e-5 and alive.any()
    torch.testing.assert_close(
        h["norm"][:, alive].std(0, correction=0), torch.ones(int(alive.sum())), rtol=0, atol=1e-3
    )
    assert not network.trains_on_one((1, 12, 12))
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert content["hyper_parameters"].pop("slot_norm") == "none"
    old = Classifier.from_checkpoint(content, "old.ckpt", (12,), 2)
    assert old.network.sequence == ("flatten", "head") and old.hparams.slot_norm == "none"


def test_networks_whose_features_have_no_variants_are_refused():
    for model, shape in (("MNISTNet", (1, 12, 12)), ("ConvNeXt", (3, 32, 32)), ("MLP", (1, 4, 4))):
        with pytest.raises(UserError, match="--augmax with --head slots is for images in white-box networks"):
            build_network(model, shape, 2, head="slots", augmax=["flip"])
    with pytest.raises(UserError, match="--augmax"):
        build_network("MLP", (12,), 2, head="slots", augmax=["flip"], widths=[])


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
    assert [args.slot_scale for args in (raw, other, behind)] == [20.0, 20.0, 10.0]
    assert [args.slot_lr for args in (raw, other, behind)] == [20.0, 5.0, 10.0]
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
        ("--slot-norm batch", "--slot-norm: is for --head slots"),
        ("--head slots -w --slot-norm batch", "--slot-norm: is for slots behind a network"),
        ("--head slots -w --augmax flip", "--augmax: needs images to mirror and to turn"),
        ("-m MLP -d MNIST --head slots --augmax flip", "white-box networks, or as they are (-m MLP -w)"),
        ("-m MNISTNet -d MNIST --head slots --augmax flip", "white-box networks, or as they are (-m MLP -w)"),
        ("-m MLP -d MNIST -w --augmax flip", "--augmax: is for -m DisjConj and"),
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
