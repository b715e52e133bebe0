"""Time and memory of roadmap_ext.ap_loss on the CPU, beside plain PyTorch, KeOps and a memory copy.

`python -m benchmarks.ap_loss` prints a table and the project's goals, and writes results/ap_loss_cpu.csv (a row a
measurement) and results/ap_loss_cpu.png. Each peer takes turns with ours in one process; ratios are of medians. In a
turn short calls are repeated and the first does not count, since it finds the caches full of the other side's data;
what it took is quoted as the first call. Forward and backward are the two halves of the same call; ours computes its
gradient in the first.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import roadmap_ext

from . import keops
from .loop import clustered, torch_loop
from .measure import MIB, Spread, in_fresh_process, memory_copy, paired, peak_growth, provenance, step

Loss = Callable[[Tensor, Tensor], Tensor]

NONE = "\N{EN DASH}"
OURS, LOOP, FLOOR = "tiled", "torch loop", "memory copy"
METHODS: dict[str, Loss] = {
    OURS: functools.partial(roadmap_ext.ap_loss, method="tiled"),
    LOOP: torch_loop,
    "reference": roadmap_ext.reference.ap_loss,
    "KeOps": keops.keops_loop,
}
PASSES = ("forward", "backward", "both")

# Peers run up to this many positive-negative pairs a call: the loops keep some 20 bytes of each for backward, and
# KeOps takes about 50 ns for each. --full: 64 x 8,192 with 10 classes, too (3.9e8 pairs).
PEER_PAIRS, FULL_PEER_PAIRS = 1e8, 5e8
# Ours, too, from here on: few rounds; and one round, only with --full.
FEW_ROUNDS_PAIRS, FULL_ONLY_PAIRS = 1e9, 1e11


@dataclass(frozen=True)
class Shape:
    """B queries, N references and the number of classes these are spread over."""

    queries: int
    references: int
    classes: int

    @property
    def positives(self) -> int:
        """Of a query, on average."""
        return self.references // self.classes

    @property
    def pairs(self) -> int:
        """Positive-negative pairs, about."""
        return self.queries * self.positives * (self.references - self.positives)

    def __str__(self) -> str:
        return f"{self.queries} x {self.references:,}, {self.classes:,} classes"


MANY_CLASSES = [
    Shape(256, 1024, 256),
    Shape(64, 8192, 2048),
    Shape(16, 65536, 16384),
    Shape(4, 1_000_000, 250_000),
]
SHAPES = [shape for many in MANY_CLASSES for shape in (many, Shape(many.queries, many.references, 10))]

# How many times as fast as the torch loop, forward and backward, at noise 1 and 2.
SPEED_GOALS = {Shape(256, 1024, 256): (120, 90), Shape(64, 8192, 2048): (60, 40), Shape(256, 1024, 10): (25, 20)}
MEMORY_GOAL = 32 * MIB
MEMORY_GOAL_REFERENCES = (8192, 1_000_000)


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of a pass, or bytes beyond scores, masks and one gradient (`what` is "memory")."""

    shape: Shape
    noise: float
    method: str
    what: str
    value: Spread
    ours: Spread | None  # in turn with it
    ratio: Spread | None  # to these
    first: Spread | None = None  # our first call after it


def peers(shape: Shape, full: bool) -> list[str]:
    """The methods other than ours to run on a shape."""
    if shape.pairs > (FULL_PEER_PAIRS if full else PEER_PAIRS):
        return []
    return [name for name in METHODS if name != OURS and (name != "KeOps" or keops.installed())]


def check_equal(name: str, scores: Tensor, target: Tensor) -> None:
    """Raise unless a method's loss and gradient are ours."""
    results = []
    for method in (OURS, name):
        leaf = scores.clone().requires_grad_()
        loss = METHODS[method](leaf, target)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    (loss, gradient), (other_loss, other_gradient) = results
    if not torch.allclose(loss, other_loss, rtol=1e-4) or (gradient - other_gradient).norm() > 1e-3 * gradient.norm():
        raise RuntimeError(f"{name} does not compute what ours does at {tuple(scores.shape)}: nothing to compare")


def time_case(shape: Shape, noise: float, full: bool) -> list[Row]:
    """Ours, its peers and the floor on one shape at one noise."""
    scores, target = clustered(shape.queries, shape.references, shape.classes, noise=noise)

    def side(name: str) -> Callable[[], tuple[float, ...]]:
        return memory_copy(scores) if name == FLOOR else step(lambda leaf: METHODS[name](leaf, target), scores)

    least, most = (5, 100) if shape.pairs < FEW_ROUNDS_PAIRS else (3, 3) if shape.pairs < FULL_ONLY_PAIRS else (1, 1)
    rows = []
    for name in [FLOOR, *peers(shape, full)]:
        if name != FLOOR:
            check_equal(name, scores, target)
        pair = paired(side(OURS), side(name), least=least, most=most)
        if name == FLOOR:  # ours is quoted from beside the floor, where rounds are many
            rows += [Row(shape, noise, OURS, what, pair.ours[i], None, None) for i, what in enumerate(PASSES)]
            rows.append(Row(shape, noise, FLOOR, "both", pair.peer[2], pair.ours[2], pair.ratio[2]))
        else:
            for i, what in enumerate(PASSES):
                first = pair.first if what == "both" else None
                rows.append(Row(shape, noise, name, what, pair.peer[i], pair.ours[i], pair.ratio[i], first))
    return rows


def memory_of(name: str, shape: Shape, threads: int) -> float | None:
    """Peak bytes of forward and backward beyond scores, masks and one gradient. Runs in a process of its own."""
    torch.set_num_threads(threads)
    loss = METHODS[name]
    small, small_target = clustered(8, 256, 16)
    step(lambda leaf: loss(leaf, small_target), small)()  # warms the thread pools; KeOps compiles
    scores, target = clustered(shape.queries, shape.references, shape.classes)
    run = step(lambda leaf: loss(leaf, target), scores)
    growth = peak_growth(run)
    return None if growth is None else max(0.0, growth - scores.nbytes)


def memory_case(shape: Shape, full: bool, threads: int) -> list[Row]:
    """Memory of ours and its peers on one shape, at noise 1."""
    rows = []
    for name in [OURS, *peers(shape, full)]:
        beyond = in_fresh_process(memory_of, name, shape, threads)
        if beyond is not None:
            rows.append(Row(shape, 1.0, name, "memory", Spread(beyond, beyond, beyond, 1), None, None))
    return rows


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    return f"{three_digits(seconds / scale)} {unit}"


def interval(value: Spread, text: Callable[[float], str]) -> str:
    return f"{text(value.median)} ({text(value.p20)} - {text(value.p80)})"


def multiple(ratio: float) -> str:
    return f"{three_digits(ratio)}x" if ratio >= 1 else f"1/{three_digits(1 / ratio)}x"


def mebibytes(size: float) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 100 * MIB else f"{size / MIB:,.0f} MiB"


def find(rows: Iterable[Row], shape: Shape, noise: float, method: str, what: str) -> Row | None:
    matching = (row for row in rows if (row.shape, row.noise, row.method, row.what) == (shape, noise, method, what))
    return next(matching, None)


def print_case(rows: list[Row], shape: Shape, noise: float) -> None:
    """The lines of one shape at one noise."""
    print(f"\n{shape} ({shape.positives:,} positives a query), noise {noise:g}")
    for method in [*METHODS, FLOOR]:
        forward, backward, both = (find(rows, shape, noise, method, what) for what in PASSES)
        memory = find(rows, shape, 1.0, method, "memory")
        cells = [
            duration(forward.value.median) if forward else NONE,
            duration(backward.value.median) if backward else NONE,
            interval(both.value, duration) if both else NONE,
            duration(both.ours.median) if both and both.ours else NONE,
            interval(both.ratio, multiple) if both and both.ratio else NONE,
            mebibytes(memory.value.median) if memory else NONE,
        ]
        print(f"  {method:<12}{cells[0]:>10}{cells[1]:>10}   {cells[2]:<29}{cells[3]:<9}{cells[4]:<30}{cells[5]:>10}")


def print_table(rows: list[Row], about: dict[str, str]) -> None:
    """Every case, under one heading."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print("float32. Median (20th - 80th percentile). ours: our time in turn with that line's, which its ratio is to;")
    print("the tiled line is in turn with the memory copy. memory: peak beyond scores, masks and one gradient.\n")
    print(f"  {'':<12}{'forward':>10}{'backward':>10}   {'both':<29}{'ours':<9}{'ratio of both':<30}{'memory':>10}")
    for shape, noise in dict.fromkeys((row.shape, row.noise) for row in rows if row.what == "both"):
        print_case(rows, shape, noise)


def print_goals(rows: list[Row]) -> None:
    """Each goal, the figure measured, and whether it is met."""
    print("\nGoals")
    for shape, goals in SPEED_GOALS.items():
        for noise, goal in zip((1.0, 2.0), goals, strict=True):
            row = find(rows, shape, noise, LOOP, "both")
            if row and row.ratio and row.first:
                met = "met" if row.ratio.median >= goal else "MISSED"
                first = row.value.median / row.first.median
                print(
                    f"  {shape}, noise {noise:g}: {row.ratio.median:.0f} times the torch loop's speed, of {goal}: "
                    f"{met} (our first call after the loop: {first:.0f} times)"
                )
    for row in rows:
        if row.method == OURS and row.what == "memory" and row.shape.references in MEMORY_GOAL_REFERENCES:
            met = "met" if row.value.median < MEMORY_GOAL else "MISSED"
            print(f"  {row.shape}: {mebibytes(row.value.median)} of {mebibytes(MEMORY_GOAL)}: {met}")


def write_csv(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """A line a measurement, each with its provenance; times in ms, memory in MiB."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        case, measured = "queries references classes noise method what unit", "median p20 p80 repeats ours ratio"
        writer.writerow([*case.split(), *measured.split(), "ratio_p20", "ratio_p80", "first", *about])
        for row in rows:
            unit, scale = ("MiB", MIB) if row.what == "memory" else ("ms", 1e-3)
            value = [f"{x / scale:.6g}" for x in (row.value.median, row.value.p20, row.value.p80)]
            ratio = [f"{x:.6g}" for x in (row.ratio.median, row.ratio.p20, row.ratio.p80)] if row.ratio else [""] * 3
            ours = f"{row.ours.median / scale:.6g}" if row.ours else ""
            first = f"{row.first.median / scale:.6g}" if row.first else ""
            case = [row.shape.queries, row.shape.references, row.shape.classes, row.noise, row.method, row.what, unit]
            writer.writerow([*case, *value, row.value.repeats, ours, *ratio, first, *about.values()])


def plot(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Forward and backward by shape, a mark a method, a panel a noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    marks: dict[str, tuple[str, str]] = {  # Okabe and Ito's colours, which all eyes tell apart
        OURS: ("#0072B2", "o"),
        LOOP: ("#D55E00", "s"),
        "reference": ("#E69F00", "^"),
        "KeOps": ("#009E73", "D"),
        FLOOR: ("#555555", "_"),
    }
    timed = [row for row in rows if row.what == "both"]
    shapes = list(dict.fromkeys(row.shape for row in timed))
    noises = list(dict.fromkeys(row.noise for row in timed))
    figure, axes = pyplot.subplots(1, len(noises), figsize=(7 * len(noises), 5.2), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], noises, strict=True):
        for index, (method, (colour, mark)) in enumerate(marks.items()):
            chosen = [row for row in timed if row.method == method and row.noise == noise]
            if not chosen:
                continue
            where = [shapes.index(row.shape) + (0.0 if method == FLOOR else 0.12 * (index - 1.5)) for row in chosen]
            medians = [1e3 * row.value.median for row in chosen]
            low = [1e3 * max(0.0, row.value.median - row.value.p20) for row in chosen]
            high = [1e3 * max(0.0, row.value.p80 - row.value.median) for row in chosen]
            size = 26 if method == FLOOR else 7
            axis.errorbar(where, medians, (low, high), fmt=mark, color=colour, ms=size, lw=1.2, capsize=2, label=method)
        axis.set_yscale("log")
        axis.set_title(f"noise {noise:g}")
        labels = [f"{s.queries} x {s.references:,}\n{s.classes:,} classes" for s in shapes]
        axis.set_xticks(range(len(shapes)), labels, fontsize=8, rotation=0 if len(shapes) < 5 else 35)
        axis.set_xlim(-0.5, len(shapes) - 0.5)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("forward + backward, ms")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, markerscale=0.8)
    caption = "{cpu}, {threads} threads, {instruction_set}, torch {torch}, {date}; bars: 20th to 80th percentile"
    figure.text(0.5, 0.01, caption.format(**about), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the shapes that have a speed goal")
    parser.add_argument("--full", action="store_true", help="every shape, and larger peers: minutes more, 16 GB")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV and PNG")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    about = provenance()
    shapes = [s for s in SHAPES if arguments.full or s.pairs < FULL_ONLY_PAIRS]
    remembered = shapes
    if arguments.quick:
        shapes = list(SPEED_GOALS)
        remembered = [*shapes, Shape(4, 1_000_000, 250_000)]
    if not keops.installed():
        print("KeOps is left out: pykeops is not installed.")

    rows: list[Row] = []
    jobs: list[tuple[str, Callable[[], Any]]] = []
    for shape in remembered:
        jobs.append((f"memory: {shape}", functools.partial(memory_case, shape, arguments.full, arguments.threads)))
    for shape in shapes:
        for noise in (1.0, 2.0):
            jobs.append((f"time: {shape}, noise {noise:g}", functools.partial(time_case, shape, noise, arguments.full)))
    for index, (name, job) in enumerate(jobs):
        print(f"[{index + 1}/{len(jobs)}] {name}", flush=True)
        rows += job()

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, about, arguments.out / "ap_loss_cpu.csv")
    plot(rows, about, arguments.out / "ap_loss_cpu.png")
    print_table(rows, about)
    print_goals(rows)
    print(f"\nWrote ap_loss_cpu.csv and ap_loss_cpu.png in {arguments.out}")


if __name__ == "__main__":
    main()
