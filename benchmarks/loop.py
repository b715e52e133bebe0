"""The common yardstick of every speed ratio: the data, and the loop that a careful user would write by hand.

`clustered_embeddings` draws class centres and unit vectors around them: at noise 1, as large as the spread of the
centres, most pairs are settled, as in a half-trained network; at noise 2 most are not. `clustered` is the scores of
these. `torch_loop` takes one query at a time, |P| x |Neg| in memory, plain autograd, and computes nothing twice: it is
faster than the code published with the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# What the noise, a number in the CSVs, makes of the data.
SEPARABILITY = {1.0: "as separable as a half-trained network", 2.0: "hardly separable"}
NOISES = tuple(SEPARABILITY)


def clustered_embeddings(
    count: int, classes: int, *, dim: int = 64, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """N unit vectors [N, D] and their labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    order = torch.randperm(count, generator=generator)
    labels = (torch.arange(count) % classes)[order]
    spread = torch.randn(count, dim, generator=generator)
    return functional.normalize(centres[labels] + noise * spread, dim=1), labels


def clustered(
    queries: int, references: int, classes: int, *, dim: int = 64, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosine scores [B, N] of the first B of N points to all of them, and the target [B, N]: same class."""
    embeddings, labels = clustered_embeddings(references, classes, dim=dim, noise=noise, seed=seed)
    return embeddings[:queries] @ embeddings.T, labels[:queries, None] == labels[None]


def torch_loop(
    scores: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    tau: float = 0.01,
    rho: float = 100.0,
    delta: float = 0.05,
) -> Tensor:
    """Mean SupAP loss of scores [B, N], differentiable. Every query needs a positive."""
    offset = 0.5 + 1 / (1 + math.exp(-delta / tau))
    losses = []
    for query, (row, positive) in enumerate(zip(scores, target, strict=True)):
        negative = ~positive
        if ignore is not None:
            positive, negative = positive & ~ignore[query], negative & ~ignore[query]
        positives, negatives = row[positive], row[negative]
        gap = negatives[None] - positives[:, None]  # [P, Neg]
        below = torch.sigmoid(gap / tau) + 0.5 * (gap >= 0)
        rank_negative = torch.where(gap > delta, rho * (gap - delta) + offset, below).sum(1)
        fixed = positives.detach()
        rank_positive = (fixed[None] >= fixed[:, None]).sum(1)
        losses.append(1 - (rank_positive / (rank_positive + rank_negative)).mean())
    return torch.stack(losses).mean()
