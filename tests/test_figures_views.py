"""Pages of input gradients and filters: which tile is what, and the scores over epochs."""

import numpy as np
import pytest
from made_runs import legend_labels, lines, load, make_run, panels, read, sentence, title

import plots
from figures.pages import PAGE_WIDTH
from figures.tiles import MARGIN, Cell, Panel, gradient_tile, image_tile
from run.arrays import Arrays
from run.arrays import read as read_arrays

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PAGES = (plots.views_images, plots.views_classes, plots.views_units, plots.views_filters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "version_0", measures=("views",))


@pytest.fixture(scope="module")
def run(folder):
    return load(folder)


@pytest.fixture(scope="module")
def arrays(folder):
    return read_arrays(folder / "arrays/epoch0005/views.npz")[0]


def tiles(figure):
    """The tiles of a page, row by row, in the order in which they stand."""
    return [image.get_array() for ax in panels(figure) for image in ax.images]


def titles(figure):
    return [text.get_text() for ax in panels(figure) for text in ax.texts]


def changed(folder, to, **arrays):
    """The same run with other arrays of its last epoch, and settings in capitals."""
    import shutil

    import torch

    shutil.copytree(folder, to)
    kept, settings = read_arrays(to / "arrays/epoch0005/views.npz")
    settings |= {name.lower(): arrays.pop(name) for name in list(arrays) if name.isupper()}
    kept = {name: torch.from_numpy(array) for name, array in (kept | arrays).items() if array is not None}
    Arrays(to).write(5, "views", kept, settings)
    return load(to)


def test_a_gradient_is_drawn_around_grey_up_to_black_or_white():
    g = np.array([[[-2.0, 0.0], [1.0, 0.5]]])
    np.testing.assert_allclose(gradient_tile(g)[..., 1], [[0, 0.5], [0.75, 0.625]])
    np.testing.assert_array_equal(gradient_tile(7 * g), gradient_tile(g))
    assert (gradient_tile(0 * g) == 0.5).all()
    color = np.random.default_rng(0).normal(size=(3, 2, 4))
    tile = gradient_tile(color)
    assert tile.shape == (2, 4, 3) and tile.min() >= 0 and tile.max() <= 1 and 0 in (tile.min(), 1 - tile.max())
    np.testing.assert_allclose(tile[1, 2], color[:, 1, 2] / np.abs(color).max() / 2 + 0.5)


def test_images_are_drawn_as_their_bytes_and_other_numbers_from_the_lowest_to_the_highest():
    image = np.array([[[0, 51], [255, 102]]], dtype=np.uint8)
    np.testing.assert_allclose(image_tile(image)[..., 0], [[0, 0.2], [1, 0.4]])
    np.testing.assert_allclose(image_tile(image - 7.0)[..., 2], [[0, 0.2], [1, 0.4]])
    assert (image_tile(np.ones((3, 2, 2))) == 0.5).all()


def test_images_stand_beside_the_gradients_of_their_class_and_of_the_strongest_wrong_one(run, arrays):
    drawn = plots.views_images(run)
    assert "Gradients on images" in title(drawn) and title(drawn).endswith("version_0 · epoch 5")
    found = tiles(drawn)
    assert len(found) == 3 * 6
    for i, wrong in enumerate([1, 0, 0, 0, 5, 6]):  # of equal logits the first, and what the last ones are taken for
        expected = [image_tile(arrays["images"][i]), *(gradient_tile(arrays["gradients"][i, c]) for c in (i, wrong))]
        for tile, of in zip(found[3 * i :], expected, strict=False):
            np.testing.assert_array_equal(tile, of)
        assert titles(drawn)[i] == f"class {i} | class {wrong}"
    marked = [text.get_color() != "black" for ax in panels(drawn) for text in ax.texts]
    assert marked == [False] * 4 + [True] * 2


def test_gradients_towards_chosen_classes_stand_beside_every_image(run, arrays):
    found = tiles(plots.views_images(run, classes=["class 7", 2, 3]))
    assert len(found) == 4 * 6
    np.testing.assert_array_equal(found[4 * 5 + 1], gradient_tile(arrays["gradients"][5, 7]))
    np.testing.assert_array_equal(found[4 * 5 + 2], gradient_tile(arrays["gradients"][5, 2]))
    assert "There are no gradients towards ['ship']" in sentence(plots.views_images(run, classes=["ship"]))
    assert "no gradients" in sentence(plots.views_images(run, classes=[10]))


def test_of_up_to_three_classes_all_stand_beside_each_image_in_their_order(folder, arrays, tmp_path):
    few = {"logits": arrays["logits"][:, :2], "labels": arrays["labels"] % 2}
    few |= {"gradients": arrays["gradients"][:, :2], "gradients_of": arrays["gradients_of"][:, :2]}
    drawn = plots.views_images(changed(folder, tmp_path / "few", **few, CLASSES=["plane", "car"]))
    assert titles(drawn) == ["plane", "car"] * 3 and "towards plane, car" in panels(drawn)[0].get_xlabel()
    np.testing.assert_array_equal(tiles(drawn)[3 * 3 + 1], gradient_tile(arrays["gradients"][3, 0]))


def test_of_two_kept_gradients_each_stands_under_its_own_name(folder, arrays, tmp_path):
    """Where all classes' were too many: own and strongest wrong."""
    of = np.stack([arrays["labels"], [1, 0, 0, 0, 5, 6]], axis=1)
    drawn = plots.views_images(
        changed(folder, tmp_path / "two", gradients=arrays["gradients"][:, 3:5], gradients_of=of)
    )
    assert titles(drawn)[4] == "class 4 | class 5"
    np.testing.assert_array_equal(tiles(drawn)[3 * 4 + 2], gradient_tile(arrays["gradients"][4, 4]))


def test_classes_and_units_show_examples_before_means_and_their_stability(run, arrays):
    drawn = plots.views_classes(run)
    assert titles(drawn)[9] == "class 9 · 1.00, 1.00" and "mean over 64" in panels(drawn)[0].get_xlabel()
    expected = [*arrays["classes/examples"][9], *(arrays[f"classes/mean/{kind}"][9] for kind in ("noise", "images"))]
    for tile, g in zip(tiles(drawn)[-4:], expected, strict=True):
        np.testing.assert_array_equal(tile, gradient_tile(g))
    drawn = plots.views_units(run)
    assert titles(drawn) == [f"unit {2 * i} · {i / 4:.2f}" for i in range(5)]
    np.testing.assert_array_equal(tiles(drawn)[-1], gradient_tile(arrays["units/avgpool/mean/noise"][4]))


def test_units_that_are_dead_on_noise_are_left_out_and_counted(folder, tmp_path):
    zeros = np.array([0, 1, 0.5, 1, 0])
    drawn = plots.views_units(changed(folder, tmp_path / "dead", **{"units/avgpool/zeros/noise": zeros}))
    assert [name.partition(" ·")[0] for name in titles(drawn)] == ["unit 0", "unit 4", "unit 8"]
    assert panels(drawn)[0].get_xlabel().endswith("2 of 5 are dead and left out")
    drawn = plots.views_units(changed(folder, tmp_path / "all", **{"units/avgpool/zeros/noise": np.ones(5)}))
    assert sentence(drawn).startswith("No unit")


def test_slots_stand_below_the_units_under_the_names_of_their_classes(folder, tmp_path):
    g = np.random.default_rng(1).normal(size=(3, 2, 1, 4, 4))
    kept = {"index": np.array([7, 0, 4]), "label": np.array([1, 2, 2]), "pictured": np.arange(3), "examples": g}
    kept |= {"mean/noise": g.mean(1), "zeros/noise": np.array([0, 1, 0]), "stability/noise": np.array([1, 0, 0.25])}
    kept = {f"slots/{name}": array for name, array in kept.items()}
    drawn = plots.views_units(changed(folder, tmp_path / "slots", **kept, CLASSES=list("abcdefghij")))
    assert titles(drawn)[5:] == ["b: slot 7 · 1.00", "c: slot 4 · 0.25"]
    assert panels(drawn)[1].get_ylabel() == "slots" and "1 of 3 are dead" in panels(drawn)[1].get_xlabel()
    np.testing.assert_array_equal(tiles(drawn)[-1], gradient_tile(g[2].mean(0)))
    dead = {"slots/zeros/noise": np.zeros(3), "units/avgpool/zeros/noise": np.ones(5)}
    assert len(titles(plots.views_units(changed(folder, tmp_path / "dead", **kept | dead)))) == 3


def test_every_filter_is_a_tile_in_its_colors(run, arrays):
    found = tiles(plots.views_filters(run))
    assert len(found) == 7
    np.testing.assert_allclose(found[6], gradient_tile(arrays["filters"][6]))
    assert found[6].shape == (2, 2, 3)


def test_tiles_of_a_page_do_not_overlap_and_titles_stay_over_their_cells(folder, tmp_path):
    names = [f"a very long name, the {i}th of its kind" for i in range(10)]
    drawn = plots.views_images(changed(folder, tmp_path / "long", CLASSES=names))
    drawn.canvas.draw()
    boxes = [image.get_extent() for image in panels(drawn)[0].images]  # left, right, bottom, top
    for i, (left, right, bottom, top) in enumerate(boxes):
        assert not any(a < right and left < b and t < bottom and top < c for a, b, c, t in boxes[:i])
    texts = [text.get_window_extent() for text in panels(drawn)[0].texts]
    assert not any(one.overlaps(other) for i, one in enumerate(texts) for other in texts[:i])


def test_many_cells_fill_rows_as_wide_as_the_page():
    cells = [Cell([np.zeros((4, 4, 3))] * 3, "x")] * 60
    panel = Panel(cells, "", "")
    assert panel.num_columns == 5 and panel.height < 8.5
    assert panel.num_columns * panel.cell_size[0] + 4 * panel.between == pytest.approx(PAGE_WIDTH - MARGIN)
    few = Panel(cells[:2], "", "")
    assert few.num_columns == 2 and few.tile_size <= 1.3 * few.size


def test_scores_over_epochs_are_drawn_for_classes_and_units_on_noise_and_images(run, folder):
    drawn = plots.views_over_epochs(run)
    stability, agreement, separation, roughness = panels(drawn)
    table = read(folder)
    for label, column in (
        ("classes noise", "views/stability/noise"),
        ("classes images", "views/stability/images"),
        ("avgpool noise", "views/units/stability/noise/avgpool"),
        ("avgpool images", "views/units/stability/images/avgpool"),
    ):
        np.testing.assert_allclose(lines(stability)[label].get_ydata(), table[column])
    assert len(lines(agreement)) == len(lines(separation)) == 2 and len(lines(roughness)) == 4
    assert legend_labels(drawn)[:2] == ["classes", "units of avgpool"]
    assert {line.get_ydata()[0] for line in roughness.get_lines() if line.get_linestyle() == ":"} == {0.8}


def test_seeds_and_settings_are_drawn(tmp_path):
    for i in range(4):
        make_run(tmp_path / f"version_{i}", seed=i % 2, learning_rate=1 + i // 2, num_epochs=1, measures=("views",))
    for figure in (plots.views_over_epochs, plots.views_units):
        drawn = figure(load(tmp_path))
        drawn.canvas.draw()
        assert sentence(drawn) is None


def test_what_is_not_there_is_said(run, folder, tmp_path):
    bare = load(make_run(tmp_path / "version_0", measures=()))
    assert all("--views" in sentence(figure(bare)) for figure in (*PAGES, plots.views_over_epochs))
    assert "not [3]" in sentence(plots.views_images(run, epochs=[3]))
    assert title(plots.views_images(run, epochs=[0])).endswith("epoch 0")
    vectors = changed(folder, tmp_path / "vectors", WHITE_ROUGHNESS=None)
    assert all("no images" in sentence(figure(vectors)) for figure in PAGES)
    assert "--views-images" in sentence(plots.views_images(changed(folder, tmp_path / "none", gradients=None)))
    assert "no filters" in sentence(plots.views_filters(changed(folder, tmp_path / "no", filters=None)))
