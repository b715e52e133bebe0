"""Time and memory of roadmap_ext.metrics.retrieval_metrics on the CPU, beside its bare matrix products and a peer.

`python -m benchmarks.retrieval_metrics` prints tables and the project's goals, and writes
results/retrieval_metrics_cpu.csv (a row a measurement). Points rank one another by cosine similarity: mAP, mAP@R,
R-precision and R@k of all of them, from embeddings to numbers. Both sides of a ratio take turns in one process.

The floor is the products alone, in the same chunks: into memory that was there and touched before, and as anyone writes
them, with new memory for each chunk. The peer is pytorch-metric-learning's AccuracyCalculator with the same products
(its CustomKNN; faiss, its default, would search in another way), asked for the same figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from roadmap_ext import metrics
from roadmap_ext.chunks import rows_of_a_chunk, rows_that_fit

from . import report
from .loop import NOISES, SEPARABILITY, clustered_embeddings
from .measure import MIB, Side, Spread, in_fresh_process, paired, peak_memory, timed
from .report import Row, find, hundredths, mebibytes, multiple

OURS, PEER = "retrieval_metrics", "AccuracyCalculator"
FLOOR, ALLOCATING = "products in place", "products, new memory"

SPEED_GOAL = 2.0  # times the floor, at the most
MEMORY_GOAL = 2048 * MIB  # of the whole process


@dataclass(frozen=True)
class Case:
    """N points in D dimensions, as many in each class, that rank one another; noise as in loop.py."""

    queries: int
    references: int  # the same
    dim: int
    classes: int
    noise: float = 2.0

    def __str__(self) -> str:
        size = f"{self.queries:,} x {self.references:,} x {self.dim}"
        return f"{size}, {self.references // self.classes:,} a class, {SEPARABILITY[self.noise]}"

    def draw(self) -> tuple[Tensor, Tensor]:
        """The points [N, D] and their labels [N]."""
        return clustered_embeddings(self.references, self.classes, dim=self.dim, noise=self.noise)


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    speed: list[Case]
    peers: list[Case]
    memory: list[Case]
    rounds: int


# 12,000 classes of 5 are about what Stanford Online Products has; 10 classes make many positives.
PLAN = Plan(
    speed=[Case(60_000, 60_000, 128, classes, noise) for classes in (12_000, 10) for noise in NOISES],
    peers=[Case(4_000, 4_000, 128, classes, noise) for classes in (800, 10) for noise in NOISES],
    memory=[Case(60_000, 60_000, *rest) for rest in ((128, 12_000), (512, 12_000), (512, 10))],
    rounds=5,
)
FULL_CASE = Case(60_000, 60_000, 512, 12_000)
QUICK = Plan(
    speed=[Case(1_000, 1_000, 32, 200), Case(1_000, 1_000, 32, 10)],
    peers=[Case(500, 500, 32, 100)],
    memory=[Case(2_000, 2_000, 32, 400)],
    rounds=1,
)


def ours(case: Case) -> Side:
    points, labels = case.draw()
    return timed(lambda: metrics.retrieval_metrics(points, labels))


def bare(case: Case, *, allocate: bool) -> Side:
    """The matrix products of a case alone, in the chunks of ours."""
    points, _ = case.draw()
    chunk = rows_of_a_chunk(len(points), rows_that_fit(len(points), 4, "cpu"), None)
    scores = torch.zeros(chunk, len(points))

    def products() -> None:
        for queries in points.split(chunk):
            if allocate:
                queries @ points.T
            else:
                torch.mm(queries, points.T, out=scores[: len(queries)])

    return timed(products)


def peer(case: Case) -> tuple[Side, Callable[[], dict[str, float]]]:
    """The peer's time, and its figures."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    points, labels = case.draw()
    names = ("mean_average_precision", "mean_average_precision_at_r", "r_precision", "precision_at_1")
    calculator = AccuracyCalculator(
        include=names, k=None, device=torch.device("cpu"), knn_func=CustomKNN(CosineSimilarity())
    )

    def figures() -> dict[str, float]:
        found = calculator.get_accuracy(points, labels)
        return dict(zip(("mAP", "mAP@R", "R-precision", "R@1"), (found[name] for name in names), strict=True))

    return timed(figures), figures


def compare(case: Case, method: str, side: Side, against: str, other: Side, rounds: int) -> Row:
    return Row.beside(case, method, against, paired(other, side, seconds=0, least=rounds, most=rounds, budget=0.1))


def time_floor(case: Case, allocate: bool, rounds: int) -> list[Row]:
    name = ALLOCATING if allocate else FLOOR
    return [compare(case, OURS, ours(case), name, bare(case, allocate=allocate), rounds)]


def time_peer(case: Case, rounds: int) -> list[Row]:
    side, figures = peer(case)
    mine = metrics.retrieval_metrics(*case.draw())
    for name, value in figures().items():
        if abs(value - mine[name]) > 1e-4:  # float32 scores are rounded in another way there, which swaps neighbours
            raise RuntimeError(f"{name} of the peer is {value}, not {mine[name]}, at {case}: nothing to compare")
    return [compare(case, PEER, side, OURS, ours(case), rounds)]


def memory_of(case: Case, threads: int) -> tuple[int, int] | None:
    """Bytes of this process before a call of ours and at its peak. Runs in a process of its own."""
    torch.set_num_threads(threads)
    ours(Case(256, 256, 16, 64))()  # warms the thread pools
    return peak_memory(ours(case))


def measure_memory(case: Case, threads: int) -> list[Row]:
    memory = in_fresh_process(memory_of, case, threads)
    if memory is None:
        return []
    before, peak = memory
    sizes = {"resident": peak, "memory": peak - before}
    return [Row(case, OURS, what, Spread.once(size)) for what, size in sizes.items()]


def tables(rows: list[Row]) -> Iterator[str]:
    """Ours beside its floors, a peer beside ours, and memory."""
    lines = [
        [f"{row.case}{'' if row.against == FLOOR else ' [1]'}", *row.cells(hundredths)]
        for row in rows
        if row.what == "time" and row.method == OURS
    ]
    title = "Against its bare matrix products; the ratio is our time to theirs."
    note = "\n  [1] Against products that take new memory for each chunk."
    yield report.table(title, ["", "ours", "products", "ratio"], lines) + note
    lines = [[f"{PEER}, {row.case}", *row.cells(multiple)] for row in rows if row.method == PEER]
    title = "The peer, asked for the same; the ratio is its time to ours."
    yield report.table(title, ["", "peer", "ours", "ratio"], lines)
    lines = []
    for row in (row for row in rows if row.what == "resident"):
        beyond = find(rows, case=row.case, what="memory")
        lines.append([str(row.case), mebibytes(row.value.median), mebibytes(beyond.value.median)])
    title = "Peak memory of the whole process, embeddings and torch included, and what came with the call"
    yield report.table(title, ["", "whole", "call"], lines)


def goals(rows: list[Row]) -> Iterator[tuple[str, bool]]:
    """Each goal, the figure measured, and whether it is met."""
    for row in rows:
        if row.against == FLOOR and row.case.dim == 128:
            text = f"{row.case}: {row.ratio.median:.2f} of {SPEED_GOAL:.2f} times the products in place"
            yield text, row.ratio.median <= SPEED_GOAL
        if row.what == "resident" and row.case.dim == 512:
            size = row.value.median
            yield f"{row.case}: {mebibytes(size)} of {mebibytes(MEMORY_GOAL)} in all", size <= MEMORY_GOAL


def main() -> None:
    options = report.parser(
        __doc__,
        quick="only that all of it runs: small sizes, nothing written",
        full=f"the time of {FULL_CASE} as well: minutes more",
    ).parse_args()
    plan = QUICK if options.quick else PLAN
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    for case in plan.memory:
        jobs.append((f"memory: {case}", functools.partial(measure_memory, case, options.threads)))
    for case in [*plan.speed, FULL_CASE] if options.full else plan.speed:
        jobs.append((f"products: {case}", functools.partial(time_floor, case, False, plan.rounds)))
    case = plan.speed[0]  # one will do: what new memory costs depends on its size alone
    jobs.append((f"products, new memory: {case}", functools.partial(time_floor, case, True, plan.rounds)))
    if find_spec("pytorch_metric_learning") is None:
        print("AccuracyCalculator is left out: pytorch-metric-learning is not installed.")
    else:
        jobs += [(f"peer: {case}", functools.partial(time_peer, case, plan.rounds)) for case in plan.peers]
    report.carry_out(options, "retrieval_metrics_cpu", jobs, tables, goals)


if __name__ == "__main__":
    main()
