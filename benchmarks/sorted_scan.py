"""Time and memory of ap_loss(method="sorted") on the CPU: its goals, its growth, and what "auto" should choose.

`python -m benchmarks.sorted_scan` prints tables and goals, and writes results/sorted_scan_cpu.csv (a row a measurement;
about five minutes); --figures measures nothing and draws docs/images/sorted-scan-*.png from that file. Forward and
backward in float32. Sides of a ratio take turns in one process (measure.py). Its parts, by the first column of the CSV:

    loop      the trimmed torch loop, as a multiple of ours
    sort      the scan as a multiple of np.sort of the same scores, both on one thread
    share     growth with |P| at fixed N, positives at random or of the query's own class
    length    a long row as a multiple of one a tenth as long
    scaling   one row of growing length, a tenth of it positive
    grid      pairwise, sorted and auto over N and |P|
    mixed     the same where few rows have many positives
    few rows  the same where all threads share a row
    settings  the same with other settings
    memory    peak growth of a call beyond scores, masks and one gradient
    floor     a memory copy of the scores
    accuracy  the gradient's distance from float64's, in units of its norm
"""

from __future__ import annotations

import csv
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import roadmap_ext
from tools.fit_series import DEGREE, sigmoid, slope

from . import plots, report
from .loop import NOISES, SEPARABILITY, clustered, torch_loop
from .measure import Side, Spread, gradient_of, memory_copy, paired, peak_growth, same, step, timed, turn
from .plots import pyplot, tidy
from .report import duration, hundredths, interval, mebibytes, median, multiple

PAIRWISE, SORTED, AUTO = "pairwise", "sorted", "auto"
LOOP, SORT, FLOOR = "torch loop", "np.sort", "memory copy"
NAME = "sorted_scan_cpu"
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

LOOP_GOAL = 400.0  # times as fast as the loop
SORT_GOAL = 4.5  # times np.sort's time, which is vectorised
EXPONENT_GOALS = {1.0: 0.2, 2.0: 0.15}  # of the growth of time with |P|, by noise
LENGTH_GOAL = 13.0  # times the time, for ten times the length
AUTO_GOAL = 1.2  # times the better of the two, wherever it is measured

# A call of the grid has about so many scores and at most so many pairs, unless one row has more: some 1 to 100 ms.
CALL_SCORES, CALL_PAIRS = 1 << 21, 5e8
# Pairwise is left out where it would take longer than this, seconds.
LONGEST = 3.0


@dataclass(frozen=True)
class Shape:
    """B queries, N references, and how many of these are positives of each query."""

    queries: int
    references: int
    positives: int

    @property
    def pairs(self) -> int:
        return self.queries * self.positives * (self.references - self.positives)

    def __str__(self) -> str:
        return f"{self.queries} x {self.references:,}, {self.positives:,} positives"


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    loop: tuple[int, int] = (64, 8192)  # queries, references; 10 classes each
    sort: tuple[int, int] = (16, 65_536)
    share: tuple[int, int] = (8, 65_536)
    classes: tuple[int, ...] = (100, 50, 20, 10, 5, 2)  # shares of 1 to 50 %
    length: int = 1_000_000
    scaling: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
    grid: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536, 262_144)
    positives: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 256, 1024)  # and N / 10 and N / 2
    # queries, references, how many of the queries have many positives, these, and what the others have
    mixed: tuple[tuple[int, int, int, int, int], ...] = ((512, 4096, 8, 2048, 4), (64, 65_536, 2, 6553, 4))
    few_rows: tuple[Shape, ...] = tuple(Shape(2, n, p) for n in (65_536, 262_144) for p in (16, 32, 64, 128))
    settings: tuple[tuple[int, int], ...] = ((1024, 32), (8192, 64), (8192, 819))  # references, positives
    memory: tuple[tuple[int, int], ...] = ((16, 65_536), (1, 1_000_000))
    accuracy: tuple[tuple[int, int], ...] = ((4, 8192), (1, 65_536))
    close: int = 100_000  # scores within 1e-4
    rounds: int = 5  # at the least
    seconds: float = 0.5  # for the rounds of one case, about


QUICK = Plan(
    loop=(4, 512),
    sort=(2, 4096),
    share=(2, 4096),
    length=20_000,
    scaling=(1_000, 3_000, 10_000),
    grid=(256, 1024),
    positives=(1, 16, 64),
    mixed=((16, 1024, 2, 512, 4),),
    few_rows=(Shape(2, 16_384, 16),),
    settings=((1024, 64),),
    memory=((4, 4096),),
    accuracy=((2, 1024),),
    close=1_000,
    rounds=1,
    seconds=0.0,
)

SETTINGS: tuple[dict[str, Any], ...] = ({"surrogate": "smooth"}, {"tau": 0.001}, {"tau": 0.1}, {"delta": 0.0})


@dataclass(frozen=True, kw_only=True)
class Row(report.Row):
    """A measurement of a shape."""

    part: str
    noise: float = 2.0  # as in loop.py
    data: str = "classes"  # "classes": 10 or so of them; "random": positives at random; "own class": as own_class draws
    settings: dict[str, Any] = field(default_factory=dict)
    choice: str = ""  # the method that auto takes

    @property
    def each(self) -> float:
        """Seconds a query."""
        return self.value.median / self.case.queries

    @property
    def name(self) -> str:
        return f"{self.case}, {SEPARABILITY[self.noise]}{''.join(f', {k} {v}' for k, v in self.settings.items())}"

    def columns(self) -> dict[str, object]:
        settings = " ".join(f"{key}={value}" for key, value in self.settings.items())
        first = {"part": self.part, "data": self.data, **asdict(self.case)}
        return first | {"noise": f"{self.noise:g}", "settings": settings} | super().columns() | {"choice": self.choice}


def own_class(shape: Shape, noise: float, *, dim: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores [B, N] and target [B, N] as `clustered` draws them, with as many positives as the shape says.

    The queries are not among the references, so that a query with one positive does not have itself.
    """
    count, of_class = shape.references, shape.positives
    classes = max(2, count // of_class)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    # Whole classes of |P|; what is left over goes to the last class, which asks nothing if it is larger.
    reference_labels = (torch.arange(count) // of_class).clamp(max=classes - 1)
    reference_labels = reference_labels[torch.randperm(count, generator=generator)]
    labels = torch.arange(shape.queries) % max(1, min(classes - 1, count // of_class))

    def points(of: Tensor) -> Tensor:
        spread = torch.randn(len(of), dim, generator=generator)
        return functional.normalize(centres[of] + noise * spread, dim=1)

    target = labels[:, None] == reference_labels[None]
    if not bool((target.sum(1) == of_class).all()):
        raise RuntimeError(f"not {of_class} positives each")
    return points(labels) @ points(reference_labels).T, target


def loss_of(method: str, target: Tensor, settings: dict[str, Any] | None = None) -> Callable[[Tensor], Tensor]:
    return functools.partial(roadmap_ext.ap_loss, target=target, method=method, **(settings or {}))


def in_turns(sides: dict[str, Side], *, seconds: float, least: int, most: int = 40) -> dict[str, np.ndarray]:
    """Sides in turn, to and fro, for about ``seconds``: of each, the median seconds of every round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    while (done := len(next(iter(times.values())))) < least or (done < most and time.perf_counter() - begin < seconds):
        for name, side in list(sides.items())[:: -1 if done % 2 else 1]:
            times[name].append(float(np.median(turn(side)[1][:, -1])))
    return {name: np.array(values) for name, values in times.items()}


@functools.cache
def seconds_a_pair() -> float:
    """What pairwise takes, about, of hardly separable data, of which it can skip little."""
    shape = Shape(8, 4096, 409)
    scores, target = own_class(shape, 2.0)
    run = step(loss_of(PAIRWISE, target), scores)
    run()
    return float(np.median([run()[-1] for _ in range(5)])) / shape.pairs


# ---- the parts ----


def loop_part(plan: Plan) -> list[Row]:
    queries, references = plan.loop
    scores, target = clustered(queries, references, 10, noise=2.0)
    shape = Shape(queries, references, references // 10)

    def loop(leaf: Tensor) -> Tensor:
        return torch_loop(leaf, target)

    if not same(gradient_of(loss_of(SORTED, target), scores), gradient_of(loop, scores)):
        raise RuntimeError("the scan does not compute what the loop does: nothing to compare")
    # Two rounds will do: the loop takes seconds a call.
    times = in_turns({SORTED: step(loss_of(SORTED, target), scores), LOOP: step(loop, scores)}, seconds=0, least=2)
    ours, peer = Spread.of(times[SORTED]), Spread.of(times[LOOP])
    ratio = Spread.of(times[LOOP] / times[SORTED], peer.median / ours.median)
    return [Row(shape, LOOP, "time", peer, SORTED, ours, ratio, part="loop")]


def sort_part(plan: Plan) -> list[Row]:
    queries, references = plan.sort
    shape = Shape(queries, references, references // 10)
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for noise in NOISES:
            scores, target = clustered(queries, references, 10, noise=noise)
            sort = timed(functools.partial(np.sort, scores.numpy(), axis=1))
            pair = paired(sort, step(loss_of(SORTED, target), scores), seconds=2 * plan.seconds, least=plan.rounds)
            rows.append(Row.beside(shape, SORTED, SORT, pair, part="sort", noise=noise))
    finally:
        torch.set_num_threads(threads)
    return rows


def share_part(plan: Plan) -> list[Row]:
    queries, references = plan.share
    rows = []
    for noise in NOISES:
        for data in ("random", "classes"):
            sides: dict[str, Side] = {}
            shapes: dict[str, Shape] = {}
            scores, _ = clustered(queries, references, 10, noise=noise)
            order = torch.rand(queries, references, generator=torch.Generator().manual_seed(1)).argsort(1)
            for classes in plan.classes:
                positives = references // classes
                if data == "random":
                    target = torch.zeros(queries, references, dtype=torch.bool).scatter_(1, order[:, :positives], True)
                else:
                    scores, target = clustered(queries, references, classes, noise=noise)
                sides[str(classes)] = step(loss_of(SORTED, target), scores)
                shapes[str(classes)] = Shape(queries, references, positives)
            in_turns(sides, seconds=0, least=1)
            times = in_turns(sides, seconds=6 * plan.seconds, least=plan.rounds)
            rows += [
                Row(shapes[key], SORTED, "time", Spread.of(times[key]), part="share", noise=noise, data=data)
                for key in sides
            ]
    return rows


def length_part(plan: Plan) -> list[Row]:
    rows = []
    for noise in NOISES:
        sides: list[Side] = []
        for references in (plan.length // 10, plan.length):
            scores, target = clustered(1, references, 10, noise=noise)
            sides.append(step(loss_of(SORTED, target), scores))
        pair = paired(sides[0], sides[1], seconds=4 * plan.seconds, least=plan.rounds)
        shape = Shape(1, plan.length, plan.length // 10)
        against = f"{plan.length // 10:,} references"
        rows.append(Row.beside(shape, SORTED, against, pair, part="length", noise=noise))
    return rows


def scaling_part(plan: Plan) -> list[Row]:
    rows = []
    for references in plan.scaling:
        shape = Shape(1, references, references // 10)
        scores, target = clustered(1, references, 10, noise=2.0)
        sides = {SORTED: step(loss_of(SORTED, target), scores)}
        if shape.pairs * seconds_a_pair() < LONGEST:
            sides[PAIRWISE] = step(loss_of(PAIRWISE, target), scores)
        first = sum(side()[-1] for side in sides.values())
        times = in_turns(sides, seconds=plan.seconds, least=1 if first > 0.5 else plan.rounds)
        times |= in_turns({FLOOR: memory_copy(scores)}, seconds=0, least=plan.rounds)
        rows += [Row(shape, method, "time", Spread.of(found), part="scaling") for method, found in times.items()]
    return rows


def chosen(auto: Tensor, pairwise: Tensor | None, scanned: Tensor) -> str:
    """The method whose gradients [B, N] auto's are, bit by bit."""
    by_scan = (auto == scanned).all(1)
    by_pairs = (auto == pairwise).all(1) if pairwise is not None else torch.zeros_like(by_scan)
    if bool(by_scan.all()):
        return "either" if bool(by_pairs.all()) else SORTED
    if bool(by_pairs.all()):
        return PAIRWISE
    if pairwise is None:
        return "not sorted"
    return "a row each" if bool((by_scan | by_pairs).all()) else "neither"


def compare(
    part: str,
    shape: Shape,
    noise: float,
    plan: Plan,
    data: tuple[Tensor, Tensor],
    settings: dict[str, Any] | None = None,
) -> list[Row]:
    """Pairwise, sorted and auto in turn; auto against the better of the other two."""
    scores, target = data
    methods = [PAIRWISE, SORTED, AUTO]
    if shape.pairs * seconds_a_pair() >= LONGEST:
        methods.remove(PAIRWISE)
    losses = {method: loss_of(method, target, settings) for method in methods}
    begin = time.perf_counter()
    found = {method: gradient_of(loss, scores) for method, loss in losses.items()}
    first = time.perf_counter() - begin
    if PAIRWISE in found and not same(found[SORTED], found[PAIRWISE]):
        data_and_settings = f"{SEPARABILITY[noise]}, {settings}"
        raise RuntimeError(f"sorted and pairwise differ at {shape}, {data_and_settings}: nothing to compare")
    choice = chosen(found[AUTO][1], found[PAIRWISE][1] if PAIRWISE in found else None, found[SORTED][1])
    del found
    sides = {method: step(loss, scores) for method, loss in losses.items()}
    least = 1 if first > 0.5 else plan.rounds
    times = in_turns(sides, seconds=plan.seconds, least=least)

    def better() -> str:
        return min((method for method in methods if method != AUTO), key=lambda method: float(np.median(times[method])))

    def worse() -> float:
        return float(np.median(times[AUTO]) / np.median(times[better()]))

    if worse() > AUTO_GOAL and plan.seconds:  # longer, before it is believed
        times = in_turns(sides, seconds=3 * plan.seconds, least=3 * least)
    best = better()
    rows = []
    for method in methods:
        value, drawn = Spread.of(times[method]), {"noise": noise, "data": "own class", "settings": settings or {}}
        row = Row(shape, method, "time", value, part=part, **drawn)
        if method == AUTO:
            ratio = Spread.of(times[AUTO] / times[best], worse())
            row = replace(row, against=best, other=Spread.of(times[best]), ratio=ratio, choice=choice)
        rows.append(row)
    return rows


def grid_shapes(references: int, plan: Plan) -> list[Shape]:
    """Every number of positives that fits a row, in calls of some 1 to 100 ms."""
    some = sorted({p for p in (*plan.positives, references // 10, references // 2) if 2 * p <= references})
    shapes = []
    for positives in some:
        queries = min(CALL_SCORES // references, int(CALL_PAIRS / (positives * references)))
        shapes.append(Shape(max(1, queries), references, positives))
    return shapes


def grid_part(plan: Plan, references: int) -> list[Row]:
    rows = []
    for noise in NOISES:
        for shape in grid_shapes(references, plan):
            rows += compare("grid", shape, noise, plan, own_class(shape, noise))
    return rows


def mixed_part(plan: Plan) -> list[Row]:
    rows = []
    for queries, references, many, long, short in plan.mixed:
        for noise in NOISES:
            parts = [
                own_class(Shape(many, references, long), noise),
                own_class(Shape(queries - many, references, short), noise, seed=1),
            ]
            order = torch.randperm(queries, generator=torch.Generator().manual_seed(2))
            scores, target = (torch.cat(both)[order] for both in zip(*parts, strict=True))
            mean = round((many * long + (queries - many) * short) / queries)
            shape = Shape(queries, references, mean)
            found = compare("mixed", shape, noise, plan, (scores, target))
            rows += [replace(row, data=f"own class: {many} rows with {long}; others {short}") for row in found]
    return rows


def few_rows_part(plan: Plan) -> list[Row]:
    rows = []
    for shape in plan.few_rows:
        rows += compare("few rows", shape, 2.0, plan, own_class(shape, 2.0))
    return rows


def settings_part(plan: Plan) -> list[Row]:
    rows = []
    for references, positives in plan.settings:
        queries = max(1, min(CALL_SCORES // references, int(CALL_PAIRS / (positives * references))) // 2)
        shape = Shape(queries, references, positives)
        for noise in NOISES:
            data = own_class(shape, noise)
            for settings in SETTINGS:
                rows += compare("settings", shape, noise, plan, data, settings)
    return rows


def floor_part(plan: Plan) -> list[Row]:
    rows = []
    for queries, references in dict.fromkeys((plan.loop, plan.sort, *plan.memory)):
        scores, target = clustered(queries, references, 10, noise=2.0)
        pair = paired(
            memory_copy(scores), step(loss_of(SORTED, target), scores), seconds=plan.seconds, least=plan.rounds
        )
        shape = Shape(queries, references, references // 10)
        rows.append(Row.beside(shape, SORTED, FLOOR, pair, part="floor"))
    return rows


def memory_of(method: str, shape: Shape, threads: int) -> float | None:
    """Peak bytes of forward and backward beyond scores, masks and one gradient. Runs in a process of its own."""
    torch.set_num_threads(threads)
    small, small_target = clustered(8, 256, 16)
    step(loss_of(method, small_target), small)()  # warms the thread pools
    scores, target = clustered(shape.queries, shape.references, 10)  # separable: pairwise takes some seconds, not more
    return peak_growth(step(loss_of(method, target), scores), left=scores.nbytes)


def memory_part(plan: Plan, threads: int) -> list[Row]:
    rows = []
    for queries, references in plan.memory:
        shape = Shape(queries, references, references // 10)
        rows += Row.memory(memory_of, shape, [PAIRWISE, SORTED], threads, part="memory", noise=1.0)
    return rows


def accuracy_part(plan: Plan) -> list[Row]:
    """Float32 against float64, which goes pair by pair."""
    generator = torch.Generator().manual_seed(3)
    close = 0.5 + 1e-4 * torch.rand(1, plan.close, generator=generator)
    cases = [("classes", *clustered(queries, references, 10, noise=2.0)) for queries, references in plan.accuracy]
    cases.append(("within 1e-4", close, torch.rand(1, plan.close, generator=generator) < 0.1))
    rows = []
    for data, scores, target in cases:
        queries, references = scores.shape
        shape = Shape(queries, references, int(target.sum()) // queries)
        truth = gradient_of(loss_of(PAIRWISE, target), scores.double())[1]
        for method in (PAIRWISE, SORTED):
            error = gradient_of(loss_of(method, target), scores)[1].double() - truth
            relative = Spread.of((error.norm(dim=1) / truth.norm(dim=1)).numpy())
            rows.append(Row(shape, method, "error", relative, part="accuracy", data=data))
    return rows


# ---- what is printed ----


def of(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row.part == part]


def exponents(rows: list[Row]) -> tuple[float, float]:
    """Of the growth of time with |P|: the least-squares line in log-log, and from the first to the last alone."""
    positives = np.log([row.case.positives for row in rows])
    times = np.log([row.value.median for row in rows])
    return float(np.polyfit(positives, times, 1)[0]), float((times[-1] - times[0]) / (positives[-1] - positives[0]))


def series_of(rows: list[Row]) -> dict[tuple[str, float], list[Row]]:
    """The rows of part "share" by data and noise, each ascending in |P|."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(of(rows, "share"), key=lambda row: row.case.positives):
        found.setdefault((row.data, row.noise), []).append(row)
    return found


def comparison(rows: list[Row], part: str) -> str:
    """Pairwise, sorted and auto a line a case."""
    cases: dict[str, dict[str, Row]] = {}
    for row in of(rows, part):
        cases.setdefault(row.name + row.data.removeprefix("own class").replace(":", ","), {})[row.method] = row
    lines = []
    for name, by in cases.items():
        times = [duration(by[m].value.median) if m in by else "left out" for m in (PAIRWISE, SORTED, AUTO)]
        mark = " !" if by[AUTO].ratio.median > AUTO_GOAL else ""
        lines.append([name, *times, interval(by[AUTO].ratio, hundredths), by[AUTO].choice + mark])
    title = f"{part}: pairwise, sorted and auto in turn; auto to the better of the two, and which auto takes"
    return report.table(title, ["", PAIRWISE, SORTED, AUTO, "ratio", "auto takes"], lines)


def series_table() -> str:
    """What the coefficients in use are good for: known without measuring."""
    lines = []
    for title, fit in (("sigmoid", sigmoid), ("slope", slope)):
        coefficients, bound = fit(DEGREE)
        condition = float(sum(map(abs, coefficients)) / sum(coefficients))
        lines.append([title, f"{DEGREE}", f"{bound:.1e}", f"{condition:.0f}"])
    title = "series: bounds on the relative error, and sum |coefficient| / |sum of them|, by which rounding may grow"
    return report.table(title, ["", "K", "bound", "growth"], lines)


def tables(rows: list[Row]) -> Iterator[str]:
    """A table a part, but for those that only have a goal."""
    yield series_table()
    lines = []
    for (data, noise), found in series_of(rows).items():
        shape = found[0].case
        lines.append([f"{shape.queries} x {shape.references:,}, {data}, {SEPARABILITY[noise]}"])
        lines += [[f"{row.case.positives:,} positives", duration(row.value.median)] for row in found]
    yield report.table("share: the scan at a fixed number of references", ["", "time"], lines)
    scaling, methods = of(rows, "scaling"), (SORTED, PAIRWISE, FLOOR)
    lines = []
    for shape in dict.fromkeys(row.case for row in scaling):
        found = (report.find(scaling, case=shape, method=method) for method in methods)
        lines.append([str(shape), *(median(row and row.value, duration) for row in found)])
    yield report.table("scaling: one row, a tenth of it positive", ["", *methods], lines)
    for part in ("grid", "mixed", "few rows", "settings"):
        yield comparison(rows, part)
    lines = [[str(row.case), *row.cells(multiple)] for row in of(rows, "floor")]
    yield report.table("floor: the scan as a multiple of a memory copy", ["", SORTED, FLOOR, "ratio"], lines)
    lines = [
        [f"{row.case}{'' if row.data == 'classes' else f' {row.data}'}, {row.method}", f"{row.value.median:.1e}"]
        for row in of(rows, "accuracy")
    ]
    yield report.table("accuracy: |gradient - float64's| / |float64's| of a row", ["", "error"], lines)
    lines = []
    for row in of(rows, "memory"):
        size = row.value.median
        lines.append([f"{row.case}, {row.method}", mebibytes(size), f"{size / row.case.references:.0f} bytes"])
    title = "memory: peak growth of a call beyond scores, masks and one gradient"
    yield report.table(title, ["", "whole", "a reference"], lines)


def goals(rows: list[Row]) -> Iterator[tuple[str, bool | None]]:
    """Each goal, the figure measured, and whether it is met. Some are for hardly separable data alone."""

    def sides(row: Row) -> str:
        return f"{duration(row.value.median)} to {duration(row.other.median)}"

    for row in of(rows, "loop"):
        text = f"(a) {row.case}: {row.ratio.median:.0f} times the loop's speed ({sides(row)}), of {LOOP_GOAL:g}"
        yield text, row.ratio.median >= LOOP_GOAL
    for row in of(rows, "sort"):
        text = f"{interval(row.ratio, hundredths)} times {SORT} ({sides(row)}), at most {SORT_GOAL}"
        yield f"(b) {row.name}: {text}", row.ratio.median <= SORT_GOAL
    for (data, noise), found in series_of(rows).items():
        line, ends = exponents(found)
        goal = EXPONENT_GOALS[noise]
        text = f"exponent {line:.3f} by least squares, {ends:.3f} by the ends, at most {goal}"
        shares = f"{found[0].case.positives:,} to {found[-1].case.positives:,} positives"
        yield f"(c) {data}, {SEPARABILITY[noise]}, {shares}: {text}", max(line, ends) <= goal
    for row in of(rows, "length"):
        text = f"{row.ratio.median:.1f} times {row.against} ({sides(row)}), at most {LENGTH_GOAL:g}"
        yield f"(d) {row.name}: {text}", row.ratio.median <= LENGTH_GOAL if row.noise == 2 else None
    autos = [row for row in rows if row.method == AUTO]
    if autos:
        worst = max(autos, key=lambda row: row.ratio.median)
        over = sum(row.ratio.median > AUTO_GOAL for row in autos)
        text = f"worst of {len(autos)} is {worst.ratio.median:.2f} times the better ({worst.part}: {worst.name})"
        yield f"(e) auto: {text}, at most {AUTO_GOAL}{f', {over} above' if over else ''}", over == 0
    for row in of(rows, "memory"):
        yield f"(f) {row.case}, {row.method}: {mebibytes(row.value.median)}", None


# ---- the file ----


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """What the figures need of the file: times and methods; and a line of it, which has the provenance of all."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = []
    for line in (line for line in lines if line["unit"] == "ms"):
        shape = Shape(int(line["queries"]), int(line["references"]), int(line["positives"]))
        # Before the method had its name, it was called tiled.
        method, choice = (line[name].replace("tiled", PAIRWISE) for name in ("method", "choice"))
        value = Spread(*(1e-3 * float(line[name]) for name in ("median", "p20", "p80")), int(line["repeats"]))
        drawn = {"part": line["part"], "noise": float(line["noise"]), "data": line["data"], "choice": choice}
        rows.append(Row(shape, method, line["what"], value, **drawn))
    return rows, lines[-1]


# ---- figures ----

COLOURS = {PAIRWISE: plots.BLUE, SORTED: plots.RED, FLOOR: plots.GREY}
MARKS = {PAIRWISE: "o", SORTED: "s", FLOOR: "_"}
RING = {"marker": "o", "ms": 10, "mfc": "none", "color": "#222222"}


def draw_line(axis: Any, rows: list[Row], over: str, line: str, unit: float = 1e3, **look: Any) -> None:
    """Time a query of one method, over the references or the positives."""
    rows = sorted(rows, key=lambda row: getattr(row.case, over))
    x, y = [getattr(row.case, over) for row in rows], [unit * row.each for row in rows]
    if rows:
        method = rows[0].method
        axis.plot(x, y, **{"marker": MARKS[method], "color": COLOURS[method], "ls": line, "lw": 1.2, **look})


def draw_crossover(rows: list[Row], about: Mapping[str, str], path: Path) -> None:
    """Time a row of pairwise and of sorted over |P|, a panel a length; rings are what auto takes."""
    grid = of(rows, "grid")
    lengths = sorted({row.case.references for row in grid})
    across = min(3, len(lengths))
    down = math.ceil(len(lengths) / across)
    figure, axes = pyplot.subplots(down, across, figsize=(4.6 * across, 3.6 * down + 0.8), squeeze=False)
    for axis in axes.flat[len(lengths) :]:
        axis.set_visible(False)
    for axis, references in zip(axes.flat, lengths, strict=False):
        for noise, line, alpha in ((1.0, "--", 0.55), (2.0, "-", 1.0)):
            here = [row for row in grid if row.case.references == references and row.noise == noise]
            choices = {row.case: row.choice for row in here if row.method == AUTO}
            for method in (PAIRWISE, SORTED):
                found = [row for row in here if row.method == method]
                label = f"{method}, {SEPARABILITY[noise]}"
                draw_line(axis, found, "positives", line, 1e6, ms=4.5, alpha=alpha, label=label)
                taken = [row for row in found if choices.get(row.case) == method]
                draw_line(axis, taken, "positives", "", 1e6, alpha=alpha, **RING)
        tidy(axis, xscale="log", yscale="log", title=f"{references:,} references", xlabel="positives of a query")
        axis.set_ylabel("forward + backward, us a query")
    axes[0][0].plot([], [], label="auto takes it", ls="", **RING)
    plots.save(figure, axes[0][0], about, path)


def draw_scaling(rows: list[Row], about: Mapping[str, str], path: Path) -> None:
    """Time over N at 10 % positives, and over |P| at one N."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(16, 4.8))
    for method, line, size in ((PAIRWISE, "-", 5), (SORTED, "-", 5), (FLOOR, "", 12)):
        found = [row for row in of(rows, "scaling") if row.method == method]
        draw_line(left, found, "references", line, ms=size, label=method)
    left.set(title=f"one row, 10 % of it positive, {SEPARABILITY[2.0]}", xlabel="references")
    series = series_of(rows)
    lines = {("random", 1.0): ":", ("random", 2.0): "-.", ("classes", 1.0): "--", ("classes", 2.0): "-"}
    for key, found in series.items():
        positives = "at random" if key[0] == "random" else "of a class"
        label = f"sorted, positives {positives}, {SEPARABILITY[key[1]]}: exponent {exponents(found)[0]:.2f}"
        draw_line(right, found, "positives", lines[key], ms=4, label=label)
    references = next((row.case.references for row in of(rows, "share")), 0)
    lowest = min((row.case.positives for row in of(rows, "share")), default=0)
    for noise, line in ((1.0, "--"), (2.0, "-")):
        found = [row for row in of(rows, "grid") if row.method == PAIRWISE and row.noise == noise]
        found = [row for row in found if row.case.references == references and row.case.positives >= lowest / 3]
        draw_line(right, found, "positives", line, ms=4, label=f"{PAIRWISE}, {SEPARABILITY[noise]}")
    right.set(title=f"{references:,} references", xlabel="positives of a query")
    for axis in (left, right):
        tidy(axis, xscale="log", yscale="log", ylabel="forward + backward, ms a query")
    left.legend(frameon=False, fontsize=9)
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    plots.save(figure, None, about, path)


def draw(results: Path, folder: Path) -> None:
    """The figures of docs/benchmarks.md."""
    if not results.exists():
        raise SystemExit(f"No {results}: run it without --figures first.")
    folder.mkdir(parents=True, exist_ok=True)
    rows, about = read_csv(results)
    draw_crossover(rows, about, folder / "sorted-scan-crossover.png")
    draw_scaling(rows, about, folder / "sorted-scan-scaling.png")
    print(f"Wrote {folder / 'sorted-scan-crossover.png'} and {folder / 'sorted-scan-scaling.png'} from {results}")


def main() -> None:
    parser = report.parser(
        __doc__,
        quick="only that all of it runs: small sizes, no goals, nothing written",
        figures="measure nothing: draw the figures from the CSV",
    )
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the figures (default: docs/images)")
    options = parser.parse_args()
    if options.figures:
        draw(options.out / f"{NAME}.csv", options.images)
        return
    plan = QUICK if options.quick else Plan()
    parts: dict[str, Callable[[Plan], list[Row]]] = {
        "memory": functools.partial(memory_part, threads=options.threads),
        "(a) beside the torch loop": loop_part,
        "(b) beside np.sort": sort_part,
        "beside a memory copy": floor_part,
        "accuracy": accuracy_part,
        "(c) growth with |P|": share_part,
        "(d) a long row": length_part,
        "growth with N": scaling_part,
        "(e) few rows, which threads share": few_rows_part,
        "(e) rows of two kinds": mixed_part,
        "(e) other settings": settings_part,
    }
    parts |= {f"(e) grid: {size:,} references": functools.partial(grid_part, references=size) for size in plan.grid}
    jobs = [(name, functools.partial(part, plan)) for name, part in parts.items()]
    report.carry_out(options, NAME, jobs, tables, (lambda rows: ()) if options.quick else goals)


if __name__ == "__main__":
    main()
