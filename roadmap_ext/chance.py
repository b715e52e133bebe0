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
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, unique

Numbers: TypeAlias = np.ndarray[Any, Any]

# Both integrals by the trapezoidal rule, over x from -9 to 9 around the separation and over z, u = exp(-exp(z)). In
# NumPy: the host has float64, whatever the device has.
_X, _DX = np.linspace(-9, 9, 73, retstep=True)
_Z, _DZ = np.linspace(-26, 4, 121, retstep=True)
# Beyond it AP is 1, below its negative as small as it gets.
_WIDEST = 12.0
_ELEMENTS = 1 << 21  # in memory at a time, in each of a few arrays


def expected_ap(positives: Numbers, negatives: Numbers, separation: float) -> Numbers:
    """The expected AP of p positives and n negatives, [U] each and p at least 1, by the model above. [U] float64."""
    w = np.exp(_Z)  # [Z]
    below_1 = -np.expm1(-w)  # 1 - u
    area = w * np.exp(-w) * _DZ  # du
    density = np.exp(-(_X**2) / 2) / math.sqrt(2 * math.pi) * _DX  # [X]
    ahead = _above(_X)[:, None]  # of another positive, [X, 1]
    own, other = _log(1 - ahead * below_1), _log(1 - _above(_X + separation)[:, None] * below_1)  # [X, Z]
    step, parts = max(1, _ELEMENTS // own.size), []
    for begin in range(0, len(positives), step):
        part = slice(begin, begin + step)
        others, n = positives[part, None, None] - 1.0, negatives[part, None, None].astype(float)  # [u, 1, 1]
        # E[(1 + A) u^A] = G(u) + u G'(u), where G(u) = (1 - ahead (1 - u))^others.
        slope = others * ahead * np.exp(np.maximum(others - 1, 0) * own)
        parts.append((np.exp(others * own) + np.exp(-w) * slope) * np.exp(n * other) @ area @ density)
    return np.concatenate(parts) if parts else np.empty(0)


def _above(x: Numbers) -> Numbers:
    """The probability that a standard normal number is above each."""
    return np.array([math.erfc(each / math.sqrt(2)) / 2 for each in x])


def _log(share: Numbers) -> Numbers:
    """Finite at 0, that 0 times it is 0."""
    return np.log(np.maximum(share, 1e-300))


class Counts:
    """How many positives and negatives queries have among all, and in their batches; equal ones are kept once."""

    def __init__(self) -> None:
        self._of_all: dict[tuple[int, int], float] = {}
        self._of_batches: dict[tuple[int, int], float] = {}

    def add(self, of_all: Tensor, of_batches: Tensor, weight: Tensor) -> None:
        """Of queries [Q, 2], which weigh 1; of batches [M, 2], which weigh [M]; those without positives go out."""
        _add(self._of_all, of_all, np.ones(len(of_all)))
        _add(self._of_batches, of_batches, weight.cpu().numpy())

    def gap(self, ap: float) -> float:
        """The expected gap, weighted, where the mean AP of all is ``ap``; NaN without queries, or if that is NaN."""
        if not self._of_all or math.isnan(ap):
            return math.nan
        low, high = -_WIDEST, _WIDEST
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if _mean(self._of_all, middle) > ap else (middle, high)
        return _mean(self._of_batches, low) - _mean(self._of_all, low)


def _add(kept: dict[tuple[int, int], float], counts: Tensor, weight: Numbers) -> None:
    distinct, of = unique(counts.cpu(), dim=0, return_inverse=True)
    sums = np.bincount(of.numpy(), weight, len(distinct))
    for (p, n), each in zip(distinct.tolist(), sums.tolist(), strict=True):
        if p:
            kept[p, n] = kept.get((p, n), 0.0) + each


def _mean(kept: dict[tuple[int, int], float], separation: float) -> float:
    counts, weight = np.array([*kept]), np.array([*kept.values()])
    return float(expected_ap(counts[:, 0], counts[:, 1], separation) @ weight / weight.sum())
