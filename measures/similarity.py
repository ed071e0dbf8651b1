"""How alike layers are, by linear CKA, and how alike the subspaces in which the classes vary.

Letters: N samples, B batch, d dimension of a layer's flattened activations, L layers, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from measures.reduction import Matrix, directions, labels_of, matrix, without_mean
from run.errors import UserError
from run.seeds import seed_from

BATCH_SIZE = 256  # samples whose kernels are compared at a time
LEAST = 4  # samples for which the debiased estimate exists
SMALL_CLASS = 256  # min(n_c, d) up to which a class's directions are exact


def cka(x: Matrix, y: Matrix, batch_size: int = BATCH_SIZE, seed: int = 0) -> float:
    """Linear CKA of two layers' activations of the same N samples, (N, …) each, debiased: 1 of a layer with itself.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the kernels K = X Xᵀ, L = Y Yᵀ, with the unbiased estimate of Song
    et al. 2012: with K̃, L̃ the kernels without their diagonals, n samples,

    HSIC = (tr(K̃ L̃) + 1ᵀK̃1 1ᵀL̃1 / ((n - 1)(n - 2)) - 2/(n - 2) 1ᵀK̃L̃1) / (n (n - 3))

    averaged over batches of about `batch_size` samples (Nguyen, Raghu & Kornblith 2021), into which `seed` deals them.
    Of all samples at once where that is at least N. Invariant under rotations and scale; 0 on average for
    independent Gaussian features, so it may be negative. nan where a layer is constant.

    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> round(cka(x, -3 * x.flip(1) + 7), 6)
    1.0
    """
    return float(cka_matrix([x, y], batch_size, seed)[0, 1])


def cka_matrix(layers: Sequence[Matrix], batch_size: int = BATCH_SIZE, seed: int = 0) -> Tensor:
    """CKA of every layer with every other, (L, L), float64, on the CPU."""
    layers = [matrix(x) for x in layers]
    [num_samples, *others] = dict.fromkeys(map(len, layers))
    if others:
        raise UserError(f"CKA compares layers on the same samples; there are {num_samples} and {others[0]} of them.")
    if min(num_samples, batch_size) < LEAST:
        raise UserError(f"CKA needs at least {LEAST} samples, of a batch too; there are {num_samples}.")
    generator = torch.Generator().manual_seed(seed_from("cka", seed))  # a file may have its classes one by one
    order = torch.randperm(num_samples, generator=generator)
    hsic = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for indices in order.tensor_split(max(1, num_samples // batch_size)):
        kernels = torch.stack([debiased_kernel(x[indices.to(x.device)]).flatten() for x in layers])  # (L, B²)
        hsic += (kernels @ kernels.T).cpu() / (len(indices) * (len(indices) - 3))
    scale = hsic.diagonal().sqrt()
    return hsic / (scale[:, None] * scale)


def debiased_kernel(x: Tensor) -> Tensor:
    """The kernel of x (B, d) such that sums of products of two of them are B (B - 3) HSIC, (B, B) in float64.

    It is the U-centred K̃: K̃_ij - (r_i + r_j)/(B - 2) + t/((B - 1)(B - 2)) off the diagonal, with its row sums r and its
    sum t. The activations' mean, which changes nothing, goes before they are multiplied.
    """
    n = len(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(0, dtype=torch.float64).to(x)
    x = x.double() if x.is_cuda else x  # there products of float32 may be TF32
    K = (x @ x.T).double()
    K.fill_diagonal_(0)
    r = K.sum(1)
    K -= (r[:, None] + r) / (n - 2) - r.sum() / ((n - 1) * (n - 2))
    return K.fill_diagonal_(0)


def alignment(activations: Matrix, labels: Matrix, k_a: int = 10, *, num_classes: int | None = None) -> Matrix:
    """How alike the subspaces are in which the classes vary, (C, C) in [0, 1].

    V_c are the first `k_a` right singular vectors of class c's centred activations (d × k_a); the entry of c and c' is
    ‖V_cᵀ V_c'‖_F² / k_a, the mean squared cosine of the principal angles. Random subspaces give k_a / d. Of a class
    that varies in fewer directions these are taken, and the mean is over as many angles as there are; a class
    without two different samples has nan.
    """
    A = matrix(activations)
    y = labels_of(labels, A)
    bases = [class_directions(A[y == c], k_a) for c in range(num_classes or int(y.max()) + 1)]
    sizes = torch.tensor([len(V) for V in bases])
    parts = (torch.cat(bases) @ torch.cat(bases).T).cpu().square().split(sizes.tolist())
    sums = torch.stack([torch.stack([part.sum() for part in row.split(sizes.tolist(), 1)]) for row in parts])
    aligned = sums / torch.minimum(sizes[:, None], sizes)  # 0/0 where a class has none
    return aligned if isinstance(activations, Tensor) else aligned.numpy()


def class_directions(A: Tensor, k_a: int) -> Tensor:
    """The first right singular vectors of a class's centred activations, in rows, (k_a, d) or fewer."""
    centred = without_mean(A) if len(A) > 1 else None
    if centred is None or not centred.energy:
        return A.new_zeros(0, A.shape[1], dtype=torch.float64)
    return directions(centred, 1, k_a, exact_limit=SMALL_CLASS).components


def mean_over_pairs(aligned: Tensor) -> float:
    """The mean of what two different classes have, nan if no two have any."""
    pairs = aligned[~torch.eye(len(aligned), dtype=torch.bool)]
    pairs = pairs[pairs.isfinite()]
    return float(pairs.mean()) if len(pairs) else math.nan
