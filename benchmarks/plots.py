"""What the plots of the benchmarks share: colours, axes, and a caption that says where the figures were taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .measure import Spread

# Okabe and Ito's colours, which all eyes tell apart.
BLUE, SKY, GREEN, ORANGE, RED, GREY = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#555555"


class Time(NamedTuple):
    """Seconds of a method, in a panel, at a case."""

    panel: str
    case: str
    method: str
    value: Spread


def by_case(times: Iterable[Time], marks: Mapping[str, tuple[str, str]], about: Mapping[str, str], path: Path) -> None:
    """Forward and backward by case, a mark a method (colour and shape; "_" is a floor's)."""
    times = list(times)
    panels, cases = (list(dict.fromkeys(names)) for names in ((x.panel for x in times), (x.case for x in times)))
    shown = [method for method in marks if any(x.method == method for x in times)]
    beside = [method for method in shown if marks[method][1] != "_"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 5.2), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for method in shown:
            colour, mark = marks[method]
            chosen = [x for x in times if (x.panel, x.method) == (panel, method)]
            aside = 0.12 * (beside.index(method) - (len(beside) - 1) / 2) if method in beside else 0
            where, values = [cases.index(x.case) + aside for x in chosen], [x.value for x in chosen]
            low = [1e3 * max(0.0, value.median - value.p20) for value in values]
            high = [1e3 * max(0.0, value.p80 - value.median) for value in values]
            look = {"fmt": mark, "color": colour, "ms": 26 if mark == "_" else 7, "lw": 1.2, "capsize": 2}
            axis.errorbar(where, [1e3 * value.median for value in values], (low, high), label=method, **look)
        axis.set_xticks(range(len(cases)), cases, fontsize=8, rotation=35 if len(cases) > 5 else 0)
        tidy(axis, yscale="log", title=panel, xlim=(-0.5, len(cases) - 0.5))
    axes[0][0].set_ylabel("forward + backward, ms")
    save(figure, axes[0][0], about, path, "; bars: 20th to 80th percentile")


def tidy(axis: Any, **properties: Any) -> None:
    """Sets properties of an axis, and draws few lines around it."""
    axis.set(**properties)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, legend: Any | None, about: Mapping[str, str], path: Path, more: str = "") -> None:
    """With the legend of an axis above all axes, and a caption from the provenance below them."""
    if legend:
        handles, names = legend.get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, fontsize=9, markerscale=0.8)
    caption = "{cpu}, {threads} threads, {instruction_set}, torch {torch}, {date}".format(**about) + more
    figure.text(0.5, 0.01, caption, ha="center", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.03, 1, 0.94 if legend else 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
