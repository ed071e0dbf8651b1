"""`--views` in runs: columns and arrays are what the library's functions give, and nothing else changes."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import assert_killed_ends_as_whole
from test_robustness import make_images

import datasets
import main
from classifier import Classifier
from measures import views
from measures.input_gradients import agreement
from measures.perturb import standard_normal
from measures.views import Pictures, Separation, Views, at_even_steps, finite, learns_features
from networks import build_network
from run.arrays import read
from run.errors import NotFinite
from run.seeds import seed_from
from slots import Similarities, similarities_in, unit
from utils import input_gradients, roughness, separation, stability

LOGS = Path("lightning_logs")
LINE = ["-e", "1", "--limit", "60", "--no-dib", "--no-nc", "--no-plots", "--quiet", "--views", "--views-samples", "9"]
AGAIN = ["--quiet", "--no-plots", "--name", "again"]


@pytest.fixture(scope="module")
def on_images(tmp_path_factory):
    """A folder with images, and a run of MNISTNet on them that views units of a map, all of a layer, and logits.

    And a run of slots on their pixels that views 3 of them.
    """
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    make_images(Path("images"))
    line = ["-m", "MNISTNet", "-d", "images", "-e", "1", "--no-dib", "--no-nc", "--quiet", "--views", "--name", "run"]
    line += ["--views-samples", "9", "--views-images", "11", "--views-units", "5"]
    assert main.main([*line, "--views-layers", "conv2.conv", "hidden", "output"]) == 0
    make_mixed(Path("mixed"))
    line = ["-m", "MLP", "-d", "mixed", "--head", "slots", "-w", "-e", "2", "-b", "4", "--slot-prune", "0", "--no-nc"]
    line += ["--quiet", "--views", "--views-samples", "9", "--views-images", "11", "--views-units", "3"]
    assert main.main([*line, "--name", "slots"]) == 0
    os.chdir(here)
    return folder


def make_mixed(root):
    """Those images with every second one under the other class: many slots to tell them apart."""
    make_images(root)
    for path in root.rglob("dark/*[02468].png"):
        other = path.parent.parent / "light" / path.name
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


def row_of(name, number=-1):
    with open(LOGS / name / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))[number]


def columns_of(row):
    return {name: value for name, value in row.items() if name.startswith("views/")}


def arrays_of(name, epoch=1):
    return read(LOGS / name / f"arrays/epoch{epoch:04d}/views.npz")


def network_of(name):
    return Classifier.load_from_checkpoint(LOGS / name / "checkpoints/last.ckpt").network


def status_of(argv):
    try:
        return main.main(argv)
    except SystemExit as end:
        return end.code


@pytest.fixture
def seen(on_images, monkeypatch):
    """Of that run: its last row, arrays, settings, network, images and noise."""
    monkeypatch.chdir(on_images)
    network = Classifier.load_from_checkpoint(LOGS / "run/checkpoints/last.ckpt").network
    dataset = datasets.load("images")
    x = (dataset.test.inputs.float() - dataset.offset) * dataset.scale
    noise = standard_normal(slice(0, 9), (1, 32, 32), seed_from("views", 0))
    return row_of("run"), *arrays_of("run"), network, {"noise": noise, "images": x[:9]}, dataset.test


def test_columns_are_the_scores_of_the_gradients_of_the_logits(seen):
    row, arrays, settings, network, inputs, _ = seen
    g = {kind: input_gradients(network, x) for kind, x in inputs.items()}
    expected = {"views/agreement": agreement(g["noise"], g["images"])}
    for kind, of_kind in g.items():
        expected |= {f"views/stability/{kind}": stability(of_kind), f"views/zeros/{kind}": torch.zeros(2)}
        expected[f"views/roughness/{kind}"] = roughness(of_kind).mean(0)
        # float32 gradients in batches of another size: relative 1e-6
        assert float(row[f"views/separation/{kind}"]) == pytest.approx(float(separation(of_kind)), rel=1e-4)
    for name, score in expected.items():
        assert float(row[name]) == pytest.approx(float(score.mean()), rel=1e-4)
        assert [float(row[f"{name}/class{c}"]) for c in range(2)] == pytest.approx(score.tolist(), rel=1e-4)
        np.testing.assert_allclose(arrays[name.replace("views/", "classes/")], score, rtol=1e-4)
    assert settings["classes"] == ["dark", "light"] and settings["samples"] == 9 and settings["seed"] == 0
    assert settings["white_roughness"] == 0.8076171875


def test_pictures_are_the_first_images_with_their_gradients_towards_all_classes(seen):
    _, arrays, _, network, inputs, test = seen
    assert (arrays["images"] == test.inputs[:11].numpy()).all() and arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == test.labels[:11].tolist() and arrays["gradients"].shape == (11, 2, 1, 32, 32)
    assert arrays["gradients_of"].tolist() == [[0, 1]] * 11
    g = input_gradients(network, inputs["images"])
    scale = float(g.abs().max())
    np.testing.assert_allclose(arrays["gradients"][:9], g, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(arrays["logits"][:9], network(inputs["images"]).detach(), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(arrays["filters"], network.conv1.conv.weight.detach())
    np.testing.assert_allclose(arrays["classes/mean/images"], g.mean(0), rtol=0, atol=1e-5 * scale)


def test_units_are_those_of_each_layer_at_even_steps_on_noise_and_images(seen):
    row, arrays, settings, network, inputs, _ = seen
    assert settings["layers"] == ["conv2.conv", "hidden", "output"]
    assert arrays["units/conv2.conv/index"].tolist() == [0, 6, 12, 19, 25]
    assert arrays["units/hidden/index"].tolist() == [0, 51, 102, 153, 204]
    for layer in ("conv2.conv", "hidden"):
        index = torch.from_numpy(arrays[f"units/{layer}/index"])
        g = {kind: input_gradients(network, x, layer, index) for kind, x in inputs.items()}
        for kind in g:
            np.testing.assert_allclose(arrays[f"units/{layer}/stability/{kind}"], stability(g[kind]), atol=1e-5)
            zeros = (g[kind].flatten(2) == 0).all(-1).double().mean()
            assert float(row[f"views/units/zeros/{kind}/{layer}"]) == pytest.approx(float(zeros))
        stable = float(row[f"views/units/stability/noise/{layer}"])
        assert stable == pytest.approx(float(stability(g["noise"]).mean()), abs=1e-5)
        assert stable == arrays[f"units/{layer}/stability/noise"].mean()
        for u, examples in enumerate(arrays[f"units/{layer}/examples"]):
            alive = [of_input[u] for of_input in g["noise"] if of_input[u].any()]
            expected = torch.stack([*alive, *torch.zeros(2, 1, 32, 32)][:2])
            np.testing.assert_allclose(examples, expected, atol=1e-5 * float(g["noise"].abs().max()))
    assert row["views/units/stability/noise/output"] == row["views/stability/noise"]


def test_slots_are_viewed_with_the_gradients_of_the_formula(on_images, monkeypatch):
    """On pixels x a slot w of length 1 has similarity s = ⟨w, x⟩ / ‖x‖ and gradient (w − s x / ‖x‖) / ‖x‖."""
    monkeypatch.chdir(on_images)
    row, (arrays, _), slots = row_of("slots"), arrays_of("slots", 2), network_of("slots").head
    dataset = datasets.load("mixed")
    x = {"images": (dataset.test.inputs[:9].float() - dataset.offset) * dataset.scale}
    x["noise"] = standard_normal(slice(0, 9), (1, 32, 32), seed_from("views", 0))
    index = torch.from_numpy(arrays["slots/index"])
    w, g = unit(slots.W.detach().double())[index], {}  # (U, d)
    for kind, inputs in x.items():
        z, norm = unit(inputs.flatten(1).double()), inputs.flatten(1).double().norm(dim=1)
        g[kind] = ((w - (z @ w.T)[..., None] * z[:, None]) / norm[:, None, None]).view(9, len(w), 1, 32, 32)
        # float32 gradients: relative 1e-6 of the largest
        scale = float(g[kind].abs().max())
        np.testing.assert_allclose(arrays[f"slots/mean/{kind}"], g[kind].mean(0), rtol=0, atol=1e-5 * scale)
        for name, score in (("stability", stability(g[kind])), ("roughness", roughness(g[kind]).mean(0))):
            np.testing.assert_allclose(arrays[f"slots/{name}/{kind}"], score, rtol=1e-4)
            assert float(row[f"views/slots/{name}/{kind}"]) == pytest.approx(float(score.mean()), rel=1e-4)
        assert row[f"views/slots/zeros/{kind}"] == "0.0"
    scale = float(g["noise"].abs().max())
    np.testing.assert_allclose(arrays["slots/examples"], g["noise"][:2].transpose(0, 1), rtol=0, atol=1e-5 * scale)
    expected = agreement(g["noise"], g["images"]).mean()
    assert float(row["views/slots/agreement"]) == pytest.approx(float(expected), rel=1e-4)


def test_slots_are_viewed_at_even_steps_class_by_class_where_there_are_any(on_images, monkeypatch, capsys):
    monkeypatch.chdir(on_images)
    arrays, label = arrays_of("slots", 2)[0], network_of("slots").head.label
    by_class = [*(label == 0).nonzero()[:, 0].tolist(), *(label == 1).nonzero()[:, 0].tolist()]
    assert len(label) > 3 and label.tolist() != label.sort().values.tolist()  # else all would be viewed, or in order
    assert arrays["slots/index"].tolist() == [by_class[i * len(label) // 3] for i in range(3)]
    assert arrays["slots/label"].tolist() == label[arrays["slots/index"]].tolist()
    assert not any(name.startswith("slots/") for name in arrays_of("slots", 0)[0])
    assert row_of("slots", 0)["views/slots/stability/noise"] == ""
    line = ["--measure", "lightning_logs/slots/checkpoints/last.ckpt", "--no-slots", "--no-plots", "--name", "saved"]
    assert main.main(line) == 0
    assert columns_of(row_of("saved")) == columns_of(row_of("slots"))
    stable = float(row_of("slots")["views/slots/stability/noise"])
    assert f"views of slots: stability {stable:.3g} on noise, " in capsys.readouterr().out


def test_gradients_of_slots_behind_a_backbone_are_those_of_a_slow_loop():
    torch.manual_seed(0)
    network = build_network("MNISTNet", (1, 12, 12), 3, head="slots").double().eval()
    x, y = torch.randn(5, 1, 12, 12).double(), torch.tensor([0, 1, 2, 0, 1])
    network.head.grow(network.feature_extractor(x)["hidden"].detach(), y)
    g = input_gradients(Similarities(network), x, units=torch.tensor([2, 0]))
    for i, one in enumerate(x):
        for k, j in enumerate((2, 0)):
            leaf = one[None].clone().requires_grad_()
            h = network.get_encoder_decoder("hidden")[0](leaf)[0]
            w = network.head.W[j].detach()
            (h @ w / h.norm() / w.norm()).backward()
            torch.testing.assert_close(g[i, k], leaf.grad[0], rtol=0, atol=1e-12)  # of about 1, rounding in float64
    assert torch.equal(Similarities(network)(x), similarities_in(network, x))


def test_the_pictures_lie_in_the_runs_folder_and_the_closing_words_have_the_scores(seen, capsys):
    pictures = {f"views_{name}.png" for name in ("images", "classes", "units", "filters")}
    assert pictures <= {path.name for path in (LOGS / "run").iterdir()}
    assert pictures - {"views_filters.png"} <= {path.name for path in (LOGS / "slots").iterdir()}
    line = ["--measure", "lightning_logs/run/checkpoints/last.ckpt", "--no-plots", "--name", "told"]
    assert main.main(line) == 0
    told = capsys.readouterr().out
    assert f"views of classes: stability {float(seen[0]['views/stability/noise']):.3g} on noise, " in told
    assert "roughness" in told and "views of units of hidden: stability" in told
    again, settings = arrays_of("told")
    assert columns_of(row_of("told")) == columns_of(seen[0]) and settings == seen[2]
    assert again.keys() == seen[1].keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, seen[1][name], err_msg=name)


def test_parts_of_the_units_and_of_the_inputs_change_nothing_but_rounding(seen, monkeypatch):
    """And where all classes' gradients are too many, those of an image's own and of the strongest wrong are kept."""
    monkeypatch.setattr(views, "AT_ONCE", 1)
    monkeypatch.setattr(views, "CHUNK", 4)
    monkeypatch.setattr(views, "KEPT", 3 * 4 * 1024)
    line = ["--measure", "lightning_logs/run/checkpoints/last.ckpt", *AGAIN[:-1], "parts"]
    assert main.main(line) == 0
    found, expected = columns_of(row_of("parts")), columns_of(seen[0])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6)
    arrays, _ = arrays_of("parts")
    y = arrays["labels"]
    assert arrays["gradients_of"].tolist() == np.stack([y, 1 - y], axis=1).tolist()
    for i, k in ((0, 0), (10, 1)):
        of = seen[1]["gradients"][i, arrays["gradients_of"][i, k]]
        np.testing.assert_allclose(arrays["gradients"][i, k], of, atol=1e-5 * np.abs(of).max())
    assert arrays["units/hidden/pictured"].tolist() == [0, 1, 3] and len(arrays["units/hidden/examples"]) == 3


def test_the_strongest_wrong_class_is_that_of_the_largest_other_logit(monkeypatch):
    monkeypatch.setattr(views, "KEPT", 10)
    logits, y = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1])
    pictures = Pictures(y, logits, (4,))
    assert pictures.of.tolist() == [[0, 1], [1, 0]]
    g = torch.randn(2, 3, 4)
    pictures.add(slice(0, 2), g[:, :2])
    pictures.add(slice(2, 3), g[:, 2:])
    assert torch.equal(pictures.arrays["gradients"], torch.stack([g[0, [0, 1]], g[1, [1, 0]]]))


def test_separation_of_parts_is_that_of_all_classes():
    g = {kind: torch.randn(6, 5, 2, 3, 3) for kind in ("noise", "images")}
    g["noise"][1, 2] = 0
    parts = Separation(5)
    for part in (slice(0, 2), slice(2, 5)):
        parts.add({kind: of_kind[:, part] for kind, of_kind in g.items()})
    expected = {f"views/separation/{kind}": float(separation(of_kind)) for kind, of_kind in g.items()}
    assert parts.values() == pytest.approx(expected, rel=1e-12)


def test_gradients_that_are_not_finite_are_told():
    with pytest.raises(NotFinite, match="the gradient of hidden by the input is infinite or nan"):
        finite(torch.tensor([1.0, torch.inf]), "hidden")


def test_of_vectors_there_are_scores_but_no_roughness_and_no_pictures(in_an_empty_folder):
    argv = [argument for argument in LINE if argument != "--no-plots"]
    assert main.main([*argv, "--name", "one"]) == 0
    row, (arrays, settings) = row_of("one"), arrays_of("one")
    assert not any("roughness" in name for name in (*row, *arrays))
    assert float(row["views/stability/noise"]) <= 1 and arrays["gradients"].shape == (60, 2, 12)
    assert settings["layers"] == ["hidden5"] and settings["white_roughness"] is None
    assert arrays["filters"].shape == (10, 12)
    assert not list((LOGS / "one").glob("views*.png")) and (LOGS / "one/summary.png").exists()


def test_a_linear_network_has_a_stability_of_exactly_1_in_every_epoch(in_an_empty_folder):
    assert main.main([*LINE, "-nl", "identity", "--views-layers", "hidden2", "flatten", "--name", "run"]) == 0
    for number in (0, 1):
        row = row_of("run", number)
        for name in (
            "stability/noise",
            "stability/images",
            "agreement",
            "units/stability/noise/flatten",
            "units/agreement/hidden2",
        ):
            assert float(row[f"views/{name}"]) == pytest.approx(1, abs=1e-13)  # rounding in float64


def test_noise_is_the_same_in_every_epoch_and_another_with_another_seed(in_an_empty_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(views, "standard_normal", lambda *args: seen.append(standard_normal(*args)) or seen[-1])
    for seed in "01":
        assert main.main([*LINE, "--seed", seed, "--name", seed]) == 0
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and seen[0].shape == (9, 12)


def test_training_is_the_same_to_the_bit_with_and_without(in_an_empty_folder):
    line = [*LINE[:-3], "--batch-norm", "-e", "2"]
    for name, more in (("without", []), ("with", ["--views"])):
        assert main.main([*line, *more, "--name", name]) == 0
    states = [torch.load(LOGS / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
              for name in ("without", "with")]  # fmt: skip
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_killed_run_ends_with_the_figures_of_an_uninterrupted_one(in_an_empty_folder):
    assert_killed_ends_as_whole([*LINE, "-e", "2"], Path.cwd(), 6)


def test_a_coarse_network_is_looked_at_in_float32_and_memory_that_runs_out_halves_the_parts(
    in_an_empty_folder, monkeypatch
):
    gradients_at, calls = views.gradients_at, []

    def once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return gradients_at(*args)

    monkeypatch.setattr(views, "gradients_at", once)
    with pytest.warns(UserWarning) as warned:
        assert main.main([*LINE, "--precision", "bf16-true", "--name", "run"]) == 0
    told = [str(warning.message) for warning in warned]
    assert told.count("views: the network is bfloat16; it is looked at in float32.") == 1
    assert sum("Out of memory in views" in sentence for sentence in told) == 1
    assert arrays_of("run")[1]["dtype"] == "torch.float32" and float(row_of("run", 0)["views/stability/noise"]) <= 1


def test_a_program_of_ones_own_gives_batches(tmp_path):
    from lightning.pytorch import Trainer

    module = Classifier("MLP", [1, 4, 4], 3, widths=[5])
    x, y = torch.randn(7, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    measure = Views(batches={"test": [(x[:4], y[:4]), (x[4:], y[4:])]}, samples=6)
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    measure.measure_now(trainer, module, 0)
    assert torch.equal(measure.arrays["images"], x) and measure.arrays["labels"].tolist() == y.tolist()
    expected = stability(input_gradients(module.network, x[:6])).mean()
    assert measure.values["views/stability/images"] == pytest.approx(float(expected), rel=1e-5)
    assert measure.settings["classes"] is None and len(measure.arrays["units/hidden1/index"]) == 5


def test_even_steps_begin_with_the_first_and_give_every_part_its_share():
    index = at_even_steps(120, 60)
    assert index.tolist() == list(range(0, 120, 2)) and at_even_steps(0, 5).tolist() == []
    assert at_even_steps(7, 5).tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--views-layers", "hiden1"], "argument --views-layers: there is no layer 'hiden1'; perhaps hidden1"),
        (["--views-samples", "1"], "--views-samples"),
        (["--views-images", "-1"], "--views-images"),
        (["--views-units", "x"], "--views-units"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_before_anything_is_written(argv, words, in_an_empty_folder, capsys):
    assert status_of([*LINE, *argv]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not LOGS.exists()


def test_units_are_looked_at_where_something_is_learnt_in_front_of_the_head():
    assert not learns_features(build_network("MLP", (1, 6, 6), 2, widths=[], head="slots"))
    assert learns_features(build_network("MLP", (1, 6, 6), 2, widths=[3], head="slots"))
    assert learns_features(build_network("Positive", (1, 32, 32), 2)) and learns_features(torch.nn.Linear(2, 2))
