"""Quantities in a run: columns, groups, resuming, several processes, coarse precisions, refusals."""

import csv
import doctest
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import assert_killed_ends_as_whole, finish, run_tasks
from torch import nn

import datasets
from classifier import Classifier
from main import main
from measures import quantities, spectra
from measures.look import between_groups
from measures.operators import Symmetric
from run.arrays import read
from utils import look

RUN = Path("lightning_logs")
LINE = ["-e", "2", "--limit", "300", "--no-dib", "--no-nc", "--no-plots", "--quiet"]
SOME = ["--look-samples", "90"]


def rows(name):
    return list(csv.DictReader((RUN / name / "metrics.csv").read_text().splitlines()))


@pytest.mark.parametrize("of", [quantities, spectra])
def test_docstrings(of):
    assert doctest.testmod(of).failed == 0


def test_a_run_logs_what_look_says_of_its_checkpoint(in_an_empty_folder):
    block = "hess(loss, theta(hidden1), theta)"
    asked = ["loss", "hessian", "gradients", "parameters", "jacobian", "f(hidden2)", block]
    argv = [*LINE, "--name", "run", "--look", *asked, "--look-samples", "0", "--look-tail", "--look-arrays"]
    argv += ["--look-bottom", "1"]
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    row, (arrays, settings) = rows("run")[-1], read(RUN / "run/arrays/epoch0002/look.npz")
    network = Classifier.load_from_checkpoint(RUN / "run/checkpoints/last.ckpt").network
    train = datasets.load("SZT", limit=300).train
    x, y = 2 * train.inputs.float() - 1, train.labels.long()

    def logged(name):
        return float(row[f"look/{name}"])

    g, H = look(network, x, y, "grad(loss, theta)"), look(network, x, y, "hess(loss, theta)")
    # float32: sums over 300 samples in another order
    close = partial(pytest.approx, rel=1e-4)
    assert logged("grad-loss-theta/norm") == close(g.norms()["norm"])
    assert logged("hess-loss-theta/eig3") == close(float(H.top(3).values[2]))
    assert logged("hess-loss-theta/min1") == close(float(H.bottom(1).values[0]))
    assert logged("hess-loss-theta/trace") == close(float(H.matrix().trace()))
    assert logged("grad-loss-theta/top_share") == close(quantities.share_in(H.top(5).vectors, g.values))
    assert logged("theta/norm") == close(sum(float(p.detach().square().sum()) for p in network.parameters()) ** 0.5)
    weight = network.hidden2.linear.weight.detach()
    assert logged("theta-hidden2.linear.weight/spectral") == close(float(torch.linalg.matrix_norm(weight, 2)))
    assert "look/theta-hidden1.linear.bias/spectral" not in row and "look/theta-hidden1.linear.bias/norm" in row
    assert {f"look/grad-loss-f-hidden{i}/snr" for i in range(1, 6)} <= row.keys()
    assert "look/grad-loss-f-hidden1/stable_rank" not in row and "look/f-hidden2/stable_rank" in row
    assert logged("hess-loss-theta-hidden1-theta/nuclear") == close(look(network, x, y, block).figures()["nuclear"])
    np.testing.assert_allclose(arrays["hess-loss-theta/eigenvalues"], H.operator.pairs().values, atol=1e-5)
    assert arrays["hess-loss-theta/matrix"].shape == (294, 294)
    assert settings["math"]["hess-loss-theta"] == r"$\nabla^2_{\theta} L$" and settings["samples"] == 300


def test_steps_of_the_path_are_distances_of_parameters(in_an_empty_folder):
    assert finish([*LINE, "--look", "theta", "--name", "run", "--save-every", "1"], Path.cwd())[0] == 0
    thetas = []
    for epoch in range(1, 3):
        content = torch.load(RUN / f"run/checkpoints/epoch{epoch:04d}.ckpt", weights_only=True)
        thetas.append(torch.cat([value.flatten() for value in content["state_dict"].values()]).double())
    arrays, _ = read(RUN / "run/arrays/epoch0000/look.npz")
    thetas.insert(0, torch.from_numpy(arrays["theta/path"]).double())
    first, second = thetas[1] - thetas[0], thetas[2] - thetas[1]
    row = rows("run")[-1]
    assert float(row["look/theta/distance"]) == pytest.approx(float((first + second).norm()))
    assert float(row["look/theta/step"]) == pytest.approx(float(second.norm()))
    assert float(row["look/theta/step_cosine"]) == pytest.approx(float(first @ second / first.norm() / second.norm()))
    assert float(rows("run")[0]["look/theta/distance"]) == 0 and not rows("run")[0]["look/theta/step"]


def test_groups_recombine_and_are_compared(in_an_empty_folder):
    argv = [*LINE, "-e", "1", "--look", "loss", "grad(loss, theta)", "hess(loss, theta(output))", "--name", "run",
            "--look-by", "class", "batch", "-b", "40", "--look-arrays", "--measure-at", "0", *SOME]  # fmt: skip
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    row, (arrays, settings) = rows("run")[0], read(RUN / "run/arrays/epoch0000/look.npz")
    assert settings["groups"] == {"class": ["class0", "class1"], "batch": ["batch0", "batch1", "batch2"]}
    train = datasets.load("SZT", limit=300).train
    share = float((train.labels == 1).double().mean())
    counts = round(90 * (1 - share)), round(90 * share)
    assert sum(counts) == 90
    for kind, weights in (("class", counts), ("batch", (40, 40, 10))):
        for name, key in (("grad-loss-theta", "values"), ("hess-loss-theta-output", "matrix")):
            mean = sum(n / 90 * arrays[f"{name}/{kind}{i}/{key}"] for i, n in enumerate(weights))
            np.testing.assert_allclose(mean, arrays[f"{name}/{key}"], atol=1e-6)
        loss = sum(n / 90 * float(row[f"look/loss/{kind}{i}/loss"]) for i, n in enumerate(weights))
        assert loss == pytest.approx(float(row["look/loss/loss"]))
    a, b = (arrays[f"grad-loss-theta/class{i}/values"] for i in range(2))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(row["look/grad-loss-theta/cosine_class"]) == pytest.approx(cosine)
    np.testing.assert_allclose(arrays["grad-loss-theta/cosines/class"], [[1, cosine], [cosine, 1]])


def test_what_groups_have_in_common_by_hand():
    figures, cosines = between_groups(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 3.0]))
    mean = (0.5, 0.75)
    noise = 0.25 * ((2 - mean[0]) ** 2 + mean[1] ** 2) + 0.75 * (mean[0] ** 2 + (1 - mean[1]) ** 2)
    assert figures == pytest.approx({"cosine": 0, "snr": (mean[0] ** 2 + mean[1] ** 2) / noise})
    assert cosines.tolist() == [[1, 0], [0, 1]]
    alone, _ = between_groups(torch.ones(1, 2), torch.ones(1))
    assert math.isnan(alone["cosine"]) and math.isnan(alone["snr"])


def test_clusters_are_groups(in_an_empty_folder):
    argv = [*LINE, "-e", "1", "--clusters", "--cluster-sets", "train", "--min-cluster-size", "20", "--look", "loss",
            "--look-by", "cluster", "--name", "run", "--measure-at", "1", "--look-samples", "0"]  # fmt: skip
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    row, (arrays, _) = rows("run")[-1], read(RUN / "run/arrays/epoch0001/clusters.npz")
    found = arrays["clusters/train/hidden5"]
    names = {k: "noise" if k < 0 else f"cluster{k}" for k in np.unique(found)}
    assert {name for name in row if name.endswith("/accuracy") and name.count("/") == 3} == {
        f"look/loss/{name}/accuracy" for name in names.values()
    }
    mean = sum((found == k).mean() * float(row[f"look/loss/{name}/loss"]) for k, name in names.items())
    assert mean == pytest.approx(float(row["look/loss/loss"]), rel=1e-5)


def test_training_is_the_same_to_the_bit_with_and_without(in_an_empty_folder):
    for name, more in (("without", []), ("with", ["--look", "hessian", "gradients", "ntk", "--look-samples", "30"])):
        assert finish([*LINE, "--batch-norm", "--name", name, *more], Path.cwd())[0] == 0
    states = [torch.load(RUN / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
              for name in ("without", "with")]  # fmt: skip
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_killed_run_ends_with_the_figures_of_an_uninterrupted_one(in_an_empty_folder):
    line = [*LINE, "--look", "theta", "hessian", "--look-dense", "0", "--look-by", "batch"]
    assert_killed_ends_as_whole(line, Path.cwd(), 8)


def test_a_checkpoint_measured_again_gives_the_runs_figures(in_an_empty_folder):
    assert finish([*LINE, "--look", "hessian", "jacobian", "--look-probes", "1", "--name", "run"], Path.cwd())[0] == 0
    argv = ["--measure", "lightning_logs/run/checkpoints/last.ckpt", "--name", "again", "--quiet", "--no-plots"]
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    row, again = rows("run")[-1], rows("again")[-1]
    columns = [name for name in row if name.startswith("look/")]
    assert columns and [again[name] for name in columns] == [row[name] for name in columns]


def test_the_average_of_several_networks_is_that_of_their_matrices(in_an_empty_folder):
    for seed in "01":
        argv = [*LINE, "-e", "1", "--seed", seed, "--name", seed]
        assert finish(argv, Path.cwd())[0] == 0
    asked = ["hess(loss, theta(output))", "grad(loss, theta)", "f(hidden5)"]
    argv = ["--measure", *(f"lightning_logs/{seed}/checkpoints/last.ckpt" for seed in "01"), "--look", *asked,
            "--look-samples", "0", "--name", "both", "--quiet", "--no-plots", "--no-dib", "--no-nc"]  # fmt: skip
    status, told = finish(argv, Path.cwd())
    assert status == 0, told
    train = datasets.load("SZT", limit=300).train
    data = 2 * train.inputs.float() - 1, train.labels.long()
    networks = [Classifier.load_from_checkpoint(RUN / seed / "checkpoints/last.ckpt").network for seed in "01"]
    *each, mean = rows("both")
    arrays, about = read(RUN / "both/arrays/average/look.npz")
    assert about["networks"] == [row["checkpoint"] for row in each] and about["math"]["grad-loss-theta"]
    assert float(mean["look/hess-loss-theta-output/eig1"]) == arrays["hess-loss-theta-output/eigenvalues"][0]
    assert mean["checkpoint"] == "average" and len(each) == 2
    name = "look/hess-loss-theta-output/eig1"
    matrices = [look(network, *data, asked[0]).matrix() for network in networks]
    for row, matrix in zip([*each, mean], [*matrices, sum(matrices) / 2], strict=True):
        assert float(row[name]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-4)
    gradients = [look(network, *data, asked[1]).values for network in networks]
    norm = float(sum(gradients).norm() / 2)
    assert float(mean["look/grad-loss-theta/norm"]) == pytest.approx(norm, rel=1e-4)


def test_the_loss_is_the_one_of_training(in_an_empty_folder):
    argv = [*LINE, "-e", "1", "--loss", "mse", "--look", "loss", "hess(loss, f(output))", "--look-samples", "0"]
    assert finish([*argv, "--look-set", "test", "--name", "run"], Path.cwd())[0] == 0
    row = rows("run")[-1]
    assert float(row["look/loss/loss"]) == pytest.approx(float(row["test_loss"]), rel=1e-5)
    assert [float(row[f"look/hess-loss-f-output/eig{i}"]) for i in (1, 2)] == pytest.approx([1, 1])  # ½‖f - y‖²


def test_figures_are_those_of_one_device_on_two(in_an_empty_folder):
    asked = ["hessian", "grad(loss, theta)", "jacobian", "grad(f(output), theta(output))", "f(hidden1)"]
    asked += ["hess(loss, f(hidden5))"]
    for name, num in (("one", 1), ("two", 2)):
        argv = [*LINE, "-e", "1", "--name", name, "--measure-at", "0", "--precision", "64-true"]
        argv += ["--look-samples", "0", "--look-dense", "0", "--look", *asked]
        argv += ["--landscape", "--landscape-steps", "3", "--landscape-map", "0"]
        argv += ["--perturb", "hidden1", "--perturb-draws", "1", "--views", "--views-samples", "7"]
        statuses, told = run_tasks(argv, Path.cwd(), num=num)
        assert statuses == [0] * num, told
    one, two = (rows(name)[0] for name in ("one", "two"))
    columns = [name for name in one if name.startswith(("look/", "landscape/", "perturb/", "views/"))]
    # float64: other orders of sums, 1e-16; eigenvalues of one search, whose start is the same
    assert {name: float(two[name]) for name in columns} == pytest.approx(
        {name: float(one[name]) for name in columns}, rel=1e-5, abs=1e-9, nan_ok=True
    )


def test_a_network_of_a_coarse_type_is_looked_at_in_float32_and_it_is_said(in_an_empty_folder):
    argv = [*LINE, "-e", "1", "--look", "grad(loss, theta)", "hessian", "--precision", "bf16-true", "--measure-at", "1"]
    status, told = finish([*argv, "--name", "run"], Path.cwd())
    assert status == 0 and told.count("look: the network is bfloat16; it is looked at in float32.") == 1, told
    settings = read(RUN / "run/arrays/epoch0001/look.npz")[1]
    assert settings["dtype"] == "torch.float32"


def test_a_compiled_network_is_looked_at_as_it_was_written(in_an_empty_folder, monkeypatch):
    """With dynamo's own backend, which needs no C compiler."""
    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend="eager")))  # fmt: skip
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        argv = [*LINE, "--look", "hessian", "grad(f(output), f(hidden2))", "--measure-at", "0", "-e", "1", *more]
        argv += ["--views"]
        assert main([*argv, "--name", name]) == 0
    plain, compiled = (rows(name)[0] for name in ("plain", "compiled"))
    columns = [name for name in plain if name.startswith(("look/", "views/"))]
    assert columns and [compiled[name] for name in columns] == [plain[name] for name in columns]


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--look", "hess(loss, theta(hiden1))"], 2, "no parameter is called 'hiden1'; perhaps hidden1"),
        (["--look", "hess(loss"], 2, "argument --look: ',' must follow"),
        (["--look", "theta(output.weight)", "theta(output-weight)"], 2, "no parameter is called 'output-weight'"),
        (["--look", "f(hidden1)[0]", "--look-by", "cluster"], 2, "--look-by: clusters are found by --clusters"),
        (["--look", "loss", "--look-by", "cluster", "--clusters"], 2, "clusters of the train set are needed"),
        (["--look-top", "3"], 2, "argument --look-top: belongs to --look, which is not asked for"),
        (["--look", "loss", "--look-parts", "svd:3"], 2, "'svd:3' is neither pca:K nor nmf:K"),
        (["--look", "theta(output.weight)", "--look-parts", "nmf:1"], 1, "nmf needs a matrix without negative numbers"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_written(argv, status, words, in_an_empty_folder):
    found, told = finish([*LINE, *argv], Path.cwd())
    assert found == status and words in told and "Traceback" not in told
    assert status == 1 or not RUN.exists()


def test_parts_of_a_matrix_are_kept(in_an_empty_folder):
    argv = [
        *LINE,
        "--look",
        "f(hidden1)",
        "theta(hidden1.linear.weight)",
        "--look-parts",
        "pca:2",
        "--measure-at",
        "0",
        *SOME,
    ]
    assert finish([*argv, "--name", "run"], Path.cwd())[0] == 0
    arrays, _ = read(RUN / "run/arrays/epoch0000/look.npz")
    assert arrays["f-hidden1/pca_components"].shape == (2, 10) and arrays["f-hidden1/pca_scores"].shape == (90, 2)
    assert 0 < float(rows("run")[0]["look/theta-hidden1.linear.weight/pca_share1"]) < 1


def test_a_measure_that_ran_out_of_memory_goes_on_in_smaller_parts(in_an_empty_folder, monkeypatch):
    product, calls = Symmetric.matvec, []

    def once(self, v):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return product(self, v)

    monkeypatch.setattr(Symmetric, "matvec", once)
    with pytest.warns(UserWarning, match="Out of memory in look"):
        assert main([*LINE, "-e", "1", "--measure-at", "0", "--look", "hessian", "--name", "run"]) == 0
    assert float(rows("run")[0]["look/hess-loss-theta/eig1"]) > 0
