"""Time and memory of ap_loss(method="sorted") on the CPU: its goals, its growth, and what "auto" should choose.

`python -m benchmarks.sorted_scan` prints tables and goals, and writes results/sorted_scan_cpu.csv (a row a measurement;
about five minutes); --figures measures nothing and draws docs/sorted-scan*.png from that file. Forward and backward in
float32. Sides of a ratio take turns in one process (measure.py). Its parts, by the first column of the CSV:

    loop      the trimmed torch loop, as a multiple of ours
    sort      the scan as a multiple of torch.sort of the same scores
    share     growth with |P| at fixed N, positives at random or of the query's own class
    length    a long row as a multiple of one a tenth as long
    scaling   one row of growing length, a tenth of it positive
    grid      tiled, sorted and auto over N and |P|
    mixed     the same where few rows have many positives
    few rows  the same where all threads share a row
    settings  the same with other settings
    memory    peak growth of a call beyond scores, masks and one gradient
    floor     a memory copy of the scores
    accuracy  the gradient's distance from float64's, in units of its norm
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import roadmap_ext
from tools.fit_series import DEGREES, ENDS, sigmoid, slope

from .ap_loss import duration, interval, mebibytes, multiple
from .loop import clustered, torch_loop
from .measure import MIB, Pair, Side, Spread, in_fresh_process, memory_copy, paired, peak_growth, provenance, step, turn
from .roadmap_loss import hundredths

TILED, SORTED, AUTO = "tiled", "sorted", "auto"
LOOP, SORT, FLOOR = "torch loop", "torch.sort", "memory copy"
CSV = "sorted_scan_cpu.csv"
DOCS = Path(__file__).resolve().parent.parent / "docs"

LOOP_GOAL = 400.0  # times as fast as the loop
SORT_GOAL = 0.45  # of torch.sort's time
EXPONENT_GOAL = 0.1  # of the growth of time with |P|
LENGTH_GOAL = 13.0  # times the time, for ten times the length
AUTO_GOAL = 1.2  # times the better of the two, wherever it is measured

# A call of the grid has about so many scores and at most so many pairs, unless one row has more: some 1 to 100 ms.
CALL_SCORES, CALL_PAIRS = 1 << 21, 5e8
# Tiled is left out where it would take longer than this, seconds.
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
    accuracy: tuple[tuple[int, int], ...] = ((4, 8192), (1, 65_536), (1, 1_000_000))
    crowd: int = 100_000  # scores within 1e-4
    rounds: int = 5  # at the least
    seconds: float = 0.5  # for the rounds of one case, about
    noises: tuple[float, ...] = (1.0, 2.0)


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
    crowd=1_000,
    rounds=1,
    seconds=0.0,
)

SETTINGS: tuple[dict[str, Any], ...] = ({"surrogate": "smooth"}, {"tau": 0.001}, {"tau": 0.1}, {"delta": 0.0})


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of forward and backward, or bytes; and what took turns with it."""

    part: str
    shape: Shape
    method: str
    value: Spread
    noise: float = 2.0
    data: str = "classes"  # "classes": 10 or so of them; "random": positives at random; "own class": as own_class draws
    settings: dict[str, Any] = field(default_factory=dict)
    what: str = "time"  # or "memory", or "error"
    against: str = ""
    other: Spread | None = None  # of `against`
    ratio: Spread | None = None  # of the value to that
    choice: str = ""  # the method that auto takes

    @property
    def each(self) -> float:
        """Seconds a query."""
        return self.value.median / self.shape.queries


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


def gradient_of(loss: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether two losses and their gradients differ by rounding alone."""
    far = float((one[1] - other[1]).norm()) > 1e-3 * float(other[1].norm())
    return torch.allclose(one[0], other[0], rtol=1e-4) and not far


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
    """What tiled takes, about: at noise 2, where it can skip little."""
    shape = Shape(8, 4096, 409)
    scores, target = own_class(shape, 2.0)
    run = step(loss_of(TILED, target), scores)
    run()
    return float(np.median([run()[-1] for _ in range(5)])) / shape.pairs


# ---- the parts ----


def beside(part: str, shape: Shape, noise: float, pair: Pair, against: str) -> Row:
    """The scan, which was the peer of the pair, as a multiple of what was ours."""
    return Row(part, shape, SORTED, pair.peer[2], noise, against=against, other=pair.ours[2], ratio=pair.ratio[2])


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
    return [Row("loop", shape, LOOP, peer, against=SORTED, other=ours, ratio=ratio)]


def sort_part(plan: Plan) -> list[Row]:
    queries, references = plan.sort
    shape = Shape(queries, references, references // 10)
    rows = []
    for noise in plan.noises:
        scores, target = clustered(queries, references, 10, noise=noise)

        def sort(scores: Tensor = scores) -> tuple[float, ...]:
            begin = time.perf_counter()
            torch.sort(scores, dim=1)
            return 0.0, 0.0, time.perf_counter() - begin

        pair = paired(sort, step(loss_of(SORTED, target), scores), seconds=2 * plan.seconds, least=plan.rounds)
        rows.append(beside("sort", shape, noise, pair, SORT))
    return rows


def share_part(plan: Plan) -> list[Row]:
    queries, references = plan.share
    rows = []
    for noise in plan.noises:
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
            rows += [Row("share", shapes[key], SORTED, Spread.of(times[key]), noise, data) for key in sides]
    return rows


def length_part(plan: Plan) -> list[Row]:
    rows = []
    for noise in plan.noises:
        sides: list[Side] = []
        for references in (plan.length // 10, plan.length):
            scores, target = clustered(1, references, 10, noise=noise)
            sides.append(step(loss_of(SORTED, target), scores))
        pair = paired(sides[0], sides[1], seconds=4 * plan.seconds, least=plan.rounds)
        shape = Shape(1, plan.length, plan.length // 10)
        against = f"{plan.length // 10:,} references"
        rows.append(beside("length", shape, noise, pair, against))
    return rows


def scaling_part(plan: Plan) -> list[Row]:
    rows = []
    for references in plan.scaling:
        shape = Shape(1, references, references // 10)
        scores, target = clustered(1, references, 10, noise=2.0)
        sides = {SORTED: step(loss_of(SORTED, target), scores)}
        if shape.pairs * seconds_a_pair() < LONGEST:
            sides[TILED] = step(loss_of(TILED, target), scores)
        first = sum(side()[-1] for side in sides.values())
        times = in_turns(sides, seconds=plan.seconds, least=1 if first > 0.5 else plan.rounds)
        rows += [Row("scaling", shape, method, Spread.of(values)) for method, values in times.items()]
        copy = in_turns({FLOOR: memory_copy(scores)}, seconds=0, least=plan.rounds)
        rows.append(Row("scaling", shape, FLOOR, Spread.of(copy[FLOOR])))
    return rows


def chosen(auto: Tensor, tiled: Tensor | None, scanned: Tensor) -> str:
    """The method whose gradients [B, N] auto's are, bit by bit."""
    by_scan = (auto == scanned).all(1)
    by_tiles = (auto == tiled).all(1) if tiled is not None else torch.zeros_like(by_scan)
    if bool(by_scan.all()):
        return "either" if bool(by_tiles.all()) else SORTED
    if bool(by_tiles.all()):
        return TILED
    if tiled is None:
        return "not sorted"
    return "a row each" if bool((by_scan | by_tiles).all()) else "neither"


def compare(
    part: str,
    shape: Shape,
    noise: float,
    plan: Plan,
    data: tuple[Tensor, Tensor],
    settings: dict[str, Any] | None = None,
) -> list[Row]:
    """Tiled, sorted and auto in turn; auto against the better of the other two."""
    scores, target = data
    methods = [TILED, SORTED, AUTO]
    if shape.pairs * seconds_a_pair() >= LONGEST:
        methods.remove(TILED)
    losses = {method: loss_of(method, target, settings) for method in methods}
    begin = time.perf_counter()
    found = {method: gradient_of(loss, scores) for method, loss in losses.items()}
    first = time.perf_counter() - begin
    if TILED in found and not same(found[SORTED], found[TILED]):
        raise RuntimeError(f"sorted and tiled differ at {shape}, noise {noise:g}, {settings}: nothing to compare")
    choice = chosen(found[AUTO][1], found[TILED][1] if TILED in found else None, found[SORTED][1])
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
        row = Row(part, shape, method, Spread.of(times[method]), noise, "own class", settings or {})
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


def grid_part(references: int, plan: Plan) -> list[Row]:
    rows = []
    for noise in plan.noises:
        for shape in grid_shapes(references, plan):
            rows += compare("grid", shape, noise, plan, own_class(shape, noise))
    return rows


def mixed_part(plan: Plan) -> list[Row]:
    rows = []
    for queries, references, many, long, short in plan.mixed:
        for noise in plan.noises:
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
        for noise in plan.noises:
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
        rows.append(beside("floor", shape, 2.0, pair, FLOOR))
    return rows


def memory_of(method: str, queries: int, references: int, threads: int) -> float | None:
    """Peak bytes of forward and backward beyond scores, masks and one gradient. Runs in a process of its own."""
    torch.set_num_threads(threads)
    small, small_target = clustered(8, 256, 16)
    step(loss_of(method, small_target), small)()  # warms the thread pools
    scores, target = clustered(queries, references, 10)  # noise 1: tiled takes some seconds, not more
    growth = peak_growth(step(loss_of(method, target), scores))
    return None if growth is None else max(0.0, growth - scores.nbytes)


def memory_part(plan: Plan, threads: int) -> list[Row]:
    rows = []
    for queries, references in plan.memory:
        shape = Shape(queries, references, references // 10)
        for method in (TILED, SORTED):
            size = in_fresh_process(memory_of, method, queries, references, threads)
            if size is not None:
                rows.append(Row("memory", shape, method, Spread(size, size, size, 1), 1.0, what="memory"))
    return rows


def accuracy_part(plan: Plan) -> list[Row]:
    """Float32 against float64, which the tests hold against longer numbers still."""
    generator = torch.Generator().manual_seed(3)
    crowd = 0.5 + 1e-4 * torch.rand(1, plan.crowd, generator=generator)
    cases = [("classes", *clustered(queries, references, 10, noise=2.0)) for queries, references in plan.accuracy]
    cases.append(("within 1e-4", crowd, torch.rand(1, plan.crowd, generator=generator) < 0.1))
    rows = []
    for data, scores, target in cases:
        queries, references = scores.shape
        shape = Shape(queries, references, int(target.sum()) // queries)
        truth = gradient_of(loss_of(SORTED, target), scores.double())[1]
        for method in (TILED, SORTED):
            if method == TILED and shape.pairs * seconds_a_pair() >= LONGEST:
                continue
            error = gradient_of(loss_of(method, target), scores)[1].double() - truth
            rows.append(
                Row("accuracy", shape, method, Spread.of((error.norm(dim=1) / truth.norm(dim=1)).numpy()), data=data)
            )
    return [replace(row, what="error") for row in rows]


# ---- what is printed ----


def of(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row.part == part]


def exponents(rows: list[Row]) -> tuple[float, float]:
    """Of the growth of time with |P|: the least-squares line in log-log, and from the first to the last alone."""
    positives = np.log([row.shape.positives for row in rows])
    times = np.log([row.value.median for row in rows])
    return float(np.polyfit(positives, times, 1)[0]), float((times[-1] - times[0]) / (positives[-1] - positives[0]))


def series_of(rows: list[Row]) -> dict[tuple[str, float], list[Row]]:
    """The rows of part "share" by data and noise, each ascending in |P|."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(of(rows, "share"), key=lambda row: row.shape.positives):
        found.setdefault((row.data, row.noise), []).append(row)
    return found


def print_comparisons(rows: list[Row], part: str) -> None:
    """Tiled, sorted and auto a line a case."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in of(rows, part):
        key = (row.shape, row.noise, row.data, str(row.settings))
        cases.setdefault(key, {})[row.method] = row
    print(f"\n{part}: tiled, sorted and auto in turn; auto to the better of the two, and which auto takes")
    for (shape, noise, _, _), by in cases.items():
        auto = by[AUTO]
        name = f"{shape}, noise {noise:g}"
        name += "".join(f", {key} {value}" for key, value in auto.settings.items())
        name += auto.data.removeprefix("own class").replace(":", ",")
        tiled = duration(by[TILED].value.median) if TILED in by else "left out"
        cells = [tiled, duration(by[SORTED].value.median), duration(auto.value.median)]
        mark = " !" if auto.ratio and auto.ratio.median > AUTO_GOAL else ""
        ratio = interval(auto.ratio, hundredths) if auto.ratio else ""
        print(f"  {name:<78}{cells[0]:>10}{cells[1]:>10}{cells[2]:>10}   {ratio:<22}{auto.choice}{mark}")


def print_series() -> None:
    """What the coefficients in use are good for: known without measuring."""
    print("\nseries: bounds on the relative error, and sum |coefficient| / |sum of them|, by which rounding may grow")
    for name, degree in DEGREES.items():
        for title, (coefficients, bound) in (
            ("sigmoid", sigmoid(degree, ENDS[name])),
            ("slope", slope(degree, ENDS[name])),
        ):
            condition = float(sum(map(abs, coefficients)) / sum(coefficients))
            print(f"  {name:<8}{title:<9}K = {degree}: {bound:.1e}, {condition:.0f}")


def print_tables(rows: list[Row]) -> None:
    print_series()
    print("\nshare: the scan at a fixed number of references")
    for (data, noise), found in series_of(rows).items():
        cells = "  ".join(f"{row.shape.positives:,}: {duration(row.value.median)}" for row in found)
        print(f"  {found[0].shape.queries} x {found[0].shape.references:,}, {data}, noise {noise:g}: {cells}")
    print("\nscaling: one row, a tenth of it positive")
    for shape in dict.fromkeys(row.shape for row in of(rows, "scaling")):
        found = [row for row in of(rows, "scaling") if row.shape == shape]
        print(f"  {shape}: " + ", ".join(f"{row.method} {duration(row.value.median)}" for row in found))
    for part in ("grid", "mixed", "few rows", "settings"):
        print_comparisons(rows, part)
    print("\nfloor: the scan as a multiple of a memory copy")
    for row in of(rows, "floor"):
        if row.other and row.ratio:
            sides = f"{interval(row.value, duration):<30}{duration(row.other.median):<10}"
            print(f"  {f'{row.shape}':<46}{sides}{multiple(row.ratio.median)}")
    print("\naccuracy: |gradient - float64's| / |float64's| of a row")
    for row in of(rows, "accuracy"):
        data = "" if row.data == "classes" else f" {row.data}"
        print(f"  {f'{row.shape}{data}, {row.method}':<60}{row.value.median:.1e}")
    print("\nmemory: peak growth of a call beyond scores, masks and one gradient")
    for row in of(rows, "memory"):
        size, each = mebibytes(row.value.median), row.value.median / row.shape.references
        print(f"  {f'{row.shape}, {row.method}':<46}{size:<14}{each:.0f} bytes a reference")


def print_goals(rows: list[Row], about: dict[str, str]) -> None:
    """Each goal, the figure measured, and whether it is met."""
    print("\nGoals")
    before, after = float(about["load"]), float(about["load_after"])
    if before > 1 or after > int(about["threads"]) + 1:
        print(f"  Other work was on this machine: load {before:g} before, {after:g} after. Run it again when idle.")

    def verdict(met: bool) -> str:
        return "met" if met else "MISSED"

    for row in of(rows, "loop"):
        if row.ratio and row.other:
            sides = f"{duration(row.value.median)} to {duration(row.other.median)}"
            met = verdict(row.ratio.median >= LOOP_GOAL)
            text = f"{row.ratio.median:.0f} times the loop's speed ({sides}), of {LOOP_GOAL:g}: {met}"
            print(f"  (a) {row.shape}: {text}")
    for row in of(rows, "sort"):
        if row.ratio and row.other:
            sides = f"{duration(row.value.median)} to {duration(row.other.median)}"
            met = verdict(row.ratio.median <= SORT_GOAL) if row.noise == 2 else "no goal"
            text = f"{interval(row.ratio, hundredths)} of torch.sort ({sides}), at most {SORT_GOAL}: {met}"
            print(f"  (b) {row.shape}, noise {row.noise:g}: {text}")
    for (data, noise), found in series_of(rows).items():
        line, ends = exponents(found)
        met = verdict(max(line, ends) <= EXPONENT_GOAL) if noise == 2 else "no goal"
        text = f"exponent {line:.3f} by least squares, {ends:.3f} by the ends, at most {EXPONENT_GOAL}: {met}"
        shares = f"{found[0].shape.positives:,} to {found[-1].shape.positives:,} positives"
        print(f"  (c) {data}, noise {noise:g}, {shares}: {text}")
    for row in of(rows, "length"):
        if row.ratio and row.other:
            sides = f"{duration(row.value.median)} to {duration(row.other.median)}"
            met = verdict(row.ratio.median <= LENGTH_GOAL) if row.noise == 2 else "no goal"
            text = f"{row.ratio.median:.1f} times {row.against} ({sides}), at most {LENGTH_GOAL:g}: {met}"
            print(f"  (d) {row.shape}, noise {row.noise:g}: {text}")
    autos = [row for row in rows if row.method == AUTO and row.ratio]
    if autos:
        ratios = [row.ratio.median for row in autos if row.ratio]
        worst = autos[int(np.argmax(ratios))]
        over = sum(ratio > AUTO_GOAL for ratio in ratios)
        text = f"worst of {len(autos)} is {max(ratios):.2f} times the better ({worst.part}: {worst.shape}"
        text += f", noise {worst.noise:g}{''.join(f', {k} {v}' for k, v in worst.settings.items())})"
        print(f"  (e) auto: {text}, at most {AUTO_GOAL}: {verdict(over == 0)}{f', {over} above' if over else ''}")
    for row in of(rows, "memory"):
        print(f"  (f) {row.shape}, {row.method}: {mebibytes(row.value.median)} (no goal)")


# ---- the file ----

HEAD = "part data queries references positives noise settings method what unit median p20 p80 repeats"
TAIL = "against against_median ratio ratio_p20 ratio_p80 choice"


def write_csv(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """A line a measurement, each with its provenance; times in ms, memory in MiB."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*HEAD.split(), *TAIL.split(), *about])
        for row in rows:
            unit, scale = {"time": ("ms", 1e-3), "memory": ("MiB", MIB), "error": ("1", 1)}[row.what]
            settings = " ".join(f"{key}={value}" for key, value in row.settings.items())
            shape = [row.shape.queries, row.shape.references, row.shape.positives]
            value = [f"{x / scale:.6g}" for x in (row.value.median, row.value.p20, row.value.p80)]
            other = f"{row.other.median / scale:.6g}" if row.other else ""
            ratio = [f"{x:.6g}" for x in (row.ratio.median, row.ratio.p20, row.ratio.p80)] if row.ratio else [""] * 3
            named = [row.part, row.data, *shape, f"{row.noise:g}", settings, row.method, row.what, unit]
            compared = [row.against, other, *ratio, row.choice]
            writer.writerow([*named, *value, row.value.repeats, *compared, *about.values()])


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """What the figures need of the file: no ratios, and the settings as one text."""
    rows = []
    about: dict[str, str] = {}
    known = {*HEAD.split(), *TAIL.split()}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            scale = {"ms": 1e-3, "MiB": MIB, "1": 1}[line["unit"]]
            median, p20, p80 = (scale * float(line[name]) for name in ("median", "p20", "p80"))
            shape = Shape(int(line["queries"]), int(line["references"]), int(line["positives"]))
            settings = {"": line["settings"]} if line["settings"] else {}
            value = Spread(median, p20, p80, int(line["repeats"]))
            rows.append(
                Row(
                    part=line["part"],
                    shape=shape,
                    method=line["method"],
                    value=value,
                    noise=float(line["noise"]),
                    data=line["data"],
                    settings=settings,
                    what=line["what"],
                    choice=line["choice"],
                )
            )
            about = {name: text for name, text in line.items() if name not in known}
    return rows, about


# ---- figures ----

# Okabe and Ito's colours, which all eyes tell apart; the tiled method's are those of ap_loss_cpu.png.
COLOURS = {TILED: "#0072B2", SORTED: "#D55E00", FLOOR: "#555555"}
MARKS = {TILED: "o", SORTED: "s", FLOOR: "_"}
CAPTION = "{cpu}, {threads} threads, {instruction_set}, torch {torch}, {date}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(axis: Any) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_crossover(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Time a row of tiled and of sorted over |P|, a panel a length; rings are what auto takes."""
    pyplot = _pyplot()
    grid = of(rows, "grid")
    lengths = sorted({row.shape.references for row in grid})
    across = min(3, len(lengths))
    down = math.ceil(len(lengths) / across)
    figure, axes = pyplot.subplots(down, across, figsize=(4.6 * across, 3.6 * down + 0.8), squeeze=False)
    for axis, references in zip(axes.flat, lengths, strict=False):
        here = [row for row in grid if row.shape.references == references]
        for noise, line, alpha in ((1.0, "--", 0.55), (2.0, "-", 1.0)):
            choices = {row.shape: row.choice for row in here if row.method == AUTO and row.noise == noise}
            for method in (TILED, SORTED):
                found = [row for row in here if row.method == method and row.noise == noise]
                found.sort(key=lambda row: row.shape.positives)
                x, y = [row.shape.positives for row in found], [1e6 * row.each for row in found]
                style = {"color": COLOURS[method], "alpha": alpha}
                axis.plot(x, y, MARKS[method] + line, ms=4.5, lw=1.2, label=f"{method}, noise {noise:g}", **style)
                taken = [(a, b) for a, b, row in zip(x, y, found, strict=True) if choices.get(row.shape) == method]
                rings = {"markeredgecolor": "#222222", "alpha": alpha}
                axis.plot(*zip(*taken, strict=True) if taken else ([], []), "o", ms=10, mfc="none", **rings)
        _tidy(axis)
        axis.set_title(f"{references:,} references", fontsize=10)
    for axis in list(axes.flat)[len(lengths) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("positives of a query")
    for axis in axes[:, 0]:
        axis.set_ylabel("forward + backward, us a query")
    axes[0][0].plot([], [], "o", ms=10, mfc="none", markeredgecolor="#222222", label="auto takes it")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, fontsize=9)
    figure.text(0.5, 0.01, CAPTION.format(**about), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_scaling(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Time over N at 10 % positives, and over |P| at one N."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8))
    for method in (TILED, SORTED, FLOOR):
        found = sorted((r for r in of(rows, "scaling") if r.method == method), key=lambda r: r.shape.references)
        x, y = [row.shape.references for row in found], [1e3 * row.value.median for row in found]
        line = "" if method == FLOOR else "-"
        left.plot(x, y, MARKS[method] + line, color=COLOURS[method], ms=12 if method == FLOOR else 5, label=method)
    left.set_title("one row, 10 % of it positive, noise 2", fontsize=10)
    left.set_xlabel("references")
    left.set_ylabel("forward + backward, ms")
    left.legend(frameon=False)
    series = series_of(rows)
    lines = {("random", 1.0): ":", ("random", 2.0): "-.", ("classes", 1.0): "--", ("classes", 2.0): "-"}
    for key, found in series.items():
        positives = "at random" if key[0] == "random" else "of a class"
        x, y = [row.shape.positives for row in found], [1e3 * row.each for row in found]
        label = f"sorted, positives {positives}, noise {key[1]:g}: exponent {exponents(found)[0]:.2f}"
        right.plot(x, y, MARKS[SORTED] + lines.get(key, "-"), color=COLOURS[SORTED], ms=4, lw=1.2, label=label)
    references = next(iter(series.values()))[0].shape.references if series else 0
    lowest = min((row.shape.positives for found in series.values() for row in found), default=0)
    for noise, line in ((1.0, "--"), (2.0, "-")):
        found = [r for r in of(rows, "grid") if r.method == TILED and r.noise == noise]
        found = [r for r in found if r.shape.references == references and r.shape.positives >= lowest / 3]
        found.sort(key=lambda row: row.shape.positives)
        if found:
            x, y = [row.shape.positives for row in found], [1e3 * row.each for row in found]
            right.plot(x, y, MARKS[TILED] + line, color=COLOURS[TILED], ms=4, lw=1.2, label=f"tiled, noise {noise:g}")
    right.set_title(f"{references:,} references", fontsize=10)
    right.set_xlabel("positives of a query")
    right.set_ylabel("forward + backward, ms a query")
    right.legend(frameon=False, fontsize=8)
    _tidy(left)
    _tidy(right)
    figure.text(0.5, 0.01, CAPTION.format(**about), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_scheme(path: Path) -> None:
    """What one positive reads: sorted scores in leaves, a step, a knee. A sketch, with no data in it."""
    pyplot = _pyplot()
    leaf, leaves, u, knee = 4, 10, 0.328, 0.645
    generator = np.random.default_rng(3)
    steps = 0.35 + generator.random(leaf * leaves)
    v = np.cumsum(steps) / steps.sum() * 0.98
    edges = [0.0, *((v[leaf * k - 1] + v[leaf * k]) / 2 for k in range(1, leaves)), 1.0]
    own = int(np.searchsorted(edges, u)) - 1
    last = int(np.searchsorted(edges, knee)) - 1
    zones = [
        (0, own, "#0072B2", "one series:\nthe sums below this edge"),
        (own, own + 1, "#D55E00", "pair\nby pair"),
        (own + 1, last, "#009E73", "a count less the series\nof both edges"),
        (last, last + 1, "#D55E00", "pair\nby pair"),
        (last + 1, leaves, "#999999", "a count and\na plain sum"),
    ]
    figure, axis = pyplot.subplots(figsize=(11, 4.6))
    for begin, end, colour, text in zones:
        axis.axvspan(edges[begin], edges[end], ymin=0.0, ymax=0.30, color=colour, alpha=0.18, lw=0)
        axis.text((edges[begin] + edges[end]) / 2, -0.56, text, ha="center", va="center", fontsize=9, color="#222222")
    for edge in edges:
        axis.plot([edge, edge], [-0.32, 0.05], color="#555555", lw=0.8)
    axis.plot([0, 1], [-0.14, -0.14], color="#555555", lw=0.8)
    axis.plot(v, np.full_like(v, -0.14), "|", color="#222222", ms=13, mew=1.2)
    tau, x = 0.045, np.linspace(0, 1, 1201)
    below = 1 / (1 + np.exp(-(x - u) / tau)) + 0.5 * (x >= u)
    curve = np.where(x <= knee, below, 1.5 + 3.5 * (x - knee))
    for part in (x < u, x >= u):
        axis.plot(x[part], 0.22 + 0.55 * curve[part], color="#222222", lw=1.6)
    for where, text in ((u, "positive u: the step"), (knee, "its knee, u + \N{GREEK SMALL LETTER DELTA}")):
        axis.plot([where, where], [-0.32, 1.6], color="#D55E00", lw=1.2, ls="--")
        axis.text(where + 0.006, 1.62, text, fontsize=10, color="#D55E00", va="bottom", ha="center")
    axis.text(0.0, 0.45, "what a negative at v adds to\nthe rank of u", fontsize=9, va="bottom")
    axis.text(0.0, 0.08, "sorted negatives, in leaves", fontsize=9, va="bottom")
    for index in (own, last + 1):
        axis.plot([edges[index]], [-0.36], "^", color="#0072B2" if index == own else "#999999", ms=7)
    for index in (own + 1, last):
        axis.plot([edges[index]], [-0.36], "^", color="#009E73", ms=7)
    axis.set_xlim(-0.01, 1.01)
    axis.set_ylim(-0.78, 1.85)
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(results: Path, folder: Path) -> None:
    """All figures; without the file, the sketch alone."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_scheme(folder / "sorted-scan.png")
    print(f"Wrote {folder / 'sorted-scan.png'}")
    if not results.exists():
        print(f"No {results}: run it without --figures first. The other figures are left as they are.")
        return
    rows, about = read_csv(results)
    draw_crossover(rows, about, folder / "sorted-scan-crossover.png")
    draw_scaling(rows, about, folder / "sorted-scan-scaling.png")
    print(f"Wrote {folder / 'sorted-scan-crossover.png'} and {folder / 'sorted-scan-scaling.png'} from {results}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only that all of it runs: small sizes, no goals")
    parser.add_argument("--figures", action="store_true", help="measure nothing: draw the figures from the CSV")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--out", type=Path, help="folder of the CSV (default: results; with --quick: none is written)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the figures (default: docs)")
    arguments = parser.parse_args()
    results = Path(__file__).parent / "results" if arguments.out is None else arguments.out
    if arguments.figures:
        draw(results / CSV, arguments.docs)
        return

    torch.set_num_threads(arguments.threads)
    about = provenance()
    plan = QUICK if arguments.quick else Plan()
    jobs: list[tuple[str, Callable[[], list[Row]]]] = [
        ("memory", functools.partial(memory_part, plan, arguments.threads)),
        ("(a) beside the torch loop", functools.partial(loop_part, plan)),
        ("(b) beside torch.sort", functools.partial(sort_part, plan)),
        ("beside a memory copy", functools.partial(floor_part, plan)),
        ("accuracy", functools.partial(accuracy_part, plan)),
        ("(c) growth with |P|", functools.partial(share_part, plan)),
        ("(d) a long row", functools.partial(length_part, plan)),
        ("growth with N", functools.partial(scaling_part, plan)),
        ("(e) few rows, which threads share", functools.partial(few_rows_part, plan)),
        ("(e) rows of two kinds", functools.partial(mixed_part, plan)),
        ("(e) other settings", functools.partial(settings_part, plan)),
    ]
    for references in plan.grid:
        jobs.append((f"(e) grid: {references:,} references", functools.partial(grid_part, references, plan)))
    write = arguments.out is not None or not arguments.quick
    rows: list[Row] = []
    failed: list[str] = []
    begin = time.perf_counter()
    for index, (name, job) in enumerate(jobs):
        print(f"[{index + 1}/{len(jobs)}] {name} ({time.perf_counter() - begin:.0f} s so far)", flush=True)
        try:
            rows += job()
        except RuntimeError as error:  # costs the other parts nothing
            failed.append(f"{name}: {error}")
            print(f"  FAILED: {error}", flush=True)
        about["load_after"] = f"{os.getloadavg()[0]:.1f}"  # this run's own threads are in it
        if write:
            results.mkdir(parents=True, exist_ok=True)
            write_csv(rows, about, results / CSV)
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print("float32. Median (20th - 80th percentile). Sides of a ratio take turns.")
    print_tables(rows)
    if arguments.quick:
        print("\n--quick: no goals")
    else:
        print_goals(rows, about)
    if write:
        print(f"\nWrote {results / CSV}")
    if failed:
        raise SystemExit("\nParts that failed, and are not in it:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
