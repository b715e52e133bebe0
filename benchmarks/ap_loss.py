"""Time and memory of roadmap_ext.ap_loss on the CPU, beside plain PyTorch, KeOps and a memory copy.

`python -m benchmarks.ap_loss` prints a table and the project's goals, and writes results/ap_loss_cpu.csv (a row a
measurement) and results/ap_loss_cpu.png. Each peer takes turns with ours in one process; ratios are of medians. In a
turn short calls are repeated and the first does not count, since it finds the caches full of the other side's data;
what it took is quoted as the first call. Forward and backward are the two halves of the same call; ours computes its
gradient in the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import roadmap_ext

from . import keops, plots, report
from .loop import NOISES, SEPARABILITY, clustered, torch_loop
from .measure import MIB, Side, Spread, gradient_of, memory_copy, paired, peak_growth, same, step
from .report import duration, find, interval, mebibytes, median, multiple

Loss = Callable[[Tensor, Tensor], Tensor]

OURS, LOOP, FLOOR = "pairwise", "torch loop", "memory copy"
METHODS: dict[str, Loss] = {
    OURS: functools.partial(roadmap_ext.ap_loss, method=OURS),
    LOOP: torch_loop,
    "reference": roadmap_ext.reference.ap_loss,
    "KeOps": keops.keops_loop,
}
MARKS = {
    OURS: (plots.BLUE, "o"),
    LOOP: (plots.RED, "s"),
    "reference": (plots.ORANGE, "^"),
    "KeOps": (plots.GREEN, "D"),
    FLOOR: (plots.GREY, "_"),
}
PASSES = ("forward", "backward", "both")

# Peers run up to this many positive-negative pairs a call: the loops keep some 20 bytes of each for backward, and
# KeOps takes about 50 ns for each. --full: 64 x 8,192 with 10 classes as well (3.9e8 pairs).
PEER_PAIRS, FULL_PEER_PAIRS = 1e8, 5e8
# Ours runs few rounds from here on; and one round, only with --full.
FEW_ROUNDS_PAIRS, FULL_ONLY_PAIRS = 1e9, 1e11


@dataclass(frozen=True)
class Case:
    """B queries, N references and the number of classes these are spread over, with how much noise (loop.py)."""

    queries: int
    references: int
    classes: int
    noise: float = 1.0

    @property
    def positives(self) -> int:
        """Of a query, on average."""
        return self.references // self.classes

    @property
    def pairs(self) -> int:
        """Positive-negative pairs, about."""
        return self.queries * self.positives * (self.references - self.positives)

    def __str__(self) -> str:
        return f"{self.sizes}, {SEPARABILITY[self.noise]}"

    @property
    def sizes(self) -> str:
        return f"{self.queries} x {self.references:,}, {self.classes:,} classes"


LONGEST = Case(4, 1_000_000, 250_000)
MANY_CLASSES = [Case(256, 1024, 256), Case(64, 8192, 2048), Case(16, 65536, 16384), LONGEST]
CASES = [
    replace(case, classes=classes, noise=noise)
    for case in MANY_CLASSES
    for classes in (case.classes, 10)
    for noise in NOISES
]

# How many times as fast as the torch loop, forward and backward.
SPEED_GOALS = {
    Case(256, 1024, 256, 1.0): 120,
    Case(256, 1024, 256, 2.0): 90,
    Case(64, 8192, 2048, 1.0): 60,
    Case(64, 8192, 2048, 2.0): 40,
    Case(256, 1024, 10, 1.0): 25,
    Case(256, 1024, 10, 2.0): 20,
}
MEMORY_GOAL = 32 * MIB
MEMORY_GOAL_REFERENCES = (8192, 1_000_000)


@dataclass(frozen=True)
class Row(report.Row):
    """`what` is a pass, or "memory" beyond scores, masks and one gradient; what it is beside is always ours."""

    first: Spread | None = None  # our first call after it

    def columns(self) -> dict[str, object]:
        first = {"first": report.figures(self.first, 1e-3)[0]}
        found = {"ours" if name == "against_median" else name: cell for name, cell in super().columns().items()}
        del found["against"]
        return found | first


def peers(case: Case, full: bool) -> list[str]:
    """The methods other than ours to run on a case."""
    if case.pairs > (FULL_PEER_PAIRS if full else PEER_PAIRS):
        return []
    return [name for name in METHODS if name != OURS and (name != "KeOps" or keops.installed())]


def time_case(case: Case, full: bool) -> list[Row]:
    """Ours, its peers and the floor."""
    scores, target = clustered(case.queries, case.references, case.classes, noise=case.noise)

    def loss(name: str) -> Callable[[Tensor], Tensor]:
        return lambda leaf: METHODS[name](leaf, target)

    def side(name: str) -> Side:
        return memory_copy(scores) if name == FLOOR else step(loss(name), scores)

    least, most = (5, 100) if case.pairs < FEW_ROUNDS_PAIRS else (3, 3) if case.pairs < FULL_ONLY_PAIRS else (1, 1)
    # Ours is quoted from beside the floor, where rounds are many.
    pair = paired(side(OURS), side(FLOOR), least=least, most=most)
    rows = [Row(case, OURS, what, value) for what, value in zip(PASSES, pair.ours, strict=True)]
    rows.append(Row(case, FLOOR, "both", pair.peer[2], OURS, pair.ours[2], pair.ratio[2]))
    for name in peers(case, full):
        if not same(gradient_of(loss(OURS), scores), gradient_of(loss(name), scores)):
            raise RuntimeError(f"{name} does not compute what ours does at {case}: nothing to compare")
        pair = paired(side(OURS), side(name), least=least, most=most)
        for i, what in enumerate(PASSES):
            first = pair.first if what == "both" else None
            rows.append(Row(case, name, what, pair.peer[i], OURS, pair.ours[i], pair.ratio[i], first))
    return rows


def memory_of(name: str, case: Case, threads: int) -> float | None:
    """Peak bytes of forward and backward beyond scores, masks and one gradient. Runs in a process of its own."""
    torch.set_num_threads(threads)
    loss = METHODS[name]
    small, small_target = clustered(8, 256, 16)
    step(lambda leaf: loss(leaf, small_target), small)()  # warms the thread pools; KeOps compiles
    scores, target = clustered(case.queries, case.references, case.classes)
    return peak_growth(step(lambda leaf: loss(leaf, target), scores), left=scores.nbytes)


def tables(rows: list[Row]) -> Iterator[str]:
    """Every case and method."""
    lines: list[list[str]] = []
    for case in dict.fromkeys(row.case for row in rows if row.what == "both"):
        lines.append([f"{case} ({case.positives:,} positives a query)"])
        for method in [*METHODS, FLOOR]:
            forward, backward, both = (find(rows, case=case, method=method, what=what) for what in PASSES)
            memory = find(rows, case=replace(case, noise=1.0), method=method, what="memory")
            if both:
                cells = [method, *(median(half and half.value, duration) for half in (forward, backward))]
                cells += [interval(both.value, duration), median(both.other, duration), interval(both.ratio, multiple)]
                lines.append([*cells, median(memory and memory.value, mebibytes)])
    title = (
        "ours: our time in turn with that line's, which its ratio is to; the pairwise line is in turn with the memory\n"
        "copy. memory: peak beyond scores, masks and one gradient."
    )
    yield report.table(title, ["", "forward", "backward", "both", "ours", "ratio of both", "memory"], lines)


def goals(rows: list[Row]) -> Iterator[tuple[str, bool]]:
    """Each goal, the figure measured, and whether it is met."""
    for case, goal in SPEED_GOALS.items():
        row = find(rows, case=case, method=LOOP, what="both")
        if row:
            ratio, first = row.ratio.median, row.value.median / row.first.median
            text = f"{case}: {ratio:.0f} times the torch loop's speed, of {goal}"
            yield f"{text} (our first call after the loop: {first:.0f} times)", ratio >= goal
    for row in rows:
        if row.method == OURS and row.what == "memory" and row.case.references in MEMORY_GOAL_REFERENCES:
            size = row.value.median
            yield f"{row.case}: {mebibytes(size)} of {mebibytes(MEMORY_GOAL)}", size < MEMORY_GOAL


def plot(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """A panel for each amount of noise."""
    found = [(row.case, row.method, row.value) for row in rows if row.what == "both"]
    times = [plots.Time(SEPARABILITY[case.noise], case.sizes.replace(", ", "\n"), *rest) for case, *rest in found]
    plots.by_case(times, MARKS, about, path)


def main() -> None:
    options = report.parser(
        __doc__,
        quick="only the shapes that have a speed goal, nothing written",
        full="every shape, and larger peers: minutes more, 16 GB",
    ).parse_args()
    if not keops.installed():
        print("KeOps is left out: pykeops is not installed.")
    cases = [*SPEED_GOALS] if options.quick else [c for c in CASES if options.full or c.pairs < FULL_ONLY_PAIRS]
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    for case in [case for case in cases if case.noise == 1] + [LONGEST] * options.quick:  # memory ignores the noise
        names = [OURS, *peers(case, options.full)]
        jobs.append((f"memory: {case}", functools.partial(Row.memory, memory_of, case, names, options.threads)))
    jobs += [(f"time: {case}", functools.partial(time_case, case, options.full)) for case in cases]
    report.carry_out(options, "ap_loss_cpu", jobs, tables, goals, plot)


if __name__ == "__main__":
    main()
