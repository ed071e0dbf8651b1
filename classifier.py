"""Training: any of the networks as a LightningModule, its loss, its optimizer and the schedule of its rate.

Letters: B samples of a batch, C classes.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import Data
from networks import build_network
from run.batch_norm import over_all_ranks
from run.checkpoints import read_checkpoint
from run.errors import UserError, WrongFlag
from run.ranks import Ranks
from run.seeds import seed_from
from run.trainer import use_threads

OF_NETWORKS = ("widths", "nonlinearity", "batch_norm", "stem", "head", "augmax", "branches", "norm", "first_conv",
               "topk", "tau", "slot_scale", "slot_pool", "slot_norm")  # fmt: skip
ALIKE = (
    "model",
    *(name for name in OF_NETWORKS if name not in ("stem", "tau")),
    "loss",
)  # of networks measured together
LOOKAHEAD_STEPS, LOOKAHEAD_DECAY = 5, 0.95  # of airbench
AGAINST_DIVERGENCE = "try a lower -lr/--learning-rate or a longer --warmup (--keep-going goes on all the same)"


def squared_error(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """½ Σ_c (f_c − 1[y = c])² of logits f (B, C) and labels y (B,): mean or sum over samples, or, with "none", (B,).

    The squared loss ½‖f − y‖² of Cohen et al. (2021), at least in float32. By hand, (0.5² + 0.5²) / 2 and 1² / 2:

    >>> squared_error(torch.tensor([[0.5, 0.5], [0.0, 2.0]]), torch.tensor([0, 1]), reduction="none").tolist()
    [0.25, 0.5]
    """
    is_label = y[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    errors = logits.to(torch.promote_types(logits.dtype, torch.float32)) - is_label.to(logits.dtype)
    losses = errors.square().sum(-1) / 2
    return losses if reduction == "none" else {"sum": torch.sum, "mean": torch.mean}[reduction](losses)


LOSSES: dict[str, Callable[..., Tensor]] = {"cross-entropy": F.cross_entropy, "mse": squared_error}


def loss_of(
    logits: Tensor, y: Tensor, hparams: Mapping[str, Any], reduction: str = "mean", *, smoothed: bool = False
) -> Tensor:
    """The loss that a network with these `hparams` is trained with; with label smoothing only if `smoothed`."""
    smoothing = hparams.get("label_smoothing", 0.0) if smoothed else 0.0
    options = {"label_smoothing": smoothing} if smoothing else {}
    return LOSSES[hparams.get("loss", "cross-entropy")](logits, y, reduction=reduction, **options)


class Classifier(LightningModule):
    """Trains any of the networks with one of LOSSES. All that it takes to build it again stands in `hparams`.

    After every epoch `values` holds, and loggers and callbacks get, `train_loss`, `train_acc` (means over the samples
    as training saw them: augmented, before each step, with label smoothing in the loss if any), `test_loss`, `test_acc`
    (eval mode, no smoothing) and `lr`, the rate of the epoch's first step. Before training, the test values alone.
    """

    def __init__(
        self,
        model: str,
        shape: Sequence[int],
        num_classes: int,
        *,
        widths: Sequence[int] = (512, 256),
        nonlinearity: str = "relu",
        batch_norm: bool = False,
        stem: str | None = None,
        head: str = "linear",
        augmax: Sequence[str] | None = None,
        branches: int = 1,
        norm: str = "batch",
        first_conv: str = "plain",
        topk: int = 1,
        tau: str = "1:0.1",
        slot_scale: float = 30.0,
        slot_pool: str = "softmax",
        slot_norm: str = "none",
        slot_lr: float = 20.0,
        slot_prune: int = 5,
        loss: str = "cross-entropy",
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        schedule: str = "constant",
        warmup: float = 0.0,
        start_factor: float = 0.1,
        end_factor: float = 0.0,
        bias_lr_scale: float = 1.0,
        whiten_epochs: int = 3,
        lookahead: bool = False,
        tta: bool = False,
        seed: int = 0,
        keep_going: bool = False,
        sync_batch_norm: bool = False,
    ):
        super().__init__()
        if tta and min(shape[1:], default=0) < 2:
            size = " × ".join(map(str, shape))
            raise WrongFlag(
                f"argument --tta: needs images of at least 2 × 2 pixels to shift, but samples here are {size}"
            )
        if loss not in LOSSES:
            raise ValueError(f"{loss!r} is none of the losses {', '.join(LOSSES)}")
        self.save_hyperparameters()
        options = {name: self.hparams[name] for name in OF_NETWORKS}
        self.network = build_network(model, shape, num_classes, **options)
        self.source: str | None = None  # the checkpoint that it was read from to be measured
        self.values: dict[str, float] = {}
        self._tally: dict[str, list[tuple[int, Tensor, Tensor]]] = {"train": [], "test": []}
        self._slow_weights: dict[str, Tensor] = {}

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], shape: Sequence[int], num_classes: int) -> "Classifier":
        """A fresh one with the flags that concern it. Its weights depend on the seed alone."""
        names = inspect.signature(cls).parameters
        options = {name: value for name, value in flags.items() if name in names and name != "model"}
        torch.manual_seed(seed_from(flags["seed"], "network"))
        return cls(flags["model"], list(shape), num_classes, **options)

    @classmethod
    def from_checkpoint(
        cls, content: Mapping[str, Any], path: str, shape: Sequence[int], num_classes: int, double: bool = False
    ) -> "Classifier":
        """The network in a checkpoint's content, if it is one for these data, in float32 or in float64."""
        hparams = content["hyper_parameters"]
        expected = tuple(hparams.get("shape", ())), hparams.get("num_classes")
        if expected != (tuple(shape), num_classes):
            raise UserError(
                f"{path} is for samples of shape {expected[0]} in {expected[1]} classes, but the data here have "
                f"shape {tuple(shape)} and {num_classes} classes: choose them with -d/--dataset"
            )
        try:
            module = cls(**hparams).to(torch.float64 if double else torch.float32)
            module.load_state_dict(content["state_dict"])
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} holds another network than it says: {' '.join(str(error).split())}") from None
        module.source = str(path)
        return module

    def refuse_other(self, content: Mapping[str, Any], path: Path) -> None:
        """Refuse a checkpoint's content from which this network's training cannot go on."""
        missing = {"optimizer_states", "lr_schedulers", "loops", "callbacks", "slow_weights"} - set(content)
        if missing:
            raise UserError(f"{path} is of no run to go on with: it has no {', '.join(sorted(missing))}")
        before, hparams = content["hyper_parameters"], self.hparams
        other = sorted(name for name in before.keys() & hparams.keys() if before[name] != hparams[name])
        if other:
            raise UserError(f"{path} is of another run than hparams.yaml beside it: they differ in {', '.join(other)}")
        shapes, growing = fixed_shapes(self), set(content["state_dict"]) & growing_names(self)
        theirs = {name: getattr(v, "shape", None) for name, v in content["state_dict"].items() if name not in growing}
        if theirs != shapes:
            raise UserError(f"{path} holds another network than it says")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        together = self.hparams.sync_batch_norm and self.trainer.world_size > 1
        with over_all_ranks(self.network) if together else nullcontext():
            logits = self.network(x)
        loss = loss_of(logits, y, self.hparams, smoothed=True)
        self._count("train", logits, y, loss)
        if self.trainer.world_size > 1:  # shares may differ by a sample, and the mean over ranks knows nothing of it
            loss = loss * self.trainer.train_dataloader.weight(batch_idx)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = logits_over_views(self.network, x) if self.hparams.tta else self.network(x)
        self._count("test", logits, y, loss_of(logits, y, self.hparams))

    def on_train_epoch_start(self) -> None:
        # Dropout and its kin draw from the seed and the epoch alone: a resumed run draws what it would have drawn.
        torch.manual_seed(seed_from(self.hparams.seed, "training", self.current_epoch, self.global_rank))
        self._first_lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._tally["train"].clear()

    def on_validation_epoch_start(self) -> None:
        self._tally["test"].clear()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.hparams.lookahead and (self.global_step % LOOKAHEAD_STEPS == 0 or self._is_last_step()):
            self._look_ahead()
        if self.trainer.is_last_batch:
            Ranks.of(self.trainer).share_buffers(self)
            if not self.hparams.keep_going:
                self._refuse_broken_loss()

    def on_validation_epoch_end(self) -> None:
        self.values = self._means("train") | self._means("test")
        if "train_loss" in self.values and not self.hparams.keep_going:
            self._refuse_broken_weights()

    def on_train_epoch_end(self) -> None:
        if not self._tally["test"]:  # trained without a test set
            self.values = self._means("train")
        self.values["lr"] = self._first_lr
        # What log_dict would do, without the running mean that it sets up for each value: 2 ms an epoch.
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.values.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics({"epoch": self.current_epoch + 1, **self.values}, step=self.global_step)

    def configure_optimizers(self) -> dict:
        optimizer = self._optimizer()
        num_steps = self.trainer.estimated_stepping_batches
        steps_of_whitening = self.hparams.whiten_epochs * num_steps / self.trainer.max_epochs

        def factor(step: int) -> float:
            return rate_factor(step / num_steps, self.hparams)

        def whitening_factor(step: int) -> float:
            return factor(step) if step < steps_of_whitening else 0.0

        factors = [whitening_factor if group["name"] == "whitening" else factor for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        hp = self.hparams
        scale = {"norm_biases": hp.bias_lr_scale}
        groups = [
            # What a step decays is rate × decay: biases with a higher rate get a lower decay.
            {"name": name, "params": params, "lr": hp.learning_rate * scale.get(name, 1.0),
             "weight_decay": hp.weight_decay / scale.get(name, 1.0)}
            for name, params in self._parameter_groups().items()
        ]  # fmt: skip
        if hp.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=hp.momentum, nesterov=hp.momentum > 0)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[hp.optimizer]
        return kind(groups, betas=tuple(hp.betas))

    def _parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All trainable parameters, those with a rate of their own apart."""
        groups = {"all": [], "norm_biases": [], "whitening": []}
        growing = growing_names(self.network)  # take their own steps
        norms = tuple(name for name, part in self.network.named_modules() if isinstance(part, nn.BatchNorm2d))
        for name, parameter in self.network.named_parameters():
            owner = name.rpartition(".")[0]
            if not parameter.requires_grad or name in growing:
                continue
            if owner.partition(".")[0] == "whitening":
                groups["whitening"].append(parameter)
            elif self.hparams.bias_lr_scale != 1 and owner in norms and name.endswith(".bias"):
                groups["norm_biases"].append(parameter)
            else:
                groups["all"].append(parameter)
        return {name: params for name, params in groups.items() if params} or {"all": []}

    def _count(self, split: str, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        # Kept as they are until the epoch ends: a sum per step would cost more calls and, on a GPU, syncs.
        correct = (logits.detach().argmax(1) == y).sum()
        self._tally[split].append((len(y), loss.detach(), correct))

    def _means(self, split: str) -> dict[str, float]:
        """Mean loss and accuracy over the samples of an epoch, on all ranks together."""
        if not self._tally[split]:
            return {}
        sizes, losses, correct = zip(*self._tally[split], strict=True)
        sizes = torch.tensor(sizes, dtype=torch.float64, device=self.device)
        losses = torch.stack(losses).double() * sizes
        sums = torch.stack([losses.sum(), torch.stack(correct).sum().double(), sizes.sum()])
        loss, num_correct, num = Ranks.of(self.trainer).sum(sums).tolist()
        return {f"{split}_loss": loss / num, f"{split}_acc": num_correct / num}

    def _refuse_broken_loss(self) -> None:
        """End the run if a training loss was nan or infinite: what follows it would be worthless."""
        losses = torch.stack([loss for _, loss, _ in self._tally["train"]])
        losses = Ranks.of(self.trainer).sum(losses)  # not finite where one rank's is not, and all ranks end together
        if torch.isfinite(losses).all():
            return
        step = int((~torch.isfinite(losses)).nonzero()[0])
        done = (self.global_step - len(losses) + step) / self.trainer.estimated_stepping_batches
        raise UserError(
            f"the training loss became {losses[step].item()} in epoch {self.current_epoch + 1}, step {step + 1} of "
            f"{len(losses)}, at a learning rate of {self.hparams.learning_rate * rate_factor(done, self.hparams):.3g}: "
            f"{AGAINST_DIVERGENCE}"
        )

    def _refuse_broken_weights(self) -> None:
        """End the run if its last step broke what no training loss has shown yet."""
        if not math.isfinite(self.values["test_loss"]):
            raise UserError(
                f"the test loss became {self.values['test_loss']} after epoch {self.current_epoch + 1}, trained at a "
                f"learning rate of {self._first_lr:.3g} at first: {AGAINST_DIVERGENCE}"
            )

    def _is_last_step(self) -> bool:
        return self.global_step == self.trainer.estimated_stepping_batches

    @torch.no_grad()
    def _look_ahead(self) -> None:
        """Move slow weights a little towards the fast ones, and the fast ones onto them; at the end keep the slow."""
        done = self.global_step / self.trainer.estimated_stepping_batches
        weight = 0.0 if self._is_last_step() else 1 - LOOKAHEAD_DECAY**LOOKAHEAD_STEPS * done**3
        growing = growing_names(self.network)
        state = {
            name: value
            for name, value in self.network.state_dict().items()
            if value.is_floating_point() and name not in growing
        }
        for name, fast in state.items():
            slow = self._slow_weights.setdefault(name, fast.clone())
            slow.lerp_(fast, weight)
            fast.copy_(slow)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["slow_weights"] = self._slow_weights

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._slow_weights = checkpoint["slow_weights"]


class SavedNetworks(Sequence[Classifier]):
    """The networks in checkpoints, {path: epoch}, in eval mode; refuses any that is not built like the first.

    Each is read when it is asked for, and the last one kept: `list` of them holds all.
    """

    def __init__(self, files: Mapping[str, int], shape: Sequence[int], num_classes: int, double: bool = False):
        self.paths, self.epochs = list(files), list(files.values())
        self._data = shape, num_classes, double
        self._trainer: Trainer | None = None
        self._held: tuple[int, Classifier] | None = None
        first = self[0]
        for i in range(1, len(self)):
            self._refuse_other(first, self[i])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Classifier:
        if self._held is None or self._held[0] != i:
            self._held = None  # its memory is the next one's
            self._held = i, self._read(self.paths[i], self.epochs[i])
        return self._held[1]

    def on(self, trainer: Trainer) -> "SavedNetworks":
        """The same, each on the trainer's device and in its number format."""
        other = copy.copy(self)
        other._trainer, other._held = trainer, None
        return other

    def _read(self, path: str, epoch: int) -> Classifier:
        content = read_checkpoint(path)
        if content["epoch"] + 1 != epoch:
            raise UserError(f"{path} was replaced meanwhile: measure a run when it has ended")
        module = Classifier.from_checkpoint(content, path, *self._data).eval()
        if self._trainer is None:
            return module
        return self._trainer.precision_plugin.convert_module(module.to(self._trainer.strategy.root_device))

    @staticmethod
    def _refuse_other(first: Classifier, other: Classifier) -> None:
        differing = [name for name in ALIKE if first.hparams[name] != other.hparams[name]]
        shapes = [fixed_shapes(module) for module in (first, other)]
        if not differing and shapes[0] != shapes[1]:
            differing = ["the shapes of their weights"]
        if differing:
            raise UserError(
                f"{other.source} is no network like {first.source}: they differ in {', '.join(differing)}; measure "
                "them one by one"
            )


def growing_names(module: nn.Module) -> set[str]:
    """The names, in its state dict, of what grows: of no fixed size, and not the optimizer's."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, layer in module.named_modules()
        if hasattr(layer, "await_batch")
        for name in layer.state_dict()
    }


def fixed_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes in its state dict, without what grows."""
    growing = growing_names(module)
    return {name: value.shape for name, value in module.state_dict().items() if name not in growing}


def new_classifier(flags: Mapping[str, Any], data: Data) -> Classifier:
    """An untrained network. Flags and data alone decide its weights."""
    module = Classifier.from_flags(flags, data.dataset.shape, data.dataset.num_classes)
    use_threads(flags, module.network)
    if flags["model"] == "CIFARNet":
        module.network.whiten(data.first_images())
    if flags["precision"] == "64-true":
        module.double()  # Lightning would do it after it has read a checkpoint's weights into the module
    if flags["channels_last"]:
        for parameter in module.network.parameters():
            if parameter.dim() == 4:  # a kernel with depth has no such format
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if flags["compile"]:
        module.network.compile()  # in place: names stay, and what measures call stays plain
    return module


def rate_factor(progress: float, hp: Mapping) -> float:
    """Learning rate relative to the highest, after a share `progress` of all steps.

    Rises linearly from `start_factor` to 1 over the share `warmup`; then stays (constant), or falls linearly or along
    half a cosine to `end_factor`.
    """
    if progress < hp["warmup"]:
        return hp["start_factor"] + (1 - hp["start_factor"]) * progress / hp["warmup"]
    rest = min((progress - hp["warmup"]) / max(1 - hp["warmup"], 1e-9), 1.0)
    height = {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[hp["schedule"]]
    return hp["end_factor"] + (1 - hp["end_factor"]) * height


def logits_over_views(network: nn.Module, x: Tensor) -> Tensor:
    """Logits averaged over an image (weight 1/2), two shifts by a pixel (1/4 each), all mirrored too."""
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    height, width = x.shape[2:]
    shifted = padded[:, :, :height, :width], padded[:, :, 2 : height + 2, 2 : width + 2]

    def mirrored(view: Tensor) -> Tensor:
        return (network(view) + network(view.flip(3))) / 2

    return mirrored(x) / 2 + (mirrored(shifted[0]) + mirrored(shifted[1])) / 4
