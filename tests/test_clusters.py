"""Clusters against blobs, noise, scikit-learn's scores and loops over samples; the measure as a run makes it."""

import csv
import doctest
import math
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import Run, arrays_of, assert_killed_ends_as_whole, assert_same_run, finish, run_tasks, signal_at
from two_ranks import on_two_ranks

import datasets
from classifier import Classifier
from measures import clusters, grouping, samples
from measures.clusters import shared_among
from measures.embedding import tsne
from measures.grouping import Recipe, agreement, cluster, of_layer
from measures.reduction import reduce
from measures.samples import Chosen, activations_of, stratified
from run.arrays import read
from run.errors import UserError


def blobs(num_samples=1000, d=12, num_classes=10, spread=1.0, seed=0):
    """Gaussian blobs far from each other, (N, d), and which of them each sample is from."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_samples) % num_classes
    means = 30 * torch.eye(num_classes, d)
    return means[y] + spread * torch.randn(num_samples, d, generator=generator), y


@pytest.mark.parametrize("of", [grouping, samples])
def test_docstrings(of):
    assert doctest.testmod(of).failed == 0


def test_ten_gaussian_blobs_are_ten_clusters_and_the_classes():
    h, y = blobs()
    grouping = cluster(reduce(h, 0.95, labels=y).scores, y)
    assert grouping.num_clusters == 10
    assert grouping.purity == 1 and grouping.coverage > 0.9
    inside = grouping.labels >= 0
    assert agreement(grouping.labels[inside].numpy(), y[inside].numpy())["ami"] == pytest.approx(1)
    tight, y = blobs(spread=1e-3)
    grouping = cluster(torch.cat([tight[y == c] for c in range(10)]), y.sort().values)
    assert grouping.coverage > 0.9


def test_blobs_without_outliers_have_homogeneity_and_ami_1():
    y = torch.arange(1000) % 10
    angle = torch.arange(1000) // 10 * (2 * math.pi / 100)
    rings = torch.stack([angle.cos(), angle.sin()], 1) + 100 * torch.stack([y % 5, y // 5], 1)  # no point is outside
    grouping = cluster(rings, y)
    found = (grouping.num_clusters, grouping.coverage, grouping.purity_all)
    assert found == (10, 1, 1)
    assert (grouping.homogeneity, grouping.completeness, grouping.ami) == pytest.approx((1, 1, 1))


def test_one_isotropic_gaussian_has_no_cluster():
    h = torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    grouping = cluster(h, torch.arange(1000) % 10)
    assert grouping.num_clusters == 0 and math.isnan(grouping.purity)
    assert (grouping.coverage, grouping.purity_all, grouping.homogeneity, grouping.ami) == pytest.approx((0, 0, 0, 0))


def test_permuted_labels_tell_nothing():
    h, y = blobs(2000)
    permuted = y[torch.randperm(2000, generator=torch.Generator().manual_seed(1))]
    assert abs(cluster(h, permuted).ami) < 0.02  # chance alone gives C² / (2 N), 0.025 nats of 2.3, and is taken away


def entropy(*names):
    counts = np.unique(np.stack(names, 1), axis=0, return_counts=True)[1] / len(names[0])
    return -(counts * np.log(counts)).sum()


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_their_definitions(seed):
    noise = np.random.default_rng(seed)
    classes, clusters = noise.integers(0, 4, 200), noise.integers(-1, 3, 200)
    classes = np.where(noise.random(200) < 0.5, clusters + 1, classes)
    inside = clusters >= 0
    most = sum(max(np.sum((clusters == k) & (classes == c)) for c in range(4)) for k in range(3))
    found = agreement(clusters, classes)
    assert found["num_clusters"] == 3 and found["coverage"] == inside.mean()
    assert found["purity"] == most / inside.sum() and found["purity_all"] == most / 200
    given_clusters = entropy(classes, clusters) - entropy(clusters)
    given_classes = entropy(classes, clusters) - entropy(classes)
    assert found["homogeneity"] == pytest.approx(1 - given_clusters / entropy(classes))
    assert found["completeness"] == pytest.approx(1 - given_classes / entropy(clusters))


def test_names_of_classes_and_clusters_do_not_matter():
    noise = np.random.default_rng(0)
    classes, clusters = noise.integers(0, 4, 200), noise.integers(-1, 3, 200)
    others = np.array([7, 0, 90, 2])[classes], np.array([5, 1, 0, -1])[clusters]
    assert agreement(others[1], others[0]) == pytest.approx(agreement(clusters, classes))


def test_collapsed_classes_are_clusters():
    """At the end of training all samples of a class may be one point."""
    y = torch.arange(600) % 3
    grouping = cluster(torch.eye(3)[y], y)
    assert grouping.num_clusters == 3 and grouping.purity_all == 1


@pytest.mark.parametrize(("d", "spread", "offset"), [(2, 9.0, 0), (64, 9.0, 0), (64, 4.0, 1e5), (12, 1e-4, 0)])
@pytest.mark.parametrize("copies", [0, 80])
@pytest.mark.parametrize("is_renamed", [False, True])
def test_clusters_are_those_of_scikit_learn(monkeypatch, d, spread, offset, copies, is_renamed):
    """Near points, those in one place, and a version without the private steps as well."""
    from sklearn.cluster import HDBSCAN

    if is_renamed:
        monkeypatch.setitem(sys.modules, "sklearn.cluster._hdbscan._tree", None)
    h, _ = blobs(600, d, num_classes=min(d, 10), spread=spread)
    h[:copies] = h[0]
    points = (h + offset).double().numpy()
    found = grouping.hdbscan(points, 20)
    np.testing.assert_array_equal(found, HDBSCAN(min_cluster_size=20, min_samples=20, copy=True).fit_predict(points))


@pytest.mark.parametrize("spread", [9.0, 1e-2, 1e-6, 0.0])
def test_core_distances_are_those_of_a_search_by_differences(spread):
    centres, _ = blobs(300, 30, spread=0)
    points = centres.numpy() + np.random.default_rng(0).normal(scale=spread, size=(300, 30))
    expected = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, 19]
    # Of neighbours that the search cannot tell apart any may be the last: they are equally far to nine digits.
    np.testing.assert_allclose(grouping.core_distances(points, 20), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("scores", "labels", "told"),
    [
        (torch.randn(40, 3), torch.zeros(40), "fewer than the 50 of a cluster"),
        (torch.randn(60, 3), torch.zeros(59), "scores of shape"),
        (torch.full((60, 3), math.nan), torch.zeros(60), "infinite or nan"),
    ],
)
def test_what_cannot_be_clustered_is_one_sentence(scores, labels, told):
    with pytest.raises(UserError, match=told):
        cluster(scores, labels)


# Samples


@pytest.mark.parametrize("num", [7, 50, 99, 100, 1000])
def test_a_sample_has_every_class_in_its_share(num):
    y = torch.tensor([0] * 50 + [1] * 30 + [3] * 20)[torch.randperm(100)]
    index = stratified(y, num, seed=3)
    assert len(index) == len(index.unique()) == min(num, 100) and torch.equal(index, index.sort().values)
    shares = y[index].bincount(minlength=4) - torch.tensor([50, 30, 0, 20]) * len(index) / 100
    assert shares.abs().max() < 1


def test_a_sample_depends_on_the_seed():
    y = torch.arange(100) % 5
    assert torch.equal(stratified(y, 50, 0), stratified(y, 50, 0))
    assert not torch.equal(stratified(y, 50, 0), stratified(y, 50, 1))


class InMemory:
    """Batches that give samples by their index, as a run's do."""

    def __init__(self, x, y):
        self.x, self.labels = x, y

    def __getitem__(self, index):
        return self.x[index]


def test_chosen_samples_are_the_same_from_batches_of_any_kind(monkeypatch):
    monkeypatch.setattr(samples, "BATCH_SIZE", 7)
    x, y = torch.arange(40.0)[:, None].repeat(1, 3), torch.arange(40) % 4
    index = stratified(y, 23, seed=0)
    batches = list(zip(x.split(9), y.split(9), strict=True))
    assert torch.equal(samples.labels_in(batches), samples.labels_in(InMemory(x, y)))
    for source in (InMemory(x, y), batches):
        found = activations_of(lambda x: {"layer": 2 * x}, Chosen(source, index), len(index))
        assert torch.equal(found["layer"], 2 * x[index])


def test_several_ranks_find_together_what_one_finds(monkeypatch):
    monkeypatch.setattr(samples, "BATCH_SIZE", 64)
    x, y = blobs(600, num_classes=3)
    index = torch.arange(600)
    layers = lambda x: {"a": x, "b": x.relu(), "c": -x}  # noqa: E731

    def found(ranks):
        activations = activations_of(layers, Chosen(InMemory(x, y), index, ranks), 600, ranks)
        return shared_among(ranks, activations, lambda layer, A: of_layer(A, y, Recipe(), 3))

    both, _ = on_two_ranks(found)
    alone = {name: of_layer(h, y, Recipe(), 3) for name, h in layers(x).items()}
    for results in both:
        assert list(results) == ["a", "b", "c"]
        for name, (figures, arrays) in results.items():
            assert figures == pytest.approx(alone[name][0], nan_ok=True)
            assert all(torch.equal(array, alone[name][1][key]) for key, array in arrays.items())


def test_a_mistake_that_one_rank_meets_ends_both_in_a_sentence_that_names_the_layer():
    def found(ranks):
        with pytest.raises(UserError, match=r"layer b: .* same activations"):
            layers, y = {"a": torch.randn(60, 3), "b": torch.ones(60, 3)}, torch.arange(60) % 2
            shared_among(ranks, layers, lambda layer, A: of_layer(A, y, Recipe(), 2))
        return True

    assert on_two_ranks(found)[0] == [True, True]


def test_memory_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(samples, "free_memory", lambda device: 1e6)
    layers = {"a": torch.zeros(4, 1000), "b": torch.zeros(4, 10)}
    with pytest.raises(UserError, match=r"of 1000 samples at 2 layer\(s\) .* at most 99 fit \(--cluster-samples\)"):
        activations_of(lambda x: layers, [(slice(0, 4), torch.zeros(4))], 1000)


def test_arrays_hold_what_the_figures_are_made_of():
    h, y = blobs(400, num_classes=4)
    figures, arrays = of_layer(h, y, Recipe(energy=0.8, min_cluster_size=20), 4)
    again = cluster(arrays["scores"], y, 20)
    assert torch.equal(arrays["clusters"], again.labels.int())
    assert {name: figures[name] for name in again.figures} == again.figures
    assert figures["directions"] == len(arrays["singular_values"]) and figures["energy"] > 0.8


def test_directions_that_do_not_hold_the_energy_are_said_once():
    measure = clusters.Clusters(recipe=Recipe(max_directions=2))
    found = {"conv1": ({"energy": 0.5}, {}), "avgpool": ({"energy": 0.95}, {})}
    with pytest.warns(UserWarning, match=r"2 directions \(--max-directions\) hold less .* of conv1 \(0.50\)") as told:
        measure._tell_low_energy(found)
        measure._tell_low_energy(found)
    assert len(told) == 1


def test_plan_refuses_what_the_data_lack():
    split = SimpleNamespace(labels=torch.zeros(30))
    data = SimpleNamespace(num_classes=3, test=split, train=split)
    flags = {"filter_class": None, "cluster_sets": ["test"], "cluster_samples": 100, "min_cluster_size": 30}
    assert clusters.Clusters.plan(SimpleNamespace(**flags), data) == {}
    for wrong, told in (({"filter_class": 3}, "--filter-class: 3"), ({"min_cluster_size": 31}, "--min-cluster-size")):
        with pytest.raises(UserError, match=told):
            clusters.Clusters.plan(SimpleNamespace(**{**flags, **wrong}), data)


# Maps


def test_a_map_is_the_same_bits_again_and_starts_from_the_one_before():
    h, y = blobs(120, num_classes=3)
    first = tsne(h)
    assert first.shape == (120, 2) and torch.equal(tsne(h), first)
    centres = torch.stack([first[y == c].mean(0) for c in range(3)])
    assert torch.cdist(centres, centres)[0, 1:].min() > 4 * torch.stack([first[y == c].std(0) for c in range(3)]).max()
    mirrored = first * torch.tensor([-1.0, 1.0])
    later = tsne(h, mirrored)
    # It moves freely from there, but what was on the left stays on the left.
    assert np.corrcoef(later[:, 0], mirrored[:, 0])[0, 1] > 0.5


def test_samples_in_one_direction_or_in_one_place_have_a_map():
    assert tsne(torch.randn(30, 1)).isfinite().all()
    assert tsne(torch.zeros(30, 4)).isfinite().all()


# In a run

RUN = Path("lightning_logs")
LINE = ["-e", "2", "--limit", "400", "--clusters", "--no-dib", "--no-nc", "--no-plots", "--quiet", "--min-cluster-size",
        "20", "--cluster-samples", "300", "--filter-class", "1"]  # fmt: skip


def last_row(name):
    return list(csv.DictReader((RUN / name / "metrics.csv").read_text().splitlines()))[-1]


def test_a_run_logs_and_keeps_what_its_recipe_gives_and_measures_its_checkpoint_alike(in_an_empty_folder):
    status, told = finish([*LINE, "--name", "run"], Path.cwd())
    assert status == 0, told
    arrays, settings = read(RUN / "run/arrays/epoch0002/clusters.npz")
    network = Classifier.load_from_checkpoint(RUN / "run/checkpoints/last.ckpt").network.eval()
    test = datasets.load("SZT", limit=400).test
    index = torch.from_numpy(arrays["index/test"])
    y = test.labels[index].long()
    h = network.feature_extractor(2 * test.inputs[index].float() - 1)["hidden2"].detach()
    figures, expected = of_layer(h, y, Recipe(filter_class=1, min_cluster_size=20), 2)
    row = last_row("run")
    for name, value in figures.items():
        assert float(row[f"clusters/{name}/test/hidden2"]) == pytest.approx(value, rel=1e-4, nan_ok=True), name
    np.testing.assert_allclose(arrays["scores/test/hidden2"], expected["scores"], atol=1e-4)
    assert arrays["labels/test"].tolist() == y.tolist() and len(y) == 300
    assert settings["layers"] == [f"hidden{i}" for i in range(1, 6)] and settings["min_cluster_size"] == 20
    assert float(row["cka/test/hidden2"]) == arrays["cka/test"][1, 2] and "cka/test/hidden5" not in row
    assert not any("/train/" in name for name in row)
    argv = ["--measure", "lightning_logs/run/checkpoints/last.ckpt", "--name", "again", "--quiet", "--no-plots"]
    assert finish(argv, Path.cwd())[0] == 0
    again = last_row("again")
    columns = [name for name in row if name.startswith(("clusters/", "cka/"))]
    assert columns and [again[name] for name in columns] == [row[name] for name in columns]


def test_a_killed_run_ends_with_the_clusters_of_an_uninterrupted_one(in_an_empty_folder):
    line = [*LINE, "--tsne", "--layers", "hidden1"]  # maps start from those of the epoch before
    assert_killed_ends_as_whole(line, Path.cwd(), 8)


def test_a_killed_run_ends_with_the_activations_of_an_uninterrupted_one(in_an_empty_folder):
    here, line = Path.cwd(), [*LINE, "--save-activations", "--layers", "hidden1"]
    assert finish([*line, "--name", "whole"], here)[0] == 0
    saved = {str(path) for path in arrays_of(RUN / "whole") if "activations" in path.parts}
    assert saved == {f"arrays/epoch{epoch:04d}/activations/test/hidden1.npz" for epoch in range(3)}
    # between the activations of an epoch and its other arrays
    meddle = partial(signal_at, "measures.saved:Saved.write", 3, signal.SIGKILL, after=True)
    status, _ = Run([*line, "--name", "cut"], here, meddle=meddle).end()
    assert status == -signal.SIGKILL and not (RUN / "cut/arrays/epoch0002/clusters.npz").exists()
    assert finish(["--resume", "lightning_logs/cut"], here)[0] == 0
    assert_same_run(here / RUN / "cut", here / RUN / "whole")


def test_clusters_are_the_same_on_two_devices(in_an_empty_folder):
    for name, num in (("one", 1), ("two", 2)):
        statuses, text = run_tasks([*LINE, "-e", "1", "--name", name, "--measure-at", "0"], Path.cwd(), num=num)
        assert statuses == [0] * num, text
    kept = [read(RUN / name / "arrays/epoch0000/clusters.npz")[0] for name in ("one", "two")]
    assert kept[0].keys() == kept[1].keys()
    for name, array in kept[0].items():
        np.testing.assert_array_equal(kept[1][name], array, name)


@pytest.mark.parametrize(
    ("argv", "status", "told"),
    [
        (["--filter-class", "7"], 2, "argument --filter-class: 7 is no class: they are 0 to 1"),
        (["--min-cluster-size", "500"], 2, "argument --min-cluster-size: a cluster of 500"),
        (["--energy", "1"], 2, "argument --energy: '1' is not a number above 0 and below 1"),
        (["--act-threshold", "50"], 1, "epoch 0: layer hidden1: No feature's mean size exceeds the threshold 50"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(in_an_empty_folder, argv, status, told):
    found, text = finish([*LINE, *argv], Path.cwd())
    assert found == status and told in text and text.count("\n") == 1, text
