"""The networks: each an ordered sequence of named blocks; see `blocks.py` for what that makes possible.

Letters: B batch, C channels of an image, H × W its size, d dimension of a layer.
"""

import inspect
import math
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import convnext_tiny, resnet18
from torchvision.models.convnext import CNBlock

from blocks import Network, child_names, dimensions, evaluating, expand, image_shape, named
from run.errors import UserError
from slots import FeatureNorm, Slots
from whitebox import AugMax, Prototypes, Variants
from whitebox_networks import Directions, DisjConj, Gumbel, Positive

__all__ = ["NETWORKS", "Network", "build_network", "dimensions", "evaluating", "named"]

NONLINEARITIES = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}
STEMS = ("small", "imagenet")
SMALL_IMAGE = 64  # pixels: up to this size the stems made for 224 × 224 throw away too much of an image
LAYER_SCALE = 1e-6  # convnext_tiny's start of every residual branch
WHITENING_EPS = 5e-4  # keeps directions that hardly vary from being blown up to unit variance


class MLP(Network):
    """Linear layers with a non-linearity in between, for data of any shape.

    Measured after each non-linearity: `hidden1`, `hidden2`, … Without widths it is a linear classifier, whose
    penultimate layer is the flattened input: `flatten`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        widths: Sequence[int] = (512, 256),
        nonlinearity: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if nonlinearity not in NONLINEARITIES:
            names = ", ".join(NONLINEARITIES)
            raise UserError(f"-nl {nonlinearity!r} is not a known non-linearity; choose one of {names}.")
        self.flatten = nn.Flatten()
        sizes = [math.prod(shape), *widths]
        for i, (d_in, d_out) in enumerate(pairwise(sizes), start=1):
            norm = {"norm": nn.BatchNorm1d(d_out)} if batch_norm else {}
            block = named(linear=nn.Linear(d_in, d_out), **norm, nonlinearity=NONLINEARITIES[nonlinearity]())
            self.add_module(f"hidden{i}", block)
        self.output = nn.Linear(sizes[-1], num_classes)
        self.sequence = child_names(self)
        self.layers = self.sequence[1:-1] or ("flatten",)


class MNISTNet(Network):
    """T. Oikarinen's small convolutional network (train_mnist_fast): two convolutions, two linear layers."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(shape, "MNISTNet", smallest=12)
        self.conv1 = named(conv=nn.Conv2d(channels, 24, 5), pool=nn.MaxPool2d(2), relu=nn.ReLU())
        self.conv2 = named(conv=nn.Conv2d(24, 32, 3), pool=nn.MaxPool2d(2), relu=nn.ReLU())
        self.flatten = nn.Flatten()
        positions = math.prod(((size - 4) // 2 - 2) // 2 for size in (height, width))
        self.hidden = named(linear=nn.Linear(32 * positions, 256), relu=nn.ReLU())
        self.output = nn.Linear(256, num_classes)
        self.sequence = child_names(self)
        self.layers = ("conv1", "conv2", "hidden")


class CIFARNet(Network):
    """K. Jordan's network for CIFAR-10 (airbench, arXiv 2404.00498): whitening filters, then three groups.

    The fixed whitening filters come from data: call `whiten` before training.
    """

    pooling, readout = ("pool",), ("output", "scale")

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape(shape, "CIFARNet", smallest=25)
        self.whitening = Whitening(channels)
        self.gelu = nn.GELU()
        self.group1 = conv_group(self.whitening.out_channels, 64)
        self.group2 = conv_group(64, 256)
        self.group3 = conv_group(256, 256)
        self.pool = named(pool=nn.MaxPool2d(3), flatten=nn.Flatten())
        positions = math.prod((size - 1) // 8 // 3 for size in (height, width))
        self.output = UnitLinear(256 * positions, num_classes, bias=False)
        self.scale = Times(1 / 9)
        self.sequence = child_names(self)
        self.layers = ("group1", "group2", "group3", "pool")

    def whiten(self, images: Tensor) -> None:
        """Make the first layer whiten the 2 × 2 patches of these normalised training images (B, C, H, W)."""
        self.whitening.fit(images)


class ResNet(Network):
    """torchvision's resnet18, untrained, with its names and state dict keys.

    `stem="small"` (the default up to 64 × 64) is what the literature uses on CIFAR-10: a 3 × 3 convolution
    with stride 1 and no max-pool, so that the first residual blocks see the image at full resolution.
    """

    pooling, readout = ("avgpool",), ("fc",)

    def __init__(self, shape: tuple[int, ...], num_classes: int, stem: str | None = None) -> None:
        super().__init__()
        channels, *_ = image_shape(shape, "ResNet", smallest=1)
        for name, child in resnet18(weights=None, num_classes=num_classes).named_children():
            self.add_module(name, child)
        if chosen_stem(stem, shape) == "small":
            self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        elif channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.initialise(self.conv1)
        self.avgpool = named(pool=self.avgpool, flatten=nn.Flatten())
        residual = [block for i in (1, 2, 3, 4) for block in expand(self, f"layer{i}")]
        self.sequence = ("conv1", "bn1", "relu", "maxpool", *residual, "avgpool", "fc")
        self.layers = (*residual, "avgpool")

    @staticmethod
    def initialise(part: nn.Module) -> None:
        """As torchvision does: He initialisation by fan-out for convolutions, elsewhere torch's default."""
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        else:
            Network.initialise(part)


class ConvNeXt(Network):
    """torchvision's convnext_tiny, untrained, with its names and state dict keys.

    `stem="small"` (the default up to 64 × 64) puts a 3 × 3 convolution with stride 1 in place of the 4 × 4
    patches: a 32 × 32 image passes the four stages at 32, 16, 8 and 4 pixels as in ResNet. The patches would
    leave 8, 4, 2 and 1, where a 7 × 7 depthwise convolution sees mostly padding. The price is 16 times their
    multiplications, 1.45 G per CIFAR-10 image: a third of what the original spends on a 224 × 224 image.
    """

    pooling, readout = ("avgpool", "classifier.1"), ("classifier.2",)

    def __init__(self, shape: tuple[int, ...], num_classes: int, stem: str | None = None) -> None:
        super().__init__()
        stem = chosen_stem(stem, shape)
        channels, *_ = image_shape(shape, "ConvNeXt", smallest=8 if stem == "small" else 32)
        original = convnext_tiny(weights=None, num_classes=num_classes, layer_scale=LAYER_SCALE)
        for name, child in original.named_children():
            self.add_module(name, child)
        if stem == "small":
            self.features[0][0] = nn.Conv2d(channels, 96, 3, padding=1)
        elif channels != 3:
            self.features[0][0] = nn.Conv2d(channels, 96, 4, stride=4)
        self.initialise(self.features[0][0])
        stages = []
        for i in (0, 2, 4, 6):  # the stem or a downsampling step, then the residual blocks at that resolution
            stages += [f"features.{i}", *expand(self, f"features.{i + 1}")]
        residual = [name for name in stages if isinstance(self.get_submodule(name), CNBlock)]
        self.sequence = (*stages, "avgpool", *expand(self, "classifier"))
        self.layers = (*residual, "classifier.1")

    @staticmethod
    def initialise(part: nn.Module) -> None:
        """As torchvision does: truncated normal weights, zero biases, residual branches almost off."""
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        elif isinstance(part, CNBlock):
            nn.init.constant_(part.layer_scale, LAYER_SCALE)
        else:
            Network.initialise(part)


NETWORKS = {
    "MLP": MLP,
    "MNISTNet": MNISTNet,
    "CIFARNet": CIFARNet,
    "ConvNeXt": ConvNeXt,
    "ResNet": ResNet,
    "DisjConj": DisjConj,
    "Directions": Directions,
    "Gumbel": Gumbel,
    "Positive": Positive,
}
HEADS = ("linear", "prototypes", "slots")


def chosen_stem(stem: str | None, shape: tuple[int, ...]) -> str:
    """The stem asked for, or where none is: "small" up to 64 × 64 images, else "imagenet"."""
    if stem is None:
        return "small" if max(shape[1:], default=0) <= SMALL_IMAGE else "imagenet"
    if stem not in STEMS:
        raise UserError(f"--stem {stem!r} is not a known stem; choose one of {', '.join(STEMS)}.")
    return stem


class Whitening(nn.Conv2d):
    """2 × 2 convolution with fixed filters that whiten patches, each with its negative, and a learnt bias.

    Filters: v_j / sqrt(λ_j + ε) and their negatives, with v_j, λ_j the eigenvectors and eigenvalues of the
    patches' covariance (4C × 4C), ε = 5e-4. Until `fit` is called they are those of white patches.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 8 * channels, 2)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """An arbitrary orthonormal basis with its negatives; zero bias."""
        half = self.out_channels // 2
        nn.init.orthogonal_(self.weight[:half])
        with torch.no_grad():
            self.weight[half:] = -self.weight[:half]
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Take the filters from the patches of normalised images (B, C, H, W)."""
        eigenvalues, v = torch.linalg.eigh(patch_covariance(images))  # (4C,) ascending, (4C, 4C)
        filters = (v / (eigenvalues + WHITENING_EPS).sqrt()).T.flip(0)  # (4C, 4C)
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))


def patch_covariance(images: Tensor) -> Tensor:
    """Covariance (4C × 4C), float64, of all 2 × 2 patches of images (B, C, H, W)."""
    count, total, products = 0, 0, 0
    for chunk in images.split(500):  # in float64 all the patches of 5000 images would take half a gigabyte
        patches = F.unfold(chunk.double(), 2)  # (B, 4C, positions)
        count += patches[:, 0].numel()
        total = total + patches.sum((0, 2))
        products = products + (patches @ patches.mT).sum(0)
    mean = total / count
    # Normalised images have means of about 0, so float64 loses nothing in this difference.
    return products / count - torch.outer(mean, mean)


class DiracConv(nn.Conv2d):
    """3 × 3 convolution that starts by passing its input through; filters beyond that start at random."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        """The identity on the first `channels_in` filters, torch's default for the others."""
        super().reset_parameters()
        nn.init.dirac_(self.weight[: self.in_channels])


class UnitLinear(nn.Linear):
    """Linear map whose initial weights have standard deviation 1."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """torch's default, rescaled."""
        super().reset_parameters()
        self.weight.div_(self.weight.std())


class Times(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """x · factor, any shape."""
        return x * self.factor

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.factor:.4g}"


def conv_group(channels_in: int, channels_out: int) -> nn.Sequential:
    """One of CIFARNet's groups: halves height and width, leaves `channels_out` channels."""
    return named(
        conv1=DiracConv(channels_in, channels_out),
        pool=nn.MaxPool2d(2),
        norm1=batch_norm_without_scale(channels_out),
        gelu1=nn.GELU(),
        conv2=DiracConv(channels_out, channels_out),
        norm2=batch_norm_without_scale(channels_out),
        gelu2=nn.GELU(),
    )


def batch_norm_without_scale(channels: int) -> nn.BatchNorm2d:
    """CIFARNet's batch norm: a learnt bias, a scale that stays 1."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def build_network(
    model: str,
    shape: Sequence[int],
    num_classes: int,
    head: str = "linear",
    slot_scale: float = 30.0,
    slot_pool: str = "softmax",
    slot_norm: str = "none",
    **options: object,
) -> Network:
    """The network of that name with that head; of the options it takes those that it knows.

    With the option `augmax` slots get the features of all copies of a sample, not their maximum.
    """
    kind = NETWORKS[model]
    known = inspect.signature(kind).parameters
    network = kind(tuple(shape), num_classes, **{name: value for name, value in options.items() if name in known})
    if head == "prototypes":
        channels = width_before(network, shape, (*network.pooling, *network.readout))
        network.put_head(Prototypes(channels, num_classes), on_map=True)
    elif head == "slots":
        if options.get("augmax"):
            keep_variants(network, shape, options["augmax"])
        dimension = width_before(network, shape, network.readout)
        if slot_norm == "batch":
            network.put_last("norm", FeatureNorm(dimension))
        network.put_head(Slots(dimension, num_classes, slot_scale, slot_pool))
    elif head != "linear":
        raise UserError(f"--head {head!r} is not a known head; choose one of {', '.join(HEADS)}.")
    return network


def keep_variants(network: Network, shape: Sequence[int], transforms: Sequence[str]) -> None:
    """Have the last layer before the logits, AugMax or the raw input, give what it makes of all copies, (B, V, d)."""
    name = [name for name in network.sequence if name not in network.readout][-1]
    layer = network.get_submodule(name)
    is_raw = name == network.sequence[0] and isinstance(layer, nn.Flatten)
    if not (isinstance(layer, AugMax) or is_raw) or len(shape) != 3:
        raise UserError("--augmax with --head slots is for images in white-box networks, or as they are (-m MLP -w).")
    network.add_module(name, Variants(transforms, layer.units if isinstance(layer, AugMax) else layer))


def width_before(network: Network, shape: Sequence[int], blocks: Collection[str]) -> int:
    """Channels of the feature map, or the dimension of the vectors, that these last blocks get."""
    rest = [name for name in network.sequence if name not in blocks]
    x = next(network.parameters()).new_zeros(2, *shape)
    with torch.no_grad(), evaluating(network):
        for name in rest:
            x = network.get_submodule(name)(x)
    return x.shape[-1] if x.ndim == 3 else x.shape[1]  # of variants (B, V, d)
