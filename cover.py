"""Similarities of samples with slots, the thresholds at which a slot is never wrong, and covers of samples by slots.

Letters: N samples, V variants of each, d their dimension, S slots; z features of length 1, W slots, s similarities,
t thresholds, y labels of samples, c that of a slot.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDING = 4e-6  # similarities that differ by less may change places when they are computed in another batch
ROWS_AT_ONCE, SLOTS_AT_ONCE = 2048, 512  # similarities computed at once: 4 MB, which caches hold

Labelled = tuple[Tensor, Tensor]  # z (N, d) or (N, V, d), labels (N,)


def unit(h: Tensor) -> Tensor:
    """Features as directions: length 1 along the last axis, at least float32; what is 0 stays 0."""
    return F.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)


def similarities(z: Tensor, W: Tensor) -> Tensor:
    """s_ij = max_v ⟨z_iv, W_j / ‖W_j‖⟩ of directions (N, d), or of V variants of each (N, V, d), with slots (S, d).

    >>> similarities(torch.tensor([[0.6, 0.8]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return cosines(z, unit(W).to(z.dtype))


def cosines(z: Tensor, W: Tensor) -> Tensor:
    """`similarities` with slots of length 1."""
    with torch.autocast(z.device.type, enabled=False):  # in bfloat16 thresholds would be good for two digits
        if z.ndim == 2:
            return z @ W.T  # (N, S)
        # One by one, so that a sample gets the same numbers in whatever order its variants come.
        return torch.stack([of_variant.contiguous() @ W.T for of_variant in z.unbind(1)]).amax(0)


def thresholds(s: Tensor, y: Tensor, label: Tensor, margin: float = 0.0) -> Tensor:
    """The lowest t_j (S,) at which each slot has full precision on samples with similarities s (N, S), labels y (N,).

    t_j = min{s_ij : y_i = c_j and s_ij > max_{k : y_k ≠ c_j} s_kj + margin}, ∞ if there is none. By hand: of the first
    slot's class are samples 0 to 2, and 3, which is not, lies between them; the second slot's class has no sample.

    >>> s = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.5, 0.1], [0.6, 0.1]])
    >>> thresholds(s, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2])).tolist()
    [0.800000011920929, inf]
    """
    return Pairs(s.clone(), y, label).thresholds(margin)


def covers(s: Tensor, y: Tensor, label: Tensor, threshold: Tensor) -> Tensor:
    """Which samples (N) each slot (S) matches and has the label of: bool (N, S)."""
    return (s >= threshold) & (y[:, None] == label)


def greedy_cover(covered: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Columns of `covered`, bool (N, S), that cover the rows: which, in greedy order, and how many rows each gains.

    Each is the first of those that cover the most rows still uncovered, at least `least`. Gains are counted once and
    then lowered row by row as rows are covered: O(N S) in all.

    >>> covered = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 1]]).bool()
    >>> [part.tolist() for part in greedy_cover(covered)]
    [[0, 1], [3, 1]]
    """
    gain = column_sums(covered)
    columns, is_open = covered.T.contiguous(), covered.new_ones(len(covered))
    chosen, gains = [], []
    while len(gain) and (most := int(gain.max())) >= max(least, 1):
        j = int((gain == most).nonzero()[0])
        rows = (columns[j] & is_open).nonzero()[:, 0]
        is_open[rows] = False
        gain -= column_sums(covered[rows])
        chosen.append(j)
        gains.append(most)
    return torch.tensor(chosen, dtype=torch.long), torch.tensor(gains, dtype=torch.long)


def column_sums(covered: Tensor) -> Tensor:
    """How many rows of (N, S) are true in each column, (S,); torch alone would make eight bytes of each at once."""
    total = torch.zeros(covered.shape[1], dtype=torch.long, device=covered.device)
    for part in covered.view(torch.uint8).split(ROWS_AT_ONCE):
        total += part.sum(0, dtype=torch.int32)
    return total


class Pairs:
    """Similarities (N, S) taken apart, in place: those of samples and slots of one class, and of other classes."""

    def __init__(self, s: Tensor, y: Tensor, label: Tensor) -> None:
        classes = [((y == c).nonzero(), (label == c).nonzero()[:, 0]) for c in label.unique()]
        self.places = [(rows, columns) for rows, columns in classes if len(rows)]  # (n, 1), (m,) of each class
        self.own = [s[place] for place in self.places]  # (n, m)
        for place in self.places:
            s[place] = -torch.inf
        self.others = s.amax(0) if len(s) else s.new_full((s.shape[1],), -torch.inf)  # (S,)

    def lowest_above(self, bar: Tensor) -> Tensor:
        """The least similarity of each slot with a sample of its class that is above its bar, (S,), else ∞."""
        t = torch.full_like(bar, torch.inf)
        for (_, columns), own in zip(self.places, self.own, strict=True):
            t[columns] = own.masked_fill(own <= bar[columns], torch.inf).amin(0)
        return t

    def thresholds(self, margin: float) -> Tensor:
        """What the function of this name gives."""
        return self.lowest_above(self.others + margin)

    def mark(self, covered: Tensor, threshold: Tensor) -> None:
        """Set, in `covered` (N, S), which samples each slot matches and has the label of."""
        for (rows, columns), own in zip(self.places, self.own, strict=True):
            covered[rows, columns] = own >= threshold[columns]


def calibrated(samples: Sequence[Labelled], W: Tensor, label: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Thresholds (S,) with full precision on all these samples together, and which of each part every slot covers.

    They lie half of `ROUNDING` below those of `thresholds`, and no sample of another class lies within it: so it makes
    no difference in which batch a similarity is computed. Holds similarities of some slots at a time, and all of them
    with samples of their own class alone.
    """
    threshold = torch.empty(len(W), dtype=W.dtype, device=W.device)
    covered = [torch.zeros(len(y), len(W), dtype=torch.bool, device=W.device) for _, y in samples]
    for start in range(0, len(W), SLOTS_AT_ONCE):
        block = slice(start, start + SLOTS_AT_ONCE)
        of_block = unit(W[block]).to(samples[0][0].dtype)
        parts = [Pairs(cosines(z, of_block), y, label[block]) for z, y in in_rows(*samples)]
        bar = torch.stack([part.others for part in parts]).amax(0) + ROUNDING
        t = torch.stack([part.lowest_above(bar) for part in parts]).amin(0) - ROUNDING / 2
        threshold[block] = t.to(W.dtype)
        for part, (of,) in zip(parts, in_rows(*((of,) for of in covered)), strict=True):
            part.mark(of[:, block], threshold[block])
    return threshold, covered


def in_rows(*tables: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors over the same samples, some samples at a time, of one table after the other."""
    for table in tables:
        yield from zip(*(column.split(ROWS_AT_ONCE) for column in table), strict=True)
