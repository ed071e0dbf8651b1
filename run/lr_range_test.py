"""The learning-rate range test (L. N. Smith, 2017): raise the rate at every step and look where the loss turns.

Lightning's `Tuner.lr_find` is not used: it gives all parameter groups one rate, where ours may differ by a factor; it
keeps only a smoothed loss, whose bias it corrects wrongly; and its suggestion follows the noise at tiny rates. Here
the loss of every step is kept, smoothed with an exact correction, and a tenth of the rate at its minimum is taken:
far enough below the edge of divergence, and much the same from seed to seed.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from run.between_steps import between_steps
from run.errors import UserError
from run.ranks import Ranks
from run.record import EpochTable

COLUMNS = ("step", "lr", "loss", "smoothed")
STEPS = 100
LOWEST, HIGHEST = 1e-6, 10.0
SMOOTHING = 0.9
DIVERGED = 4.0  # times the lowest smoothed loss: from here on the rate is too high
SAFETY = 10.0  # how far below the rate at the minimum the chosen one lies


class RisingRate(Callback):
    """Multiplies the learning rate by the same factor at every step and keeps (rate, loss) until the loss diverges."""

    def __init__(self, base_rate: float):
        self.base_rate = base_rate
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        rate = LOWEST * (HIGHEST / LOWEST) ** (len(self.rates) / (STEPS - 1))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["initial_lr"] / self.base_rate
        self.rates.append(rate)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: dict, *_: object) -> None:
        ranks = Ranks.of(trainer)
        self.losses.append(float(ranks.sum(outputs["loss"].double())) / ranks.num)
        trainer.should_stop = diverged(self.losses)


def lr_range_test(
    module: LightningModule, data: LightningDataModule, folder: Path, new_trainer: Callable[..., Trainer]
) -> float:
    """The learning rate to train with, found on `module`, which is spent thereby; table and figure lie in `folder`."""
    module.hparams.keep_going = True  # until the loss diverges is how far the test goes
    ramp = RisingRate(module.hparams.learning_rate)
    options = {"max_epochs": -1, "max_steps": STEPS, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = new_trainer(callbacks=[ramp, *between_steps(module)], **options)
    trainer.fit(module, datamodule=data)
    smooth = smoothed(ramp.losses)
    steps = range(1, len(smooth) + 1)
    rows = zip(steps, ramp.rates, ramp.losses, smooth, strict=True)
    if trainer.is_global_zero:
        EpochTable(folder / "lr_range_test.csv", COLUMNS).add(*(dict(zip(COLUMNS, row, strict=True)) for row in rows))
    return chosen_rate(ramp.rates, smooth)


def smoothed(losses: Sequence[float], beta: float = SMOOTHING) -> list[float]:
    """Exponential moving average s_t of the losses, divided by its weights' sum 1 - β^(t+1)."""
    averages, average = [], 0.0
    for t, loss in enumerate(losses):
        average = beta * average + (1 - beta) * loss
        averages.append(average / (1 - beta ** (t + 1)))
    return averages


def diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the smoothed loss far above its lowest."""
    if not math.isfinite(losses[-1]):
        return True
    smooth = smoothed(losses)
    return smooth[-1] > DIVERGED * min(smooth)


def chosen_rate(rates: Sequence[float], smooth: Sequence[float]) -> float:
    """A tenth of the rate at the minimum of the smoothed loss, to three digits.

    The minimum must lie inside: a loss that never falls below its start, or still falls at the end, chooses nothing.
    """
    finite = [loss if math.isfinite(loss) else math.inf for loss in smooth]
    lowest = min(range(len(finite)), key=finite.__getitem__)
    falls = finite[lowest] < 0.99 * finite[0]
    if not falls or lowest == STEPS - 1:
        where = "does not fall" if not falls else "still falls at the highest rate"
        raise UserError(
            f"--lr-range-test: the loss {where} between the rates {rates[0]:g} and {rates[-1]:g}, so there is no "
            "minimum to choose from: set -lr/--learning-rate by hand"
        )
    return float(f"{rates[lowest] / SAFETY:.3g}")
