"""What was looked at: spectra, eigenvalues, statistics, matrices, cosines, Jacobians, kernels and the path."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from made_runs import ROOT, legend_labels, lines, load, make_run, panels, sentence, title, write_csv

import plots
from figures.axes import MAX_NAMES
from figures.look_matrices import block_means, principal_plane
from run.arrays import Arrays, read
from run.catalogue import MEASURES, found

# Whatever warning a user would see is an error here; deprecations inside libraries nobody sees.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

HESSIAN, EXACT, KERNEL, JACOBIAN = "hess-loss-theta", "hess-loss-theta-fc", "grad-f-output-theta", "grad-f-output-f-in"
TENSORS = ("b.weight", "b.bias", "a.weight", "a.bias")
MATH = {
    HESSIAN: r"$\nabla^2_{\theta} L$",
    EXACT: r"$\nabla^2_{\theta_{\mathrm{fc}}} L$",
    KERNEL: r"$\partial f / \partial \theta$",
    JACOBIAN: r"$\partial f / \partial x$",
    "theta": r"$\theta$",
}
FIGURES = tuple(found(name) for about in MEASURES if about.name == "look" for name in about.figures)


def with_looks(folder, seed=0, error=None, **options):
    """A made run with columns of looks, and arrays at the epochs 0, 2 and 5."""
    make_run(folder, seed=seed, measures=(), **options)
    noise = np.random.default_rng(seed)
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    for i, row in enumerate(rows):
        for name in (HESSIAN, EXACT, KERNEL):
            row |= {f"look/{name}/eig{k}": 10.0**-k + i + seed for k in (1, 2, 3)}
            row |= {f"look/{name}/min1": -0.1, f"look/{name}/trace": 5.0, f"look/{name}/residual": 1e-9}
        row |= {f"look/grad-loss-theta-{tensor}/norm": 10.0**-k for k, tensor in enumerate(TENSORS)}
        row |= {f"look/{JACOBIAN}/sample_spectral": 2.0, "look/theta/distance": i, "look/theta/class0/norm": 1.0}
    write_csv(folder / "metrics.csv", rows)
    for epoch in (0, 2, 5):
        settings = {"math": MATH, "groups": {"class": ["class0", "class2"]}} | ({"path_error": error} if error else {})
        Arrays(folder).write(epoch, "look", kept_of(epoch, noise), settings)
    networks = {"networks": [f"{folder}/checkpoints/epoch000{epoch}.ckpt" for epoch in (0, 2, 5)]}
    Arrays(folder).write("average", "look", kept_of(3, noise), {"math": MATH} | networks)
    return folder


def kept_of(epoch, noise):
    values = noise.normal(size=50)
    kept = {f"{HESSIAN}/density_nodes": noise.normal(size=(4, 30)), f"{HESSIAN}/density_weights": np.full((4, 30), 0.0)}
    kept[f"{HESSIAN}/density_weights"][:, :2] = (0.25, 0.75)
    for i, path in enumerate((EXACT, f"{EXACT}/class0", f"{EXACT}/class2")):
        some = np.sort((epoch + i + 1) * np.r_[values[:19], 1.0])[::-1].copy()
        kept |= {f"{path}/density_nodes": some[None], f"{path}/density_weights": np.full((1, 20), 1 / 20)}
        kept[f"{path}/eigenvalues"] = some
    kept |= {f"{KERNEL}/eigenvalues": np.r_[np.arange(1.0, 6) ** -2, -1e-20], f"{KERNEL}/matrix": np.eye(6)}
    kept |= {f"{JACOBIAN}/singular_values": np.array([2.0, 1.0]), f"{JACOBIAN}/matrix": -np.ones((2, 2500))}
    kept |= {f"{JACOBIAN}/sample_singular_values": np.arange(1.0, 22)[:, None] * [2.0, 1.0]}
    kept |= {"grad-loss-theta/cosines/class": np.array([[1.0, epoch / 10], [epoch / 10, 1.0]])}
    kept |= {"theta/path": np.array([0.0, epoch, 0.1 * epoch**2], dtype=np.float32)}
    return {name: torch.from_numpy(array) for name, array in kept.items()}


@pytest.fixture
def run(tmp_path):
    return load(with_looks(tmp_path / "version_0"))


def test_every_figure_draws_what_one_run_and_several_settings_looked_at(tmp_path):
    folders = [with_looks(tmp_path / f"version_{i}", seed=i % 2, learning_rate=0.1 * (1 + i // 2)) for i in range(4)]
    for runs in (load(folders[0]), load(*folders[:2]), load(*folders)):
        for figure in FIGURES:
            drawn = figure(runs)
            drawn.canvas.draw()
            assert sentence(drawn) is None


@pytest.mark.parametrize("figure", FIGURES)
def test_without_looks_a_figure_says_which_flag_looks(run_folder, figure):
    assert "--look" in sentence(figure(load(run_folder)))


def test_a_smoothed_density_integrates_to_one_and_its_band_holds_all_probes(run):
    ax = plots.spectra(run).axes[0]
    assert ax.get_title().startswith(MATH[HESSIAN]) and "4 probes" in ax.get_title()
    line = lines(ax)["epoch 5"]
    width = ax.xaxis.get_transform().linear_width
    decades = np.arcsinh(np.asarray(line.get_xdata()) / width) / np.log(10)
    # Beyond four widths of the Gaussian there are 6e-5 of it; a sum over steps of a quarter of a width errs by less.
    assert np.sum(line.get_ydata()) * (decades[1] - decades[0]) == pytest.approx(1, abs=1e-3)
    assert [label for label in lines(ax)] == ["epoch 0", "epoch 2", "epoch 5"] and len(ax.collections) == 3


def test_an_exact_spectrum_is_a_histogram_of_all_eigenvalues(run):
    ax = plots.spectra(run).axes[1]
    assert ax.get_title() == f"{MATH[EXACT]}, exact"
    values, edges, _ = ax.patches[-1].get_data()
    width = ax.xaxis.get_transform().linear_width
    assert np.sum(values * np.diff(np.arcsinh(edges / width) / np.log(10))) == pytest.approx(1)


def test_largest_eigenvalues_are_strokes_where_they_are(run):
    ax = plots.spectra(run, epochs=[5]).axes[0]
    [strokes] = [line for line in ax.get_lines() if line.get_label() == "_top"]
    np.testing.assert_allclose(strokes.get_xdata(), [5.1, 5.01, 5.001])


def test_each_group_has_a_line_beside_that_of_all_samples(tmp_path):
    folders = [with_looks(tmp_path / f"version_{seed}", seed) for seed in range(2)]
    figure = plots.spectra_by_group(load(*folders))
    density, spectrum = panels(figure)
    assert title(figure).startswith("Spectra by group, epoch 5 · ")
    assert density.get_title() == f"{MATH[EXACT]}, by class, exact"
    assert legend_labels(figure) == list(lines(spectrum)) == ["class 0", "class 2", "all"]
    kept = [read(folder / "arrays/epoch0005/look.npz")[0] for folder in folders]
    for label, path in (("class 0", f"{EXACT}/class0"), ("class 2", f"{EXACT}/class2"), ("all", EXACT)):
        values = np.mean([arrays[f"{path}/eigenvalues"] for arrays in kept], axis=0)
        drawn = lines(spectrum)[label].get_ydata()
        np.testing.assert_allclose(drawn, values[: len(drawn)])
        assert values[len(drawn)] < 0 or len(drawn) == MAX_NAMES  # what is below zero has no place there
    assert lines(spectrum)["all"].get_color() == "black" != lines(spectrum)["class 0"].get_color()
    with_names = plots.spectra_by_group(load(*folders), epoch=2, names=[EXACT])
    assert title(with_names).startswith("Spectra by group, epoch 2")
    assert sentence(plots.spectra_by_group(load(*folders), epoch=3)) == "Measured epochs are 0, 2, 5; not [3]."


def test_networks_stand_beside_their_average(tmp_path):
    run = load(folder := with_looks(tmp_path / "version_0"))
    figure = plots.spectra_of_average(run)
    drawn = lines(panels(figure)[3])
    assert title(figure) == "Average of 3 networks · version_0"
    assert list(drawn) == ["epoch 0", "epoch 2", "epoch 5", "average"]
    for label, place in (("epoch 2", "epoch0002"), ("average", "average")):
        values = read(folder / f"arrays/{place}/look.npz")[0][f"{EXACT}/eigenvalues"]
        np.testing.assert_allclose(drawn[label].get_ydata(), values[: len(drawn[label].get_ydata())])
    # networks of one epoch lie in folders of their own, and are called by their runs
    for i, epoch in enumerate((0, 2, 5)):
        place = folder / f"checkpoint{i:04d}/arrays"
        place.mkdir(parents=True)
        (folder / f"arrays/epoch{epoch:04d}").rename(place / "epoch0007")
    networks = {"networks": [f"runs/{name}/checkpoints/last.ckpt" for name in "abc"]}
    Arrays(folder).write("average", "look", kept_of(3, np.random.default_rng(0)), {"math": MATH} | networks)
    assert list(lines(panels(plots.spectra_of_average(run))[3])) == ["a", "b", "c", "average"]


def test_a_page_says_what_it_leaves_out(tmp_path, monkeypatch):
    run = load(with_looks(tmp_path / "version_0"))
    monkeypatch.setattr("figures.look.MAX_ROWS", 2)
    monkeypatch.setattr("figures.look_matrices.MAX_MATRICES", 1)
    assert f"(2 of 3; with names= also {EXACT})" in title(plots.spectra(run)).replace("\n", " ")
    assert "(1 of 2; with names= also " in title(plots.matrices(run)).replace("\n", " ")
    assert "with names=" not in title(plots.spectra(run, names=[EXACT]))


def test_eigenvalues_have_a_panel_for_each_matrix(run):
    figure = plots.eigenvalues_over_epochs(run)
    assert [ax.get_ylabel() for ax in figure.axes] == [MATH[HESSIAN], MATH[EXACT], f"$J J^T$, $J$ = {MATH[KERNEL]}"]
    np.testing.assert_allclose(figure.axes[0].get_lines()[1].get_ydata(), 0.01 + np.arange(6))
    np.testing.assert_allclose(figure.axes[0].get_lines()[-1].get_ydata(), -0.1)
    assert legend_labels(figure)[-1] == "least"


def test_statistics_have_a_panel_each_and_a_large_family_is_left_to_its_heat_map(run):
    figure = plots.look_over_epochs(run)
    labels = [ax.get_ylabel().replace("\n", " ") for ax in figure.axes]
    assert labels == ["trace", "spectral norm, mean over samples", "distance from the start"]
    assert "4 tensors or layers" in title(figure)
    assert legend_labels(figure)[2] == f"$J J^T$, $J$ = {MATH[KERNEL]}"
    assert [name for name, _ in plots.figures(run) if name.startswith("heat_map")] == [
        "heat_map_look_grad-loss-theta-each_norm"
    ]


def test_a_heat_map_of_looks_has_a_row_for_each_tensor_in_the_order_of_the_network(run):
    figure = plots.heat_map(run, "look/grad-loss-theta-*/norm")
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(TENSORS)
    np.testing.assert_allclose(ax.collections[0].get_array(), np.repeat(10.0 ** -np.arange(4.0)[:, None], 6, axis=1))
    assert title(figure).startswith("norm of grad-loss-theta-*")
    assert "--look" in sentence(plots.heat_map(run, "look/grad-loss-f-*/norm"))


def test_matrices_are_shown_with_zero_in_the_middle_and_large_ones_by_means_of_blocks(run):
    figure = plots.matrices(run)
    drawn = panels(figure)
    assert [ax.get_title(loc="left") for ax in drawn[::2]] == [
        f"$J J^T$, $J$ = {MATH[KERNEL]}, epoch 0, 6 × 6",
        f"{MATH[JACOBIAN]}, epoch 0, 2 × 2500\nmeans of blocks of 1 × 3",
    ]
    for ax in drawn:
        low, high = ax.images[0].get_clim()
        assert low == -high == -1
    assert drawn[-1].images[0].get_array().shape == (2, 834)


def test_blocks_weigh_all_their_numbers_alike_also_smaller_ones_at_the_end():
    matrix = np.arange(35.0).reshape(5, 7)
    means, sizes = block_means(matrix, most=3)
    assert sizes == (2, 3) and means.shape == (3, 3)
    expected = [[matrix[i : i + 2, j : j + 3].mean() for j in (0, 3, 6)] for i in (0, 2, 4)]
    np.testing.assert_allclose(means, expected)
    assert block_means(matrix)[1] == (1, 1)


def test_cosines_are_means_over_runs_and_bear_the_names_of_the_groups(tmp_path):
    folders = [with_looks(tmp_path / f"version_{seed}", seed) for seed in range(2)]
    ax = panels(plots.gradient_cosines(load(*folders)))[1]
    np.testing.assert_allclose(ax.images[0].get_array(), [[1, 0.5], [0.5, 1]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "2"] and ax.get_xlabel() == "class"


def test_jacobians_show_the_mean_and_the_samples_between_their_quantiles(run):
    ax = plots.jacobian_singular_values(run, epochs=[2]).axes[0]
    median, mean = ax.get_lines()
    np.testing.assert_allclose(median.get_ydata(), [22, 11])
    np.testing.assert_allclose(mean.get_ydata(), [2, 1])
    [band] = ax.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(38)  # 19 · 2: 90% of 1 to 21


def test_a_kernels_eigenvalues_fall_over_their_index_and_what_is_rounding_is_left_out(run):
    ax = plots.ntk_spectrum(run).axes[0]
    np.testing.assert_allclose(lines(ax)["epoch 5"].get_ydata(), np.arange(1.0, 6) ** -2)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_a_path_keeps_distances_in_its_plane_and_says_whether_it_is_exact(tmp_path, run):
    ax = plots.path(run).axes[0]
    assert ax.get_title() == f"{MATH['theta']}, exact · version_0"
    way = np.stack(ax.get_lines()[0].get_data(), axis=1)
    points = np.array([[epoch, 0.1 * epoch**2] for epoch in (0, 2, 5)])
    for a, b in ((0, 1), (1, 2), (0, 2)):  # three points lie in a plane; they are kept as float32
        assert np.linalg.norm(way[a] - way[b]) == pytest.approx(np.linalg.norm(points[a] - points[b]), rel=1e-5)
    sketch = load(with_looks(tmp_path / "version_1", error=(2 / 3) ** 0.5))
    assert "from a sketch, distances ± 81.6%" in plots.path(sketch).axes[0].get_title()


def test_shares_of_a_plane_are_those_of_singular_values():
    points = np.random.default_rng(0).normal(size=(6, 40)) * np.arange(40)
    plane, shares = principal_plane(points)
    sigma = np.linalg.svd(points - points.mean(0), compute_uv=False)
    np.testing.assert_allclose(shares, sigma[:2] ** 2 / np.sum(sigma**2))
    np.testing.assert_allclose(np.linalg.norm(plane, axis=0), sigma[:2])
    assert (plane[-1] >= plane[0]).all()


def test_a_folder_that_lost_its_arrays_or_has_broken_ones_is_said_and_not_a_traceback(tmp_path):
    folder = with_looks(tmp_path / "version_0")
    (folder / "arrays/epoch0005/look.npz").write_bytes(b"PK broken")
    for figure in FIGURES:
        figure(load(folder)).canvas.draw()
    for epoch in (0, 2, 5):
        (folder / f"arrays/epoch{epoch:04d}/look.npz").unlink()
    for figure in FIGURES:
        figure(load(folder)).canvas.draw()
    assert "are not there" in sentence(plots.spectra(load(folder)))


def test_what_is_no_mathematics_is_written_by_its_name(tmp_path):
    folder = with_looks(tmp_path / "version_0")
    Arrays(folder).write(
        5, "look", kept_of(5, np.random.default_rng(0)), {"math": {HESSIAN: "$\\nonsense{$", EXACT: 3}}
    )
    figure = plots.spectra(load(folder))
    figure.canvas.draw()
    assert figure.axes[0].get_title().startswith(HESSIAN)


def test_figures_of_looks_need_no_torch(tmp_path):
    folder = with_looks(tmp_path / "version_0")
    code = f"import sys, plots; runs = plots.load([{str(folder)!r}]); plots.spectra(runs); plots.path(runs)"
    code += "; print({'torch', 'sklearn', 'measures'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"


def test_a_resumed_run_shows_the_arrays_of_the_one_that_it_goes_on_from(tmp_path):
    parent = with_looks(tmp_path / "version_0")
    folder = with_looks(tmp_path / "version_1", resumed_from=str(parent))
    for epoch in (0, 2):
        (folder / f"arrays/epoch{epoch:04d}/look.npz").unlink()
    rows = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join([rows[0], *rows[4:]]))  # from epoch 3 on
    assert list(lines(plots.spectra(load(folder)).axes[0])) == ["epoch 0", "epoch 2", "epoch 5"]
