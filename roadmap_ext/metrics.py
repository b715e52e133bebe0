"""Exact retrieval metrics, for evaluation: no surrogate, no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_scores

# Scores that are sorted at a time: bounds the memory beyond the input to a few such tensors.
_CHUNK_ELEMENTS = 1 << 20


@torch.no_grad()
def average_precision(scores: Tensor, target: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Exact average precision of each query.

    AP = 1/|P| * sum over positives i of rank+(i) / rank(i), where rank(i) counts the references, and rank+(i) the
    positives, with a score of at least s_i: ties count against the ranking, as in :func:`roadmap_ext.ap_loss`. Where no
    scores are tied this is scikit-learn's ``average_precision_score``.

    Args:
        scores: [B, N] float16, bfloat16, float32 or float64.
        target: [B, N] bool, True where relevant.
        ignore: [B, N] bool, True where a pair is left out; None for none.

    Returns:
        [B], float64 for float64 scores and float32 for all others; NaN for a query without positives or with a NaN
        score that is not ignored.

    Raises:
        TypeError, ValueError: as :func:`roadmap_ext.ap_loss`.
    """
    check_scores(scores, target, ignore)
    rows, columns = scores.shape
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    out = scores.new_empty(rows, dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        out[part] = _sorted_average_precision(scores[part], target[part], None if ignore is None else ignore[part])
    return out


def _sorted_average_precision(scores: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
    counted = torch.ones_like(target) if ignore is None else ~ignore
    positive = target & counted
    # Ignored pairs stay where they are and weigh nothing.
    ordered, order = scores.sort(dim=1, descending=True)
    positive, weight = positive.gather(1, order), counted.gather(1, order)
    # Each rank is read at the end of its run of equal scores.
    columns = scores.shape[1]
    index = torch.arange(columns, device=scores.device).expand_as(ordered)
    ends = torch.ones_like(positive)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    end = torch.where(ends, index, columns - 1).flip(1).cummin(1).values.flip(1) if columns else index
    rank = weight.cumsum(1).gather(1, end).double()
    rank_positive = positive.cumsum(1).gather(1, end).double()
    precision = (torch.where(positive, rank_positive / rank, 0.0)).sum(1) / positive.sum(1)
    nan = (scores.isnan() & counted).any(1)
    return torch.where(nan, torch.nan, precision)
