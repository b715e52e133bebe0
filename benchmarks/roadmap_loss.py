"""Time and memory of roadmap_ext.roadmap_loss on the CPU, beside bare matrix products, plain PyTorch and FastAP.

`python -m benchmarks.roadmap_loss` prints tables and the project's goals, and writes results/roadmap_loss_cpu.csv (a
row a measurement) and results/roadmap_loss_cpu.png. Times are of forward and backward together, and both sides of a
ratio take turns in one process; ratios are of medians. In a turn short calls are repeated and the first does not count,
since it finds the caches full of the other side's data.

The matrix products are those that embeddings cannot do without: the scores, and a gradient of their size times either
side. They are timed twice: into memory that was there and touched before, the floor that the goal is measured by; and
as anyone writes them, with new memory for every result, as a loss has to take it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import roadmap_ext

from . import plots, report
from .loop import NOISES, SEPARABILITY, clustered_embeddings, torch_loop
from .measure import (
    MIB,
    Side,
    Spread,
    gradient_of,
    in_fresh_process,
    paired,
    peak_growth,
    peak_memory,
    same,
    step,
    timed,
)
from .report import Row, duration, find, hundredths, interval, mebibytes, median, multiple

OURS, LOOP, FASTAP = "roadmap_loss", "torch loop", "FastAPLoss"
FLOOR, ALLOCATING = "products in place", "products, new memory"

SPEED_GOAL = 1.25  # times the floor, at the most
MEMORY_GOAL, FULL_MEMORY_GOAL = 128 * MIB, 2048 * MIB

SETTINGS: dict[str, dict[str, Any]] = {
    'reduction="none"': {"reduction": "none"},
    'calibration_reduction="violating_pairs"': {"calibration_reduction": "violating_pairs"},
    "calibration_weight=0 (SupAPLoss)": {"calibration_weight": 0.0},
    "calibration_weight=1 (CalibrationLoss)": {"calibration_weight": 1.0},
    'surrogate="smooth"': {"surrogate": "smooth"},
    "bfloat16 embeddings": {"dtype": torch.bfloat16},
}

# Seconds; a peer that takes longer is left out.
LONGEST_PEER_CALL = 30.0


@dataclass(frozen=True)
class Case:
    """B queries, the first of N points in D dimensions, that rank all of these; 4 a class, noise as in loop.py."""

    queries: int
    references: int
    dim: int
    noise: float = 2.0

    @property
    def classes(self) -> int:
        return self.references // 4

    @property
    def own(self) -> bool:
        """The batch is its own reference; else queries are a copy of their rows, and both sides get a gradient."""
        return self.queries == self.references

    @property
    def gradient_bytes(self) -> int:
        """Of the float32 gradients that are left behind."""
        return 4 * self.dim * (self.references if self.own else self.queries + self.references)

    def __str__(self) -> str:
        return f"{self.queries:,} x {self.references:,} x {self.dim}"

    @property
    def name(self) -> str:
        return f"{self}, {SEPARABILITY[self.noise]}"


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    speed: list[Case]  # with every noise
    settings: Case
    peers: list[Case]  # with every noise
    memory: Case
    seconds: float  # for a pair of sides, about


PLAN = Plan(
    # The goals are for D = 512; the others show what a small batch and a large one take.
    speed=[
        Case(128, 128, 128),
        Case(1024, 1024, 512),
        Case(4096, 4096, 512),
        Case(512, 16384, 512),
        Case(8192, 8192, 128),
    ],
    settings=Case(1024, 1024, 512),
    peers=[Case(1024, 1024, 512), Case(4096, 4096, 512)],
    memory=Case(8192, 8192, 128),
    seconds=4.0,
)
QUICK = Plan(
    speed=[Case(256, 256, 64), Case(64, 512, 64)],
    settings=Case(256, 256, 64),
    peers=[Case(256, 256, 64)],
    memory=Case(1024, 1024, 32),
    seconds=0.1,
)
FULL_CASE = Case(2048, 1_000_000, 64)


def data(case: Case) -> tuple[Tensor, Tensor]:
    """All points [N, D] of a case and their labels [N]."""
    return clustered_embeddings(case.references, case.classes, dim=case.dim, noise=case.noise)


def ours(case: Case, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Side:
    """roadmap_loss with gradients for all embeddings."""
    points, labels = data(case)

    def loss(queries: Tensor, references: Tensor | None = None) -> Tensor:
        ref_labels = None if references is None else labels
        value = roadmap_ext.roadmap_loss(queries, labels[: case.queries], references, ref_labels, **settings)
        return value if value.ndim == 0 else value.sum()

    points = points.to(dtype)
    return step(loss, points) if case.own else step(loss, points[: case.queries], points)


def plain_objective(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The objective of a batch that is its own reference, as a careful user would write it by hand."""
    unit = functional.normalize(embeddings, dim=1)
    scores = unit @ unit.T
    own = torch.eye(len(labels), dtype=torch.bool)
    target = labels[:, None] == labels[None]
    positive, negative = target & ~own, ~target
    below = (torch.relu(0.9 - scores) * positive).sum(1) / positive.sum(1).clamp(min=1)
    above = (torch.relu(scores - 0.6) * negative).sum(1) / negative.sum(1).clamp(min=1)
    return 0.5 * torch_loop(scores, target, own) + 0.5 * (below + above).mean()


def loop(case: Case) -> Side:
    points, labels = data(case)
    return step(lambda embeddings: plain_objective(embeddings, labels), points)


def fastap(case: Case) -> Side:
    from pytorch_metric_learning.losses import FastAPLoss

    loss = FastAPLoss()
    points, labels = data(case)
    return step(lambda embeddings: loss(embeddings, labels), points)


def fastap_installed() -> bool:
    return find_spec("pytorch_metric_learning") is not None


METHODS: dict[str, Callable[[Case], Side]] = {OURS: ours, LOOP: loop, FASTAP: fastap}


def bare(case: Case, *, allocate: bool) -> Side:
    """The three matrix products on the data of a case; scores serve as their own gradient, as they are in ours."""
    references, _ = data(case)
    queries = references if case.own else references[: case.queries].clone()
    scores = torch.zeros(case.queries, case.references)
    gradients = [torch.zeros_like(queries), torch.zeros_like(references)]

    def in_place() -> None:
        torch.mm(queries, references.T, out=scores)
        torch.mm(scores, references, out=gradients[0])
        torch.mm(scores.T, queries, out=gradients[1])

    def allocating() -> None:
        gradient = queries @ references.T
        gradients.extend([gradient @ references, gradient.T @ queries])

    # A step frees its last gradients before it as well.
    return timed(allocating, before=gradients.clear) if allocate else timed(in_place)


def time_floor(case: Case, seconds: float, floor: str, name: str = OURS) -> list[Row]:
    """Ours, or ours with the settings of that name, against the bare products."""
    side, other = ours(case, **SETTINGS.get(name, {})), bare(case, allocate=floor == ALLOCATING)
    # A larger budget than the default, so that sides of some 10 ms are both repeated and both find warm caches.
    return [Row.beside(case, name, floor, paired(other, side, seconds=seconds, budget=0.1, most=200))]


def check_equal(case: Case) -> None:
    """Raise unless the plain objective's loss and gradient are ours."""
    points, labels = data(case)
    losses = (functools.partial(loss, labels=labels) for loss in (roadmap_ext.roadmap_loss, plain_objective))
    if not same(*(gradient_of(loss, points) for loss in losses)):
        raise RuntimeError(f"the plain objective is not what ours computes at {case}: nothing to compare")


def time_peers(case: Case, seconds: float) -> list[Row]:
    """The peers against ours; FastAP with the most noise alone, since its cost does not depend on the scores."""
    rows = []
    for name in peers():
        if name == FASTAP and case.noise != NOISES[-1]:
            continue
        if name == LOOP:
            check_equal(case)
        side = METHODS[name](case)
        call = side()[-1]
        if call > LONGEST_PEER_CALL:
            print(f"      {name}: not run, a call takes {duration(call)}", flush=True)
            continue
        rows.append(Row.beside(case, name, OURS, paired(ours(case), side, seconds=seconds, least=3, budget=0.1)))
    return rows


def peers() -> list[str]:
    return [name for name in METHODS if name != OURS and (name != FASTAP or fastap_installed())]


def memory_of(name: str, case: Case, threads: int) -> float | None:
    """Peak bytes of forward and backward beyond embeddings and their gradients. Runs in a process of its own.

    The inputs are there before; the gradients, which the step leaves behind, are subtracted from what comes on top.
    """
    torch.set_num_threads(threads)
    METHODS[name](Case(256, 256, 64))()  # warms the thread pools
    return peak_growth(METHODS[name](case), left=case.gradient_bytes)


def full_of(case: Case, threads: int) -> tuple[int | None, list[float]]:
    """Peak bytes of a whole process while it takes three steps, and the seconds of each; references get no gradient."""
    torch.set_num_threads(threads)
    ours(Case(256, 256, 64))()
    points, labels = data(case)
    few = labels[: case.queries]
    side = step(lambda queries: roadmap_ext.roadmap_loss(queries, few, points, labels), points[: case.queries])
    seconds: list[float] = []
    memory = peak_memory(lambda: seconds.extend(side()[-1] for _ in range(3)))
    return None if memory is None else memory[1], seconds


def full_case(case: Case, threads: int) -> list[Row]:
    resident, seconds = in_fresh_process(full_of, case, threads)
    rows = [Row(case, OURS, "time", Spread.of(seconds))]
    if resident is not None:
        rows.append(Row(case, OURS, "resident", Spread.once(resident)))
    return rows


def tables(rows: list[Row]) -> Iterator[str]:
    """Ours beside the products, with other settings, and beside peers."""
    lines = []
    for row in (row for row in rows if row.against == FLOOR and row.method == OURS):
        new = find(rows, case=row.case, method=OURS, against=ALLOCATING)
        mark = "[1]" if row.case.own else "[2]"
        cells = new.cells(hundredths)[1:] if new else [report.NONE] * 2
        lines.append([f"{row.case.name} {mark}", *row.cells(hundredths), *cells])
    title = (
        "Forward and backward against three bare matrix products of the same sizes; the ratio is our time to theirs."
    )
    yield report.table(title, ["", "ours", "in place", "ratio", "new memory", "ratio"], lines) + (
        "\n  [1] The batch is its own reference: both shares of its gradient come from one product, so ours makes two."
        "\n  [2] Queries and references are apart, with a gradient for each: ours makes three products."
    )
    lines = [[f"{row.method}, {row.case.name}", *row.cells(hundredths)] for row in rows if row.method in SETTINGS]
    yield report.table("Other settings, against the products in place", ["", "ours", "in place", "ratio"], lines)
    lines = []
    for row in (row for row in rows if row.against == OURS):
        # Memory does not depend on the noise and is measured with one.
        one = replace(row.case, noise=NOISES[-1])
        found = (find(rows, case=one, method=method, what="memory") for method in (row.method, OURS))
        sizes = [median(memory and memory.value, mebibytes) for memory in found]
        lines.append([f"{row.method}, {row.case.name}", *row.cells(multiple), *sizes])
    title = "Peers; the ratio is their time to ours. memory: peak beyond embeddings and their gradient, then ours."
    yield report.table(title, ["", "peer", "ours", "ratio", "memory", "ours"], lines) + (
        "\n  torch loop: the same objective by hand, a query at a time. FastAPLoss: pytorch-metric-learning's, another"
        "\n  objective of the same kind (average precision over a histogram of distances), here for what it costs."
    )


def goals(rows: list[Row]) -> Iterator[tuple[str, bool | None]]:
    """Each goal, the figure measured, and whether it is met."""
    for row in rows:
        if row.method == OURS and row.against == FLOOR and row.case.dim == 512:
            text = f"{row.case.name}: {row.ratio.median:.2f} of {SPEED_GOAL:.2f} times the products in place"
            yield text, row.ratio.median <= SPEED_GOAL
    memory = find(rows, case=PLAN.memory, what="memory")
    if memory:
        size = memory.value.median
        text = f"{mebibytes(size)} of {mebibytes(MEMORY_GOAL)} beyond embeddings and their gradient"
        yield f"{memory.case}: {text}", size <= MEMORY_GOAL
    for row in (row for row in rows if row.case == FULL_CASE):
        size, name = row.value.median, f"{row.case}, references without a gradient"
        if row.what == "time":
            yield f"{name}: {interval(row.value, duration)} a step", None
        else:
            yield f"{name}: {mebibytes(size)} of {mebibytes(FULL_MEMORY_GOAL)} in all", size <= FULL_MEMORY_GOAL


MARKS = {
    ALLOCATING: (plots.SKY, "v"),
    OURS: (plots.BLUE, "o"),
    LOOP: (plots.RED, "s"),
    FASTAP: (plots.GREEN, "D"),
    FLOOR: (plots.GREY, "_"),
}


def plot(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """A panel for each amount of noise."""
    times: dict[tuple[Case, str], Spread] = {}
    for row in rows:
        if row.what == "time" and row.other and row.method in MARKS:
            times.setdefault((row.case, row.method), row.value)  # ours is shown from beside the floor
            times.setdefault((row.case, row.against), row.other)
    found = (plots.Time(SEPARABILITY[case.noise], str(case), *rest, value) for (case, *rest), value in times.items())
    plots.by_case(found, MARKS, about, path)


def main() -> None:
    options = report.parser(
        __doc__, quick="only that all of it runs: small sizes, nothing written", full=f"{FULL_CASE} as well"
    ).parse_args()
    plan = QUICK if options.quick else PLAN
    if not fastap_installed():
        print("FastAPLoss is left out: pytorch-metric-learning is not installed.")
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    for case, names in [*((case, [OURS, *peers()]) for case in plan.peers), (plan.memory, [OURS])]:
        jobs.append((f"memory: {case}", functools.partial(Row.memory, memory_of, case, names, options.threads)))
    if options.full:
        jobs.append((f"memory and time: {FULL_CASE}", functools.partial(full_case, FULL_CASE, options.threads)))
    for case in (replace(case, noise=noise) for case in plan.speed for noise in NOISES):
        for floor in (FLOOR, ALLOCATING):
            jobs.append((f"{floor}: {case.name}", functools.partial(time_floor, case, plan.seconds, floor)))
    for case in (replace(case, noise=noise) for case in plan.peers for noise in NOISES):
        jobs.append((f"peers: {case.name}", functools.partial(time_peers, case, plan.seconds)))
    for name in SETTINGS:
        jobs.append((name, functools.partial(time_floor, plan.settings, plan.seconds / 2, FLOOR, name)))
    report.carry_out(options, "roadmap_loss_cpu", jobs, tables, goals, plot)


if __name__ == "__main__":
    main()
