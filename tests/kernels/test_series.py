"""csrc/series.h: the polynomials of the sorted scan are what tools/fit_series.py writes, and keep their bounds."""

import math
import re
from fractions import Fraction

import numpy as np
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
    points = [y * fit_series.END for y in points]
    errors = [abs(1 - fit_series.evaluate(coefficients, y) * (1 + y) ** power) for y in points]
    assert max(errors) <= Fraction(bound) * Fraction(105, 100), title
    if power == 1:
        assert max(errors) >= Fraction(bound) / 2
    exact, limit = (fit_series.sigmoid, fit_series.slope)[power - 1](int(degree))  # before they were rounded
    errors = [abs(1 - fit_series.evaluate(exact, y) * (1 + y) ** power) for y in points]
    assert limit / 2 <= max(errors) <= Fraction(limit) * (1 + Fraction(1, 10**12))
    if power == 1:  # the best: the error reaches its bound with alternating signs, degree + 1 times
        assert max(errors) >= Fraction(limit) * Fraction(999, 1000)


def test_a_far_field_is_as_exact_as_float32():
    """A source and a target in different boxes: the series, expanded on both sides as by the kernels, is off by less.

    Beside each other's edge, t = 0, the expansions ask more of the series than it has to hold for.
    """
    tables = re.findall(r"\[12\] = \{ .*?\n(.*?)\};", fit_series.HEADER.read_text(), re.DOTALL)
    boxes = (fit_series.HEADER.parent / "cpu/boxes.h").read_text()
    width, terms = (float(re.search(rf"{name} = ([0-9.]+);", boxes)[1]) for name in ("kWidth", "kTerms"))
    k, m = np.arange(1, 13)[:, None], np.arange(terms)
    taylor = k**m / [math.factorial(int(power)) for power in m]  # of e^(k x)
    x = np.linspace(-width / 2, width / 2, 61)
    expanded = taylor @ x ** m[:, None]  # [k, x]
    for distance in [width, 1.1 * width, 2 * width, 1.0, 3.0, 10.0]:
        t = x[:, None] - distance - x  # of the target's x and the source's
        exact = 1 / (1 + np.exp(-t))
        for body, value in zip(tables, (exact, exact * (1 - exact)), strict=True):
            weight = np.array([float(c) for c in body.replace(",", "").split()]) * np.exp(-k[:, 0] * distance)
            field = np.einsum("k,kx,ky->xy", weight, expanded, expanded[:, ::-1])
            assert (np.abs(field - value) <= 2**-24 * value)[t <= 0].all(), distance
