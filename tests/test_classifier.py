"""The Classifier: what it logs, how its rate moves, and that a run is what its seed says."""

import doctest
import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

import classifier
from classifier import LOOKAHEAD_STEPS, LOSSES, Classifier, logits_over_views, loss_of, rate_factor
from datasets import Data, Dataset, Split
from flags import get_args
from run import presets
from run.errors import UserError
from run.presets import flags_of_run


def toy_images(num_train=90, num_test=31, size=28, channels=1, num_classes=3):
    """Images whose class is their brightness, so that a few steps learn something."""
    generator = torch.Generator().manual_seed(0)

    def half(num):
        labels = torch.arange(num) % num_classes
        noise = torch.randint(0, 60, (num, channels, size, size), generator=generator)
        return Split((noise + 80 * labels[:, None, None, None] // 1).clamp(max=255).byte(), labels)

    offset, scale = torch.full((channels,), 110.0), torch.full((channels,), 1 / 70)
    return Dataset("toy", tuple("abc"[:num_classes]), half(num_train), half(num_test), offset, scale, 2, True)


def fitted(line, dataset, callbacks=(), **options):
    """A Classifier trained as `main.py` would, without folder and measures."""
    args = get_args(["-d", "MNIST", *line.split()])
    module = Classifier.from_flags(flags_of_run(args), dataset.shape, dataset.num_classes)
    data = Data(dataset, args.batch_size, augment=args.augment, alternate_flip=args.alternate_flip, seed=args.seed)
    options = {"max_epochs": args.epochs, "accelerator": "cpu", "num_sanity_val_steps": 0} | options
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**options, **quiet, enable_checkpointing=False, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data)
    return module, trainer, data


def test_logged_means_are_means_over_samples_not_over_batches():
    dataset = toy_images()
    module, _, data = fitted("-m MLP -w 8 -e 2 -b 64", dataset)  # 64 + 26, 31
    module.eval()
    x, y = data.val_dataloader()[torch.arange(31)], dataset.test.labels
    with torch.no_grad():
        logits = module(x)
    assert module.values["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)  # float32 sums
    assert module.values["test_acc"] == (logits.argmax(1) == y).double().mean().item()
    assert set(module.values) == {"train_loss", "train_acc", "test_loss", "test_acc", "lr"}


def test_training_loss_is_that_of_the_weights_before_each_step():
    dataset = toy_images(num_train=40)
    module, _, data = fitted("-m MLP -w 8 -e 1 -b 64 --no-augment", dataset)
    flags = flags_of_run(get_args(["-d", "MNIST", "-m", "MLP", "-w", "8"]))
    fresh = Classifier.from_flags(flags, (1, 28, 28), 3)
    x, y = data.in_order("train")[torch.arange(40)], dataset.train.labels
    assert module.values["train_loss"] == pytest.approx(F.cross_entropy(fresh(x), y).item(), rel=1e-5)


def test_the_squared_error_by_hand():
    """Of (0.5, −1, 2) with label 2: (0.5² + 1² + 1²) / 2 = 1.125; of (0, 3, 0) with label 1: 2² / 2."""
    assert doctest.testmod(classifier).failed == 0 and doctest.testmod(classifier).attempted > 0
    logits, y = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, 0.0]]), torch.tensor([2, 1])
    assert loss_of(logits, y, {"loss": "mse"}, "none").tolist() == [1.125, 2.0]
    assert loss_of(logits, y, {"loss": "mse"}, "sum").item() == 3.125
    assert loss_of(logits, y, {"loss": "mse"}).item() == 1.5625
    assert loss_of(logits.bfloat16(), y, {"loss": "mse"}, "none").dtype == torch.float32


def test_without_a_loss_in_its_settings_a_network_has_the_cross_entropy_which_alone_is_smoothed():
    logits, y = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([2])
    plain, smooth = (F.cross_entropy(logits, y, label_smoothing=smoothing) for smoothing in (0.0, 0.2))
    assert loss_of(logits, y, {}) == loss_of(logits, y, {"label_smoothing": 0.2}) == plain
    assert loss_of(logits, y, {"label_smoothing": 0.2}, smoothed=True) == smooth
    assert set(presets.LOSSES) == set(LOSSES)


GRADIENT_DESCENT = "--optimizer sgd --momentum 0 --schedule constant --warmup 0 --no-augment -b all"


@pytest.mark.parametrize("loss", LOSSES)
def test_with_all_samples_in_a_batch_and_no_momentum_an_epoch_is_a_step_of_gradient_descent(loss):
    """θ − lr ∇L of a linear network in float64, ∇L in closed form: mean over samples of (g − 1[y = c]) xᵀ."""
    dataset = toy_images(num_train=50)
    line = f"-m MLP -w 5 -nl identity -e 1 -lr 0.1 {GRADIENT_DESCENT} --loss {loss}"
    module, trainer, data = fitted(line, dataset, precision="64-true")
    assert trainer.global_step == 1 and data.batch_size == 50
    fresh = Classifier.from_flags(flags_of_run(get_args(["-d", "MNIST", *line.split()])), (1, 28, 28), 3).double()
    x, y = data.in_order("train")[torch.arange(50)].double().flatten(1), dataset.train.labels
    with torch.no_grad():
        W, b, V, c = fresh.parameters()
        h = x @ W.T + b
        f = h @ V.T + c
        g = (f.softmax(1) if loss == "cross-entropy" else f) - F.one_hot(y, 3)
        gradients = (g @ V).T @ x / 50, (g @ V).mean(0), g.T @ h / 50, g.mean(0)
        for theta, before, gradient in zip(module.parameters(), fresh.parameters(), gradients, strict=True):
            # Sums of 784 and 50 terms about 1, in float64 and in any order.
            assert torch.allclose(theta, before - 0.1 * gradient, rtol=1e-10, atol=1e-12)


def test_the_squared_error_is_what_both_loss_columns_hold():
    dataset = toy_images(num_train=40)
    module, _, data = fitted("-m MLP -w 8 -e 1 -b all --no-augment --loss mse", dataset)
    fresh = Classifier.from_flags(flags_of_run(get_args(["-d", "MNIST", "-m", "MLP", "-w", "8"])), (1, 28, 28), 3)
    for split, network, num in (("train", fresh, 40), ("test", module.eval(), 31)):
        x, y = data.in_order(split)[torch.arange(num)], getattr(dataset, split).labels
        with torch.no_grad():
            errors = network(x) - F.one_hot(y, 3)
        assert module.values[f"{split}_loss"] == pytest.approx(errors.square().sum(1).mean().item() / 2, rel=1e-5)


@pytest.mark.parametrize("size", ["all", "1000000"])
def test_a_batch_of_all_samples_leaves_those_of_measures_and_tests_as_they_are(size):
    _, trainer, data = fitted(f"-m MLP -w 8 -e 3 -b {size}", toy_images(num_train=5000, num_test=5000))
    assert trainer.global_step == 3 and len(data.train_dataloader()) == 1
    most = max(len(y) for split in ("train", "test") for _, y in data.in_order(split))
    assert most == 2**20 // 28**2  # whatever the step's size


def test_same_seed_same_weights_other_seed_others():
    weights = [fitted(f"-m MLP -w 8 -e 2 -b 32 --seed {seed}", toy_images())[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["network.output.weight"], weights[2]["network.output.weight"])


def test_the_random_state_before_a_run_does_not_matter():
    torch.manual_seed(5)
    first = fitted("-m MLP -w 8 -e 1 -b 32", toy_images())[0].state_dict()
    torch.manual_seed(6)
    second = fitted("-m MLP -w 8 -e 1 -b 32", toy_images())[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("constant", 0.0, 0.2),
        ("constant", 0.125, 0.6),  # half-way from 0.2 to 1
        ("constant", 0.25, 1.0),
        ("constant", 1.0, 1.0),
        ("linear", 0.625, 0.55),  # half-way from 1 to 0.1
        ("linear", 1.0, 0.1),
        ("cosine", 0.625, 0.55),
        ("cosine", 0.25 + 0.75 / 3, 0.1 + 0.9 * 0.75),  # (1 + cos 60°) / 2 = 0.75
        ("cosine", 1.2, 0.1),
    ],
)
def test_rate_factor_rises_linearly_and_falls_as_the_schedule_says(schedule, progress, factor):
    hp = {"warmup": 0.25, "start_factor": 0.2, "end_factor": 0.1, "schedule": schedule}
    assert rate_factor(progress, hp) == pytest.approx(factor)


def test_warmup_over_the_whole_run_never_divides_by_zero():
    hp = {"warmup": 1.0, "start_factor": 0.0, "end_factor": 0.0, "schedule": "linear"}
    assert rate_factor(0.5, hp) == 0.5 and math.isfinite(rate_factor(1.0, hp))


def test_every_learnt_parameter_is_in_one_group_and_biases_of_norms_have_their_own_rate():
    flags = flags_of_run(get_args(["-m", "CIFARNet", "-d", "CIFAR10"]))
    module = Classifier.from_flags(flags, (3, 32, 32), 10)
    groups = {group["name"]: group for group in module._optimizer().param_groups}
    learnt = {id(p) for p in module.parameters() if p.requires_grad}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(learnt)
    assert len(groups["norm_biases"]["params"]) == 6 and len(groups["whitening"]["params"]) == 1
    assert groups["norm_biases"]["lr"] == 64 * groups["all"]["lr"]
    decay = [groups[name]["lr"] * groups[name]["weight_decay"] for name in ("all", "norm_biases")]
    assert decay[0] == pytest.approx(decay[1])  # decoupled: a step shrinks both alike


def test_the_whitening_bias_stops_learning_after_its_epochs():
    dataset = toy_images(channels=3, size=32)
    line = "-m CIFARNet -d CIFAR10 -b 45 --no-lookahead --no-tta -lr 1e-3 --weight-decay 0.1"
    short = fitted(f"{line} -e 2 --whiten-epochs 0", dataset)[0].network.whitening.bias
    long = fitted(f"{line} -e 2 --whiten-epochs 2", dataset)[0].network.whitening.bias
    assert torch.equal(short, torch.zeros_like(short)) and not torch.equal(long, torch.zeros_like(long))


def test_lookahead_moves_slow_weights_every_five_steps_and_ends_on_them():
    """With plain steps f_5 and f_10 from the same start, ten steps end on s = f_5: the last keeps the slow weights."""
    dataset = toy_images(num_train=50)
    line = "-m MLP -w 4 -b 10 -e 2 --schedule constant --warmup 0 --no-augment"  # 10 steps
    plain = fitted(line, dataset, max_steps=LOOKAHEAD_STEPS)[0].network.state_dict()
    module = fitted(f"{line} --lookahead", dataset)[0]
    for name, weight in module.network.state_dict().items():
        assert torch.equal(weight, module._slow_weights[name]) and torch.equal(weight, plain[name])


def test_views_of_a_symmetric_image_agree_with_the_network_itself():
    x = torch.ones(2, 1, 6, 6)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    assert torch.allclose(logits_over_views(network, x), network(x), atol=1e-6)  # float32 rounding of averages


def test_a_pixel_counts_as_often_as_the_views_show_it():
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 2] = 1.0
    expected = torch.zeros(7, 7)
    expected[3, 2] = expected[3, 4] = 1 / 4  # as it is and mirrored
    expected[4, 3] = 2 / 8  # shifted by (1, 1), into the middle column: the mirrored one lies there too
    expected[2, 1] = expected[2, 5] = 1 / 8  # shifted by (-1, -1), and mirrored
    assert torch.equal(logits_over_views(lambda view: view.flatten(1), x).view(7, 7), expected)


@pytest.mark.parametrize("rate", ["1e30"])
def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(rate):
    with pytest.raises(UserError, match=r"epoch 1, step \d+ of 6, at a learning rate of"):
        fitted(f"-m MLP -w 8 -nl identity -e 3 -b 15 --optimizer sgd -lr {rate}", toy_images())
    module, _, _ = fitted(f"-m MLP -w 8 -nl identity -e 3 -b 15 --optimizer sgd -lr {rate} --keep-going", toy_images())
    assert not math.isfinite(module.values["train_loss"])


def test_a_checkpoint_gives_the_same_network_without_further_arguments(tmp_path):
    module, trainer, _ = fitted("-m MLP -w 8 4 -nl tanh --batch-norm -e 1 -b 32", toy_images())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu", weights_only=True)
    x = torch.randn(4, 1, 28, 28)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert loaded.network.layers == ("hidden1", "hidden2")
