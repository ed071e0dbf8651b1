"""A layer's samples as a map: t-SNE in two dimensions. A picture only: no number is taken from it.

Letters: n samples shown, k directions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST = 2000  # samples shown: the cost grows faster than they do, and more points hide each other
PERPLEXITY = 30
START = 1e-4  # spread of the start, as scikit-learn has it: far smaller than what comes of it


def tsne(scores: Tensor, before: Tensor | None = None, seed: int = 0) -> Tensor:
    """Where samples with these scores (n, k) lie on a map, (n, 2), float32 (van der Maaten & Hinton 2008).

    It starts from the first two principal directions, or from the map `before`, so that maps of two epochs can be
    compared. The same bits in every run: it takes a single thread.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    points = scores.double().numpy()
    start = before.numpy() if before is not None else principal(points)
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)  # neighbours: there must be some others
    with threadpool_limits(1):
        found = TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(points)
    return torch.from_numpy(found.astype(np.float32))


def principal(points: np.ndarray) -> np.ndarray:
    """The first two directions of scores (n, k), as small as a start has to be, float32 (n, 2)."""
    start = np.zeros((len(points), 2), np.float32)
    spread = np.std(points[:, 0])
    if spread:
        start[:, : points.shape[1]] = points[:, :2] * (START / spread)
    return start
