"""What the CUDA kernels would take on an H100, an H200 and an A100, by counting: a table, and results/cuda_count.csv.

    make cuda-count                                           all of it
    make cuda-count ARGS='--only "100 positives"'             the workloads whose name holds this
    make cuda-count ARGS='--machine H200 --data half --lines 12'   and where the time of each launch goes

Needs a CUDA toolkit, a C++ compiler and, installed once into .cuda, NVIDIA's disassembler; no GPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import report
from benchmarks.cuda import Case
from benchmarks.loop import NOISES, SEPARABILITY
from tools.cuda import is_toolkit, toolkit_candidates

from .machine import LAUNCH, MACHINES, Machine
from .replay import Cache, Outcome, replay
from .sass import Kernel, assemble, modules
from .trace import Head, Launch, head_of, read
from .workload import CASES, ROOT, ROWS, Rest, chunk_rows, emulated_ops, record

FOLDER = ROOT / "build" / "count"


def nvdisasm() -> Path:
    """NVIDIA's disassembler: that on the PATH, or the package, which is installed into .cuda where it is not there."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    folder = ROOT / ".cuda"
    if not list(folder.glob("nvidia/*/bin/nvdisasm")):
        print("installing NVIDIA's disassembler into .cuda (5 MB, once)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(folder), "nvidia-cuda-nvdisasm"], check=True)
    return next(folder.glob("nvidia/*/bin/nvdisasm"))


def folder_of(arch: int) -> Path:
    """For what is made of the kernels as they are now; what was made of others goes."""
    folder = FOLDER / Path(emulated_ops().built(arch)).stem
    for old in FOLDER.glob(f"{folder.name.partition('-')[0]}-*"):
        if old != folder:
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def traced(case: Case, arch: int, multiprocessors: int) -> tuple[list[Path], Rest]:
    """The traces of a case, a launch each, recorded once; and the rest."""
    key = hashlib.sha256(f"{case} {multiprocessors}".encode()).hexdigest()[:16]
    folder = folder_of(arch) / key
    if not (folder / "rest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(record, case, arch, multiprocessors, folder).result()
    rest = Rest(**json.loads((folder / "rest.json").read_text()))
    return sorted((file for file in folder.iterdir() if file.suffix == ""), key=lambda file: int(file.name)), rest


def kernels(arch: int, entries: set[str]) -> dict[str, Kernel]:
    """Kernels by their entries, as ptxas makes them of the PTX that ran."""
    ptxas = next(root for root in toolkit_candidates(os.environ) if is_toolkit(root)) / "bin" / "ptxas"
    texts = modules(emulated_ops().built(arch))
    module = {entry: next(text for text in texts if re.search(rf"\.entry {entry}\b", text)) for entry in entries}
    folder, disassembler = folder_of(arch), nvdisasm()
    return {entry: assemble(entry, ptx, arch, ptxas, disassembler, folder) for entry, ptx in module.items()}


# --- from what was traced to the whole -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How a traced launch stands for the real ones."""

    multiprocessors: int  # that the blocks which were traced are spread over
    times: float = 1  # what a real one does after another where the traced one does it once
    launches: float = 1

    @classmethod
    def of(cls, small: Head, double: Head, case: Case, machine: Machine) -> Scale:
        """From a launch for ROWS on one multiprocessor, and the same for twice as many on two."""
        if small.blocks == double.blocks:  # whatever the rows: a single block, or all columns
            return cls(machine.multiprocessors)
        rows = chunk_rows(case)
        each = rows / machine.multiprocessors
        if small.blocks < ROWS:  # a block takes row after row, and the last ones leave some idle
            each = math.ceil(each / small.blocks) * small.blocks
        return cls(1, each / ROWS, case.queries / rows)


@dataclass
class Estimate:
    """A case on a machine: seconds, and what the launches did in them."""

    case: Case
    machine: Machine
    floor: float
    seconds: float = 0
    instructions: float = 0  # of threads
    dram: float = 0  # bytes
    registers: int = 0  # of the kernel that takes longest, and its warps that a multiprocessor holds
    warps: int = 0
    longest: float = 0
    cycles: float = 0
    unmatched: float = 0
    busy: Counter[str] = field(default_factory=Counter)

    def add(self, launch: Launch, outcome: Outcome, scale: Scale) -> None:
        machine, times = self.machine, scale.times * scale.launches
        seconds = outcome.cycles / machine.clock * times + LAUNCH * scale.launches
        self.seconds += seconds
        everywhere = self.case.queries / ROWS if scale.multiprocessors == 1 else 1 / launch.share
        self.instructions += 32 * outcome.issued * everywhere
        self.dram += outcome.dram * everywhere
        self.cycles += outcome.cycles * times
        self.unmatched += outcome.unmatched * outcome.cycles * times
        self.busy.update({name: value * times for name, value in outcome.busy.items()})
        if seconds > self.longest:
            head, self.longest, self.registers = launch.head, seconds, launch.kernel.registers
            self.warps = head.warps * min(machine.resident(head.threads, self.registers, head.shared), head.blocks)

    @property
    def limit(self) -> str:
        """What is busy most of the time, and for how much of it; where nothing is, time is lost waiting."""
        name, cycles = max(self.busy.items(), key=lambda item: item[1])
        return f"{'' if cycles > 0.8 * self.cycles else 'latency, '}{name} {cycles / self.cycles:.0%}"

    def columns(self) -> dict[str, object]:
        """Of the CSV."""
        case, scores, busy = self.case, self.case.queries * self.case.references, self.busy
        return {
            "queries": case.queries,
            "references": case.references,
            "positives": case.positives,
            "dim": case.dim or "",
            "dtype": str(case.dtype).removeprefix("torch."),
            "noise": case.noise,
            "machine": self.machine.name,
            "ms": f"{self.seconds * 1e3:.4g}",
            "against": "products" if case.dim else "copy",
            "ratio": f"{self.seconds / self.floor:.4g}",
            "limit": self.limit,
            "instructions_a_score": f"{self.instructions / scores:.4g}",
            "instructions_a_pair": f"{self.instructions / scores / case.positives:.4g}",
            "dram_bytes_a_score": f"{self.dram / scores:.4g}",
            "registers": self.registers,
            "warps": self.warps,
            "unmatched": f"{self.unmatched / self.cycles:.3f}",
            **{f"busy_{name.lower()}": f"{value / self.cycles:.3f}" for name, value in busy.items()},
        }


def floor_of(case: Case, machine: Machine) -> float:
    """Seconds of the three products, or of a copy of the bytes of two passes: as in benchmarks/cuda.py."""
    if case.dim:
        return 6 * case.queries * case.references * case.dim / machine.products
    return (4 * case.dtype.itemsize + 1) * case.queries * case.references / machine.copy


def estimate(case: Case, machine: Machine, lines: int) -> Estimate:
    """Trace a case, or some of its rows, and replay it on a machine."""
    if case.queries < ROWS:
        files, rest = traced(case, machine.arch, machine.multiprocessors)
        scales = [Scale(machine.multiprocessors)] * len(files)
    else:
        files, rest = traced(replace(case, queries=ROWS), machine.arch, 1)
        plain = replace(case, queries=2 * ROWS, positives=4, noise=1.0)  # grids do not rest on the data
        double = [head_of(file) for file in traced(plain, machine.arch, 2)[0]]
        scales = [Scale.of(head_of(file), head, case, machine) for file, head in zip(files, double, strict=True)]
    found = Estimate(case, machine, floor_of(case, machine))
    known = kernels(machine.arch, {head_of(file).entry for file in files})
    cache = Cache(machine.cache)
    for file, scale in zip(files, scales, strict=True):
        launch = read(file, known[head_of(file).entry], scale.multiprocessors)
        alone = scale.multiprocessors == 1
        outcome = replay(launch, machine, Cache(machine.cache // machine.multiprocessors) if alone else cache, alone)
        for sector in launch.sectors.tolist():  # what other multiprocessors have touched is in L2, too
            cache.touch(sector, False)
        found.add(launch, outcome, scale)
        if lines:
            print_launch(launch, outcome, scale, machine, lines)
    if case.dim:  # the products, and what torch does around
        size = rest.fixed + rest.grown * case.queries / ROWS
        found.seconds += found.floor + size / machine.copy + rest.calls * LAUNCH
    return found


# --- what is said ----------------------------------------------------------------------------------------------------


def print_launch(launch: Launch, outcome: Outcome, scale: Scale, machine: Machine, lines: int) -> None:
    """One launch: what is busy, and the lines of the source at which its warps spend their time."""
    head, ms = launch.head, outcome.cycles / machine.clock * scale.times * scale.launches * 1e3
    busy = ", ".join(f"{name} {cycles / outcome.cycles:.0%}" for name, cycles in outcome.busy.items())
    registers = f"{launch.kernel.registers} registers"
    print(f"  {head.entry}: {head.blocks} x {head.threads}, {registers}, {head.shared} bytes: {ms:.3f} ms\n    {busy}")
    whole = sum(outcome.waits.values())
    for (file, line), cycles in outcome.waits.most_common(lines):
        print(f"    {cycles / whole:6.1%}  {file}:{line}, {outcome.counts[file, line]:,} instructions of warps")


def table(found: list[Estimate]) -> str:
    """All estimates."""
    heads = ["forward and backward", "machine", "time", "ratio", "limit", "instructions", "a pair", "bytes", "warps"]
    lines = []
    for e in found:
        c = e.columns()
        ratio = f"{c['ratio']} x {c['against']}"
        counts = [c["instructions_a_score"], c["instructions_a_pair"], c["dram_bytes_a_score"]]
        cells = [e.case, e.machine.name, report.duration(e.seconds), ratio, e.limit, *counts, e.warps]
        lines.append(list(map(str, cells)))
    note = "instructions of threads and bytes of DRAM: a score. warps: of the longest kernel, on a multiprocessor."
    return f"{report.table('Counted, not measured', heads, lines)}\n{note}"


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--only", default="", help="the workloads whose name holds this")
    parser.add_argument("--machine", default="", help="the machines whose name holds this")
    parser.add_argument("--data", default="", help="data whose description holds this: half-trained, hardly")
    parser.add_argument("--lines", type=int, default=0, help="print each launch with so many lines of the source")
    options = parser.parse_args()
    if not any(is_toolkit(root) for root in toolkit_candidates(os.environ)):
        sys.exit("There is no CUDA toolkit to compile the kernels with: install one and set CUDA_HOME.")
    cases = [replace(case, noise=noise) for case in CASES for noise in NOISES]
    cases = [case for case in cases if options.only in str(case) and options.data in SEPARABILITY[case.noise]]
    machines = [machine for machine in MACHINES if options.machine in machine.name]
    found = []
    for _, (case, machine) in report.told([(f"{c}, {m.name}", (c, m)) for c in cases for m in machines]):
        found.append(estimate(case, machine, options.lines))
    print(f"\n{table(found)}")
    if options.only or options.machine or options.data:
        print("\nA part of it: nothing written")
    else:
        report.write_csv(options.out / "cuda_count.csv", [e.columns() for e in found], report.provenance())


if __name__ == "__main__":
    main()
