"""Time and memory of the CUDA kernels, beside the floors of the same GPU and beside plain PyTorch.

`python -m benchmarks.cuda` prints a table with the project's goals, and writes results/cuda.csv (a row a comparison)
and results/cuda.txt (the table). Where there is no GPU, or no kernels for it, it says so and is done.

Times are of forward and backward together, between CUDA events, warm, in turns of both sides; each call takes the next
of several sets of inputs, together more than twice the L2 cache. The floors:

    copy      a device copy that moves the bytes which any two-pass scheme has to move: forward reads scores and mask
              and writes the gradient it keeps, backward reads that and writes the one it gives
    products  the three matrix products that embeddings cannot do without, bare, in the embeddings' dtype

Peers are the plain PyTorch reference, the same loss written for all queries at once and compiled (it is told the
columns of the positives, which ours has to find), and KeOps where it is installed. A row that fails is reported as
such, and the others go on, in a new process.
"""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

import roadmap_ext

from . import keops, report
from .loop import NOISES, SEPARABILITY, clustered_embeddings
from .measure import MIB, Spread
from .report import NONE, duration, interval, mebibytes, three_digits

DEVICE = torch.device("cuda", 0)
ROUNDS = 5

COPY, PRODUCTS, REFERENCE, COMPILED, KEOPS, GRAPH = "copy", "products", "reference", "torch.compile", "KeOps", "graph"
FLOORS = (COPY, PRODUCTS)  # the ratio is our time to theirs; of all others theirs to ours

# A call of one side, with the inputs of this number.
Side = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """B queries and N references, of which a query has so many positives; from embeddings if it has a dimension.

    Noise is that of loop.py.
    """

    queries: int
    references: int
    positives: int
    dim: int = 0
    dtype: torch.dtype = torch.float32
    noise: float = 1.0

    @property
    def bytes(self) -> int:
        """Of a set of inputs."""
        size = self.dtype.itemsize
        if self.dim:
            return size * self.dim * (self.queries + self.references)
        return (size + 1) * self.queries * self.references

    def __str__(self) -> str:
        name, last = ("RoadmapLoss", f" x {self.dim}") if self.dim else ("ap_loss", "")
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.queries:,} x {self.references:,}{last}"
        return f"{name} {sizes}, {self.positives} positives, {dtype}, {SEPARABILITY[self.noise]}"


@dataclass(frozen=True)
class Comparison:
    """What ours is measured against, the ratio to reach (at most for a floor, at least for a peer), memory to keep."""

    case: Case
    against: str
    goal: float | None = None
    memory_goal: int | None = None


@dataclass(frozen=True)
class Row:
    """A comparison's outcome: seconds a call, and the peak of bytes beside the inputs. Or why there is none."""

    comparison: Comparison
    ours: Spread | None = None
    other: Spread | None = None
    memory: int = 0
    other_memory: int = 0
    error: str = ""

    @property
    def ratio(self) -> float | None:
        if self.ours is None or self.other is None:
            return None
        ratio = self.ours.median / self.other.median
        return ratio if self.comparison.against in FLOORS else 1 / ratio

    @property
    def verdict(self) -> str:
        """Each goal, and whether it is met."""
        parts, goal, ratio = [], self.comparison.goal, self.ratio
        if goal is not None and ratio is not None:
            floor = self.comparison.against in FLOORS
            met = ratio <= goal if floor else ratio >= goal
            parts.append(f"{'<=' if floor else '>='} {goal:g} {'met' if met else 'MISSED'}")
        if self.comparison.memory_goal is not None and self.ours is not None:
            met = self.memory <= self.comparison.memory_goal
            parts.append(f"<= {mebibytes(self.comparison.memory_goal)} {'met' if met else 'MISSED'}")
        return ", ".join(parts)

    def columns(self) -> dict[str, object]:
        """Of the CSV: times in ms, memory in MiB."""
        case, goal, columns = self.comparison.case, self.comparison.goal, {}
        for side, value in (("", self.ours), ("against_", self.other)):
            times = zip(
                (f"{side}median_ms", f"{side}p20_ms", f"{side}p80_ms"), report.figures(value, 1e-3), strict=True
            )
            columns[side] = {**dict(times), f"{side}repeats": value.repeats if value else ""}
        return {
            **asdict(case),
            "dim": case.dim or "",
            "dtype": str(case.dtype).removeprefix("torch."),
            **columns[""],
            "against": self.comparison.against,
            **columns["against_"],
            "ratio": "" if self.ratio is None else f"{self.ratio:.6g}",
            "goal": "" if goal is None else goal,
            "verdict": self.verdict,
            "memory_mib": f"{self.memory / MIB:.6g}",
            "against_memory_mib": f"{self.other_memory / MIB:.6g}",
            "error": self.error,
        }


FEW = Case(4096, 65_536, 3)
MANY = Case(4096, 65_536, 100)
EMBEDDINGS = Case(4096, 65_536, 4, 512, torch.bfloat16)
FOR_PEERS = Case(512, 65_536, 3)
SMALL = Case(256, 1024, 4)


def plan(quick: bool, full: bool, floors: bool) -> list[Comparison]:
    """The floors first, with every noise; then peers, and sizes that show the rest."""
    rows = []
    for noise in NOISES[:1] if quick else NOISES:
        rows.append(Comparison(replace(FEW, noise=noise), COPY, 1.2))
        rows.append(Comparison(replace(MANY, noise=noise), COPY, 6))
        rows.append(Comparison(replace(EMBEDDINGS, noise=noise), PRODUCTS, 1.6, 768 * MIB))
    if floors:
        return rows
    rows.append(Comparison(FOR_PEERS, REFERENCE, 100))
    rows += [Comparison(FOR_PEERS, KEOPS, 5)] if keops.installed() else []
    if quick:
        return rows
    rows.append(Comparison(FOR_PEERS, COMPILED))
    for case in (SMALL, Case(1024, 1024, 4), Case(8, 1_000_000, 4)):
        rows += [Comparison(case, COPY), Comparison(case, GRAPH)]
    rows += [Comparison(SMALL, REFERENCE, 100)] + ([Comparison(SMALL, KEOPS, 5)] if keops.installed() else [])
    square = Case(1024, 1024, 4, 512)
    for case in (square, replace(square, dtype=torch.bfloat16)):
        rows += [Comparison(case, PRODUCTS), Comparison(case, GRAPH)]
    rows.append(Comparison(square, REFERENCE))
    if full:
        rows += [Comparison(FEW, REFERENCE, 100), Comparison(FEW, COMPILED)]
    return rows


# --- inputs ----------------------------------------------------------------------------------------------------------


def sets_of(size: int) -> int:
    """How many sets of so many bytes are more than twice the L2 cache: at least two."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(256, max(2, math.ceil(2.2 * cache / size)))


def inputs(case: Case) -> list[tuple[Tensor, ...]]:
    """Sets of (scores, target), or of (queries, labels, references, their labels); floats are leaves for gradients.

    Every set has its own queries of the same N points, and all its memory to itself.
    """
    points, labels = (
        x.to(DEVICE)
        for x in clustered_embeddings(
            case.references, case.references // case.positives, dim=case.dim or 64, noise=case.noise
        )
    )
    sets: list[tuple[Tensor, ...]] = []
    for index in range(sets_of(case.bytes)):
        rows = (torch.arange(case.queries, device=DEVICE) + index * case.queries) % case.references
        if case.dim:
            queries, references = points[rows].to(case.dtype), points.to(case.dtype, copy=True)
            sets.append((queries.requires_grad_(), labels[rows], references.requires_grad_(), labels.clone()))
        else:
            scores = (points[rows] @ points.T).to(case.dtype).requires_grad_()
            sets.append((scores, labels[rows, None] == labels[None]))
    return sets


def leaves_of(arguments: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in arguments if x.requires_grad]


# --- sides -----------------------------------------------------------------------------------------------------------


def training_step(loss: Callable[..., Tensor], sets: Sequence[tuple[Tensor, ...]]) -> Side:
    """Forward and backward, with gradients for all floats."""

    def call(index: int) -> tuple[Tensor, ...]:
        arguments = sets[index % len(sets)]
        value = loss(*arguments)
        return value, *torch.autograd.grad(value, leaves_of(arguments))

    return call


def ours(case: Case) -> Callable[..., Tensor]:
    return roadmap_ext.roadmap_loss if case.dim else roadmap_ext.ap_loss


def copy_of_its_bytes(case: Case) -> Side:
    size = (4 * case.dtype.itemsize + 1) * case.queries * case.references // 2  # half is read, half is written
    pairs = [
        (torch.randint(255, (size,), dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8).to(DEVICE))
        for _ in range(sets_of(2 * size))
    ]

    def call(index: int) -> None:
        source, destination = pairs[index % len(pairs)]
        destination.copy_(source)

    return call


def bare_products(sets: Sequence[tuple[Tensor, ...]]) -> Side:
    """Into memory that is there; scores serve as their own gradient, as they do in ours."""
    first, _, second, _ = sets[0]
    scores = torch.empty(len(first), len(second), dtype=first.dtype, device=DEVICE)
    gradients = torch.empty_like(first, requires_grad=False), torch.empty_like(second, requires_grad=False)

    def call(index: int) -> None:
        queries, references = (x.detach() for x in leaves_of(sets[index % len(sets)]))
        torch.mm(queries, references.T, out=scores)
        torch.mm(scores, references, out=gradients[0])
        torch.mm(scores.T, queries, out=gradients[1])

    return call


def dense_loss(scores: Tensor, target: Tensor, column: Tensor, valid: Tensor) -> Tensor:
    """SupAP for all queries at once, [B, P, N]: column [B, P] of the positives, of which some rows have fewer."""
    tau, rho, delta = 0.01, 100.0, 0.05
    offset = 0.5 + 1 / (1 + math.exp(-delta / tau))
    positives = scores.gather(1, column)
    gap = scores[:, None] - positives[:, :, None]
    below = torch.sigmoid(gap / tau) + 0.5 * (gap >= 0)
    pairs = torch.where(gap > delta, rho * (gap - delta) + offset, below)
    rank_negative = torch.where(target[:, None], 0.0, pairs).sum(2)
    fixed = positives.detach()
    rank_positive = ((fixed[:, None] >= fixed[:, :, None]) & valid[:, None]).sum(2)
    precision = torch.where(valid, rank_positive / (rank_positive + rank_negative), 0.0)
    return (1 - precision.sum(1) / valid.sum(1)).mean()


def compiled(sets: Sequence[tuple[Tensor, ...]]) -> Side:
    widest = max(int(target.sum(1).max()) for _, target in sets)
    known = []
    for scores, target in sets:
        marked = target.int().topk(widest)
        known.append((scores, target, marked.indices, marked.values.bool()))
    return training_step(torch.compile(dense_loss, dynamic=False), known)


def replayed(case: Case, sets: Sequence[tuple[Tensor, ...]]) -> Side:
    """Ours from a CUDA graph, which spares the calls but has one set of inputs, maybe in the cache."""
    step = training_step(ours(case), sets)
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(3):
            step(0)
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    return lambda _: graph.replay()


def other_side(case: Case, against: str, sets: Sequence[tuple[Tensor, ...]]) -> Side:
    if against == COPY:
        return copy_of_its_bytes(case)
    if against == PRODUCTS:
        return bare_products(sets)
    if against == GRAPH:
        return replayed(case, sets)
    if against == COMPILED:
        return compiled(sets)
    if against == KEOPS:
        return training_step(keops.keops_loop, sets)
    plain = roadmap_ext.reference
    return training_step(plain.roadmap_loss if case.dim else plain.ap_loss, sets)


# --- measuring -------------------------------------------------------------------------------------------------------


def check_equal(mine: Side, other: Side) -> None:
    """Raise unless a peer's loss and gradients are ours."""
    (loss, *gradients), (other_loss, *other_gradients) = mine(0), other(0)
    same = torch.allclose(loss, other_loss, rtol=1e-3)
    for gradient, theirs in zip(gradients, other_gradients, strict=True):
        same &= bool((gradient - theirs).norm() <= 1e-2 * theirs.norm())
    if not same:
        raise RuntimeError("it does not compute what ours does: nothing to compare")


def timed(side: Side, first: int, calls: int) -> list[float]:
    """Seconds of each call."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for index, (begin, end) in enumerate(events, first):
        begin.record()
        side(index)
        end.record()
    torch.cuda.synchronize(DEVICE)
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def in_turns(sides: Sequence[Side], seconds: float) -> list[Spread]:
    """Each side for about so many seconds, in turns; long calls at least twice."""
    estimates = [min(timed(side, 0, 2)) for side in sides]
    calls = [max(1, min(40, int(seconds / ROUNDS / max(estimate, 1e-6)))) for estimate in estimates]
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(ROUNDS if max(estimates) < seconds else 2):
        for side, count, found in zip(sides, calls, times, strict=True):
            found += timed(side, turn * count, count)
    return [Spread.of(np.array(found)) for found in times]


def peak(side: Side) -> int:
    """Bytes that a call takes beside what is there, gradients included."""
    torch.cuda.synchronize(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    kept = side(0)
    torch.cuda.synchronize(DEVICE)
    del kept
    return int(torch.cuda.max_memory_allocated(DEVICE)) - before


def measure(comparison: Comparison, seconds: float) -> Row:
    """Runs in the process that holds the GPU."""
    torch.cuda.empty_cache()
    case, against = comparison.case, comparison.against
    sets = inputs(case)
    mine = training_step(ours(case), sets)
    mine(0)
    memory = peak(mine)
    other = other_side(case, against, sets)
    if against in (REFERENCE, COMPILED, KEOPS):
        check_equal(mine, other)
    else:
        other(0)
    other_memory = peak(other)
    spreads = in_turns([mine, other], seconds)
    return Row(comparison, *spreads, memory, other_memory)


def measured(comparisons: Sequence[Comparison], seconds: float) -> Iterable[Row]:
    """A row each. An error on the GPU ends what its process can do, so the next row begins in a new one."""
    pool = None
    for comparison in comparisons:
        pool = pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            row = pool.submit(measure, comparison, seconds).result()
        except Exception as error:  # of any kind: the table has to come
            text = str(error).strip().partition("\n")[0]
            row = Row(comparison, error=f"{type(error).__name__}: {text}")
            pool.shutdown()
            pool = None
        yield row
    if pool:
        pool.shutdown()


# --- what is said ----------------------------------------------------------------------------------------------------


def about() -> dict[str, str]:
    """Provenance, with that of the GPU."""
    properties = torch.cuda.get_device_properties(DEVICE)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = ""
    return {
        "gpu": f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB",
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "cuda_archs": str(roadmap_ext.build_info()["cuda_archs"]),
        **report.provenance(),
    }


def table(rows: Sequence[Row], where: dict[str, str]) -> str:
    """All rows, and where they were measured."""
    lines, failed = [], []
    for row in rows:
        case, against = str(row.comparison.case), row.comparison.against
        if row.ratio is None:
            lines.append([case, "FAILED", against, *[NONE] * 5])
            failed.append(f"\nFAILED: {case}, {against}: {row.error}")
            continue
        ratio = f"{row.ratio:.2f}" if row.ratio < 10 else three_digits(row.ratio)
        theirs = mebibytes(row.other_memory) if against not in (*FLOORS, GRAPH) else NONE
        times = [interval(row.ours, duration), against, interval(row.other, duration)]
        lines.append([case, *times, ratio, row.verdict, mebibytes(row.memory), theirs])
    heads = ["forward and backward", "ours (p20 - p80)", "against", "(p20 - p80)", "ratio", "goal", "memory", "theirs"]
    note = "ratio: our time to a floor's (copy, products), another's time to ours. memory: peak beside inputs."
    return f"{report.table(report.in_words(where), heads, lines)}\n{note}{''.join(failed)}"


def main() -> None:
    parser = report.parser(
        __doc__,
        quick=f"the rows with a goal, {SEPARABILITY[1.0]}; writes with --out alone",
        full=f"PyTorch at {FEW} as well",
    )
    parser.add_argument("--floors", action="store_true", help="the floors' rows alone")
    parser.set_defaults(out=None)
    arguments = parser.parse_args()

    why = "there is no CUDA device" if not torch.cuda.is_available() else roadmap_ext.build_info()["cuda_reason"]
    if not torch.cuda.is_available() or not roadmap_ext.build_info()["cuda"]:
        print(f"The benchmark of the CUDA kernels is left out: {why}.")
        return
    torch.set_num_threads(arguments.threads)
    where, rows = about(), []
    out = arguments.out or (None if arguments.quick else report.RESULTS)
    if not keops.installed():
        print("KeOps is left out: pykeops is not installed.")
    comparisons = plan(arguments.quick, arguments.full, arguments.floors)
    for row in measured(comparisons, 0.25 if arguments.quick else 0.4):
        rows.append(row)
        told = row.error or f"{duration(row.ours.median)}, {row.comparison.against} {duration(row.other.median)}"
        print(f"[{len(rows)}/{len(comparisons)}] {row.comparison.case}: {told}", flush=True)
        if out:  # after every row, lest all be lost with one
            report.write_csv(out / "cuda.csv", [row.columns() for row in rows], where)
            (out / "cuda.txt").write_text(table(rows, where) + "\n")
    print("\n" + table(rows, where))
    sys.exit(1 if any(row.error for row in rows) else 0)


if __name__ == "__main__":
    main()
