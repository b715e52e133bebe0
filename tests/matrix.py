"""What `make test-deep` runs: a flat table of cells, each a choice of tests by their markers under one condition.

    python -m tests.matrix                 all cells but "quick", and a table of results at the end
    python -m tests.matrix quick           what `make test` runs
    python -m tests.matrix avx2 emulated   these cells; from the first option on all goes to pytest
    python -m tests.matrix --list          the table, without running anything

tests/package/test_matrix.py sees to it that every test is in a cell.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = os.cpu_count() or 1

MARKERS = {
    "kernels": "in tests/kernels: accuracy of the ops, and what they promise, by instruction set and method",
    "losses": "in tests/losses: what the losses, memory and cached_backward promise",
    "metrics": "in tests/metrics: exact metrics and the decomposability gap",
    "distributed": "in tests/distributed: several ranks as one",
    "integrations": "in tests/integrations: the losses inside other libraries",
    "trainers": "in tests/trainers: sentence-transformers, Lightning, Hugging Face's Trainer and accelerate",
    "training": "in tests/training: the training program and its data",
    "comparison": "in tests/comparison: benchmarks/quality and mechanism, which compare losses",
    "package": "in tests/package: how the package is built, and this matrix",
    "documentation": "in tests/documentation: code and commands on the pages",
    "emulated": "in tests/emulated: the emulator, and what the CUDA ops promise beyond the CPU's",
    "ptx": "in tests/ptx: the machine that runs what nvcc makes of the kernels, and the model that counts what it did",
    "sanitizers": "in tests/sanitizers: memory safety of the CPU kernels",
    "cuda": "in tests/cuda: what nvcc makes of the kernels, and the kernels on a GPU",
    "deep": "for `make test-deep` alone: what costs much and seldom finds what the quick tests do not",
    "ops": "passes with any implementation of the ops: each instruction set, every row sorted, emulated CUDA",
    "cpu_kernels": "passes with each instruction set",
    "host": "about Python, autograd or torch around the ops: the same for every implementation of them",
    "long": "rows so long, or calls so many, that emulated kernels take minutes and show nothing more",
    "recipes": "the paper's experiments on tiny copies of their data sets",
    "timm": "needs timm's own networks: `make recipes-check`",
    "gpu": "needs a CUDA device and a build with CUDA kernels",
}


@dataclass(frozen=True)
class Cell:
    """Tests by an expression of markers, as pytest's -m takes it, and the condition that they run under."""

    name: str
    runs: str
    tests: int
    """How many there are, so that one that drops out is noticed."""
    environ: dict[str, str] = field(default_factory=dict)
    plugin: str | None = None
    """A module of tests/support that puts another implementation of the ops in place."""
    by: str | None = None
    """The make target that runs it on a machine that has what it needs, where `make test-deep` cannot."""

    def command(self, *options: str) -> list[str]:
        plugin = ["-p", self.plugin] if self.plugin else []
        return [sys.executable, "-m", "pytest", "-m", self.runs, *plugin, *options]


OPS = "ops and not host"
EACH_SET = "(ops or cpu_kernels) and not host and not long"
CELLS = [
    Cell("quick", "not deep and not gpu and not timm", 2100),
    Cell("kernels", "deep and (kernels or losses or metrics)", 1137),
    Cell("sorted", OPS, 797, plugin="every_row_sorted"),
    *(
        cell
        for name in ("avx512", "avx2", "baseline")
        for cell in (
            Cell(name, EACH_SET, 1234, {"ROADMAP_EXT_CPU": name}),
            Cell(f"{name}-sorted", f"{OPS} and not long", 720, {"ROADMAP_EXT_CPU": name}, "every_row_sorted"),
        )
    ),
    Cell("emulated-ops", f"{OPS} and not long", 720, plugin="emulated_ops"),
    *(
        Cell(f"ptx-{arch}", f"{OPS} and not long or deep and emulated", 1087, {"ROADMAP_PTX": arch}, "emulated_ops")
        for arch in ("80", "90")
    ),
    Cell("ptx", "deep and ptx", 5),
    Cell("emulated", "deep and emulated", 367),
    Cell("nvcc", "deep and cuda and not gpu", 1),
    Cell("sanitizers", "deep and sanitizers", 1),
    Cell("packaging", "deep and package", 10),
    Cell("distributed", "deep and (distributed or integrations)", 184),
    Cell("trainers", "trainers", 33),
    Cell("training", "deep and (training or comparison) and not recipes", 52),
    Cell("recipes", "recipes and not timm", 66),
    Cell("documentation", "documentation", 24),
    Cell("timm", "timm", 5, by="recipes-check"),
    Cell("gpu", "gpu", 544, by="gpu-check"),
]


def selects(expression: str, markers: set[str]) -> bool:
    """Whether an expression of markers takes a test that has these: pytest's -m, for names alone."""
    return bool(eval(re.sub(r"\b(?!and\b|or\b|not\b)\w+\b", lambda name: str(name[0] in markers), expression)))


def instruction_sets() -> tuple[str, list[str]]:
    """The one in use, and all that this processor has."""
    import roadmap_ext

    info = roadmap_ext.build_info()
    return info["cpu"], info["cpu_available"]


def left_out(cell: Cell) -> str | None:
    """Why a cell is not run here, if it is not."""
    if cell.by:
        return f"make {cell.by}"
    if cell.plugin == "emulated_ops" and sys.platform != "linux":
        return "needs Linux"
    used, available = instruction_sets()
    name = cell.environ.get("ROADMAP_EXT_CPU")
    if name and name not in available:
        return "not on this processor"
    if name == used:
        return "in use already: quick, kernels and sorted"
    return None


def run(cell: Cell, options: list[str], alone: bool) -> tuple[bool, str]:
    """Whether all tests passed, and a row for the table. A cell that runs alone spreads over a process per core."""
    reason = left_out(cell)
    if reason:
        return True, f"{cell.name:<16}       -  {reason}"
    begin = time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | cell.environ
    shared = ["-n", str(CORES), "--dist", "loadscope"] if alone and CORES > 1 else []
    done = subprocess.run(
        cell.command("-q", *shared, *options), cwd=ROOT, env=environ, text=True,
        stdout=None if alone else subprocess.PIPE, stderr=None if alone else subprocess.STDOUT,
    )  # fmt: skip
    passed, seconds = done.returncode == 0, time.monotonic() - begin
    if not alone:
        print(f"--- {cell.name}\n{done.stdout.rstrip()}", flush=True)
    last = "" if alone else (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    return passed, f"{cell.name:<16}{seconds:>8.0f}  {'' if passed else 'FAILED '}{last}"


def main() -> None:
    """The command line."""
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(names) :]
    known = {cell.name: cell for cell in CELLS}
    if options[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if options[:1] == ["--list"]:
        for cell in CELLS:
            condition = "".join(f" {name}={value}" for name, value in cell.environ.items())
            print(f"{cell.name:<16}{cell.runs}{condition}{f' -p {cell.plugin}' if cell.plugin else ''}")
        return
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"there is no cell {', '.join(unknown)}; there are {', '.join(known)}")
    cells = [known[name] for name in names] or [cell for cell in CELLS if cell.name != "quick"]
    with ThreadPoolExecutor(CORES) as pool:
        outcomes = list(pool.map(lambda cell: run(cell, options, len(cells) == 1), cells))
    print(f"\n{'cell':<16}{'seconds':>8}", *(row for _, row in outcomes), sep="\n")
    sys.exit(0 if all(passed for passed, _ in outcomes) else 1)


if __name__ == "__main__":
    main()
