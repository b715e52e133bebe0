"""Coefficients of the sorted scan: the sigmoid and its slope as short sums of exponentials, in closed form.

For t <= 0 and y = e^(t / tau) in (0, 1]

    sigma(t / tau)              = y / (1 + y)    ~  sum_{k=1..K} a_k y^k
    sigma (1 - sigma)(t / tau)  = y / (1 + y)^2  ~  sum_{k=1..K} b_k y^k

with the relative error |1 - (1 + y) sum a_k y^(k-1)|, and |1 - (1 + y)^2 sum b_k y^(k-1)|. The first is a polynomial of
degree K that is 1 at y = -1. Of all these the Chebyshev polynomial T_K(2y - 1) / T_K(-3) is smallest on [0, 1]: the
best coefficients are the quotient, and the error is 1 / T_K(3). The second has degree K + 1, is 1 at -1 and has no
slope there: (K + 1) T_K(2y - 1) / T_K(-3) - K T_{K+1}(2y - 1) / T_{K+1}(-3), nearly, which this program solves for
exactly. All of it in rational numbers, rounded once.

The series hold a little further, up to y = END = 1.1, t = 0.095 tau: 2y / 1.1 - 1 takes the place of 2y - 1. The scan
expands them around the middles of boxes. Where two boxes meet, at t = 0, a fit up to y = 1 alone would be off by twenty
times its own error (tests/kernels/test_series.py).

`python tools/fit_series.py` prints the bound of every degree; with --write it writes csrc/series.h.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

Polynomial = list[Fraction]  # coefficients, the constant first

DEGREE = 12
END = Fraction(11, 10)  # up to which y the series hold
HEADER = Path(__file__).resolve().parent.parent / "csrc" / "series.h"


def evaluate(p: Polynomial, x: Fraction) -> Fraction:
    """p(x)."""
    value = Fraction(0)
    for coefficient in reversed(p):
        value = value * x + coefficient
    return value


def derivative(p: Polynomial) -> Polynomial:
    """p'."""
    return [k * coefficient for k, coefficient in enumerate(p)][1:]


def chebyshev(degree: int, end: Fraction) -> Polynomial:
    """T_degree(2y / end - 1): within 1 of 0 on [0, end]."""
    before, now = [Fraction(1)], [Fraction(-1), 2 / end]
    if degree == 0:
        return before
    for _ in range(degree - 1):
        following = [Fraction(0)] * (len(now) + 1)
        for k, coefficient in enumerate(now):  # 2 (2y / end - 1) T_n - T_(n-1)
            following[k] -= 2 * coefficient
            following[k + 1] += 4 * coefficient / end
        for k, coefficient in enumerate(before):
            following[k] -= coefficient
        before, now = now, following
    return now


def divided(p: Polynomial) -> Polynomial:
    """p / (1 + y), which has to go without remainder."""
    quotient = [Fraction(0)] * (len(p) - 1)
    rest = Fraction(0)
    for k in range(len(p) - 1, 0, -1):
        rest = p[k] - rest
        quotient[k - 1] = rest
    if p[0] != rest:
        raise ValueError("1 + y does not divide the polynomial")
    return quotient


def sigmoid(degree: int, end: Fraction = END) -> tuple[Polynomial, float]:
    """a_1 ... a_degree, and the relative error on (0, end]."""
    t = chebyshev(degree, end)
    at = evaluate(t, Fraction(-1))
    return divided([Fraction(k == 0) - c / at for k, c in enumerate(t)]), float(1 / abs(at))


def slope(degree: int, end: Fraction = END) -> tuple[Polynomial, float]:
    """b_1 ... b_degree, and a bound on the relative error on (0, end]."""
    low, high = chebyshev(degree, end), chebyshev(degree + 1, end)
    minus_one = Fraction(-1)
    # x low + z high is 1 at -1, and its derivative 0.
    p, q = evaluate(low, minus_one), evaluate(high, minus_one)
    dp, dq = evaluate(derivative(low), minus_one), evaluate(derivative(high), minus_one)
    determinant = p * dq - q * dp
    x, z = dq / determinant, -dp / determinant
    rest = [x * (low[k] if k < len(low) else 0) + z * high[k] for k in range(len(high))]
    return divided(divided([Fraction(k == 0) - c for k, c in enumerate(rest)])), float(abs(x) + abs(z))


def header() -> str:
    """The text of csrc/series.h."""
    lines = [
        "// Written by tools/fit_series.py: the sigmoid and its slope as sums of exponentials. For",
        f"// y = e^(t / tau) <= {float(END)}, with relative errors as noted below:",
        "//",
        "//     sigma ~ sum_k sigmoid(k - 1) y^k    sigma (1 - sigma) ~ sum_k slope(k - 1) y^k",
        "//",
        "// Functions, for device code has no use for a host's array.",
        "#pragma once",
        "",
        "// clang-format off",
        "namespace roadmap {",
        "",
        "struct Series {",
        f"  static constexpr int kDegree = {DEGREE};",
    ]
    for title, (coefficients, bound) in (("sigmoid", sigmoid(DEGREE)), ("slope", slope(DEGREE))):
        lines.append(f"  static constexpr double {title}(int k) {{")
        lines.append(f"    constexpr double kCoefficients[{DEGREE}] = {{  // {bound:.1e}")
        lines += [f"        {float(c)!r}," for c in coefficients]
        lines += ["    };", "    return kCoefficients[k];", "  }"]
    lines.append("};")
    return "\n".join([*lines, "", "}  // namespace roadmap", ""])


def main() -> None:
    """Print the bound of every degree; write the header if asked."""
    parser = argparse.ArgumentParser(description="Coefficients of the sorted scan.")
    parser.add_argument("--write", action="store_true", help=f"write csrc/{HEADER.name}")
    arguments = parser.parse_args()
    print("degree  sigma    slope    largest |a|  largest |b|")
    for degree in range(4, 17):
        (a, first), (b, second) = sigmoid(degree), slope(degree)
        largest = [float(max(abs(c) for c in p)) for p in (a, b)]
        used = "used" if degree == DEGREE else ""
        print(f"{degree:6}  {first:.1e}  {second:.1e}  {largest[0]:11.3f}  {largest[1]:11.3f}  {used}")
    if arguments.write:
        HEADER.write_text(header())


if __name__ == "__main__":
    main()
