"""Rank: over how many directions a layer's activations spread, and its class means.

Letters: N samples, B batch, C classes, d dimension of a layer's flattened activations.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from measures.means import FLOAT32_EPS, Means, check_same_counts, class_means, class_members
from measures.measure import Measure
from measures.passes import Activations, Features, joined
from measures.spectra import default_tolerance, ranks_of, spectrum
from run.ranks import ALONE, Ranks

EXACT_LIMIT = 4096  # an N × N or d × d matrix of this size has 134 MB; its eigenvalues take 10 s on two CPU cores
CENTRED_ELEMENTS = 2**23  # of a batch, copied to float64 at once: 67 MB
COLUMN_ELEMENTS = 2**26  # of columns over all samples, held at once: 268 MB in float32


def rank(
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    cache_bytes: int | None = None,
    *,
    tolerance: float | None = None,
    exact_limit: int = EXACT_LIMIT,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """Every layer's rank figures: "numerical", "stable", "effective", and with "means_" before, of class means.

    They are those of the centred activations H (N × d), rows h - mu, and of M (d × C), columns mu_c - mu over
    the classes present, with singular values σ_1 ≥ σ_2 ≥ …:

    - numerical: how many σ exceed `tolerance` σ_1, by default max(N, d) eps32, NumPy's choice for float32 (for M
      max(C, d) eps32); at least eps of the activations' type, where that is coarser
    - stable: ‖H‖_F² / ‖H‖_2² = Σ σ² / σ_1²
    - effective: exp of the entropy of σ / Σ σ (Roy & Vetterli 2007)

    Where H (or M) vanishes up to float32's resolution, the numerical rank is 0 and the others are nan.

    The σ² are eigenvalues of HᵀH or HHᵀ, whichever is smaller, summed in float64 from centred activations. That
    resolves σ down to sqrt(n eps64) σ_1, n rows of the matrix (1e-6 at n = 4096); smaller ones count as zero.

    With N and d both above `exact_limit`, H is folded first: its d columns, in random order and with random signs,
    are dealt to `exact_limit` buckets and summed, which keeps large singular values nearly. What that does to the
    figures, relative to the exact ones, as measured on power laws, exponentials, steps and MNIST activations:

    - stable: ‖H‖_F is exact, ‖H‖_2² within sqrt(2 / buckets), one standard deviation (2% with 4096), but where
      many σ are about as large as σ_1, the figure is too low by up to 2 sqrt(stable / buckets)
    - effective: too low, by up to a quarter where it is a fifth of the buckets, by up to half where it is half
    - numerical: within a tenth up to half of the buckets; it never exceeds their number

    M is never folded.

    Args:
        features, batches, cache_bytes, ranks: as for `neural_collapse`. HHᵀ needs all samples at a time, some columns
            after the other: what is not kept is computed again each time.
        seed: of the folding; the same on every device and rank.

    >>> H = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # σ = sqrt(18), sqrt(2)
    >>> figures = rank(lambda x: {"input": x}, [(H, torch.tensor([0, 1, 1, 1]))], 2)["input"]
    >>> figures["numerical"], round(figures["stable"], 6), round(figures["effective"], 6)
    (2.0, 1.111111, 1.754765)
    >>> figures["means_numerical"]
    1.0
    """
    options = {"tolerance": tolerance, "exact_limit": exact_limit, "seed": seed, "ranks": ranks}
    figures, _ = figures_and_spectra(features, batches, num_classes, cache_bytes, **options)
    return figures


def figures_and_spectra(
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    cache_bytes: int | None = None,
    *,
    tolerance: float | None = None,
    exact_limit: int = EXACT_LIMIT,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Tensor]]]:
    """What `rank` gives, and the singular values behind it, {layer: {"": σ of H, "_of_means": σ of M}}.

    They descend, float32, and those that float64 does not resolve are 0. Where H is folded, they are the folded one's.
    """
    activations = Activations(features, batches, cache_bytes)
    means, counts = class_means(activations, num_classes, ranks)
    num_samples = int(counts.sum())
    by_samples = {
        layer: mean.mu for layer, mean in means.items() if num_samples <= exact_limit and num_samples < len(mean.mu)
    }
    streamed = {layer: Gram(mean.mu, exact_limit, seed) for layer, mean in means.items() if layer not in by_samples}
    add_all(activations, streamed, counts, ranks)
    squares = {layer: gram.squares(ranks) for layer, gram in streamed.items()}
    squares |= sample_squares(activations, by_samples, counts, ranks)
    products = {layer: mean.M @ mean.M.T for layer, mean in means.items()}  # (C, C)
    of_means = {layer: (torch.linalg.eigvalsh(product), product.trace()) for layer, product in products.items()}
    figures = {
        layer: layer_figures(mean, squares[layer], of_means[layer], counts, tolerance, activations.dtypes[layer])
        for layer, mean in means.items()
    }
    spectra = {layer: {"": spectrum(squares[layer][0]), "_of_means": spectrum(of_means[layer][0])} for layer in means}
    return figures, spectra


class Gram:
    """HᵀH (d × d) of centred activations, summed batch by batch; folded to `limit` columns if d is larger."""

    def __init__(self, mu: Tensor, limit: int, seed: int) -> None:
        d = len(mu)
        self.mu = mu
        self.fold = Fold(d, limit, seed, mu.device) if d > limit else None
        self.product = mu.new_zeros(min(d, limit), min(d, limit))
        self.energy = mu.new_zeros(())  # ‖H‖_F², exact also where the product is folded

    def add(self, h: Tensor) -> None:
        """Add a batch (B, d)."""
        for rows in h.split(max(1, CENTRED_ELEMENTS // h.shape[1])):
            r = rows - self.mu
            self.energy += r.square().sum()
            r = self.fold(r) if self.fold else r
            self.product.addmm_(r.T, r)

    def squares(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """The σ² in ascending order, and their sum."""
        return torch.linalg.eigvalsh(ranks.sum(self.product)), ranks.sum(self.energy)


class Fold:
    """Deals d columns at random to `num_buckets` equally large buckets and sums each, under random signs."""

    def __init__(self, d: int, num_buckets: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices fold alike
        self.num_buckets = num_buckets
        self.order = torch.randperm(d, generator=generator).to(device)
        self.signs = (2 * torch.randint(2, (d,), generator=generator) - 1).to(device)

    def __call__(self, r: Tensor) -> Tensor:
        """(B, d) → (B, buckets)."""
        r = (r * self.signs)[:, self.order]
        r = torch.nn.functional.pad(r, (0, -r.shape[1] % self.num_buckets))
        return r.unflatten(1, (-1, self.num_buckets)).sum(1)


def add_all(activations: Activations, grams: dict[str, Gram], counts: Tensor, ranks: Ranks) -> None:
    """The second pass over the data, whose class counts must equal those of the first, (C,)."""
    if not grams:
        return
    counts_again = torch.zeros_like(counts)
    for batch, y in joined(activations):
        counts_again += class_members(y, len(counts)).sum(1)
        for layer, gram in grams.items():
            gram.add(batch[layer])
        del batch  # its memory is the next one's
    check_same_counts(counts, ranks.sum(counts_again))


def sample_squares(
    activations: Activations, mus: Mapping[str, Tensor], counts: Tensor, ranks: Ranks
) -> dict[str, tuple[Tensor, Tensor]]:
    """As `Gram.squares`, from HHᵀ (N × N), for layers with more dimensions than samples.

    HHᵀ is summed over the columns of H. Some of them at a time are brought together from all ranks, and each time
    another rank multiplies.
    """
    num_samples = int(counts.sum())
    products = {layer: mu.new_zeros(num_samples, num_samples) for layer, mu in mus.items()}
    for turn, wanted in enumerate(column_pieces(mus, num_samples)):
        blocks = gathered_columns(activations, wanted, counts, ranks)
        if turn % ranks.num == ranks.index:
            for (layer, columns), block in zip(wanted, blocks, strict=True):
                r = block - mus[layer][columns]
                products[layer].addmm_(r, r.T)
    products = {layer: ranks.sum(product) for layer, product in products.items()}
    return {layer: (torch.linalg.eigvalsh(product), product.trace()) for layer, product in products.items()}


def column_pieces(mus: Mapping[str, Tensor], num_samples: int) -> Iterator[list[tuple[str, slice]]]:
    """All columns of all layers, in lists of as many as may be held at once for all samples."""
    room = max(1, COLUMN_ELEMENTS // num_samples)
    pieces, width = [], 0
    for layer, mu in mus.items():
        start = 0
        while start < len(mu):
            stop = min(len(mu), start + room - width)
            pieces.append((layer, slice(start, stop)))
            width, start = width + stop - start, stop
            if width == room:
                yield pieces
                pieces, width = [], 0
    if pieces:
        yield pieces


def gathered_columns(
    activations: Activations, wanted: list[tuple[str, slice]], counts: Tensor, ranks: Ranks
) -> list[Tensor]:
    """These columns of H, not centred, with the rows of all ranks: (N, width) each."""
    parts: list[list[Tensor]] = [[] for _ in wanted]
    counts_again = torch.zeros_like(counts)
    for batch, y in activations:
        counts_again += class_members(y, len(counts)).sum(1)
        for part, (layer, columns) in zip(parts, wanted, strict=True):
            h = batch[layer][:, columns]
            part.append(h.to(torch.promote_types(h.dtype, torch.float32)))
        del batch  # its memory is the next one's
    own = int(counts_again.sum())
    sizes = counts.new_zeros(ranks.num)
    sizes[ranks.index] = own
    start = int(ranks.sum(sizes)[: ranks.index].sum())
    check_same_counts(counts, ranks.sum(counts_again))
    blocks = []
    for part in parts:
        block = part[0].new_zeros(int(counts.sum()), part[0].shape[1])
        torch.cat(part, out=block[start : start + own])
        blocks.append(ranks.sum(block))
    return blocks


def layer_figures(
    mean: Means,
    squares: tuple[Tensor, Tensor],
    squares_of_means: tuple[Tensor, Tensor],
    counts: Tensor,
    tolerance: float | None,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The six figures of a layer, from the σ² of its activations and of its class means, each with their sum."""
    num_samples, num_present, d = int(counts.sum()), int((counts > 0).sum()), len(mean.mu)
    floor = FLOAT32_EPS * math.sqrt(num_samples) * torch.linalg.vector_norm(mean.mu)
    vanishes = bool(squares[1].sqrt() <= floor)
    of_samples = ranks_of(*squares, tolerance or default_tolerance(max(num_samples, d), dtype), vanishes)
    # Rows of absent classes add zeros to the means' spectrum.
    means_tolerance = tolerance or default_tolerance(max(num_present, d), dtype)
    of_means = ranks_of(*squares_of_means, means_tolerance, bool(mean.coincide))
    return of_samples | {f"means_{name}": value for name, value in of_means.items()}


class Rank(Measure):
    """Logs the rank figures of every measured layer, `rank/FIGURE/SET/LAYER`, of its activations and class means.

    The singular values behind them are kept as arrays, `singular_values/SET/LAYER` and `singular_values_of_means/…`.
    """

    name = "rank"

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Both sets' figures in this epoch."""
        values, self.arrays = {}, {}
        self.settings = {"exact_limit": EXACT_LIMIT, "tolerance": "max(N, d) eps32"}
        for split in self.sets:
            figures, spectra = figures_and_spectra(
                self.features(trainer, pl_module),
                self.shown(self.batches(trainer, split), split),
                pl_module.hparams.num_classes,
                self.cache_bytes,
                ranks=Ranks.of(trainer),
            )
            for layer, of_layer in figures.items():
                values |= {f"rank/{figure}/{split}/{layer}": value for figure, value in of_layer.items()}
                for which, sigma in spectra[layer].items():
                    self.arrays[f"singular_values{which}/{split}/{layer}"] = sigma
        return values
