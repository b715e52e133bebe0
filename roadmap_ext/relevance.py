"""What is relevant to a query, and how much: levels of its references, and what an item of each level is worth.

A level is 0 for a negative and 1 to L, at most 16, for positives; ranks compare levels alone. What an item of a level
is worth, its relevance, is a query's own: [B, L].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .autograd import can_be_read
from .extension import _REFERENCE_ONLY

MOST_LEVELS = 16


def of_relevance(relevance: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Levels [B, N] of relevance [B, N], the distinct positive values in a row, and these values, [B, 16].

    A mask is its own level, and its worth is None. Raises ValueError where a row has more than 16 levels.
    """
    if relevance.dtype == torch.bool:
        return relevance, None
    wide = relevance if relevance.dtype in (torch.float32, torch.float64) else relevance.double()
    if relevance.device.type in ("cpu", "meta") and not _REFERENCE_ONLY:
        level, value, count = torch.ops.roadmap_ext.levels_of(wide, ignore)
    else:
        level, value, count = _levels_of(wide, ignore)
    if can_be_read(count) and (count < 0).any():
        raise ValueError(
            f"relevance must have at most {MOST_LEVELS} distinct positive values in a row, got more in row "
            f"{int(count.argmin())}: round them to fewer"
        )
    return level, value


def _levels_of(relevance: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [B, N], their values [B, 16] and their numbers [B], -1 where there are too many, in plain PyTorch."""
    known = relevance if ignore is None else relevance.masked_fill(ignore, 0)
    level = torch.zeros_like(known, dtype=torch.uint8)
    value = torch.full((len(known), MOST_LEVELS), math.nan, dtype=torch.float64, device=known.device)
    count = torch.full((len(known),), -1, device=known.device)
    for q, row in enumerate(known):
        values = torch.unique(row[row > 0])
        if len(values) <= MOST_LEVELS:
            level[q], count[q] = torch.bucketize(row, values, right=True), len(values)
            value[q] = torch.nn.functional.pad(values, (0, MOST_LEVELS - len(values)))
    return level, value, count


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
