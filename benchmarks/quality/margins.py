"""Rules that read ROADMAP's margins from a batch: what ``margins="auto"`` was chosen over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import roadmap_ext

# Similarities of positives and of negatives, [n] and [m], to the two margins.
Rule = Callable[[Tensor, Tensor], tuple[float, float]]


class MeasuredMargins(nn.Module):
    """ROADMAP with margins that a rule reads from each batch anew, or, ``once``, from the first alone."""

    def __init__(self, rule: Rule, once: bool = False, **settings: float) -> None:
        super().__init__()
        self.rule, self.once, self.loss, self.measured = rule, once, roadmap_ext.RoadmapLoss(**settings), False

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] with labels [B]."""
        if not (self.once and self.measured):
            vectors = normalize(embeddings.detach(), dim=1)
            scores, positive = vectors @ vectors.T, labels[:, None] == labels
            own = torch.eye(len(labels), dtype=torch.bool)
            margins = self.rule(scores[positive & ~own], scores[~positive])
            self.loss.positive_margin, self.loss.negative_margin = margins
            self.measured = True
        return self.loss(embeddings, labels)


def medians(positives: Tensor, negatives: Tensor) -> tuple[float, float]:
    """Half of the positives are pulled, half of the negatives pushed."""
    return positives.median().item(), negatives.median().item()


def fifths(positives: Tensor, negatives: Tensor) -> tuple[float, float]:
    """The farthest fifth of the positives is pulled, the nearest fifth of the negatives pushed."""
    return positives.quantile(0.2).item(), negatives.quantile(0.8).item()
