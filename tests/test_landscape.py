"""The loss around a network: lines, planes and paths, in closed form and in runs."""

import csv
import doctest
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import assert_killed_ends_as_whole, finish
from torch import nn

import datasets
from classifier import Classifier, squared_error
from measures import landscape
from measures.derivatives import View
from measures.landscape import around, directions_of, parameters_of, plane, random_direction, spanning, symmetric
from measures.quantities import Wanted, quantity
from run.arrays import read

RUN = Path("lightning_logs")
LINE = ["-e", "2", "--limit", "300", "--no-dib", "--no-nc", "--no-plots", "--quiet", "--landscape"]
SMALL = ["--look-samples", "60", "--landscape-steps", "5", "--landscape-map", "3"]


def rows(name):
    return list(csv.DictReader((RUN / name / "metrics.csv").read_text().splitlines()))


def quadratic(seed=0):
    """A linear network with the squared error: its loss is a quadratic function of its parameters."""
    torch.manual_seed(seed)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    loss = partial(squared_error, reduction="none")
    return View(nn.Linear(6, 3, dtype=torch.float64), x, y, loss=loss, chunk=16)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()


def of_all(view):
    return (quantity(view, landscape.HESSIAN, Wanted()), quantity(view, landscape.GRADIENT, Wanted()).values)


def test_docstrings():
    assert doctest.testmod(landscape).failed == 0


def test_a_quadratic_loss_is_its_parabola_along_any_direction():
    view = quadratic()
    hessian, g = of_all(view)
    v, alphas = torch.randn(21, dtype=torch.float64), symmetric(3.0, 7)
    losses = around(view, v[None], alphas[:, None])[:, 0]
    parabola = view.loss_and_accuracy()[0] + alphas * (g @ v) + alphas**2 * (v @ hessian.matvec(v)) / 2
    torch.testing.assert_close(losses, parabola, rtol=1e-12, atol=0)  # float64, a few hundred terms


def test_the_loss_away_from_the_network_is_that_of_a_copy_with_other_weights():
    network, x = small_network(), torch.randn(10, 1, 4, 4, dtype=torch.float64)
    y = torch.randint(0, 2, (10,))
    view = View(network, x, y)
    V = torch.randn(2, parameters_of(view).size, dtype=torch.float64)
    found = plane(view, *V, torch.tensor([0.0, 0.5]), torch.tensor([-1.0, 2.0, 0.3]))
    for i, a in enumerate((0.0, 0.5)):
        for j, b in enumerate((-1.0, 2.0, 0.3)):
            copy = small_network().eval()
            theta = nn.utils.parameters_to_vector(network.parameters()) + a * V[0] + np.float32(b).item() * V[1]
            nn.utils.vector_to_parameters(theta, copy.parameters())
            expected = nn.functional.cross_entropy(copy(x), y).item()
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-12)


def test_where_nothing_is_added_the_loss_is_that_of_the_network_to_the_bit():
    torch.manual_seed(1)
    view = View(nn.Linear(50, 10), torch.randn(700, 50), torch.randint(0, 10, (700,)))
    alphas = symmetric(0.7, 41)
    assert alphas[20] == 0 and torch.equal(alphas, -alphas.flip(0)) and alphas[-1] == 0.7
    found = around(view, torch.randn(1, 510), alphas[:, None])[20].tolist()
    assert tuple(found) == view.loss_and_accuracy()


def test_filters_of_the_random_direction_have_the_norms_of_the_networks():
    network = small_network()
    with torch.no_grad():
        network[0].weight[1] = 0
    at = parameters_of(View(network, torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)))
    parts = dict(zip(at.tensors, at.split(random_direction(at, seed=0)), strict=True))
    for name in ("0.weight", "4.weight"):
        norms = [tensor.detach().flatten(1).norm(dim=1) for tensor in (parts[name], at.tensors[name])]
        torch.testing.assert_close(*norms, rtol=1e-14, atol=0)
    assert not any(parts[name].any() for name in ("0.bias", "1.weight", "1.bias", "4.bias"))
    assert torch.equal(random_direction(at, 0), random_direction(at, 0))
    assert not torch.equal(random_direction(at, 0), random_direction(at, 1))


def test_directions_are_unit_eigenvectors_and_gradient_that_do_not_lead_down():
    view = quadratic()
    hessian, g = of_all(view)
    found = directions_of(view, hessian, g, Wanted(), seed=0)
    # By hand: the Hessian of ½‖Wx + b − y‖² is X̄ᵀX̄/N for each output, X̄ with a column of ones
    X = torch.cat([view.x, torch.ones(40, 1, dtype=torch.float64)], 1)
    top = torch.linalg.eigvalsh(X.T @ X / 40)[-1]
    for name in ("eig1", "eig2"):  # three outputs: the largest comes three times
        torch.testing.assert_close(hessian.matvec(found[name]), top * found[name])
        assert g @ found[name] >= 0 and float(found[name].norm()) == pytest.approx(1)
    torch.testing.assert_close(found["gradient"], g / g.norm())
    assert "gradient" not in directions_of(view, hessian, 0 * g, Wanted(), seed=0)


def test_a_grid_around_a_path_holds_all_of_it_and_its_end_exactly():
    for seed in range(20):
        coordinates = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10**seed
        coordinates[-1] = 0
        grid = spanning(coordinates, 21)
        assert grid[0] < coordinates.min() and coordinates.max() < grid[-1] and (grid == 0).sum() == 1


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_is_left_behind_also_after_an_exception(broken, monkeypatch):
    network = small_network().train()
    network[4].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    view = View(network, torch.randn(6, 1, 4, 4).double(), torch.randint(0, 2, (6,)))
    random_state, size = torch.get_rng_state(), parameters_of(view).size
    if broken:
        forward, calls = network[0].forward, iter(range(100))
        monkeypatch.setattr(network[0], "forward", lambda x: 1 / 0 if next(calls) == 2 else forward(x))
        with pytest.raises(ZeroDivisionError):
            around(view, torch.ones(1, size), symmetric(1.0, 5)[:, None])
    else:
        around(view, torch.ones(1, size), symmetric(1.0, 5)[:, None])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(part.training for part in network.modules()) and torch.equal(torch.get_rng_state(), random_state)
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["4.bias"]
    assert all(p.grad is None for p in network.parameters())


def test_a_run_logs_the_curvature_of_its_checkpoint(in_an_empty_folder):
    status, told = finish([*LINE, "--look-samples", "0", "--landscape-span", "0.01", "--name", "run"], Path.cwd())
    assert status == 0, told
    row, (arrays, settings) = rows("run")[-1], read(RUN / "run/arrays/epoch0002/landscape.npz")
    network = Classifier.load_from_checkpoint(RUN / "run/checkpoints/last.ckpt").network
    train = datasets.load("SZT", limit=300).train
    view = View(network, 2 * train.inputs.float() - 1, train.labels.long())
    top = quantity(view, landscape.HESSIAN, Wanted()).top(2).values
    # float32: sums over 300 samples
    assert [float(row[f"landscape/eig{i}/curvature"]) for i in (1, 2)] == pytest.approx(top.tolist(), rel=1e-4)
    assert settings["directions"] == ["eig1", "eig2", "gradient", "random"] and settings["samples"] == 300
    assert arrays["alphas"].shape == (41,) and arrays["map/losses"].shape == (21, 21)
    for name in settings["directions"]:
        assert arrays[f"{name}/losses"][20] == float(row["landscape/loss"]) == arrays[f"{name}/parabola"][20]
        assert arrays[f"{name}/accuracies"][20] == float(row["landscape/accuracy"])
        # so near, what is left beside the parabola is of third order
        np.testing.assert_allclose(arrays[f"{name}/losses"], arrays[f"{name}/parabola"], rtol=1e-4)
    assert arrays["map/losses"][10, 10] == float(row["landscape/loss"])
    np.testing.assert_array_equal(arrays["map/losses"][:, 10], arrays["eig1/losses"][::2])
    rise = (arrays["eig1/losses"][0] + arrays["eig1/losses"][-1]) / 2 - arrays["eig1/losses"][20]
    assert float(row["landscape/eig1/rise"]) == pytest.approx(rise)


def test_the_map_of_a_path_has_every_network_where_it_lies(in_an_empty_folder):
    line = [*LINE[2:-1], "-e", "3", "--save-every", "1", "--name", "run"]
    assert finish(line, Path.cwd())[0] == 0
    argv = ["--measure", "lightning_logs/run", "--name", "path", "--landscape", "--quiet", "--no-plots", *SMALL]
    status, told = finish([*argv, "--landscape-map", "7"], Path.cwd())
    assert status == 0, told
    arrays, settings = read(RUN / "path/arrays/average/landscape.npz")
    *each, average = rows("path")
    assert average["checkpoint"] == "average" and settings["networks"] == [row["checkpoint"] for row in each]
    files = [RUN / f"run/checkpoints/epoch000{epoch}.ckpt" for epoch in (1, 2, 3)]
    thetas = torch.stack([nn.utils.parameters_to_vector(Classifier.load_from_checkpoint(path).network.parameters())
                          for path in files]).detach().double()  # fmt: skip
    # three points lie in their plane: distances are those in it
    apart = torch.cdist(torch.from_numpy(arrays["path"]), torch.from_numpy(arrays["path"]))
    torch.testing.assert_close(apart, torch.cdist(thetas, thetas, compute_mode="donot_use_mm_for_euclid_dist"))
    shares = [float(average[f"landscape/path/share{i}"]) for i in (1, 2)]
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]
    assert arrays["path_losses"].tolist() == [float(row["landscape/loss"]) for row in each]
    i, j = (int(np.flatnonzero(arrays[f"map/alphas{k}"] == 0)[0]) for k in (1, 2))
    assert arrays["path"][-1].tolist() == [0, 0] and arrays["map/losses"][i, j] == arrays["path_losses"][-1]


def test_without_three_networks_there_is_no_path_and_it_is_said(in_an_empty_folder):
    assert finish([*LINE[:-1], "--save-every", "1", "--name", "run"], Path.cwd())[0] == 0
    argv = ["--measure", "lightning_logs/run", "--name", "path", "--landscape", "--quiet", "--no-plots", *SMALL]
    status, told = finish(argv, Path.cwd())
    assert status == 0 and "a plane takes 3 networks, and there are 2" in told, told
    assert not (RUN / "path/arrays/average").exists()


def test_training_is_the_same_to_the_bit_with_and_without(in_an_empty_folder):
    for name, line in (("without", LINE[:-1]), ("with", [*LINE, "--perturb", *SMALL])):
        assert finish([*line, "--batch-norm", "--name", name], Path.cwd())[0] == 0
    states = [torch.load(RUN / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
              for name in ("without", "with")]  # fmt: skip
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_killed_run_ends_with_the_figures_of_an_uninterrupted_one(in_an_empty_folder):
    line = [*LINE, "--perturb", "input", "hidden2", *SMALL]
    assert_killed_ends_as_whole(line, Path.cwd(), 11)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--landscape", "--landscape-steps", "40"], "'40' is not an odd number from 3 to 1001"),
        (["--landscape", "--landscape-map", "20"], "'20' is neither an odd number from 3 to 301, nor 0"),
        (["--landscape", "--landscape-span", "0"], "--landscape-span"),
        (["--look-samples", "3"], "belongs to --look, --landscape and --perturb, none of which is asked for"),
        (["--landscape", "--look-top", "3"], "argument --look-top: belongs to --look, which is not asked for"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(argv, words, in_an_empty_folder):
    found, told = finish([*LINE[:-1], *argv], Path.cwd())
    assert found == 2 and words in told and "Traceback" not in told and not RUN.exists()
