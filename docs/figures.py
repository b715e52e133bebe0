"""Draw the figures of docs/how-it-works.md: `python -m docs.figures` writes docs/images/. It needs matplotlib.

    pairs.png    which negatives of a positive the pairwise kernels evaluate
    series.png   the sigmoid as a sum of exponentials, and its error
    boxes.png    what the sorted scan reads in place of the negatives

All are computed or sketched; nothing in them is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from tools.fit_series import DEGREE, END, sigmoid

FOLDER = Path(__file__).resolve().parent / "images"
# Okabe and Ito's colours, which all eyes tell apart.
BLUE, GREEN, ORANGE, RED, GREY, INK = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#777777", "#222222"


def surrogate(t: np.ndarray, tau: float, delta: float, rho: float) -> np.ndarray:
    """H- of the defaults: continuous at the threshold, start 1/2."""
    curve = 1 / (1 + np.exp(-np.clip(t, None, delta) / tau)) + 0.5 * (t >= 0)
    return curve + rho * np.clip(t - delta, 0, None)


def draw_pairs() -> Figure:
    tau, delta, rho, count = 0.01, 0.05, 100.0, 1024
    low, high, reach = -0.32, 0.12, -(17 + np.log(count)) * tau
    figure, axis = pyplot.subplots(figsize=(10, 3.2))
    zones = [
        (low, reach, GREY, "pruned:\ntogether they\nadd less than\nrounding"),
        (reach, delta, BLUE, "active set:\nevaluated pair by pair"),
        (delta, high, ORANGE, "linear part:\na count and\na sum"),
    ]
    v = np.sort(np.random.default_rng(5).normal(-0.13, 0.12, 90))
    for begin, end, colour, text in zones:
        axis.axvspan(begin, end, color=colour, alpha=0.13, lw=0)
        inside = v[(v > begin) & (v < end)]
        axis.plot(inside, np.full_like(inside, -0.28), "|", color=colour, ms=12, mew=1.3)
        axis.text((begin + end) / 2, 0.85, text, ha="center", va="top", color=INK)
    t = np.linspace(low, high, 4001)
    for part in (t < 0, t >= 0):
        axis.plot(t[part], surrogate(t[part], tau, delta, rho), color=INK, lw=2)
    axis.plot([low, 0, 0, high], [0, 0, 1, 1], color=RED, lw=1.2, ls="--")
    axis.text(-0.006, 1.0, "the step that it replaces", color=RED, ha="right", va="center")
    axis.text(-0.006, 1.5, "$H^-(v-u)$, what a negative at $v$ adds to the rank of $u$", color=INK, ha="right")
    axis.text(low + 0.003, -0.06, "negatives", va="top", ha="left", fontsize=9, color=INK)
    axis.set_xticks([reach, 0, delta], [r"$u-(17+\ln N)\,\tau$", "$u$", r"$u+\delta$"], fontsize=11)
    axis.set(xlim=(low, high), ylim=(-0.5, 2.2))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_yticks([])
    return figure


def draw_series() -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    t = np.linspace(-12, 0, 4001)
    y, exact = np.exp(t), 1 / (1 + np.exp(-t))
    looks = {1: (ORANGE, ":"), 2: (RED, "--"), 4: (GREEN, "-."), 8: (GREY, "-"), 12: (BLUE, "-")}
    left.plot(t, exact, color=INK, lw=4, alpha=0.3, label=r"$\sigma(t/\tau)$")
    for terms, (colour, line) in looks.items():
        end = END if terms == DEGREE else Fraction(1)
        series = sum(float(a) * y**k for k, a in enumerate(sigmoid(terms, end)[0], 1))
        label = f"{terms} terms, as used" if terms == DEGREE else f"{terms} term{'s' if terms > 1 else ''}"
        if terms < 8:
            left.plot(t, series, color=colour, ls=line, lw=1.6, label=label)
        if terms > 1:
            error = np.abs(series - exact) / exact
            right.semilogy(t, np.maximum(error, 1e-12), color=colour, ls=line, lw=1.2, label=label)
    left.set(xlim=(-4, 0), xlabel=r"$t/\tau$", title="the sigmoid and sums of few exponentials")
    right.set(xlim=(-6, 0), ylim=(1e-10, 10), xlabel=r"$t/\tau$", title="relative error of the sums")
    right.axhline(2**-24, color=INK, lw=0.8)
    right.text(-4.5, 2**-24 / 1.5, "rounding of float32", va="top", fontsize=9, color=INK)
    left.legend(frameon=False)
    right.legend(frameon=False, ncols=2, loc="upper center", fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_boxes() -> Figure:
    # A box begins at a score: after the second there is a gap.
    width, begins = 1.0, np.array([0.0, 1.05, 2.6, 3.65, 4.7, 5.75, 6.8, 7.85])
    own, last, u, threshold = 2, 5, 3.15, 6.55
    generator = np.random.default_rng(11)
    zones = [
        (0.0, begins[own - 1] + width, BLUE, "far field", "exponential sums:\n" + r"$\sum_k\, a_k A_k\, e^{-kx}$"),
        (begins[own], begins[own] + width, GREEN, "near field", "Taylor series\nand moments\nof the box"),
        (begins[own + 1], begins[last - 1] + width, BLUE, "far field",
         "their number, less\n" + r"$\sum_k\, a_k (B_k - e^{-kd/\tau} B_k')\, e^{kx}$"),
        (begins[last], threshold, GREEN, "cut box", "moments of\nits chunks,\nthe last few\none by one"),
        (threshold, begins[-1] + width, ORANGE, "linear part", "a count and\na sum"),
    ]  # fmt: skip
    figure, axis = pyplot.subplots(figsize=(11, 5))
    for begin, end, colour, name, text in zones:
        axis.add_patch(pyplot.Rectangle((begin, -1.85), end - begin, 2.15, color=colour, alpha=0.13, lw=0))
        look = {"ha": "center", "va": "top", "color": INK}
        axis.text((begin + end) / 2, -0.47, name, fontsize=10.5, weight="bold", **look)
        plain, _, formula = text.partition("\n$")
        axis.text((begin + end) / 2, -0.82, plain, fontsize=10, linespacing=1.35, **look)
        if formula:
            axis.text((begin + end) / 2, -1.1, f"${formula}", fontsize=11.5, **look)
    for begin in begins:
        axis.add_patch(pyplot.Rectangle((begin, -0.3), width, 0.6, fill=False, ec=GREY, lw=1))
        inside = np.sort(np.append(begin + width * generator.random(11), begin))
        axis.plot(inside, np.zeros_like(inside), "|", color=INK, ms=13, mew=1.1)
    x = np.linspace(0, begins[-1] + width, 2201)
    curve = surrogate(x - u, 0.45, threshold - u, 0.7)
    for part in (x < u, x >= u):
        axis.plot(x[part], 0.95 + 0.5 * curve[part], color=INK, lw=2)
    for where, text in ((u, "target $u$"), (threshold, r"threshold $u+\delta$")):
        axis.plot([where, where], [-0.38, 2.2], color=RED, lw=1.3, ls="--")
        axis.text(where, 2.25, text, color=RED, ha="center", fontsize=11)
    axis.text(0, 1.1, "what a negative adds to the rank of $u$", fontsize=10, color=INK)
    axis.text(0, 0.4, "sorted negatives in boxes", fontsize=10, color=INK)
    axis.set(xlim=(-0.05, 8.9), ylim=(-1.85, 2.5))
    axis.axis("off")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "pairs.png": draw_pairs,
    "series.png": draw_series,
    "boxes.png": draw_boxes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures (default: docs/images)")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw()
        figure.tight_layout()
        # Without the version of matplotlib, the same picture is the same file.
        figure.savefig(folder / name, dpi=120, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)
        print(f"Wrote {folder / name}")


if __name__ == "__main__":
    main()
