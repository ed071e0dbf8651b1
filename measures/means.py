"""Class sums and class means of all layers, in float64, from one pass over the data.

Letters: N samples, B batch, C classes, R labelings, d dimension of a layer's flattened activations, L layers.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from measures.passes import Batch, joined
from run.errors import NotFinite, UserError
from run.ranks import ALONE, Ranks

PIECE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}  # in float64 2 MB, which a CPU's cache holds, and 256 MB
MAX_ONE_HOT_CLASSES = 32  # up to here a matrix product sums classes faster than adding row by row does
FLOAT32_EPS = torch.finfo(torch.float32).eps


class Means(NamedTuple):
    """One layer's mean over all samples, mu (d,), and M (C, d), whose rows are mu_c - mu, both float64.

    Rows of classes without samples are zero. Where `coincide`, float32 does not tell the class means apart. Under R
    labelings each of the three has a dimension R in front.
    """

    mu: Tensor
    M: Tensor
    coincide: Tensor


def class_means(
    activations: Iterable[Batch], num_classes: int, ranks: Ranks = ALONE
) -> tuple[dict[str, Means], Tensor]:
    """Every layer's means, and the class counts (C,), from one pass over the data."""
    sums, counts = class_sums(activations, num_classes, ranks)
    return {layer: centred(sums.pop(layer), counts) for layer in list(sums)}, counts


def centred(sums: Tensor, counts: Tensor) -> Means:
    """Means from class sums (C, d), or (R, C, d), whose memory becomes M: there may be gigabytes of it."""
    mu = sums.sum(-2) / counts.sum(-1, keepdim=True)  # (d,)
    M = sums.div_(counts.clamp(min=1)[..., None])  # still the class means
    floor = FLOAT32_EPS * torch.linalg.vector_norm(M, dim=(-2, -1))
    M.sub_(mu[..., None, :]).mul_((counts > 0)[..., None])
    return Means(mu, M, coincide=torch.linalg.vector_norm(M, dim=(-2, -1)) <= floor)


def class_sums(
    activations: Iterable[Batch], num_classes: int, ranks: Ranks = ALONE
) -> tuple[dict[str, Tensor], Tensor]:
    """Every layer's sums over classes, {layer: (C, d)} in float64, and the class counts (C,).

    Where a batch has R labels per sample, (B, R), the classes of the second ones follow those of the first, and so on:
    C stands for R times the number of classes.
    """
    sums: dict[str, Tensor] = {}
    counts, num_labels = 0, 0
    for batch, y in joined(activations):
        members = class_members(y, num_classes)
        counts = counts + members.sum(1)
        num_labels += y.numel()
        sums = sums or {layer: zeros(len(members), h) for layer, h in batch.items()}
        for layer in sums:
            add_to_classes(sums[layer], batch[layer], y, members)
        del batch  # its memory is the next one's
    if not num_labels:
        raise UserError("There is no sample to measure.")
    counts = ranks.sum(torch.cat([counts, counts.new_tensor([num_labels])]))
    counts, num_labels = counts[:-1], counts[-1]
    if counts.sum() != num_labels:
        raise UserError(f"There are labels outside 0 to {num_classes - 1}, the {num_classes} classes.")
    sums = {layer: ranks.sum(s) for layer, s in sums.items()}
    check_finite(sums)
    return sums, counts


def zeros(num_rows: int, h: Tensor) -> Tensor:
    """A float64 matrix as wide as h (B, d), on the same device."""
    return h.new_zeros(num_rows, h.shape[1], dtype=torch.float64)


def class_members(y: Tensor, num_classes: int) -> Tensor:
    """Which of the samples with labels y (B,) are of each class, (C, B); labels of no class are nowhere.

    Of labels (B, R) one set of classes below the other, (R · C, B).
    """
    columns = y.view(len(y), -1).T  # (R, B)
    return (columns[:, None] == torch.arange(num_classes, device=y.device)[:, None]).flatten(0, 1)


def check_same_counts(counts: Tensor, counts_again: Tensor) -> None:
    """The passes over the data must meet the same samples."""
    if not torch.equal(counts, counts_again):
        raise RuntimeError("The two passes over the data met different labels: `batches` must repeat itself.")


def add_to_classes(sums: Tensor, h: Tensor, y: Tensor, members: Tensor) -> None:
    """Add each row of h (B, d) to its classes' rows of sums (C, d); the same bits in every run, on GPUs too."""
    by_product = len(sums) <= MAX_ONE_HOT_CLASSES
    one_hot = members.double() if by_product else None  # (C, B)
    rows = () if by_product else class_rows(y, len(sums))
    for columns in pieces(h):
        piece = h[:, columns].double()
        if by_product:
            sums[:, columns].addmm_(one_hot, piece)
        for row in rows:  # (B,)
            if h.is_cuda:  # index_add_ would add in random order there
                sums[:, columns].index_put_((row,), piece, accumulate=True)
            else:
                sums[:, columns].index_add_(0, row, piece)


def class_rows(y: Tensor, num_rows: int) -> Tensor:
    """In which of the rows of `class_sums` each sample is added, (R, B); labels of no class: counts tell, later."""
    columns = y.view(len(y), -1).T  # (R, B)
    num_classes = num_rows // len(columns)
    return columns.clamp(0, num_classes - 1) + num_classes * torch.arange(len(columns), device=y.device)[:, None]


def pieces(h: Tensor) -> Iterator[slice]:
    """Slices of the columns of h (B, d) that are small enough for working copies in float64."""
    width = max(1, PIECE_ELEMENTS.get(h.device.type, 2**18) // max(1, len(h)))
    return (slice(start, start + width) for start in range(0, h.shape[1], width))


def check_finite(sums: dict[str, Tensor]) -> None:
    """A single infinite or nan activation makes its class's sum so, which is cheaper to look at."""
    finite = torch.stack([torch.linalg.vector_norm(s).isfinite() for s in sums.values()]).tolist()
    broken = [layer for layer, is_finite in zip(sums, finite, strict=True) if not is_finite]
    if broken:
        raise NotFinite(f"Activations are infinite or nan in layer {', '.join(broken)}.")
