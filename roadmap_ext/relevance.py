"""What is relevant to a query, and how much: levels of its references, and what an item of each level is worth.

A level is 0 for a negative and 1 to L, at most 16, for positives; ranks compare levels alone. What an item of a level
is worth is a query's own, [B, L]: to NDCG its gain, to H-AP its relevance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import can_be_read
from .settings import Ranking

MOST_LEVELS = 16


def of_relevance(relevance: Tensor, ignore: Tensor | None, ranking: Ranking) -> tuple[Tensor, Tensor | None]:
    """Levels [B, N] and worth [B, L] of relevance [B, N], whose distinct positive values in a row are its levels.

    A mask is its own level, and its worth is None. Raises ValueError where a row has more than 16 levels.
    """
    if relevance.dtype == torch.bool:
        return relevance, None
    rows, _ = relevance.shape
    level = torch.zeros_like(relevance, dtype=torch.uint8)
    value = torch.zeros(rows, MOST_LEVELS, dtype=torch.float64, device=relevance.device)
    for q, row in enumerate(relevance):
        known = row if ignore is None else row.masked_fill(ignore[q], 0)
        values = known.unique()
        values = values[values > 0]
        if len(values) > MOST_LEVELS:
            raise ValueError(
                f"relevance must have at most {MOST_LEVELS} distinct positive values in a row, got {len(values)} in "
                f"row {q}: round them to fewer"
            )
        level[q] = torch.bucketize(known, values, right=True).to(torch.uint8)
        value[q, : len(values)] = values
    return level, worth_of(value, ranking)


def of_levels(level: Tensor, relevance: Tensor | None, ignore: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Levels [B, N] as the kernels take them, and what they are worth, [B, L]: relevance [B, N], or the level itself.

    Raises ValueError where items of one level have different relevance for a query, or none.
    """
    if level.dtype == torch.bool and relevance is None:
        return level, None
    rows, _ = level.shape
    levels = level.to(torch.uint8)
    if relevance is None:
        return levels, torch.arange(1.0, 1 + MOST_LEVELS, dtype=torch.float64, device=level.device).expand(rows, -1)
    place, known = levels.long(), relevance.double()
    place = place if ignore is None else place.masked_fill(ignore, 0)
    none = known.new_zeros(rows, 1 + MOST_LEVELS)
    worth = none.scatter_reduce(1, place, known, "amax", include_self=False)
    lowest = none.scatter_reduce(1, place, known, "amin", include_self=False)
    present = none.scatter(1, place, 1.0)[:, 1:] > 0
    worth, lowest = worth[:, 1:], lowest[:, 1:]
    wrong = (worth != lowest) | (present & ~(lowest > 0))
    if can_be_read(wrong) and wrong.any():
        q, at = wrong.nonzero()[0].tolist()
        raise ValueError(
            "relevance must be positive for items of a level above 0, and the same for all of a level in a row, got "
            f"{lowest[q, at]:g} and {worth[q, at]:g} for level {at + 1} in row {q}"
        )
    return levels, worth


def worth_of(value: Tensor, ranking: Ranking) -> Tensor:
    """What items of some relevance are worth to a loss."""
    return torch.exp2(value) - 1 if ranking.loss == "ndcg" and ranking.gain == "exponential" else value
