"""How far the AP of batches can stand above the AP of all of them together: from counts alone, for the worst ranking.

A batch's ranking is perfect if its positives stand above its negatives. Perfect rankings can be merged in many ways;
the worst puts one batch whole after the other, in the worst order. What a batch adds to the AP there depends on which
batches came before, and on nothing else of their order: so the worst order is found over the 2^K sets of batches, not
over the K! orders.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The worst order is searched for among as many batches that hold positives of a query: 1,024 sets.
MOST_SEARCHED = 10
# Numbers in memory at a time, in each of a few tensors.
_ELEMENTS = 1 << 18


def bound(positives: Tensor, negatives: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The greatest gap of perfect batches, [B] of a float dtype, and whether the worst order was found, [B] bool.

    Counts come as [B, K] integers; NaN, and True, for a query without positives.
    """
    if not positives.numel():
        nothing = torch.full((len(positives),), torch.nan, dtype=dtype, device=positives.device)
        return nothing, nothing.isnan()
    counts, of = torch.unique(torch.stack([positives, negatives], dim=2), dim=0, return_inverse=True)  # [R, K, 2]
    own = counts[:, :, 0] > 0  # [R, K]
    # A batch without positives is worst at the very top.
    before = (counts[:, :, 1] * ~own).sum(1)
    share = counts[:, :, 0] / counts.sum(2)
    order = share.masked_fill(~own, torch.inf).argsort(dim=1, stable=True)
    counts = (counts * own[:, :, None]).take_along_dim(order[:, :, None], dim=1)
    total, batches = counts[:, :, 0].sum(1), own.sum(1)
    least = _in_order(counts, before, dtype)
    # Sorted by a share, batches that are all alike are so if the first is like the last in both counts.
    first, last = counts[:, :1], counts.take_along_dim((batches - 1).clamp(min=0)[:, None, None], dim=1)
    alike = ((counts == first).all(2) | (counts == 0).all(2)).all(1) & (first == last).flatten(1).all(1)
    search = ((batches <= MOST_SEARCHED) & ~alike).nonzero().flatten()
    if len(search):
        width = int(batches[search].max())
        for rows in search.split(max(1, _ELEMENTS >> width)):
            least[rows] = _in_worst_order(counts[rows, :width], before[rows], dtype)
    exact = alike | (batches <= MOST_SEARCHED)
    return (1 - least / total)[of], exact[of]


def _in_order(counts: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the precisions of all positives, [R], if batches [R, K, 2] follow each other as they stand."""
    above = counts.cumsum(1) - counts
    p, n = above[:, :, 0], above[:, :, 1] + before[:, None]
    return _precisions(counts[:, :, 0], p, n, _start(p + n + 1, dtype)).sum(1)


def _in_worst_order(counts: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """The least such sum over all orders, [R]. Batches of no images change nothing."""
    positives, negatives = counts.permute(2, 1, 0)  # [K, R]: whole rows of sets are taken below
    batches = len(positives)
    p, n = torch.zeros_like(before)[None], before[None]  # [sets, R]; a set is its bits
    for b in range(batches):
        p, n = torch.cat([p, p + positives[b]]), torch.cat([n, n + negatives[b]])
    start = _start(p + n + 1, dtype)
    least = torch.full_like(p, torch.inf, dtype=dtype)
    least[0] = 0
    sets = torch.arange(1 << batches, device=counts.device)
    size = torch.stack([sets >> b & 1 for b in range(batches)]).sum(0)
    for level in range(batches):
        of_size = sets[size == level]
        for b in range(batches):
            s = of_size[of_size >> b & 1 == 0]
            after = s | 1 << b
            added = _precisions(positives[b], p[s], n[s], start[s])
            least[after] = torch.minimum(least[after], least[s] + added)
    return least[-1]


def _precisions(positives: Tensor, p: Tensor, n: Tensor, start: Tensor) -> Tensor:
    """The sum over j = 1 .. positives of (j + p) / (j + p + n), with ``start`` of p + n + 1."""
    return positives - n * _harmonic(p + n + 1, positives, start)


def _start(first: Tensor, dtype: torch.dtype) -> Tensor:
    """What _harmonic needs of its first term, whatever the number of terms."""
    return torch.digamma(first.double()) if dtype == torch.float64 else first.to(dtype)


def _harmonic(first: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """The sum over j = 0 .. terms - 1 of 1 / (first + j)."""
    if start.dtype == torch.float64:
        return torch.digamma((first + terms).double()) - start
    # In float32 that difference would have no digit left: it is taken term by term, from the recurrence of digamma and
    # its asymptotic series.
    m = terms.to(start.dtype)
    near = sum(m / ((start + k) * (start + k + m)) for k in range(8))
    u, v = 1 / (start + 8), 1 / (start + 8 + m)
    return near + torch.log1p(m * u) + m * u * v * (1 / 2 + (u + v) / 12)
