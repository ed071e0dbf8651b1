"""Shallow networks whose decisions can be read off their input gradients: parts, "and", "or", and "or" again.

Each looks for parts anywhere in the image, has a fixed number of units per class, and gives every class the soft
maximum of its own: no unit speaks for two classes. Numbers of parameters are those for 2 classes of 32 × 32 images with
3 channels.

Letters: B batch, C classes.
"""

from collections.abc import Sequence

from torch import nn

from blocks import Network, child_names, image_shape, named
from whitebox import (
    AugMax,
    GlobalMaxPool,
    GroupMean,
    GumbelConv2d,
    IterNorm,
    PadTo,
    Parallel,
    PercentileNorm,
    PerspectiveConv2d,
    PositiveConv2d,
    ProjectiveConv2d,
    Scale,
    ScaledConv2d,
    ShiftNorm,
    SoftMaxPool,
)

SIZE = 32  # pixels: smaller images get a border
DIRECTIONS = 120  # channels of the first layer
UNITS = 60  # per class
NORMS = {"batch": nn.BatchNorm2d, "iternorm": IterNorm, "percentile": PercentileNorm}
FIRST_CONVS = {
    "plain": nn.Conv2d,
    "scaled": ScaledConv2d,
    "perspective": PerspectiveConv2d,
    "projective": ProjectiveConv2d,
}


class WhiteBox(Network):
    """Blocks that lead from images to units, as many for each class; then the soft maximum of a class's units, scaled.

    With `branches` the blocks exist several times, side by side, and a class has the units of all of them; with
    `augmax` a unit is the largest over transformed copies of the image. In both cases the blocks are one, `units`.
    """

    readout = ("classes", "scale")

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        augmax: Sequence[str] | None = None,
        branches: int = 1,
        norm: str = "batch",
        first_conv: str = "plain",
    ) -> None:
        super().__init__()
        channels, *_ = image_shape(shape, type(self).__name__, smallest=8)
        self._first_conv, self._norm = FIRST_CONVS[first_conv], NORMS[norm]
        self.pad = PadTo(SIZE)
        copies = [self.blocks(channels, num_classes) for _ in range(branches)]
        if branches > 1 or augmax:
            units = Parallel(copies, num_classes) if branches > 1 else copies[0]
            self.units = AugMax(augmax, units) if augmax else units
            self.pooling, self.layers = (), ("units",)
        else:
            for name, block in copies[0].named_children():
                self.add_module(name, block)
        self.classes = SoftMaxPool(num_classes)
        self.scale = Scale()
        self.sequence = child_names(self)

    def blocks(self, channels: int, num_classes: int) -> nn.Sequential:
        """Named blocks from images (B, channels, H, W) to units (B, C · n), those of a class together."""
        raise NotImplementedError


class DisjConj(WhiteBox):
    """Or of ands of parts: 12 prototypes per class, each the mean of 5 parts that lie anywhere. 36,361 parameters."""

    layers = ("conv", "parts", "prototypes")
    pooling = ("parts", "prototypes")

    def blocks(self, channels: int, num_classes: int) -> nn.Sequential:
        """Parts are filters of 10 × 10, each at the place where it fits best."""
        num_prototypes = UNITS // 5 * num_classes
        num_parts = 5 * num_prototypes
        return named(
            conv=self._first_conv(channels, num_parts, 10, stride=2),
            parts=named(pool=GlobalMaxPool(), norm=self._norm(num_parts), flatten=nn.Flatten()),
            prototypes=GroupMean(num_prototypes),
        )


class Directions(WhiteBox):
    """Directions of 10 × 10 pixels, mixed by 60 units per class, each where it fits best. 266,881 parameters."""

    layers = ("conv1", "units")
    pooling = ("units",)

    def blocks(self, channels: int, num_classes: int) -> nn.Sequential:
        """Two convolutions with a GELU in between."""
        return named(
            conv1=self.directions(channels, nn.MaxPool2d(3), nn.GELU()),
            conv2=nn.Conv2d(DIRECTIONS, UNITS * num_classes, 4),
            units=named(pool=GlobalMaxPool(), flatten=nn.Flatten()),
        )

    def directions(self, channels: int, pool: nn.Module, nonlinearity: nn.Module, stride: int = 2) -> nn.Sequential:
        """The first layer."""
        conv = self._first_conv(channels, DIRECTIONS, 10, stride=stride)
        return named(conv=conv, pool=pool, norm=self._norm(DIRECTIONS), nonlinearity=nonlinearity)


class Positive(Directions):
    """Directions that only speak for a unit, never against it: positive weights on a ReLU. 266,881 parameters."""

    def blocks(self, channels: int, num_classes: int) -> nn.Sequential:
        """The units' own batch norm has a bias and no scale, so that they compete as they are."""
        num_units = UNITS * num_classes
        return named(
            conv1=self.directions(channels, nn.MaxPool2d(3), nn.ReLU()),
            conv2=PositiveConv2d(DIRECTIONS, num_units, 4, bias=False),
            units=named(pool=GlobalMaxPool(), norm=ShiftNorm(num_units), flatten=nn.Flatten()),
        )


class Gumbel(Directions):
    """Directions of which each of 30 units per class chooses `topk` at every place. 166,021 parameters."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        augmax: Sequence[str] | None = None,
        branches: int = 1,
        norm: str = "batch",
        first_conv: str = "plain",
        topk: int = 1,
        tau: str = "1:0.1",
    ) -> None:
        self._topk, self._tau = topk, float(tau.partition(":")[0])
        super().__init__(shape, num_classes, augmax, branches, norm, first_conv)

    def blocks(self, channels: int, num_classes: int) -> nn.Sequential:
        """A fine first layer, pooled coarsely to 3 × 3 places for images of 32 × 32."""
        pool = nn.MaxPool2d(5, stride=10, padding=2)
        return named(
            conv1=self.directions(channels, pool, nn.GELU(), stride=1),
            conv2=GumbelConv2d(DIRECTIONS, UNITS // 2 * num_classes, 3, topk=self._topk, tau=self._tau),
            units=named(pool=GlobalMaxPool(), flatten=nn.Flatten()),
        )
