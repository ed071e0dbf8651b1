"""Gradients of a network's classes and units by its input, and how far one can read decisions off them.

Letters: B samples, C classes, U units, n inputs, *shape that of an input, H × W of an image, ĝ = g / ‖g‖.

A gradient that is zero has no direction: its cosine with any other counts as 0, and it has no roughness (nan).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from measures.derivatives import View, gradients
from run.expressions import INPUT, OUTPUT, Expression, Name


def input_gradients(network: nn.Module, x: Tensor, layer: str = OUTPUT, units: Tensor | None = None) -> Tensor:
    """g_c(x) = ∂f_c/∂x of each sample x (B, *shape) and each class c, (B, C, *shape): f are the logits.

    With a `layer`, one of those of `features_of`, of each of its units instead, or of those that `units` (U,) chooses,
    (B, U, *shape). A unit is what the first index of a sample's activations means; of a map it is the neuron in the
    middle, at (h // 2, w // 2). The network is in eval mode meanwhile and afterwards as it was. Of a linear network,
    the rows of its matrix:

    >>> network = nn.Linear(3, 2)
    >>> g = input_gradients(network, torch.randn(5, 3))
    >>> g.shape, torch.equal(g[4], network.weight)
    (torch.Size([5, 2, 3]), True)
    """
    view = View(network, x, torch.zeros(len(x), dtype=torch.int64))
    return gradients_at(view, layer, torch.arange(num_units(view, layer)) if units is None else units)


def num_units(view: View, layer: str) -> int:
    """How many units a layer has; a number without an index is one."""
    name = Name("f", layer)
    return (*view.shape_of(name, Expression(name)), 1)[0]


def gradients_at(view: View, layer: str, units: Tensor) -> Tensor:
    """The gradients of these units (U,) of a layer on the view's samples, (B, U, *shape), on all ranks."""
    g = torch.zeros(len(view), len(units), *view.x.shape[1:], dtype=view.dtype, device=view.device)
    indices = units.tolist()
    with view.at_rest():
        for part in view.chunks(-(-len(view) // view.ranks.num)):
            _, found = view.run(part, [Name("f", INPUT), Name("f", layer)])
            values = in_the_middle(found[layer])
            for i, unit in enumerate(indices):  # samples do not mix: the gradient of a sum has each one's own
                is_last = i == len(indices) - 1
                [g[part, i]] = gradients(values[:, unit].sum(), [found[INPUT]], keep=not is_last)
    return view.total(g)


def in_the_middle(h: Tensor) -> Tensor:
    """(B, U, …) → (B, U): of maps the middle; (B,) → (B, 1)."""
    h = h[:, None] if h.dim() == 1 else h
    return h[(slice(None), slice(None), *(size // 2 for size in h.shape[2:]))]


def directions(g: Tensor, num_axes: int = 2) -> Tensor:
    """ĝ of gradients whose first axes count them, flattened and in float64, (B, U, D); zero where g is."""
    g = g.flatten(num_axes).double()
    norms = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    return g / norms.where(norms > 0, 1.0)


def mean_cosine(total: Tensor, num: int, num_not_zero: Tensor) -> Tensor:
    """The mean cosine over ordered pairs of different ones among `num` directions, from their sum (…, D).

    (‖Σ ĝ_i‖² − m) / (num (num − 1)), m = Σ ‖ĝ_i‖² those that are not zero; nan for fewer than two.
    """
    pairs = num * (num - 1) or float("nan")
    return (total.square().sum(-1) - num_not_zero) / pairs


def stability(g: Tensor) -> Tensor:
    """How little the gradient of a class or unit depends on the input, (n, U, *shape) → (U,), float64.

    The mean cosine between the gradients at two different inputs, (‖Σ_i ĝ_i‖² − m) / (n (n − 1)): m of the n gradients
    are not zero, as a rule all. At most 1, which a linear model has; 0 for directions that have nothing in common, as
    for unrelated ones in many dimensions; at least −1 / (n − 1). Three inputs, two of them alike:

    >>> g = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])[:, None]  # (3, 1, 2)
    >>> stability(g)  # cosines 1, 0, 0
    tensor([0.3333], dtype=torch.float64)
    """
    return mean_cosine(directions(g).sum(0), len(g), is_not_zero(g).sum(0))


def separation(g: Tensor) -> Tensor:
    """How differently the classes look at an input: 1 − mean cos(g_c(x), g_c'(x)), (n, C, *shape) → (), float64.

    The mean is over inputs and pairs c ≠ c'. 0 where all classes have the same gradient, 1 where they are orthogonal,
    and at most 1 + 1 / (C − 1), where their directions sum to zero: 2 for two classes that are opposite.

    >>> separation(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]]))
    tensor(2., dtype=torch.float64)
    """
    return 1 - mean_cosine(directions(g).sum(1), g.shape[1], is_not_zero(g).sum(1)).mean()


def agreement(g: Tensor, other: Tensor) -> Tensor:
    """The cosine between the mean gradients at two kinds of inputs, (n, U, *shape) and (n', U, *shape) → (U,)."""
    return (directions(g.double().mean(0), 1) * directions(other.double().mean(0), 1)).sum(-1)


def roughness(g: Tensor) -> Tensor:
    """The share of an image's 2-D Fourier energy above half the Nyquist frequency, (…, channels, H, W) → (…), float64.

    Frequencies u / H and v / W are in cycles per pixel, −H/2 ≤ u < H/2 and likewise v; above means that their radius
    √((u/H)² + (v/W)²) exceeds 1/4, half of Nyquist's 1/2. Energies |F|² are added over channels, the mean (u = v = 0)
    belongs to all. What is white has `white_roughness(H, W)`, about 0.8; smooth images are near 0, and a chessboard of
    single pixels has 1:

    >>> chessboard = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    >>> roughness(chessboard[None]), roughness(chessboard[None] + 1)  # its mean takes half of the energy
    (tensor(1., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    energy = torch.view_as_real(torch.fft.fft2(g.double())).square().sum((-4, -1))  # (…, H, W)
    is_high = high_frequencies(*g.shape[-2:]).to(energy.device)
    return (energy * is_high).sum((-2, -1)) / energy.sum((-2, -1))


def high_frequencies(height: int, width: int) -> Tensor:
    """Which places (H, W) of a 2-D Fourier transform lie above half the Nyquist frequency, by whole numbers."""
    u, v = ((torch.arange(size) + size // 2) % size - size // 2 for size in (height, width))
    return 16 * ((u[:, None] * width) ** 2 + (v * height) ** 2) > (height * width) ** 2


def white_roughness(height: int, width: int) -> float:
    """The exact mean roughness of white Gaussian noise: the share of frequencies above half of Nyquist's.

    Its direction is uniform on the sphere, so that a space of k of the N dimensions has k / N of the energy on average.

    >>> white_roughness(28, 28), white_roughness(32, 32)
    (0.8099489795918368, 0.8076171875)
    """
    return high_frequencies(height, width).double().mean().item()


def is_not_zero(g: Tensor) -> Tensor:
    """Which gradients have a direction, (B, U)."""
    return g.flatten(2).ne(0).any(-1)


def first_filters(network: nn.Module, shape: tuple[int, ...]) -> Tensor | None:
    """The weights of the first layer that takes an input of this shape, a filter each, (F, *shape of a filter).

    Of a convolution (F, channels, k, k), of a linear map its rows as inputs (F, *shape); None where there is neither.
    """
    size = torch.Size(shape).numel()
    for part in network.modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if weight.dim() == 2 and weight.shape[1] == size:
            return weight.detach().unflatten(1, shape)
        if weight.dim() == 4 and len(shape) == 3 and weight.shape[1] == shape[0]:
            return weight.detach()
    return None
