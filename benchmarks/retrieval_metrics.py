"""Time and memory of roadmap_ext.metrics.retrieval_metrics on the CPU, beside its bare matrix products and a peer.

`python -m benchmarks.retrieval_metrics` prints tables and the project's goals, and writes
results/retrieval_metrics_cpu.csv (a row a measurement). Points rank one another by cosine similarity: mAP, mAP@R,
R-precision and R@k of all of them, from embeddings to numbers. Both sides of a ratio take turns in one process.

The floor is the products alone, in the same chunks: into memory that was there and touched before, and as anyone writes
them, with new memory for each chunk. The peer is pytorch-metric-learning's AccuracyCalculator with the same products
(its CustomKNN; faiss, its default, would search in another way), asked for the same figures.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from roadmap_ext import metrics

from .ap_loss import duration, interval, mebibytes, multiple
from .loop import clustered_embeddings
from .measure import MIB, Side, Spread, in_fresh_process, paired, peak_memory, provenance
from .roadmap_loss import hundredths

OURS, PEER = "retrieval_metrics", "AccuracyCalculator"
FLOOR, ALLOCATING = "products in place", "products, new memory"

SPEED_GOAL = 2.0  # times the floor, at the most
MEMORY_GOAL = 2048 * MIB  # of the whole process

NOISES = (1.0, 2.0)


@dataclass(frozen=True)
class Case:
    """N points in D dimensions, as many in each class, that rank one another."""

    points: int
    dim: int
    classes: int
    noise: float = 2.0

    def __str__(self) -> str:
        size = f"{self.points:,} x {self.points:,} x {self.dim}"
        return f"{size}, {self.points // self.classes:,} a class, noise {self.noise:g}"


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    speed: list[Case]
    peers: list[Case]
    memory: list[Case]
    rounds: int


# 12,000 classes of 5 are about what Stanford Online Products has; 10 classes make many positives.
PLAN = Plan(
    speed=[Case(60_000, 128, classes, noise) for classes in (12_000, 10) for noise in NOISES],
    peers=[Case(4_000, 128, classes, noise) for classes in (800, 10) for noise in NOISES],
    memory=[Case(60_000, 128, 12_000), Case(60_000, 512, 12_000), Case(60_000, 512, 10)],
    rounds=5,
)
FULL_CASE = Case(60_000, 512, 12_000)
QUICK = Plan(
    speed=[Case(1_000, 32, 200), Case(1_000, 32, 10)],
    peers=[Case(500, 32, 100)],
    memory=[Case(2_000, 32, 400)],
    rounds=1,
)


@dataclass(frozen=True)
class Row:
    """One measurement: seconds, or bytes (`what` says which), and what took turns with it."""

    case: Case
    method: str
    what: str  # "time"; "resident": of the whole process at its peak; "memory": of that, what came with the call
    value: Spread
    against: str = ""
    other: Spread | None = None  # of `against`
    ratio: Spread | None = None  # of the value to that


def timed(call: Callable[[], object]) -> Side:
    def run() -> tuple[float]:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin,)

    return run


def ours(case: Case) -> Side:
    points, labels = clustered_embeddings(case.points, case.classes, dim=case.dim, noise=case.noise)
    return timed(lambda: metrics.retrieval_metrics(points, labels))


def bare(case: Case, *, allocate: bool) -> Side:
    """The matrix products of a case alone, in the chunks of ours."""
    points, _ = clustered_embeddings(case.points, case.classes, dim=case.dim, noise=case.noise)
    chunk = metrics._chunk_rows(case.points, metrics._BUDGET // (4 * case.points), None)
    scores = torch.zeros(chunk, case.points)

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

    points, labels = clustered_embeddings(case.points, case.classes, dim=case.dim, noise=case.noise)
    names = ("mean_average_precision", "mean_average_precision_at_r", "r_precision", "precision_at_1")
    calculator = AccuracyCalculator(
        include=names, k=None, device=torch.device("cpu"), knn_func=CustomKNN(CosineSimilarity())
    )

    def figures() -> dict[str, float]:
        found = calculator.get_accuracy(points, labels)
        return dict(zip(("mAP", "mAP@R", "R-precision", "R@1"), (found[name] for name in names), strict=True))

    return timed(figures), figures


def compare(case: Case, method: str, side: Side, against: str, other: Side, rounds: int) -> Row:
    pair = paired(other, side, seconds=0, least=rounds, most=rounds, budget=0.1)
    return Row(case, method, "time", pair.peer[0], against, pair.ours[0], pair.ratio[0])


def time_floor(case: Case, allocate: bool, rounds: int) -> list[Row]:
    name = ALLOCATING if allocate else FLOOR
    return [compare(case, OURS, ours(case), name, bare(case, allocate=allocate), rounds)]


def time_peer(case: Case, rounds: int) -> list[Row]:
    side, figures = peer(case)
    points, labels = clustered_embeddings(case.points, case.classes, dim=case.dim, noise=case.noise)
    mine = metrics.retrieval_metrics(points, labels)
    for name, value in figures().items():
        if abs(value - mine[name]) > 1e-4:  # float32 scores are rounded in another way there, which swaps neighbours
            raise RuntimeError(f"{name} of the peer is {value}, not {mine[name]}, at {case}: nothing to compare")
    return [compare(case, PEER, side, OURS, ours(case), rounds)]


def memory_of(case: Case, threads: int) -> tuple[int, int] | None:
    """Bytes of this process before a call of ours and at its peak. Runs in a process of its own."""
    torch.set_num_threads(threads)
    ours(Case(256, 16, 64))()  # warms the thread pools
    return peak_memory(ours(case))


def measure_memory(case: Case, threads: int) -> list[Row]:
    memory = in_fresh_process(memory_of, case, threads)
    if memory is None:
        return []
    before, peak = memory
    sizes = {"resident": peak, "memory": peak - before}
    return [Row(case, OURS, what, Spread(size, size, size, 1)) for what, size in sizes.items()]


def print_tables(rows: list[Row]) -> None:
    print("\nAgainst its bare matrix products; the ratio is our time to theirs.")
    print(f"  {'':<66}{'ours':<29}{'products':<29}ratio")
    for row in rows:
        if row.what == "time" and row.method == OURS:
            cells = [interval(row.value, duration), interval(row.other, duration), interval(row.ratio, hundredths)]
            name = f"{row.case}{'' if row.against == FLOOR else ' [1]'}"
            print(f"  {name:<66}{cells[0]:<29}{cells[1]:<29}{cells[2]}")
    print("  [1] Against products that take new memory for each chunk.")
    print("\nThe peer, asked for the same; the ratio is its time to ours.")
    print(f"  {'':<66}{'peer':<29}{'ours':<29}ratio")
    for row in rows:
        if row.what == "time" and row.method == PEER:
            cells = [interval(row.value, duration), interval(row.other, duration), interval(row.ratio, multiple)]
            print(f"  {f'{row.method}, {row.case}':<66}{cells[0]:<29}{cells[1]:<29}{cells[2]}")
    print("\nPeak memory of the whole process, embeddings and torch included, and what came with the call")
    for row in rows:
        if row.what == "resident":
            beyond = next(other for other in rows if other.case == row.case and other.what == "memory")
            sizes = f"{mebibytes(row.value.median):<14}{mebibytes(beyond.value.median)}"
            print(f"  {f'{row.case}':<66}{sizes}")


def print_goals(rows: list[Row], about: dict[str, str]) -> None:
    """Each goal, the figure measured, and whether it is met."""
    print("\nGoals")
    before, after = float(about["load"]), float(about["load_after"])
    if before > 1 or after > int(about["threads"]) + 1:
        print(f"  Other work was on this machine: load {before:g} before, {after:g} after. Run it again when idle.")
    for row in rows:
        if row.against == FLOOR and row.case.dim == 128:
            met = "met" if row.ratio.median <= SPEED_GOAL else "MISSED"
            print(f"  {row.case}: {row.ratio.median:.2f} of {SPEED_GOAL:.2f} times the products in place: {met}")
        if row.what == "resident" and row.case.dim == 512:
            met = "met" if row.value.median <= MEMORY_GOAL else "MISSED"
            print(f"  {row.case}: {mebibytes(row.value.median)} of {mebibytes(MEMORY_GOAL)} in all: {met}")


def write_csv(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """A line a measurement, each with its provenance; times in ms, memory in MiB."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        case, measured = "queries references dim classes noise method what unit", "median p20 p80 repeats"
        compared = "against against_median ratio ratio_p20 ratio_p80"
        writer.writerow([*case.split(), *measured.split(), *compared.split(), *about])
        for row in rows:
            unit, scale = ("ms", 1e-3) if row.what == "time" else ("MiB", MIB)
            size = [row.case.points, row.case.points, row.case.dim, row.case.classes, row.case.noise]
            value = [f"{x / scale:.6g}" for x in (row.value.median, row.value.p20, row.value.p80)]
            other = f"{row.other.median / scale:.6g}" if row.other else ""
            ratio = [f"{x:.6g}" for x in (row.ratio.median, row.ratio.p20, row.ratio.p80)] if row.ratio else [""] * 3
            named = [*size, row.method, row.what, unit, *value, row.value.repeats]
            writer.writerow([*named, row.against, other, *ratio, *about.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only that all of it runs: small sizes, nothing written")
    parser.add_argument("--full", action="store_true", help=f"the time of {FULL_CASE}, too: minutes more")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    about = provenance()
    plan = QUICK if arguments.quick else PLAN
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    for case in plan.memory:
        jobs.append((f"memory: {case}", functools.partial(measure_memory, case, arguments.threads)))
    for case in [*plan.speed, FULL_CASE] if arguments.full else plan.speed:
        jobs.append((f"products: {case}", functools.partial(time_floor, case, False, plan.rounds)))
    case = plan.speed[0]  # one will do: what new memory costs depends on its size alone
    jobs.append((f"products, new memory: {case}", functools.partial(time_floor, case, True, plan.rounds)))
    if find_spec("pytorch_metric_learning") is None:
        print("AccuracyCalculator is left out: pytorch-metric-learning is not installed.")
    else:
        for case in plan.peers:
            jobs.append((f"peer: {case}", functools.partial(time_peer, case, plan.rounds)))
    rows: list[Row] = []
    for index, (name, run) in enumerate(jobs):
        print(f"[{index + 1}/{len(jobs)}] {name}", flush=True)
        rows += run()
    about["load_after"] = f"{os.getloadavg()[0]:.1f}"  # this run's own threads are in it

    if not arguments.quick:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(rows, about, arguments.out / "retrieval_metrics_cpu.csv")
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print("float32. Median (20th - 80th percentile). Sides of a ratio take turns.")
    print_tables(rows)
    if arguments.quick:
        print("\n--quick: no goals, and nothing written")
    else:
        print_goals(rows, about)
        print(f"\nWrote retrieval_metrics_cpu.csv in {arguments.out}")


if __name__ == "__main__":
    main()
