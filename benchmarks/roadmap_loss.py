"""Time and memory of roadmap_ext.roadmap_loss on the CPU, beside bare matrix products, plain PyTorch and FastAP.

`python -m benchmarks.roadmap_loss` prints tables and the project's goals, and writes results/roadmap_loss_cpu.csv (a
row a measurement) and results/roadmap_loss_cpu.png. Times are of forward and backward together, and both sides of a
ratio take turns in one process; ratios are of medians. In a turn short calls are repeated and the first does not count,
since it finds the caches full of the other side's data.

The matrix products are those that embeddings cannot do without: the scores, and a gradient of their size times either
side. They are timed twice: into memory that was there and touched before, the floor that the goal is measured by; and
as anyone writes them, with new memory for every result, as a loss has to take it, too.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import roadmap_ext

from .ap_loss import NONE, duration, interval, mebibytes, multiple
from .loop import clustered_embeddings, torch_loop
from .measure import MIB, Side, Spread, in_fresh_process, paired, peak_growth, peak_memory, provenance, step

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
    """B queries, the first of N points in D dimensions, that rank all of these; 4 points a class."""

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


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    speed: list[Case]  # at noise 1 and 2
    settings: Case
    peers: list[Case]  # at noise 1 and 2
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
NOISES = (1.0, 2.0)


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of forward and backward, or bytes (`what` says which), and what took turns with it."""

    case: Case
    method: str
    what: str  # "time"; "memory": beyond inputs and their gradients; "resident": of the whole process
    value: Spread
    against: str = ""
    other: Spread | None = None  # of `against`
    ratio: Spread | None = None  # of the value to that


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

    def run() -> tuple[float, float, float]:
        if allocate:
            gradients.clear()  # a step frees its last gradients before it, too
        begin = time.perf_counter()
        if allocate:
            gradient = queries @ references.T
            gradients.extend([gradient @ references, gradient.T @ queries])
            del gradient
        else:
            torch.mm(queries, references.T, out=scores)
            torch.mm(scores, references, out=gradients[0])
            torch.mm(scores.T, queries, out=gradients[1])
        seconds = time.perf_counter() - begin
        return 0.0, 0.0, seconds

    return run


def compare(case: Case, method: str, side: Side, against: str, other: Side, **turns: Any) -> Row:
    """A side's time, and its ratio to that of another in turn with it."""
    pair = paired(other, side, **turns)
    return Row(case, method, "time", pair.peer[-1], against, pair.ours[-1], pair.ratio[-1])


def time_floor(case: Case, method: str, side: Side, allocate: list[bool], seconds: float) -> list[Row]:
    """A side against the bare products."""
    rows = []
    for new in allocate:
        name = ALLOCATING if new else FLOOR
        other = bare(case, allocate=new)
        # A larger budget than the default, so that sides of some 10 ms are both repeated and both find warm caches.
        rows.append(compare(case, method, side, name, other, seconds=seconds, budget=0.1, most=200))
    return rows


def time_speed(case: Case, seconds: float) -> list[Row]:
    return time_floor(case, OURS, ours(case), [False, True], seconds)


def time_settings(case: Case, seconds: float) -> list[Row]:
    rows = []
    for name, settings in SETTINGS.items():
        rows += time_floor(case, name, ours(case, **settings), [False], seconds / 2)
    return rows


def check_equal(case: Case) -> float:
    """Raise unless the plain objective's loss and gradient are ours; the seconds that it took."""
    points, labels = data(case)
    results = []
    for loss in (roadmap_ext.roadmap_loss, plain_objective):
        leaf = points.clone().requires_grad_()
        begin = time.perf_counter()
        value = loss(leaf, labels)
        value.backward()
        seconds = time.perf_counter() - begin
        results.append((value.detach(), leaf.grad))
    (value, gradient), (other_value, other_gradient) = results
    if not torch.allclose(value, other_value, rtol=1e-4) or (gradient - other_gradient).norm() > 1e-3 * gradient.norm():
        raise RuntimeError(f"the plain objective is not what ours computes at {case}: nothing to compare")
    return seconds


def time_peers(case: Case, seconds: float) -> list[Row]:
    """The peers against ours; FastAP at noise 2 alone, since its cost does not depend on the scores."""
    rows = []
    for name in peers():
        if name == FASTAP and case.noise != NOISES[-1]:
            continue
        side = METHODS[name](case)
        call = check_equal(case) if name == LOOP else side()[-1]
        if call > LONGEST_PEER_CALL:
            print(f"      {name}: not run, a call takes {duration(call)}", flush=True)
            continue
        rows.append(compare(case, name, side, OURS, ours(case), seconds=seconds, least=3, budget=0.1))
    return rows


def peers() -> list[str]:
    return [name for name in METHODS if name != OURS and (name != FASTAP or fastap_installed())]


def memory_of(name: str, case: Case, threads: int) -> float | None:
    """Peak bytes of forward and backward beyond embeddings and their gradients. Runs in a process of its own.

    The inputs are there before; the gradients, which the step leaves behind, are subtracted from what comes on top.
    """
    torch.set_num_threads(threads)
    METHODS[name](Case(256, 256, 64))()  # warms the thread pools
    growth = peak_growth(METHODS[name](case))
    return None if growth is None else max(0.0, growth - case.gradient_bytes)


def memory_case(case: Case, names: list[str], threads: int) -> list[Row]:
    rows = []
    for name in names:
        beyond = in_fresh_process(memory_of, name, case, threads)
        if beyond is not None:
            rows.append(Row(case, name, "memory", Spread(beyond, beyond, beyond, 1)))
    return rows


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
        rows.append(Row(case, OURS, "resident", Spread(resident, resident, resident, 1)))
    return rows


def hundredths(ratio: float) -> str:
    """Of ratios near 1, on either side of it."""
    return f"{ratio:.2f}"


def find(rows: Iterable[Row], case: Case, method: str, what: str, against: str = "") -> Row | None:
    wanted = (case, method, what, against)
    return next((row for row in rows if (row.case, row.method, row.what, row.against) == wanted), None)


def print_speed(rows: list[Row]) -> None:
    print("\nAgainst three bare matrix products of the same sizes; the ratio is our time to theirs.")
    print(f"  {'':<36}{'ours':<29}{'in place':<29}{'ratio':<21}{'new memory':<29}ratio")
    for row in rows:
        if row.against == FLOOR and row.method == OURS:
            new = find(rows, row.case, OURS, "time", ALLOCATING)
            cells = [interval(row.value, duration), interval(row.other, duration), interval(row.ratio, hundredths)]
            cells += [interval(new.other, duration), interval(new.ratio, hundredths)]
            mark = " [1]" if row.case.own else " [2]"
            name = f"{row.case}, noise {row.case.noise:g}{mark}"
            print(f"  {name:<36}{cells[0]:<29}{cells[1]:<29}{cells[2]:<21}{cells[3]:<29}{cells[4]}")
    print("  [1] The batch is its own reference: both shares of its gradient come from one product, so ours makes two.")
    print("  [2] Queries and references are apart, with a gradient for each: ours makes three products.")


def print_settings(rows: list[Row]) -> None:
    chosen = [row for row in rows if row.method in SETTINGS]
    if chosen:
        print(f"\nOther settings, {chosen[0].case}, noise {chosen[0].case.noise:g}, against the products in place")
        print(f"  {'':<42}{'ours':<30}{'in place':<30}ratio")
    for row in chosen:
        cells = [interval(row.value, duration), interval(row.other, duration), interval(row.ratio, hundredths)]
        print(f"  {row.method:<42}{cells[0]:<30}{cells[1]:<30}{cells[2]}")


def print_peers(rows: list[Row]) -> None:
    print("\nPeers; the ratio is their time to ours. memory: peak beyond embeddings and their gradient, then ours.")
    print(f"  {'':<42}{'peer':<30}{'ours':<30}{'ratio':<30}{'memory':>12}{'ours':>12}")
    for row in rows:
        if row.against == OURS:
            cells = [interval(row.value, duration), interval(row.other, duration), interval(row.ratio, multiple)]
            for method in (row.method, OURS):  # which does not depend on the noise and is measured at one
                memory = find(rows, replace(row.case, noise=NOISES[-1]), method, "memory")
                cells.append(mebibytes(memory.value.median) if memory else NONE)
            name = f"{row.method}, {row.case}, noise {row.case.noise:g}"
            print(f"  {name:<42}{cells[0]:<30}{cells[1]:<30}{cells[2]:<30}{cells[3]:>12}{cells[4]:>12}")
    print("  torch loop: the same objective by hand, a query at a time. FastAPLoss: pytorch-metric-learning's, another")
    print("  objective of the same kind (average precision over a histogram of distances), here for what it costs.")


def print_goals(rows: list[Row], about: dict[str, str]) -> None:
    """Each goal, the figure measured, and whether it is met."""
    print("\nGoals")
    before, after = float(about["load"]), float(about["load_after"])
    if before > 1 or after > int(about["threads"]) + 1:
        # Ours makes more and shorter parallel calls than a product does, and each waits for a core that others hold.
        print(f"  Other work was on this machine: load {before:g} before, {after:g} after. Run it again when idle.")
    for row in rows:
        if row.method == OURS and row.against == FLOOR and row.case.dim == 512:
            met = "met" if row.ratio.median <= SPEED_GOAL else "MISSED"
            ratio = f"{row.ratio.median:.2f} of {SPEED_GOAL:.2f} times the products in place"
            print(f"  {row.case}, noise {row.case.noise:g}: {ratio}: {met}")
    memory = find(rows, PLAN.memory, OURS, "memory")
    if memory:
        met = "met" if memory.value.median <= MEMORY_GOAL else "MISSED"
        size = f"{mebibytes(memory.value.median)} of {mebibytes(MEMORY_GOAL)} beyond embeddings and their gradient"
        print(f"  {memory.case}: {size}: {met}")
    resident = find(rows, FULL_CASE, OURS, "resident")
    seconds = find(rows, FULL_CASE, OURS, "time")
    if resident:
        met = "met" if resident.value.median <= FULL_MEMORY_GOAL else "MISSED"
        size = f"{mebibytes(resident.value.median)} of {mebibytes(FULL_MEMORY_GOAL)} in all"
        print(f"  {resident.case}, references without a gradient: {size}: {met}")
    if seconds:
        print(f"  {seconds.case}, references without a gradient: {interval(seconds.value, duration)} a step (no goal)")


def write_csv(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """A line a measurement, each with its provenance; times in ms, memory in MiB."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        case, measured = "queries references dim noise method what unit", "median p20 p80 repeats"
        compared = "against against_median ratio ratio_p20 ratio_p80"
        writer.writerow([*case.split(), *measured.split(), *compared.split(), *about])
        for row in rows:
            unit, scale = ("ms", 1e-3) if row.what == "time" else ("MiB", MIB)
            case = [row.case.queries, row.case.references, row.case.dim, row.case.noise, row.method, row.what, unit]
            value = [f"{x / scale:.6g}" for x in (row.value.median, row.value.p20, row.value.p80)]
            other = f"{row.other.median / scale:.6g}" if row.other else ""
            ratio = [f"{x:.6g}" for x in (row.ratio.median, row.ratio.p20, row.ratio.p80)] if row.ratio else [""] * 3
            writer.writerow([*case, *value, row.value.repeats, row.against, other, *ratio, *about.values()])


def plot(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Forward and backward by sizes, a mark a method, a panel a noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    marks: dict[str, tuple[str, str]] = {  # Okabe and Ito's colours, which all eyes tell apart
        FLOOR: ("#555555", "_"),
        ALLOCATING: ("#56B4E9", "v"),
        OURS: ("#0072B2", "o"),
        LOOP: ("#D55E00", "s"),
        FASTAP: ("#009E73", "D"),
    }
    times: dict[tuple[Case, str], Spread] = {}
    for row in rows:
        if row.what == "time" and row.other and row.method in marks:
            times.setdefault((row.case, row.method), row.value)  # ours is shown from beside the floor
            times.setdefault((row.case, row.against), row.other)
    cases = list(dict.fromkeys(replace(case, noise=0.0) for case, _ in times))
    figure, axes = pyplot.subplots(1, len(NOISES), figsize=(7 * len(NOISES), 5.2), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], NOISES, strict=True):
        for index, (method, (colour, mark)) in enumerate(marks.items()):
            chosen = [(i, times.get((replace(case, noise=noise), method))) for i, case in enumerate(cases)]
            chosen = [(i, value) for i, value in chosen if value is not None]
            where = [i if method == FLOOR else i + 0.12 * (index - 2.5) for i, _ in chosen]
            medians = [1e3 * value.median for _, value in chosen]
            low = [1e3 * max(0.0, value.median - value.p20) for _, value in chosen]
            high = [1e3 * max(0.0, value.p80 - value.median) for _, value in chosen]
            size = 40 if method == FLOOR else 7
            axis.errorbar(where, medians, (low, high), fmt=mark, color=colour, ms=size, lw=1.2, capsize=2, label=method)
        axis.set_yscale("log")
        axis.set_title(f"noise {noise:g}")
        axis.set_xticks(range(len(cases)), [str(case) for case in cases], fontsize=8)
        axis.set_xlim(-0.5, len(cases) - 0.5)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("forward + backward, ms")
    handles, names = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, markerscale=0.8)
    caption = "{cpu}, {threads} threads, {instruction_set}, torch {torch}, {date}; bars: 20th to 80th percentile"
    figure.text(0.5, 0.01, caption.format(**about), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only that all of it runs: small sizes, nothing written")
    parser.add_argument("--full", action="store_true", help=f"{FULL_CASE}, too")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV and PNG")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    about = provenance()
    plan = QUICK if arguments.quick else PLAN
    if not fastap_installed():
        print("FastAPLoss is left out: pytorch-metric-learning is not installed.")

    rows: list[Row] = []
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    for case in plan.peers:
        jobs.append((f"memory: {case}", functools.partial(memory_case, case, [OURS, *peers()], arguments.threads)))
    jobs.append((f"memory: {plan.memory}", functools.partial(memory_case, plan.memory, [OURS], arguments.threads)))
    if arguments.full:
        jobs.append((f"memory and time: {FULL_CASE}", functools.partial(full_case, FULL_CASE, arguments.threads)))
    for name, cases, job in (("products", plan.speed, time_speed), ("peers", plan.peers, time_peers)):
        for case in (replace(case, noise=noise) for case in cases for noise in NOISES):
            jobs.append((f"{name}: {case}, noise {case.noise:g}", functools.partial(job, case, plan.seconds)))
    jobs.append((f"settings: {plan.settings}", functools.partial(time_settings, plan.settings, plan.seconds)))
    for index, (name, run) in enumerate(jobs):
        print(f"[{index + 1}/{len(jobs)}] {name}", flush=True)
        rows += run()
    about["load_after"] = f"{os.getloadavg()[0]:.1f}"  # this run's own threads are in it

    if not arguments.quick:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(rows, about, arguments.out / "roadmap_loss_cpu.csv")
        plot(rows, about, arguments.out / "roadmap_loss_cpu.png")
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print("float32, forward and backward. Median (20th - 80th percentile). Sides of a ratio take turns.")
    print_speed(rows)
    print_settings(rows)
    print_peers(rows)
    if arguments.quick:
        print("\n--quick: no goals, and nothing written")
    else:
        print_goals(rows, about)
        print(f"\nWrote roadmap_loss_cpu.csv and roadmap_loss_cpu.png in {arguments.out}")


if __name__ == "__main__":
    main()
