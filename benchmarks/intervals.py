"""A mean and its 95 % interval, as every comparison over seeds reports it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval."""

    mean: float
    half: float  # NaN for a single value
    values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t of independent values; of paired differences, if these are what is given."""
        count = len(values)
        if count < 2:
            return cls(values[0] if values else math.nan, math.nan, count)
        quantile = float(student.ppf(0.975, count - 1))
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)

    def show(self, sign: bool = False, scale: float = 100) -> str:
        """In points of 100, or multiplied by another number."""
        if not self.values:
            return "-"
        half = "" if math.isnan(self.half) else f" ± {scale * self.half:.1f}"
        return f"{scale * self.mean:{'+' if sign else ''}.1f}{half}"
