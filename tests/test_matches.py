"""Matches of slots: shares and accuracies by hand, what is kept for figures, groups, and updates of saved networks."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_classifier import toy_images

import datasets
import figures.slots as drawn
import plots
from classifier import Classifier
from figures.runs import Run
from flags import get_args
from main import main
from measures.grouping import agreement
from measures.matches import accuracies, gradients_on_noise, most_hit, nearest_and_uncovered, noise_like, permuted
from measures.neural_collapse import neural_collapse
from networks import build_network
from run import arrays
from run.seeds import seed_from
from run.slot_update import UPDATED, fewest, fewest_labels, in_halves, updated
from slots import Slots, similarities, similarities_in, unit

LINE = ["-m", "MLP", "--head", "slots", "-w", "-e", "3", "-b", "30", "--slot-prune", "0", "--quiet", "--no-nc"]


def three_slots():
    """Along the axes, of classes 0, 0 and 1, all with the threshold 0.9."""
    slots = Slots(3, 2, scale=100.0, pool="max")
    slots._append(torch.eye(3), torch.tensor([0, 0, 1]), torch.full((3,), 0.9), torch.tensor([4, 5, 6]), update=0)
    return slots


def test_shares_and_accuracies_by_hand():
    h = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.9], [0.9, 0.0, 1.0]])
    y = torch.tensor([0, 1, 1, 1, 1])  # matched and right, matched and wrong, right; unmatched and wrong, and right
    slots = three_slots()
    s = similarities(unit(h), slots.W)
    found = accuracies(slots, [(s[:2], y[:2], torch.arange(2)), (s[2:], y[2:], torch.arange(2, 5))])
    assert found == {
        "matched": 3 / 5,
        "acc_pooled": 3 / 5,
        "acc_pooled_on_matched": 2 / 3,
        "acc_by_slot": 2 / 3,
        "acc_predict": 3 / 5,
    }
    none = accuracies(Slots(3, 2), [(s[:, :0], y, torch.arange(5))])
    assert none["matched"] == 0 and math.isnan(none["acc_by_slot"]) and none["acc_predict"] == 1 / 5


def test_nearest_samples_and_those_that_nothing_covers_by_hand():
    h = torch.tensor(
        [[1.0, 0.0, 0.5], [1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.2, 0.0, 1.0], [0.0, 0.3, 1.0], [1.0, 0, 0.9]]
    )
    y = torch.tensor([0, 0, 0, 1, 0, 1])
    slots = three_slots()
    s = similarities(unit(h), slots.W).detach()
    index = torch.arange(6)
    near, found = nearest_and_uncovered(slots, [(s[:4], y[:4], index[:4]), (s[4:], y[4:], index[4:])])
    assert near.tolist() == [1, 2, 3]
    assert found["uncovered"].tolist() == [4, 5, 0]  # 4 is like a 1, 5 nearly so, 0 its own but too far away
    assert found["uncovered_label"].tolist() == [0, 1, 0] and found["uncovered_as"].tolist() == [1, 0, 1]
    lead = [s[4, 2] - s[4, 1], s[5, 0] - s[5, 2], s[0, 2] - s[0, 0]]
    assert found["uncovered_lead"].tolist() == pytest.approx([float(value) for value in lead])
    assert most_hit(slots, 2).tolist() == [1, 2]


def test_a_permutation_moves_pixels_and_keeps_channels_and_is_the_same_for_all():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    moved = permuted(x, 1)
    assert moved.shape == x.shape and not torch.equal(moved, x)
    assert torch.equal(moved.flatten(2).sort().values, x.flatten(2))
    assert torch.equal(moved[0] + 48, moved[1])
    assert permuted(torch.arange(5.0)[None], 1).sort().values.tolist() == [[0, 1, 2, 3, 4]]


def test_gradients_on_noise_are_those_of_finite_differences():
    torch.manual_seed(0)
    network = build_network("MLP", (1, 2, 2), 2, head="slots", widths=[5], nonlinearity="tanh").double().eval()
    network.head.grow(torch.randn(6, 5).double(), torch.tensor([0, 1, 0, 1, 0, 1]))
    g = gradients_on_noise(network, torch.tensor([0, 1]), torch.zeros(1, 1, 2, 2).double(), seed=3)
    x = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    for pixel in range(4):
        step = torch.zeros(4).double()
        step[pixel] = 1e-6
        with torch.no_grad():
            up, down = (similarities_in(network, x + sign * step.view(1, 2, 2)) for sign in (1, -1))
        expected = ((up - down)[:, :2] / 2e-6).mean(0)
        assert torch.allclose(g.flatten(1)[:, pixel], expected, atol=1e-8)  # of differences of this step in float64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on toy images with everything about slots, and what the same images turned over are to it."""
    folder = tmp_path_factory.mktemp("matches")
    images = {"toy": toy_images(90, 60, size=8), "other": toy_images(30, 30, size=8, num_classes=2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets, "DATASETS", {"MNIST": lambda _: images["toy"], "FashionMNIST": lambda _: images["other"]}
        )
        more = ["--ood", "FashionMNIST", "--slot-groups", "--slot-update", "--target-acc", "0.5", "--save-every", "1"]
        more += [
            "--clusters",
            "--min-cluster-size",
            "5",
            "--look",
            "gradients",
            "--look-by",
            "slot",
            "--measure-at",
            "0",
            "3",
        ]
        assert main([*LINE, "-d", "MNIST", *more, "--log-dir", str(folder), "--name", "run"]) == 0
        yield folder / "run"


def test_columns_of_a_run_are_those_of_its_network(run):
    row = pd.read_csv(run / "metrics.csv").iloc[-1]
    network = Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt").network.eval()
    dataset = datasets.DATASETS["MNIST"](None)
    x = datasets.Batches(dataset, "test", 60)[torch.arange(60)]
    matched = network.head.matched(x.flatten(1))
    predicted = network.head.predict(x.flatten(1)) == dataset.test.labels
    assert row["slots/matched/test"] == matched.double().mean().item()
    assert row["slots/acc_predict/test"] == predicted.double().mean().item()
    assert row["slots/acc_pooled/test"] == row["test_acc"]
    others = {
        "noise": noise_like(x, seed_from("slots noise", 0, 0)),
        "permuted": permuted(x, seed_from("slots permutation", 0)),
        "ood/FashionMNIST": x.new_tensor(0) + datasets.DATASETS["FashionMNIST"](None).test.inputs.sub(110.0).div(70),
    }
    for name, inputs in others.items():
        assert row[f"slots/matched/{name}"] == network.head.matched(inputs.flatten(1)).double().mean().item()


def test_slots_are_groups_for_nc1_and_clusters(run):
    row = pd.read_csv(run / "metrics.csv").iloc[-1]
    network = Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt").network.eval()
    x = datasets.Batches(datasets.DATASETS["MNIST"](None), "test", 60)[torch.arange(60)]
    slot = network.head.deciding(similarities_in(network, x))
    batches = [(x[slot >= 0], slot[slot >= 0])]
    expected = neural_collapse(network.feature_extractor, batches, len(network.head))["flatten"]
    assert row["nc1_slots/test/flatten"] == pytest.approx(expected, rel=1e-6)  # sums in another order
    clusters, _ = arrays.read(run / "arrays/epoch0003/clusters.npz")
    found = agreement(clusters["clusters/test/flatten"], slot[torch.from_numpy(clusters["index/test"])].numpy())
    assert row["ami_slots/test/flatten"] == pytest.approx(found["ami"])
    assert any("/slot" in name for name in row.index if name.startswith("look/"))


def test_an_update_is_a_checkpoint_like_any_other_and_says_what_it_is(run, tmp_path):
    report = json.loads((run / "slot_update.json").read_text())
    before, after = (
        Classifier.load_from_checkpoint(run / "checkpoints" / name).network.head for name in ("last.ckpt", UPDATED)
    )
    assert (len(before), len(after)) == (report["slots_before"], report["slots_before"] + report["slots_added"])
    assert report["samples"] == 30 and report["labels"] <= 30
    argv = ["--measure", str(run / "checkpoints" / UPDATED), "--log-dir", str(tmp_path), "--name", "m", "--quiet"]
    assert main([*argv, "--no-clusters"]) == 0
    row = pd.read_csv(tmp_path / "m" / "metrics.csv").iloc[-1]
    for column, name in (("test_acc", "scores_after"), ("slots/acc_predict/test", "after")):
        assert row[column] == pytest.approx(np.mean(list(report[name].values())))  # the halves are of one size


def test_a_saved_network_is_updated_as_one_just_trained(run, tmp_path):
    argv = ["--measure", str(run / "checkpoints/last.ckpt"), "--slot-update", "--target-acc", "0.5", "--quiet"]
    assert main([*argv, "--no-clusters", "--log-dir", str(tmp_path), "--name", "m"]) == 0
    assert (tmp_path / "m/slot_update.json").read_bytes() == (run / "slot_update.json").read_bytes()
    assert main(["--resume", str(run), "--quiet"]) == 0  # a finished run, updated again


def test_a_measured_run_is_neither_updated_again_nor_bound_to_its_other_data(run, tmp_path):
    argv = ["--measure", str(run), "--no-slots", "--no-clusters", "--quiet", "--log-dir", str(tmp_path), "--name", "m"]
    with pytest.warns(UserWarning, match="look: networks with slots have no average"):
        assert main(argv) == 0
    assert len(pd.read_csv(tmp_path / "m/metrics.csv")) == 3 and not (tmp_path / "m/slot_update.json").exists()


def test_a_folder_of_several_networks_is_not_updated(run, tmp_path, capsys):
    argv = ["--measure", str(run), "--slot-update", "--log-dir", str(tmp_path), "--no-clusters", "--quiet"]
    assert main(argv) == 2
    assert "--slot-update: takes one checkpoint of --measure at a time, and here are 3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_report_of_an_update_by_hand():
    torch.manual_seed(0)
    h, y = torch.randn(400, 5), torch.randint(3, (400,))
    slots = Slots(5, 3)
    slots.fit(h[:200], y[:200], epochs=2, batch_size=50, lr=0.1, prune=0)
    halves = in_halves(h[200:], y[200:], seed=0)
    dealt = torch.cat([part for part, _ in halves.values()])
    assert torch.equal(dealt.sort(dim=0).values, h[200:].sort(dim=0).values) and not torch.equal(dealt, h[200:])
    unmatched = int((~slots.matched(halves["updated"][0])).sum())
    before = {name: (slots.predict(a) == b).double().mean().item() for name, (a, b) in halves.items()}
    other = Slots(5, 3)
    other.load_state_dict(slots.state_dict())
    report, curves = updated(slots, (h[:200], y[:200]), halves)
    assert report["labels"] == unmatched and report["before"] == before
    assert report["after"]["updated"] == curves["updated"][-1] > curves["updated"][0] == before["updated"]
    best = report["after"]["updated"]
    assert fewest(curves["updated"], best) <= report["slots_added"] and fewest(curves["updated"], 1.01) is None
    assert fewest(torch.tensor([0.1, 0.5, 0.4, 0.5]), 0.5) == 1
    labels = fewest_labels(other, (h[:200], y[:200]), halves, best)
    assert 0 < labels["updated"] <= unmatched and labels["held_out"] is None
    assert fewest_labels(other, (h[:200], y[:200]), halves, min(before.values())) == {"updated": 0, "held_out": 0}
    assert fewest_labels(other, (h[:200], y[:200]), halves, 1.01) == {"updated": None, "held_out": None}


def test_an_update_that_adds_no_slot_has_no_new_ones_even_after_another():
    torch.manual_seed(0)
    h, y = torch.randn(400, 5), torch.randint(3, (400,))
    slots = Slots(5, 3)
    slots.fit(h[:200], y[:200], epochs=2, batch_size=50, lr=0.1, prune=0)
    known, unmatched = (h[200:], y[200:]), ~slots.matched(h[200:])
    assert len(slots.update(h[:200], y[:200], known[0][unmatched], known[1][unmatched]))
    known = tuple(part[slots.matched(h[200:])] for part in known)
    report, curves = updated(slots, (h[:200], y[:200]), {"updated": known, "held_out": (h[200:], y[200:])})
    assert report["slots_added"] == 0
    assert {name: curve.tolist() for name, curve in curves.items()} == {k: [v] for k, v in report["after"].items()}


def test_figures_of_slots_show_what_was_kept(run):
    loaded = Run(run)
    pictures, _ = arrays.read(run / "arrays/epoch0003/slots.npz")
    shown = [ax for ax in drawn.slot_pictures(loaded).axes if ax.images]
    assert len(shown) == 2 * len(pictures["shown"])
    title = f"{pictures['label'][pictures['shown'][0]]}: {pictures['hits'][pictures['shown'][0]]}"
    assert shown[0].get_title() == title
    lines = drawn.slots_over_epochs(loaded).axes[0].get_lines()[0]
    assert lines.get_ydata().tolist() == pd.read_csv(run / "metrics.csv")["slots/num"].tolist()
    curve = drawn.accuracy_by_slots(loaded).axes[0].get_lines()[0]
    report = json.loads((run / "slot_update.json").read_text())
    assert curve.get_ydata()[-1] == pytest.approx(100 * report["after"]["updated"])
    assert curve.get_xdata()[-1] == report["slots_before"] + report["slots_added"]
    page = drawn.uncovered_samples(loaded)
    assert len([ax for ax in page.axes if ax.images]) == min(60, len(pictures["uncovered"]))


def test_figures_say_what_a_run_lacks(run_folder):
    loaded = plots.load([run_folder])
    names = ("slots_over_epochs", "slot_pictures", "accuracy_by_slots", "uncovered_samples")
    for name in names:
        [text] = getattr(plots, name)(loaded).axes[0].texts
        assert "main.py" in text.get_text() and "slot" in text.get_text()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--ood", "SZT"], "--ood: samples of SZT have shape (12,)"),
        (["--ood", "nowhere"], "--ood: --dataset nowhere"),
    ],
)
def test_other_data_that_do_not_fit_are_refused(run, more, reason, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "SZT", lambda _: datasets._szt_dataset())
        assert main([*LINE, "-d", "MNIST", *more, "--log-dir", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--slots", "--slots: is for --head slots"),
        ("--ood MNIST", "--ood: belongs to --slots"),
        ("--head slots --target-acc 0.9", "--target-acc: belongs to --slot-update"),
        ("--slot-update", "--slot-update: is for --head slots"),
        ("--look gradients --look-by slot", "--look-by: slots are"),
    ],
)
def test_flags_that_need_slots_say_so(line, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        get_args(line.split())
    assert ended.value.code == 2 and reason in capsys.readouterr().err
