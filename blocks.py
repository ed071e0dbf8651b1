"""A network as a named sequence of blocks, which any layer splits into encoder and decoder.

A measured layer is a block's output, its encoder the blocks up to it, its decoder the blocks after it. Blocks
are called one by one and nothing hooks into them, so a compiled network is measured like any other.

Letters: B batch.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from run.errors import UserError


class Network(nn.Module):
    """A classifier made of named blocks that run one after the other.

    A subclass builds its blocks as submodules and sets the two tuples. A block after a measured layer must
    not write into its input: that keeps measured activations, and those decoders train on, as they were.
    """

    sequence: tuple[str, ...]  # dotted names of the blocks, in the order in which they run
    layers: tuple[str, ...]  # those whose output is measured, the penultimate layer last
    pooling: tuple[str, ...] = ()  # those that make a vector of the last feature map, if there is a map
    readout: tuple[str, ...] = ("output",)  # those that make logits of that vector, the last of all

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of a batch."""
        for name in self.sequence:
            x = self.get_submodule(name)(x)
        return x

    def feature_extractor(self, x: Tensor) -> dict[str, Tensor]:
        """Activations of all measured layers, from one forward pass that ends at the last of them."""
        features = {}
        for name in self._up_to(self.layers[-1]):
            x = self.get_submodule(name)(x)
            if name in self.layers:
                features[name] = x
        return features

    def get_encoder_decoder(self, layer: str) -> tuple[nn.Sequential, nn.Sequential]:
        """The network up to and including a measured layer, and the rest of it; both share its parameters."""
        if layer not in self.layers:
            names = ", ".join(self.layers)
            raise UserError(f"{type(self).__name__} has no layer {layer!r} to measure; it has {names}.")
        before = self._up_to(layer)
        return self._part(before), self._part(self.sequence[len(before) :])

    def put_head(self, head: nn.Module, *, on_map: bool = False) -> None:
        """Put a new block, `head`, in place of those that make logits and, with `on_map`, those that pool the map."""
        gone = (*self.pooling, *self.readout) if on_map else self.readout
        for name in gone:
            parent, _, child = name.rpartition(".")
            delattr(self.get_submodule(parent), child)
        self.add_module("head", head)
        self.reset(head)
        rest = tuple(name for name in self.sequence if name not in gone)
        self.sequence = (*rest, "head")
        self.layers = (*(name for name in self.layers if name in rest[:-1]), rest[-1])

    def put_last(self, name: str, block: nn.Module) -> None:
        """Put a new block before those that make logits."""
        self.add_module(name, block)
        at = len(self.sequence) - len(self.readout)
        self.sequence = (*self.sequence[:at], name, *self.sequence[at:])

    def trains_on_one(self, shape: tuple[int, ...]) -> bool:
        """Whether a single sample of this shape is enough for a training step.

        It is not where batch norm, or its kin, sees but one value of a channel in it: in an MLP, or in a map of 1 × 1.
        """
        is_alone: list[bool] = []

        def look(norm: nn.Module, args: tuple[Tensor]) -> None:
            is_alone.append(args[0][0, 0].numel() == 1)

        norms = [part for part in self.modules() if hasattr(part, "running_mean")]
        hooks = [norm.register_forward_pre_hook(look) for norm in norms]
        if hooks:
            with torch.no_grad(), evaluating(self):
                self.forward(next(self.parameters()).new_zeros(1, *shape))
        for hook in hooks:
            hook.remove()
        return not any(is_alone)

    def reset(self, module: nn.Module) -> None:
        """Give (a copy of) a part of this network new parameters and statistics, drawn as at construction."""
        for part in module.modules():
            self.initialise(part)

    @staticmethod
    def initialise(part: nn.Module) -> None:
        """Initialise what this module itself owns, not its children; torch's defaults unless overridden."""
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()

    def _up_to(self, layer: str) -> tuple[str, ...]:
        return self.sequence[: self.sequence.index(layer) + 1]

    def _part(self, names: Sequence[str]) -> nn.Sequential:
        blocks = {name.replace(".", "_"): self.get_submodule(name) for name in names}  # torch forbids dots
        part = named(**blocks)
        part.training = self.training  # the flag of the new container alone: the blocks have theirs
        return part


def dimensions(network: Network, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of every measured layer's activations for one sample of the given shape."""
    weight = next(network.parameters())
    with torch.no_grad(), evaluating(network):
        features = network.feature_extractor(weight.new_zeros(2, *shape))
    return {layer: tuple(h.shape[1:]) for layer, h in features.items()}


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule's own mode again, for some may be frozen in eval mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence of modules with names instead of numbers."""
    return nn.Sequential(OrderedDict(modules))


def child_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's direct submodules, in the order of their creation."""
    return tuple(name for name, _ in module.named_children())


def expand(network: nn.Module, name: str) -> list[str]:
    """The dotted names of the direct submodules of a submodule."""
    return [f"{name}.{child}" for child in child_names(network.get_submodule(name))]


def image_shape(shape: tuple[int, ...], model: str, smallest: int) -> tuple[int, int, int]:
    """Channels, height and width of the samples, if this model can work on them."""
    if len(shape) != 3:
        size = " × ".join(map(str, shape))
        raise UserError(f"-m {model} needs images, but the samples here are vectors ({size}); use -m MLP.")
    channels, height, width = shape
    if min(height, width) < smallest:
        needs = f"images of at least {smallest} × {smallest} pixels"
        raise UserError(f"-m {model} needs {needs}, but these are {height} × {width}.")
    return channels, height, width
