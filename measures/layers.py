"""Layers by name: the activations of any module of any network, and which names a user's patterns mean.

A measured block of a network of this program is one such layer, and so is everything within the blocks and between
them: `conv1`, `layer1.0.bn2`, `layer1.0.relu:1`. A module that runs several times in a forward pass has an output for
each, numbered from 0.

Letters: B batch.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from measures.passes import Features, uncompiled
from networks import Network, dimensions, evaluating
from run.errors import UserError, WrongFlag
from whitebox import Variants

RESHAPING = (nn.Flatten, nn.Unflatten)  # their values are those of the layer before
CALL = ":"  # between a module's name and the number of its call


def hookable_layers(network: nn.Module) -> list[str]:
    """Names of all layers of a network that a hook can reach: its modules without children, in their order.

    What only reshapes is none of them, and where a container holds a single one, the container stands for it.

    >>> from torchvision.models import resnet18
    >>> layers = hookable_layers(resnet18())
    >>> len(layers), layers[:5], layers[-2:]
    (52, ['conv1', 'bn1', 'relu', 'maxpool', 'layer1.0.conv1'], ['avgpool', 'fc'])
    """
    return [_outermost(network, name) for name, part in network.named_modules() if name and _computes(part)]


def blocks_of(network: nn.Module) -> tuple[str, ...]:
    """Names of the blocks that a network of this program calls one after the other; none of what runs otherwise."""
    is_of_blocks = isinstance(network, Network) and type(network).forward is Network.forward
    return network.sequence if is_of_blocks else ()


def gives_variants(network: nn.Module, place: str) -> bool:
    """Whether a measured layer has features of several copies of the input, (B, V, d)."""
    blocks = blocks_of(network)
    if place not in blocks or place not in network.layers:
        return False
    return any(isinstance(network.get_submodule(name), Variants) for name in blocks[: blocks.index(place) + 1])


def features_of(network: nn.Module, layers: Sequence[str]) -> Features:
    """A function from a batch x to {layer: activations (B, …)} of the named modules, from one call of the network.

    Names are those of `named_modules`, of containers too. Of a module that runs several times in a call, `name` means
    all of its outputs, which come as `name:0`, `name:1`, …, and `name:1` the second one. Activations are as the module
    returned them, also where the network writes into them afterwards. Whether there are gradients, and in which mode
    the network is, is up to the caller; hooks and plain instead of compiled code are there for the call alone.

    It is an error if a module is not called, or returns no tensor.

    >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    >>> h = features_of(network, ["0", "1"])(torch.randn(5, 3))
    >>> torch.equal(h["0"].relu(), h["1"]), bool((h["0"] < 0).any())
    (True, True)
    """
    names = dict.fromkeys(name.partition(CALL)[0] for name in layers)
    modules = {name: _module(network, name) for name in names}
    overwritten: set[str] = set()  # what the network writes into after the hook: such outputs are copied

    def extract(x: Tensor) -> dict[str, Tensor]:
        outputs, spoilt = _called(network, modules, x, overwritten)
        if spoilt:  # from now on known
            overwritten.update(spoilt)
            outputs, _ = _called(network, modules, x, overwritten)
        return _wanted(outputs, layers)

    return extract


def features_of_layers(network: nn.Module, layers: Sequence[str] | None = None) -> Features:
    """The same for measured blocks and other layers alike. Blocks alone (default: all) need no hooks."""
    blocks = getattr(network, "layers", ())
    if layers is not None and not set(layers) <= set(blocks):
        return features_of(network, layers)

    def extract(x: Tensor) -> dict[str, Tensor]:
        h = network.feature_extractor(x)
        return {layer: h[layer] for layer in layers or h}

    return extract


def traced(network: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's output, and the layers' activations as it made that output from them: for derivatives of it.

    Names are those of `features_of`, of a module's single call: `name:1` where there are several.
    """
    names = dict.fromkeys(name.partition(CALL)[0] for name in layers)
    returned: list[Tensor] = []
    hook = network.register_forward_hook(lambda module, inputs, output: returned.append(output))
    try:
        outputs, _ = _called(network, {name: _module(network, name) for name in names}, x, (), passes_copies=True)
    finally:
        hook.remove()
    return returned[-1], {layer: _wanted(outputs, [layer])[layer] for layer in layers}


def shapes_of_layers(
    network: nn.Module, example: Tensor, layers: Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of one sample's activations at these layers (default: all hookable ones), in the order they run in.

    `example` is a batch (B, …). What does not run, or returns no tensor, is left out.
    """
    modules = {name: _module(network, name) for name in layers or hookable_layers(network)}
    with torch.no_grad():
        outputs, _ = _called(network, modules, example, ())
    return {name: tuple(h.shape[1:]) for name, h in outputs.items() if h is not None}


def by_module(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same with a line per module: the outputs of one that runs twice are `name:0, :1`, at the place of the first.

    >>> by_module({"relu:0": (4, 2), "conv": (4, 2), "relu:1": (4, 2)})
    {'relu:0, :1': (4, 2), 'conv': (4, 2)}
    """
    calls: dict[str, list[str]] = {}
    for name in shapes:
        calls.setdefault(name.partition(CALL)[0], []).append(name)
    others = {names[0]: "".join(f", {CALL}{name.partition(CALL)[2]}" for name in names[1:]) for names in calls.values()}
    return {name + others[name]: shape for name, shape in shapes.items() if name in others}


def example_of(network: nn.Module, shape: Sequence[int]) -> Tensor:
    """Two samples of this shape, all zeros, of the network's type and on its device."""
    return next(network.parameters()).new_zeros(2, *shape)


def chosen(patterns: Sequence[str] | None, network: Network, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The layers that `--layers` names, and their shapes, in network order; without patterns the measured blocks.

    A pattern that matches blocks means these. One that matches none means other layers: every hookable one that it
    matches.
    """
    blocks = dimensions(network, tuple(shape))
    if patterns is None:
        return blocks
    wanted = {pattern: [layer for layer in blocks if fnmatchcase(layer, pattern)] for pattern in patterns}
    if all(wanted.values()):
        return {layer: shape for layer, shape in blocks.items() if any(layer in found for found in wanted.values())}
    with evaluating(network):
        all_shapes = shapes_of_layers(
            network, example_of(network, shape), list(dict.fromkeys([*hookable_layers(network), *blocks]))
        )
    for pattern, found in wanted.items():
        found += [layer for layer in all_shapes if not found and is_match(layer, pattern)]
        if not found:
            raise WrongFlag(
                f"argument --layers: {pattern!r} matches none of the layers {', '.join(blocks)} and none of the others "
                f"that --list-layers all prints{perhaps_layers(pattern, all_shapes)}"
            )
    names = {name for found in wanted.values() for name in found}
    return {layer: shape for layer, shape in all_shapes.items() if layer in names}


def matching(patterns: Sequence[str] | None, layers: Sequence[str], flag: str) -> list[str]:
    """The layers, in their order, that match one of the shell patterns; without patterns all of them."""
    if patterns is None:
        return list(layers)
    for pattern in patterns:
        if not any(is_match(layer, pattern) for layer in layers):
            names = ", ".join(layers) + perhaps_layers(pattern, layers)
            raise WrongFlag(f"argument {flag}: {pattern!r} matches none of the layers {names}")
    return [layer for layer in layers if any(is_match(layer, pattern) for pattern in patterns)]


def is_match(layer: str, pattern: str) -> bool:
    """Whether a shell pattern means a layer; one that means a module means each of its outputs."""
    return fnmatchcase(layer, pattern) or fnmatchcase(layer.partition(CALL)[0], pattern)


def perhaps_layers(name: str, layers: Collection[str]) -> str:
    """`; perhaps layer1.0 or layer1.1`; nothing where no layer is called alike."""
    close = difflib.get_close_matches(name, layers, n=3)
    return f"; perhaps {' or '.join(close)}" if close else ""


def _computes(part: nn.Module) -> bool:
    return not any(part.children()) and not isinstance(part, RESHAPING)


def _outermost(network: nn.Module, name: str) -> str:
    """The name of the largest part of the network in which this module is the only one that computes."""
    while "." in name:
        container, _, _ = name.rpartition(".")
        if sum(map(_computes, network.get_submodule(container).modules())) > 1:
            break
        name = container
    return name


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        close = perhaps_layers(name, [other for other, _ in network.named_modules()])
        raise UserError(f"{type(network).__name__} has no layer {name!r}{close}.") from None


def _called(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    x: Tensor,
    copied: Collection[str],
    passes_copies: bool = False,
) -> tuple[dict[str, Tensor | None], list[str]]:
    """What the modules return in one call of the network, in the order of calls, and the names of what it overwrote.

    With `passes_copies` the network goes on with copies, so that it overwrites nothing.
    """
    calls: dict[str, list[tuple[Tensor | None, int]]] = {name: [] for name in modules}
    order: list[tuple[str, int]] = []

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, inputs: object, output: object) -> Tensor | None:
            h = output if isinstance(output, Tensor) else None
            h = h.clone() if h is not None and (name in copied or h.is_inference()) else h
            order.append((name, len(calls[name])))
            calls[name].append((h, _version(h)))
            return h.clone() if passes_copies and h is not None else None

        return keep

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        network(x)
    several = {name for name in modules if len(calls[name]) > 1}
    outputs = {f"{name}{CALL}{i}" if name in several else name: calls[name][i][0] for name, i in order}
    spoilt = [name for name in modules if any(_version(h) != version for h, version in calls[name])]
    return outputs, spoilt


def _version(h: Tensor | None) -> int:
    """Grows with every write into a tensor's memory."""
    return -1 if h is None or h.is_inference() else h._version


def _wanted(outputs: Mapping[str, Tensor | None], layers: Sequence[str]) -> dict[str, Tensor]:
    """The outputs that the names mean, in their order."""
    wanted: dict[str, Tensor] = {}
    for layer in layers:
        found = [name for name in outputs if layer in (name, name.partition(CALL)[0])]
        if not found:
            raise RuntimeError(f"The layer {layer!r} was not called.")
        for name in found:
            if outputs[name] is None:
                raise RuntimeError(f"What the layer {name!r} returns is no tensor.")
            wanted[name] = outputs[name]
    return wanted
