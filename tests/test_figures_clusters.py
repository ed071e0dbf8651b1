"""Clusters over epochs, and the matrices and singular values that runs keep."""

import numpy as np
import pytest
import torch
from made_runs import lines, load, make_run, read, sentence

import plots
from run.arrays import Arrays

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FIGURES = ("coverage", "purity", "purity_all", "homogeneity", "ami", "directions", "alignment")


def with_clusters(folder, seed=0, split="test", **options):
    """A made run with columns of clusters, and arrays at the first and the last epoch."""
    return make_run(folder, seed=seed, measures=("clusters",), cluster_set=split, **options)


def matrices(figure):
    return [ax.collections[0].get_array() for ax in figure.axes if ax.get_title(loc="left")]


@pytest.mark.parametrize("split", ["test", "train"])
def test_clusters_have_a_panel_for_each_agreement_with_coverage_above_purity(tmp_path, split):
    folder = with_clusters(tmp_path / "version_0", split=split)
    table, figure = read(folder), plots.clusters_over_epochs(load(folder))
    labels = [ax.get_ylabel().split(",")[0].replace("\n", " ") for ax in figure.axes]
    assert labels == ["coverage", "purity of clustered samples", "purity", "homogeneity", "adjusted mutual information"]
    for ax, name in zip(figure.axes, FIGURES, strict=False):
        expected = table[f"clusters/{name}/{split}/avgpool"].dropna()
        np.testing.assert_allclose(lines(ax)["avgpool"].get_ydata(), expected)
        assert ax.get_ylim()[0] < 0 and ax.get_ylim()[1] > 1
    assert len(plots.directions_over_epochs(load(folder)).axes) == 3


def test_singular_values_are_drawn_relative_to_the_first_at_the_first_epoch_dashed_and_the_last(tmp_path):
    [ax] = plots.singular_values(load(with_clusters(tmp_path / "version_0"))).axes
    drawn = ax.get_lines()
    assert [line.get_linestyle() for line in drawn] == ["--"] * 3 + ["-"] * 3
    np.testing.assert_allclose(drawn[0].get_ydata(), np.arange(1, 9.0) ** -1)
    np.testing.assert_allclose(drawn[5].get_ydata(), np.arange(1, 11.0) ** -6)


def test_matrices_are_means_over_the_runs_of_a_setting(tmp_path):
    folders = [with_clusters(tmp_path / f"version_{seed}", seed) for seed in range(2)]
    kept = [np.load(folder / "arrays/epoch0005/clusters.npz") for folder in folders]
    runs = plots.load(folders)
    alignment = matrices(plots.alignment_of_classes(runs))
    assert len(alignment) == 6  # three layers, two epochs
    expected = np.mean([file["alignment/test/avgpool"] for file in kept], axis=0)
    np.testing.assert_allclose(alignment[-1], expected)
    cka = matrices(plots.cka_of_layers(runs))
    np.testing.assert_allclose(cka[-1], np.mean([file["cka/test"] for file in kept], axis=0))
    assert len(matrices(plots.cka_of_layers(runs, epochs=[5]))) == 1


@pytest.mark.parametrize("color", ["class", "cluster"])
def test_maps_show_each_sample_once_and_the_wrong_ones_as_crosses(tmp_path, color):
    folder = with_clusters(tmp_path / "version_0")
    figure = plots.tsne_maps(load(folder), color=color)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["layer1.0, epoch 0", "layer1.0, epoch 5"]
    kept = np.load(folder / "arrays/epoch0005/clusters.npz")
    shown = kept["mapped/test"]
    is_wrong = kept["labels/test"][shown] != kept["predictions/test"][shown]
    right, wrong = figure.axes[-1].collections
    np.testing.assert_allclose(right.get_offsets(), kept["map/test/avgpool"][~is_wrong])
    np.testing.assert_allclose(wrong.get_offsets(), kept["map/test/avgpool"][is_wrong])
    kinds = kept["labels/test" if color == "class" else "clusters/test/avgpool"][shown][~is_wrong]
    drawn = [tuple(value) for value in right.get_facecolors()]
    assert len(set(drawn)) == len(set(kinds)) == len(set(zip(drawn, kinds, strict=True)))


def test_without_maps_a_figure_says_how_to_get_them(tmp_path):
    folder = with_clusters(tmp_path / "version_0")
    Arrays(folder).write(0, "clusters", {"x": torch.zeros(1)}, {})
    Arrays(folder).write(5, "clusters", {"x": torch.zeros(1)}, {})
    assert "--clusters --tsne" in sentence(plots.tsne_maps(load(folder)))


def test_settings_have_a_row_each_and_what_lacks_arrays_is_said(tmp_path):
    folders = [with_clusters(tmp_path / f"version_{i}", learning_rate=rate) for i, rate in enumerate((0.1, 0.2))]
    assert len(matrices(plots.cka_of_layers(plots.load(folders)))) == 4
    assert "first of 2 settings" in plots.alignment_of_classes(plots.load(folders)).get_suptitle().replace("\n", " ")
    (folders[0] / "arrays/epoch0005/clusters.npz").write_bytes(b"PK broken")
    assert "holds no arrays" in sentence(plots.cka_of_layers(load(folders[0])))
    for epoch in (0, 5):
        (folders[0] / f"arrays/epoch{epoch:04d}/clusters.npz").unlink()
    assert "are not there" in sentence(plots.cka_of_layers(load(folders[0])))


@pytest.mark.parametrize("name", ["clusters_over_epochs", "directions_over_epochs", "singular_values",
                                  "alignment_of_classes", "cka_of_layers", "tsne_maps"])  # fmt: skip
def test_without_clusters_a_figure_says_how_to_get_them(run_folder, name):
    assert "--clusters" in sentence(getattr(plots, name)(load(run_folder)))
