"""CKA of kept scores: against the measure and its definition, between runs, between epochs, and where there is none."""

import math

import numpy as np
import pytest
import torch
from made_runs import change_flags, command, load, make_run, panels, sentence, title
from test_similarity import definition

import plots
from figures.similarity import Scores, cka, cka_matrix
from measures.similarity import cka as measured_cka
from run.arrays import Arrays, read

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROUNDING = 1e-10  # float64, of sums over 10⁴ products and a few digits that differences of these cancel


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def of(x, y):
    return cka(Scores.of(x), Scores.of(y))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (normal(120, 8), normal(120, 8)[:, :5] + 0.5 * normal(120, 5, seed=1)),
        (normal(90, 30), normal(90, 2, seed=1)),  # near 0, where what is subtracted is as large as the rest
        (30 + normal(60, 3), np.maximum(normal(60, 3), 0)),
        (normal(4, 3), normal(4, 2, seed=1)),  # the fewest samples that have an estimate
    ],
)
def test_cka_without_kernels_is_that_of_the_measure_and_of_the_definition(x, y):
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    assert of(x, y) == pytest.approx(measured_cka(*tensors, batch_size=len(x)), rel=ROUNDING, abs=ROUNDING)
    assert of(x, y) == pytest.approx(definition(*tensors), rel=1e-8, abs=1e-8)  # which does not take the mean away


def test_scores_are_compared_as_they_are_kept():
    x, y = normal(200, 6).astype("f4"), normal(200, 9, seed=1).astype("f4")
    assert of(x, y) == of(x.astype("f8"), y.astype("f8"))


def test_cka_of_scores_with_themselves_rotated_scaled_and_shifted_is_1():
    x = normal(300, 20)
    rotation = np.linalg.qr(normal(20, 20, seed=1))[0]
    for other in (x, -0.01 * x @ rotation, x + 1e3):
        assert of(x, other) == pytest.approx(1, abs=1e-9)  # at 1e3 float64 keeps x to 1e-13


def test_cka_of_independent_scores_is_0_on_average():
    found = [of(normal(200, 50, seed=i), normal(200, 50, seed=100 + i)) for i in range(20)]
    assert abs(np.mean(found)) < 5 * np.std(found) / math.sqrt(20) and min(found) < 0


def test_a_constant_layer_has_no_cka_and_a_matrix_has_a_row_for_each_of_the_first():
    constant, x, y = np.ones((60, 3)), normal(60, 4), normal(60, 2, seed=1)
    assert math.isnan(of(constant, x))
    matrix = cka_matrix([Scores.of(x)], [Scores.of(y), Scores.of(x)])
    assert matrix.shape == (1, 2) and matrix[0].tolist() == [of(x, y), of(x, x)]


def kept(folder, epoch):
    return read(folder / f"arrays/epoch{epoch:04d}/clusters.npz")[0]


def change(folder, epoch, **arrays):
    """Puts other arrays in the place of some."""
    content, settings = read(folder / f"arrays/epoch{epoch:04d}/clusters.npz")
    content |= {name.replace("__", "/"): array for name, array in arrays.items()}
    tensors = {name: torch.from_numpy(array) for name, array in content.items()}
    Arrays(folder).write(epoch, "clusters", tensors, {"layers": settings["layers"]})


def told_by(*folders):
    """The sentence of a figure of runs that cannot be compared, in one line."""
    return " ".join(sentence(plots.cka_between_runs(load(*folders))).split())


def values(ax):
    return ax.collections[0].get_array()


def make(tmp_path, num=2, **options):
    return [make_run(tmp_path / f"v{seed}", seed=seed, measures=("clusters",), **options) for seed in range(num)]


def test_two_seeds_are_compared_layer_by_layer_at_their_first_and_last_epoch(tmp_path):
    folders = make(tmp_path)
    figure = plots.cka_between_runs(plots.load(folders))
    before, after = panels(figure)
    assert (after.get_ylabel(), after.get_xlabel()) == ("v0", "v1")
    assert after.get_title(loc="left") == "epoch 5, 60 samples"
    first, other = (kept(folder, 5) for folder in folders)
    names = ["layer1.0", "layer1.1", "avgpool"]
    for ticks in (after.get_xticklabels(), after.get_yticklabels()):
        assert [text.get_text() for text in ticks] == names
    for i, j in ((0, 1), (2, 0), (1, 1)):
        x, y = first[f"scores/test/{names[i]}"], other[f"scores/test/{names[j]}"]
        expected = measured_cka(torch.from_numpy(x).double(), torch.from_numpy(y).double(), batch_size=60)
        assert values(after)[i, j] == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    assert not np.allclose(values(before), values(after))
    assert "of scores in 8 directions of a layer, which hold 91% of the energy" in title(figure)
    assert len(panels(plots.cka_between_runs(plots.load(folders), epochs=[5]))) == 1


def test_a_run_with_itself_under_another_order_of_samples_has_a_diagonal_of_ones(tmp_path):
    folder, again = make(tmp_path, 1)[0], make_run(tmp_path / "again", measures=("clusters",))
    order = np.random.default_rng(1).permutation(60)[:55]
    arrays = kept(folder, 5)
    shuffled = {name.replace("/", "__"): arrays[name][order] for name in arrays if name.startswith(("scores", "index"))}
    change(again, 5, **shuffled, labels__test=arrays["labels/test"][order])
    figure = plots.cka_between_runs(plots.load([folder, again]), epochs=[5])
    [panel] = panels(figure)
    assert panel.get_title(loc="left") == "epoch 5, 55 samples"
    np.testing.assert_allclose(values(panel).diagonal(), 1, rtol=1e-12)


def test_networks_of_other_depths_have_a_matrix_that_is_not_square(tmp_path):
    folders = [make_run(tmp_path / f"v{n}", n, measures=("clusters",), model=f"Net{n}") for n in (3, 5)]
    figure = plots.cka_between_runs(plots.load(folders), epochs=[5])
    assert values(panels(figure)[0]).shape == (3, 5)
    assert panels(figure)[0].get_title(loc="left").startswith("Net5")


def test_of_many_runs_the_first_is_compared_with_six_and_the_rest_is_said(tmp_path):
    figure = plots.cka_between_runs(plots.load(make(tmp_path, 9)))
    assert [ax.get_xlabel() for ax in panels(figure)[::2]] == [f"v{i}" for i in range(1, 7)]
    assert "the first 6 of 8 other runs" in title(figure)


def test_runs_on_other_samples_are_not_compared_but_said(tmp_path):
    folders = make(tmp_path, 3)
    for epoch in (0, 5):
        change(folders[1], epoch, index__test=1000 + np.arange(60))
    figure = plots.cka_between_runs(plots.load(folders))
    assert [ax.get_xlabel() for ax in panels(figure)] == ["v2", "v2"]
    assert "1 cannot be compared: v0 and v1 looked at different samples" in title(figure)


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    first, other = make(tmp_path)
    assert "needs two" in told_by(first)
    labels = kept(first, 5)["labels/test"]
    change(other, 5, labels__test=labels[::-1].copy())
    assert "have different labels" in told_by(first, other)
    change(other, 5, index__test=np.arange(60), labels__test=labels)  # of which half are even
    assert "30 in common, and CKA needs 50" in told_by(first, other)
    change_flags(other, dataset="FashionMNIST")
    assert told_by(first, other) == (
        "v0 and v1 looked at different data, MNIST and FashionMNIST; CKA needs the same samples."
    )
    for epoch in (0, 5):
        (other / f"arrays/epoch{epoch:04d}/clusters.npz").unlink()
    assert "needs two that kept" in told_by(first, other)
    assert "MNIST" not in sentence(plots.cka_between_epochs(load(other)))


def test_runs_without_a_common_epoch_or_scores_are_one_sentence(tmp_path):
    first, other = (
        make_run(tmp_path / f"v{i}", measures=("clusters",), measured=measured) for i, measured in enumerate(([0], [5]))
    )
    assert "kept no epoch in common" in told_by(first, other)
    assert "of two epochs" in sentence(plots.cka_between_epochs(load(first)))
    Arrays(first).write(0, "clusters", {"x": torch.zeros(1)}, {"layers": ["avgpool"]})
    again = make_run(tmp_path / "again", measures=("clusters",))
    assert "has no index/test" in told_by(first, again)


def test_epochs_of_a_layer_are_compared_in_the_mean_over_the_runs_of_a_setting(tmp_path):
    folders = make(tmp_path)
    figure = plots.cka_between_epochs(plots.load(folders))
    assert [ax.get_title(loc="left") for ax in panels(figure)] == ["layer1.0", "layer1.1", "avgpool"]
    scores = [[kept(folder, epoch)["scores/test/avgpool"] for epoch in (0, 5)] for folder in folders]
    expected = np.mean([of(*both) for both in scores], axis=0)
    np.testing.assert_allclose(values(panels(figure)[2]), [[1, expected], [expected, 1]], rtol=1e-12)
    assert "(2 runs)" in title(figure) and "which hold 91% of the energy" in title(figure)


def test_a_deep_network_shows_six_layers_and_twelve_epochs_at_most(tmp_path):
    folder = make_run(tmp_path / "v0", 20, 29, measures=("clusters",))
    for epoch in range(30):
        target = folder / f"arrays/epoch{epoch:04d}"
        target.mkdir(exist_ok=True)
        (target / "clusters.npz").write_bytes((folder / "arrays/epoch0029/clusters.npz").read_bytes())
    figure = plots.cka_between_epochs(load(folder))
    [*_, last] = panels(figure)
    epochs = [int(text.get_text()) for text in last.get_xticklabels()]
    assert epochs[0] == 0 and epochs[-1] == 29 and len(values(last)) <= 12
    assert [ax.get_title(loc="left") for ax in panels(figure)][-1] == "avgpool" and len(panels(figure)) == 5


def test_the_command_draws_both_of_two_runs(tmp_path):
    done = command(*make(tmp_path), "-o", tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    assert {"cka_between_runs.png", "cka_between_epochs.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}
