"""What the runs of a comparison say: intervals, a table in Markdown, and plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from ..intervals import Interval
from ..report import markdown_head, markdown_row
from .losses import LOSSES
from .plan import Comparison
from .runs import CURVE, EVALUATIONS, Results, Run

COLOURS = dict(zip(LOSSES, (*pyplot.get_cmap("tab10").colors, *pyplot.get_cmap("Dark2").colors), strict=False))


class Findings:
    """The finished runs of a comparison's tests, by batch size, loss and seed."""

    def __init__(self, comparison: Comparison, results: Results) -> None:
        self.comparison = comparison
        self.batch_sizes = sorted({size for size, _ in comparison.stages})
        self.rates: dict[tuple[int, str], float] = {}
        self._runs: dict[tuple[int, str], dict[int, dict[str, float]]] = {}
        for size, losses in comparison.stages:
            for loss in losses:
                rate = comparison.rate(loss, size, results)
                tests = {seed: Run("test", loss, size, rate, seed) for seed in range(comparison.seeds)}
                done = {seed: results[run] for seed, run in tests.items() if run in results}
                if done:
                    self.rates[size, loss], self._runs[size, loss] = rate, done

    def losses(self, size: int) -> list[str]:
        """Those that have finished runs of a batch size, in the order of their list."""
        return [loss for loss in LOSSES if (size, loss) in self._runs]

    def values(self, size: int, loss: str, name: str) -> dict[int, float]:
        """By seed; a run that diverged has none."""
        return {seed: row[name] for seed, row in self._runs.get((size, loss), {}).items() if name in row}

    def mean(self, size: int, loss: str, name: str) -> Interval:
        """Over seeds."""
        return Interval.of([*self.values(size, loss, name).values()])

    def difference(self, size: int, ours: str, theirs: str, name: str) -> Interval:
        """Over the seeds that both have, the same network and batches to begin with."""
        one, other = self.values(size, ours, name), self.values(size, theirs, name)
        return Interval.of([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])

    def diverged(self, size: int, loss: str) -> int:
        """Runs whose loss was not finite."""
        return len(self._runs[size, loss]) - len(self.values(size, loss, "mAP@R"))


def table(found: Findings) -> str:
    """Markdown: every loss, and the paired differences that the claims are about."""
    points = "In points of 100: mean ± half of the 95 % interval (Student's t over seeds)."
    shown, compared = found.comparison.shown, found.comparison.compared
    lines = [points, "", markdown_head(["batch", "loss", "learning rate", "runs", *shown])]
    for size in found.batch_sizes:
        for loss in found.losses(size):
            cells = [found.mean(size, loss, name).show() for name in shown]
            count, lost = found.mean(size, loss, "mAP@R").values, found.diverged(size, loss)
            runs = f"{count}" + (f", {lost} diverged" if lost else "")
            lines.append(markdown_row([size, LOSSES[loss].title, f"{found.rates[size, loss]:g}", runs, *cells]))
    lines += ["", "Differences, paired by seed: the same network, batches and distortions.", ""]
    titles = [f"{name} of the images" if name in CURVE else name for name in compared]
    lines += [markdown_head(["batch", "difference", *titles])]
    for size in found.batch_sizes:
        for ours, theirs in found.comparison.differences:
            if {ours, theirs} <= {*found.losses(size)}:
                cells = [found.difference(size, ours, theirs, name).show(True) for name in compared]
                lines.append(markdown_row([size, f"{LOSSES[ours].title} - {LOSSES[theirs].title}", *cells]))
    return "\n".join(lines) + "\n"


def plot(found: Findings, path: Path) -> None:
    """mAP@R by loss and by batch size, the gap with and without calibration, and learning curves; without curves mAP@R
    alone, a panel each batch size."""
    if CURVE[0] in found.comparison.measured:
        most = max(found.batch_sizes, key=lambda size: (len(found.losses(size)), size))
        figure, axes = pyplot.subplots(2, 2, figsize=(12, 9))
        _by_loss(axes[0, 0], found, most)
        _by_batch_size(axes[0, 1], found)
        _gaps(axes[1, 0], found)
        _curves(axes[1, 1], found, most)
    else:
        figure, axes = pyplot.subplots(1, len(found.batch_sizes), figsize=(14, 5), squeeze=False)
        for axis, size in zip(axes[0], found.batch_sizes, strict=True):
            _by_loss(axis, found, size)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{found.comparison.name}: means of {found.comparison.seeds} seeds at the most, 95 % intervals")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _by_loss(axis: Axes, found: Findings, size: int) -> None:
    losses = found.losses(size)[::-1]
    for place, loss in enumerate(losses):
        values = [*found.values(size, loss, "mAP@R").values()]
        _bar(axis, found.mean(size, loss, "mAP@R"), lambda x, half, y=place: {"x": x, "y": y, "xerr": half}, loss)
        axis.plot(values, [place - 0.25] * len(values), ".", color="gray", markersize=4)
    axis.set(
        yticks=range(len(losses)),
        yticklabels=[LOSSES[loss].title for loss in losses],
        ylim=(-0.6, len(losses) - 0.4),
        xlabel="mAP@R (gray: each seed)",
        title=f"retrieval, batches of {size}",
    )


def _by_batch_size(axis: Axes, found: Findings) -> None:
    planned = [loss for _, losses in found.comparison.stages for loss in losses]
    several = [loss for loss in LOSSES if planned.count(loss) > 1 and any(_has(found, loss))]
    for place, loss in enumerate(several):
        sizes = [size for size in found.batch_sizes if loss in found.losses(size)]
        means = [found.mean(size, loss, "mAP@R") for size in sizes]
        aside = [size * 1.03 ** (place - (len(several) - 1) / 2) for size in sizes]
        halves = [0 if math.isnan(each.half) else each.half for each in means]
        look = {"fmt": "o-", "capsize": 3, "markersize": 4, "color": COLOURS[loss], "label": LOSSES[loss].title}
        axis.errorbar(aside, [each.mean for each in means], halves, **look)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="batch size", ylabel="mAP@R", title="retrieval by batch size")
    axis.set_xticks(found.batch_sizes, [str(size) for size in found.batch_sizes])
    axis.minorticks_off()
    if several:
        axis.legend()


def _gaps(axis: Axes, found: Findings) -> None:
    shown = [loss for loss in ("smooth-ap", "sup-ap", "roadmap", "calibration") if any(_has(found, loss))]
    for place, loss in enumerate(shown):
        for row, size in enumerate(found.batch_sizes):
            if loss in found.losses(size):
                x = row + 0.2 * (place - (len(shown) - 1) / 2)
                _bar(axis, found.mean(size, loss, "gap"), lambda y, half, x=x: {"x": x, "y": y, "yerr": half}, loss)
        title = LOSSES[loss].title + (" (SupAP with calibration)" if loss == "roadmap" else "")
        axis.plot([], [], "o", color=COLOURS[loss], label=title)
    axis.set_xticks(range(len(found.batch_sizes)), [str(size) for size in found.batch_sizes])
    axis.set(xlabel="batch size", ylabel="mean AP of batches - AP of all", title="decomposability gap after training")
    axis.margins(x=0.2)
    if shown:
        axis.legend()


def _has(found: Findings, loss: str) -> list[bool]:
    return [loss in found.losses(size) for size in found.batch_sizes]


def _curves(axis: Axes, found: Findings, size: int) -> None:
    images = [found.comparison.images * place / EVALUATIONS for place in range(1, EVALUATIONS + 1)]
    for loss in found.losses(size):
        means = [found.mean(size, loss, name).mean for name in (*CURVE, "mAP@R")]
        axis.plot(images, means, "o-", markersize=3, color=COLOURS[loss], label=LOSSES[loss].title)
    axis.set(xlabel="images trained on", ylabel="mAP@R of the test", title=f"learning curves, batches of {size}")
    if found.losses(size):
        axis.legend(fontsize=8)


def _bar(axis: Axes, value: Interval, where: Callable[[float, float], dict[str, float]], loss: str) -> None:
    if value.values:
        half = 0 if math.isnan(value.half) else value.half
        axis.errorbar(**where(value.mean, half), fmt="o", capsize=4, color=COLOURS[loss])
