"""The reductions of a loss a query."""

from __future__ import annotations

from torch import Tensor


def reduce_rows(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce ``loss`` [B]; the mean is over the queries in ``counted`` [B] bool, 0 where there is none.

    Queries that are not counted have loss 0, so the sum need not leave them out.
    """
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)
