"""Two average-precision losses of others, from the equations of their papers in plain PyTorch.

Each image of a batch ranks all others of it by cosine similarity; those without a positive are left out of the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu


class SoftBinAP(nn.Module):
    """1 - mean AP of similarities that are sorted into bins, each into its two nearest by their distance.

    With bins m = 1 .. M from similarity 1 down to -1, and the soft counts of positives h+_m and of all h_m,

        AP = sum over m of (h+_1 + .. + h+_m) / (h_1 + .. + h_m) * h+_m / |P|

    Revaud et al., "Learning with Average Precision: Training Image Retrieval with a Listwise Loss", ICCV 2019,
    equations 5 to 9; the paper takes 20 bins.
    """

    def __init__(self, bins: int = 20) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] with labels [B]."""
        scores, positive, own = _pairs(embeddings, labels)
        width = 2 / (self.bins - 1)
        every, found = [], []
        for center in torch.linspace(1, -1, self.bins).tolist():
            weight = relu(1 - (scores - center).abs() / width).masked_fill(own, 0)  # [B, B]
            every.append(weight.sum(1))
            found.append((weight * positive).sum(1))
        h, h_positive = torch.stack(every, 1), torch.stack(found, 1)  # [B, M]
        # An empty beginning has no precision, and nothing to weigh it by.
        precision = h_positive.cumsum(1) / h.cumsum(1).clamp(min=1e-12)
        return _mean_loss((precision * h_positive).sum(1), positive)


class BlackBoxAP(nn.Module):
    """1 - mean AP of the exact ranks, whose gradient is how the ranks change when the scores are moved by the loss's.

    For scores y, their ranks r(y) and a loss L of these, the gradient is (r(y + lambda dL/dr) - r(y)) / lambda. Ranks
    are counted in shares of the row, and those among positives alone carry no gradient. Before they are ranked, scores
    of positives are lowered and those of negatives raised by half the margin.

    Rolinek et al., "Optimizing Rank-based Metrics with Blackbox Differentiation", CVPR 2020, algorithm 1 and section 4;
    lambda and margin as theirs for retrieval.
    """

    def __init__(self, lambda_: float = 4.0, margin: float = 0.02) -> None:
        super().__init__()
        self.lambda_, self.margin = lambda_, margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] with labels [B]."""
        scores, positive, own = _pairs(embeddings, labels)
        moved = scores + self.margin / 2 * (1 - 2 * positive.to(scores.dtype))
        moved = moved.masked_fill(own, -torch.inf)  # last
        rank = _BlackBoxRank.apply(moved, self.lambda_)
        with torch.no_grad():
            among_positives = ranks(moved.masked_fill(~positive, -torch.inf))
        ratio = torch.where(positive, among_positives / rank, 0.0)
        return _mean_loss(ratio.sum(1), positive)


class _BlackBoxRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, lambda_: float) -> Tensor:
        rank = ranks(scores)
        ctx.save_for_backward(scores, rank)
        ctx.lambda_ = lambda_
        return rank

    @staticmethod
    def backward(ctx: Any, grad_rank: Tensor) -> tuple[Tensor, None]:
        scores, rank = ctx.saved_tensors
        return (ranks(scores + ctx.lambda_ * grad_rank) - rank) / ctx.lambda_, None


def ranks(scores: Tensor) -> Tensor:
    """The rank of each in its row, the highest score's first, from 1 / N to 1."""
    columns = scores.shape[1]
    place = torch.arange(1, columns + 1, dtype=scores.dtype, device=scores.device) / columns
    order = scores.argsort(dim=1, descending=True)
    return torch.empty_like(scores).scatter_(1, order, place.expand_as(scores))


def _pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities, which pairs are positive, and which are of an image and itself: [B, B] each."""
    vectors = normalize(embeddings, dim=1)
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return vectors @ vectors.T, (labels[:, None] == labels) & ~own, own


def _mean_loss(sums: Tensor, positive: Tensor) -> Tensor:
    """1 - mean AP from the sum of each query's precisions; 0 where no query has a positive."""
    count = positive.sum(1)
    has = count > 0
    return torch.where(has, 1 - sums / count.clamp(min=1), 0.0).sum() / has.sum().clamp(min=1)
