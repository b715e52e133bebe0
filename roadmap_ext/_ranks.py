"""The result of smooth_rank, shared by the kernels' and the reference's function."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SmoothRank(NamedTuple):
    """Smooth ranks of the positives of all queries, one entry a positive, row after row, columns ascending.

    Attributes:
        query: [nnz] int64, the row of each positive.
        reference: [nnz] int64, its column.
        positive_rank: [nnz], its rank among the positives, from 1.
        negative_rank: [nnz], the smooth number of negatives ranked at or above it.
    """

    query: Tensor
    reference: Tensor
    positive_rank: Tensor
    negative_rank: Tensor
