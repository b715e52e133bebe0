"""csrc/series.h: the polynomials of the sorted scan are what tools/fit_series.py writes, and keep their bounds."""

import math
import re
from fractions import Fraction

import pytest

from tools import fit_series


def test_series_header_is_what_the_tool_writes():
    assert fit_series.HEADER.read_text() == fit_series.header()


@pytest.mark.parametrize(("power", "title"), [(1, "sigma"), (2, "sigma (1 - sigma)")])
def test_series_keep_their_bounds(power, title):
    """The header's numbers, in rational arithmetic: within the bound, which the best of all fits comes up to."""
    tables = re.findall(r"\[(\d+)\] = \{ *// *(\S+)\n(.*?)\};", fit_series.HEADER.read_text(), re.DOTALL)
    assert len(tables) == 2
    degree, bound, body = tables[power - 1]
    coefficients = [Fraction(float(c)) for c in body.replace(",", "").split()]
    assert len(coefficients) == int(degree) == fit_series.DEGREE
    points = [Fraction(k, 997) for k in range(1, 998)]
    points += [(1 + Fraction(math.cos(k * math.pi / int(degree)))) / 2 for k in range(int(degree))]  # the extremes
    errors = [abs(1 - fit_series.evaluate(coefficients, y) * (1 + y) ** power) for y in points]
    assert max(errors) <= Fraction(bound) * Fraction(105, 100), title
    if power == 1:
        assert max(errors) >= Fraction(bound) / 2
    exact, limit = (fit_series.sigmoid, fit_series.slope)[power - 1](int(degree))  # before they were rounded
    errors = [abs(1 - fit_series.evaluate(exact, y) * (1 + y) ** power) for y in points]
    assert limit / 2 <= max(errors) <= Fraction(limit) * (1 + Fraction(1, 10**12))
    if power == 1:  # the best: the error reaches its bound with alternating signs, degree + 1 times
        assert max(errors) >= Fraction(limit) * Fraction(999, 1000)
