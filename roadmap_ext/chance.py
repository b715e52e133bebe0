"""The decomposability gap that scores have by chance alone: what a gap has to be compared with.

A batch holds a part of a query's negatives, so its AP is higher than that of all even if every score is drawn by
itself. The model: the scores of negatives are independent normal numbers, those of positives the same shifted up by the
separation, which is chosen so that the AP of all is the one that was measured. The AP of the batches follows.

The expected AP is computed, not drawn. A positive of score x has A of the p - 1 other positives at or above it, and C
of the n negatives, both binomial, and (1 + A) / (1 + A + C) = integral over u from 0 to 1 of (1 + A) u^(A + C). So two
integrals over smooth functions are left, over x and over u.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Both integrals by the trapezoidal rule, over x from -9 to 9 around the separation and over z, u = exp(-exp(z)).
_X = torch.linspace(-9, 9, 73, dtype=torch.float64)
_Z = torch.linspace(-26, 4, 121, dtype=torch.float64)
# Beyond it AP is 1, below its negative as small as it gets.
_WIDEST = 12.0
_ELEMENTS = 1 << 21  # in memory at a time, in each of a few tensors


def expected_ap(positives: Tensor, negatives: Tensor, separation: float) -> Tensor:
    """The expected AP of p positives and n negatives, [U] each and p at least 1, by the model above. [U] float64."""
    w = _Z.exp()  # [Z]
    below_1 = -torch.expm1(-w)  # 1 - u
    area = w * torch.exp(-w) * (_Z[1] - _Z[0])  # du
    density = torch.exp(-(_X**2) / 2) / math.sqrt(2 * math.pi) * (_X[1] - _X[0])  # [X]
    ahead = torch.special.ndtr(-_X)  # of another positive, [X]
    outranks = torch.special.ndtr(-_X - separation)  # of a negative, [X]
    own, other = (_log(1 - share[:, None] * below_1) for share in (ahead, outranks))  # [X, Z]
    result = []
    step = max(1, _ELEMENTS // (len(_X) * len(_Z)))
    for begin in range(0, len(positives), step):
        part = slice(begin, begin + step)
        others, n = positives[part, None, None].double() - 1, negatives[part, None, None].double()  # [u, 1, 1]
        # E[(1 + A) u^A] = G(u) + u G'(u), where G(u) = (1 - ahead (1 - u))^others.
        slope = others * ahead[:, None] * torch.exp((others - 1).clamp(min=0) * own)
        value = (torch.exp(others * own) + torch.exp(-w) * slope) * torch.exp(n * other)
        result.append((value @ area) @ density)
    return torch.cat(result) if result else positives.new_empty(0, dtype=torch.float64)


def _log(share: Tensor) -> Tensor:
    """Finite at 0, that 0 times it is 0."""
    return share.log().clamp(min=-1e3)


class Counts:
    """How many positives and negatives queries have among all, and in their batches; equal ones are kept once."""

    def __init__(self) -> None:
        self._of_all: dict[tuple[int, int], float] = {}
        self._of_batches: dict[tuple[int, int], float] = {}

    def add(self, of_all: Tensor, of_batches: Tensor, weight: Tensor) -> None:
        """Of queries [Q, 2], which weigh 1; of batches [M, 2], which weigh [M]; those without positives go out."""
        _add(self._of_all, of_all, torch.ones(len(of_all)))
        _add(self._of_batches, of_batches, weight)

    def gap(self, ap: float) -> float:
        """The expected gap, weighted, where the mean AP of all is ``ap``; NaN without queries, or if that is NaN."""
        if not self._of_all or math.isnan(ap):
            return math.nan
        low, high = -_WIDEST, _WIDEST
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if _mean(self._of_all, middle) > ap else (middle, high)
        return _mean(self._of_batches, low) - _mean(self._of_all, low)


def _add(kept: dict[tuple[int, int], float], counts: Tensor, weight: Tensor) -> None:
    distinct, of = torch.unique(counts.cpu(), dim=0, return_inverse=True)
    sums = torch.zeros(len(distinct), dtype=torch.float64).index_add(0, of, weight.cpu().double())
    for (p, n), each in zip(distinct.tolist(), sums.tolist(), strict=True):
        if p:
            kept[p, n] = kept.get((p, n), 0.0) + each


def _mean(kept: dict[tuple[int, int], float], separation: float) -> float:
    counts, weight = torch.tensor([*kept]), torch.tensor([*kept.values()], dtype=torch.float64)
    return float(expected_ap(counts[:, 0], counts[:, 1], separation) @ weight / weight.sum())
