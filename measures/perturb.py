"""What disturbs a network: noise on its input or on a layer's output, and each channel of a layer zeroed in turn.

Letters: N samples, B of a chunk, h a layer's activations (B, C, …), C its channels, S sizes of noise, R draws of it.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from measures.derivatives import View
from measures.layers import CALL, blocks_of, example_of, gives_variants
from measures.viewing import Viewing
from run.errors import NotFinite, UserError, WrongFlag
from run.expressions import INPUT, OUTPUT, Expression, ExpressionError, Name
from run.seeds import seed_from

if TYPE_CHECKING:
    from run.console import Console
    from run.run_folder import RunFolder

NOISE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ALWAYS = (0.0, 1.0)  # sizes: no noise, and as much as there is of what it is added to
DRAWS = 5

Change = Callable[[Tensor], Tensor]  # of a layer's output (B, …)


class Perturb(Viewing):
    """Logs how loss and accuracy change when a layer's output is disturbed, on the samples that `Viewing` sees.

    `places` are names of layers, those of `f(LAYER)`, `input` and `output` among them; without any, the input and the
    measured layers. Gaussian noise of standard deviation s · sqrt(mean h²), the mean over samples and units, is added
    for sizes s, the same noise in every epoch, and the results averaged over `draws` of it. A channel is what the
    first index of a sample's activations means, in a layer without space a neuron. Columns, with "drop" of the accuracy
    and "rise" of the loss against the network as it is:

    - `perturb/noise_drop/LAYER`, `perturb/noise_rise/LAYER` at s = 1
    - `perturb/channel_drop/LAYER`, `perturb/channel_rise/LAYER` with a channel zeroed, mean over channels
    - `perturb/channel_worst_drop/LAYER`, `perturb/channel_worst_rise/LAYER`, the largest

    Arrays: `sizes` (S,); `noise/LAYER/losses` and `…/accuracies` (R, S); `channels/LAYER/losses` and `…/accuracies`
    (C,); `rms/LAYER`; `clean` (2,), loss and accuracy of the network as it is.
    """

    name = "perturb"

    def __init__(
        self,
        places: Sequence[str] = (),
        *,
        noise: Sequence[float] = NOISE,
        draws: int = DRAWS,
        channels: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.places, self.sizes = list(dict.fromkeys(places)), sorted({*noise, *ALWAYS})
        self.draws, self.channels = draws, channels

    @classmethod
    def from_flags(cls, args: Namespace, common: Mapping[str, Any], folder: RunFolder, console: Console) -> Perturb:
        """The measure as the run's flags want it."""
        return cls(
            args.perturb,
            samples=args.look_samples,
            noise=args.perturb_noise,
            draws=args.perturb_draws,
            channels=args.perturb_channels,
            **common | {"sets": (args.look_set,)},
        )

    @staticmethod
    def refuse_layers(args: Namespace, layers: Collection[str], network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse names that are none of this network's layers."""
        try:
            view = View(network, example_of(network, shape), torch.zeros(2, dtype=torch.int64))
            for place in args.perturb or layers:
                shape_of(view, place)
        except UserError as error:
            sentence, *_ = str(error).splitlines()  # without the mark under a place in an expression
            raise WrongFlag(f"argument --perturb: {sentence}") from None

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """The columns, of the samples of the set."""
        view, _ = self.view_of(trainer, pl_module)
        places, seed = self.places or [INPUT, *self.layers], pl_module.hparams.get("seed")
        clean = torch.tensor(view.loss_and_accuracy(), dtype=torch.float64)
        sizes, values = torch.tensor(self.sizes, dtype=torch.float64), {}
        self.arrays = {"sizes": sizes, "clean": clean}
        for place, rms in root_mean_squares(view, places).items():
            noisy = torch.stack([with_noise(view, place, rms, self.sizes, seed_from("perturb", seed, place, draw))
                                 for draw in range(self.draws)])  # (R, S, 2)  # fmt: skip
            self.arrays |= {f"noise/{place}/losses": noisy[..., 0], f"noise/{place}/accuracies": noisy[..., 1]}
            self.arrays[f"rms/{place}"] = torch.tensor(rms, dtype=torch.float64)
            values |= changes("noise", place, (noisy - clean)[:, self.sizes.index(1.0)].mean(0))
            if self.channels:
                lacking = without_channels(view, place)
                losses, accuracies = lacking.T
                self.arrays |= {f"channels/{place}/losses": losses, f"channels/{place}/accuracies": accuracies}
                values |= changes("channel", place, (lacking - clean).mean(0))
                worst = torch.stack([losses.max(), accuracies.min()])
                values |= changes("channel_worst", place, worst - clean)
        self.settings = {"samples": len(view), "dtype": str(view.dtype), "places": places, "draws": self.draws}
        return values


def changes(of: str, place: str, change: Tensor) -> dict[str, float]:
    """The columns of a change of loss and accuracy (2,)."""
    rise, gain = change.tolist()
    return {f"perturb/{of}_drop/{place}": -gain, f"perturb/{of}_rise/{place}": rise}


def shape_of(view: View, place: str) -> tuple[int, ...]:
    """The shape of one sample's activations; refuses what is no layer, or has no channels."""
    name = Name("f", place)
    shape = view.shape_of(name, Expression(name))
    if not shape:
        raise ExpressionError(f"{place} has no channels: it is one number a sample", place, 0)
    return shape


def root_mean_squares(view: View, places: Sequence[str]) -> dict[str, float]:
    """sqrt(mean h²) of each place, over samples and units."""
    names = [Name("f", place) for place in places]
    sums = torch.zeros(len(places), dtype=torch.float64, device=view.device)
    with view.at_rest(), torch.no_grad():
        for part in view.chunks():
            _, found = view.run(part, names)
            sums += torch.stack([found[place].double().square().flatten(1).mean(1).sum() for place in places])
    found = dict(zip(places, (view.total(sums) / len(view)).sqrt().tolist(), strict=True))
    for place, rms in found.items():
        if not torch.tensor(rms).isfinite():
            raise NotFinite(f"{place} has activations that are infinite or nan.")
    return found


def with_noise(view: View, place: str, rms: float, sizes: Sequence[float], seed: int) -> Tensor:
    """Mean loss and accuracy, (S, 2), with one draw of noise at a place, in each of these sizes relative to `rms`."""
    shape = shape_of(view, place)

    def logits(part: slice) -> Iterator[Tensor]:
        z = standard_normal(part, shape, seed).to(view.x)
        with_change = resumed(view.network, place, view.x[part])
        for size in sizes:
            yield with_change(lambda h, s=size * rms: h + s * z if s else h)

    return view.losses_and_accuracies(len(sizes), logits).cpu()


def standard_normal(part: slice, shape: Sequence[int], seed: int) -> Tensor:
    """Noise (B, …) for some samples, a generator for each: it is the same whatever chunks they come in."""
    generator = torch.Generator()
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(seed_from(seed, sample)))
                        for sample in range(part.start, part.stop)])  # fmt: skip


def without_channels(view: View, place: str) -> Tensor:
    """Mean loss and accuracy, (C, 2), with each channel of a place zeroed in turn, in all variants of a sample."""
    axis = 2 if gives_variants(view.network, place) else 1
    num = shape_of(view, place)[axis - 1]

    def logits(part: slice) -> Iterator[Tensor]:
        with_change = resumed(view.network, place, view.x[part])
        for c in range(num):
            index = torch.tensor([c], device=view.device)
            yield with_change(lambda h, index=index: h.index_fill(axis, index, 0.0))

    return view.losses_and_accuracies(num, logits).cpu()


def resumed(network: nn.Module, place: str, x: Tensor) -> Callable[[Change], Tensor]:
    """A function from a change of a layer's output to the network's logits of x, to the bit those of `changed`.

    Of a network of blocks, what comes before the block with that layer runs but once.
    """
    if place == OUTPUT:
        logits = network(x)
        return lambda change: change(logits)
    blocks = [network.get_submodule(name) for name in blocks_of(network)]
    first = 0 if place == INPUT else index_of_block(network, place, blocks)
    if not first:
        return lambda change: changed(network, place, x, change)
    for block in blocks[:first]:
        x = block(x)

    def rest(h: Tensor) -> Tensor:
        h = h.clone()  # a block may write into its input
        for block in blocks[first:]:
            h = block(h)
        return h

    return lambda change: with_hook(network, place, change, lambda: rest(x))


def index_of_block(network: nn.Module, place: str, blocks: Sequence[nn.Module]) -> int:
    """Which of the blocks has a layer in it, the first if several have; 0 also where none has."""
    layer = network.get_submodule(place.partition(CALL)[0])
    return next((i for i, block in enumerate(blocks) if any(part is layer for part in block.modules())), 0)


def changed(network: nn.Module, place: str, x: Tensor, change: Change) -> Tensor:
    """The network's logits of x where the output of one of its layers is changed on the way."""
    if place == INPUT:
        return network(change(x))
    if place == OUTPUT:
        return change(network(x))
    return with_hook(network, place, change, lambda: network(x))


def with_hook(network: nn.Module, place: str, change: Change, run: Callable[[], Tensor]) -> Tensor:
    """What `run` returns while the output of a layer, in that call of it which the place names, is changed."""
    name, _, call = place.partition(CALL)
    calls = itertools.count()

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        return change(output) if next(calls) == int(call or 0) else None

    handle = network.get_submodule(name).register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()
