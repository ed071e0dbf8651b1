"""The page of a file's clusters: what it shows is what was found."""

import math

import numpy as np
import pytest
from made_runs import panels, title

from figures.grouped import classes_in_clusters, clusters_of_layer

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LABELS = np.arange(60) % 3
FIGURES = {"features": 12, "directions": 4, "energy": 0.92, "num_clusters": 2, "coverage": 0.75, "purity": 0.9,
           "purity_all": 0.675, "homogeneity": 0.5, "completeness": 0.5, "ami": 0.4, "alignment": 0.3}  # fmt: skip


def made(k=4, clusters=None):
    noise = np.random.default_rng(0)
    return {
        "scores": noise.normal(size=(60, k)).astype("f4"),
        "singular_values": np.arange(k, 0, -1.0),
        "clusters": np.arange(60) % 4 - 1 if clusters is None else clusters,
        "alignment": noise.random((3, 3)),
    }


def test_classes_share_their_samples_among_clusters_and_noise():
    clusters, labels = np.array([0, 0, 1, -1, -1, 1]), np.array([0, 0, 0, 0, 2, 2])
    shares, names = classes_in_clusters(clusters, labels)
    assert names == ["0", "1", "none"]
    np.testing.assert_array_equal(shares, [[0.5, np.nan, 0], [0.25, np.nan, 0.5], [0.25, np.nan, 0.5]])
    assert classes_in_clusters(clusters[:3], labels[:3])[1] == ["0", "1"]


@pytest.mark.parametrize("with_variance", [False, True])
def test_the_page_shows_the_scores_by_class_and_by_cluster_and_the_variance_if_asked(with_variance):
    arrays = made()
    figure = clusters_of_layer("Clusters of conv1", FIGURES, arrays, LABELS, with_variance=with_variance)
    figure.canvas.draw()
    shown = {ax.get_title(): ax for ax in panels(figure)}
    assert ("Explained variance" in shown) == with_variance and len(shown) == 5 + with_variance
    np.testing.assert_allclose(shown["Singular values"].get_lines()[0].get_ydata(), [1, 0.75, 0.5, 0.25])
    for name, num_kinds in (("class", 3), ("cluster", 4)):
        [points] = shown[f"Scores by {name}"].collections
        np.testing.assert_allclose(points.get_offsets(), arrays["scores"][:, :2])
        assert len({tuple(color) for color in points.get_facecolors()}) == num_kinds
    np.testing.assert_allclose(shown["Alignment of classes"].collections[0].get_array(), arrays["alignment"])
    if with_variance:
        alone, summed = (line.get_ydata() for line in shown["Explained variance"].get_lines())
        np.testing.assert_allclose(alone, 0.92 * np.array([16, 9, 4, 1]) / 30)
        assert summed[-1] == pytest.approx(0.92)


def test_purity_stands_beside_coverage():
    told = title(clusters_of_layer("Clusters of conv1", FIGURES, made(), LABELS))
    assert "2 clusters · coverage 0.750 · purity 0.900, noise as wrong 0.675" in told


@pytest.mark.parametrize("clusters", [np.full(60, -1), np.arange(60) % 2, np.arange(60)], ids=["none", "all", "many"])
@pytest.mark.parametrize("k", [1, 2])
def test_few_directions_no_cluster_and_many_are_drawn(clusters, k):
    figures = FIGURES | {"purity": math.nan}
    figure = clusters_of_layer("Clusters of conv1", figures, made(k, clusters), LABELS, with_variance=True)
    figure.canvas.draw()
    page, ink = figure.get_window_extent(), figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    pixel = 1.0  # rounding of the letters' boxes
    assert page.x0 - pixel <= ink.x0 and ink.x1 <= page.x1 + pixel
    assert page.y0 - pixel <= ink.y0 and ink.y1 <= page.y1 + pixel
