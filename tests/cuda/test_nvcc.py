"""What nvcc makes of the CUDA kernels, without a GPU: no warnings, and registers that leave room for enough blocks."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.cuda import is_toolkit, toolkit_candidates

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu"))
ARCHS = (80, 90)
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v"]


@dataclass(frozen=True)
class Bound:
    """Threads of a block, how many blocks a multiprocessor has to hold, and bytes that may be spilled all the same."""

    threads: int
    blocks: int
    spills: int = 0


BOUNDS = {
    "row_kernel": Bound(384, 2, 800),  # between the tiles of a row, not between pairs
    "row_kernel<double>": Bound(384, 1),
    "long_row_kernel": Bound(384, 1),
    "box_kernel": Bound(384, 2, 2000),  # between the steps of a row, not in its loops over columns
    "scale_kernel": Bound(256, 3),
    "radial_kernel": Bound(256, 8),
    "symmetrise_kernel": Bound(256, 8),
    "reduce_kernel": Bound(512, 1),
    "start_kernel": Bound(512, 1),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of one arch: what it takes of a multiprocessor, and what did not fit in registers, in bytes."""

    name: str
    arch: str
    registers: int
    shared: int  # without what the launch asks for
    stack: int
    spills: int

    def blocks(self, threads: int) -> int:
        """How many blocks of so many threads have registers: a multiprocessor has 65,536, a warp takes them by 256."""
        return 65536 // (-(-32 * self.registers // 256) * 256) // (threads // 32)


ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse(report: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` says, each with the functions that it calls."""
    entries = list(ENTRY.finditer(report))
    ends = [entry.start() for entry in entries[1:]] + [len(report)]
    kernels = []
    for entry, end in zip(entries, ends, strict=True):
        text = report[entry.end() : end]
        stack, stores, loads = (sum(map(int, sizes)) for sizes in zip(*STACK.findall(text), strict=True))
        registers, shared = USED.search(text).groups()
        kernels.append(Kernel(*entry.groups(), int(registers), int(shared or 0), stack, stores + loads))
    return kernels


def demangled(names: list[str]) -> list[str]:
    """Readable names, without what they take, if there is a tool for it."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return names
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [line.replace("(anonymous namespace)::", "").replace("roadmap::cuda::", "") for line in lines.splitlines()]
    return [name.removeprefix("void ").partition("(")[0] for name in short]


def compile_source(nvcc: Path, source: Path, folder: Path) -> str:
    """The report of ptxas on a source, for all archs."""
    archs = [flag for arch in ARCHS for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    out = ["-c", str(source), "-o", str(folder / f"{source.stem}.o"), "--threads", str(len(ARCHS))]
    result = subprocess.run([str(nvcc), *FLAGS, *archs, *out], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile without a warning:\n{result.stderr}{result.stdout}")
    return result.stderr + result.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """All kernels of all sources, compiled once."""
    roots = [root for root in toolkit_candidates(os.environ) if is_toolkit(root)]
    if not roots:
        pytest.skip("there is no CUDA toolkit: set CUDA_HOME")
    if not SOURCES:
        pytest.skip("there is no csrc/cuda/*.cu")
    folder = tmp_path_factory.mktemp("nvcc")
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // len(ARCHS))) as pool:
        reports = pool.map(lambda source: compile_source(roots[0] / "bin" / "nvcc", source, folder), SOURCES)
        return [kernel for report in reports for kernel in parse(report)]


@pytest.mark.deep
def test_registers_leave_room_for_enough_blocks(kernels, capsys):
    names = demangled([kernel.name for kernel in kernels])
    rows = sorted(zip(names, kernels, strict=True), key=lambda row: (row[0], row[1].arch))
    bounds = [BOUNDS.get(name) or BOUNDS.get(name.partition("<")[0]) for name, _ in rows]
    with capsys.disabled():
        print(f"\n  {'kernel':<40}{'arch':<8}{'registers':>9}{'shared':>8}{'stack':>7}{'spills':>8}{'blocks':>8}")
        for (name, k), bound in zip(rows, bounds, strict=True):
            blocks = k.blocks(bound.threads) if bound else "?"
            print(f"  {name:<40}{k.arch:<8}{k.registers:>9}{k.shared:>8}{k.stack:>7}{k.spills:>8}{blocks:>8}")
    assert not [name for (name, _), bound in zip(rows, bounds, strict=True) if not bound], "kernels without a bound"
    assert {name.partition("<")[0] for name, _ in rows} == {name.partition("<")[0] for name in BOUNDS}
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}" for arch in ARCHS}
    beyond = [
        name
        for (name, k), bound in zip(rows, bounds, strict=True)
        if k.blocks(bound.threads) < bound.blocks or k.spills > bound.spills
    ]
    assert not beyond


def test_the_report_is_understood():
    report = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z10row_kernelIfEv' for 'sm_80'
ptxas info    : Function properties for _Z10row_kernelIfEv
    8 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 10.000 ms
ptxas info    : Compiling entry function '_Z12scale_kernelv' for 'sm_90'
ptxas info    : Function properties for _Z12scale_kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    assert parse(report) == [
        Kernel("_Z10row_kernelIfEv", "sm_80", 64, 128, 8, 48),
        Kernel("_Z12scale_kernelv", "sm_90", 12, 0, 0, 0),
    ]
    assert [Kernel("", "", registers, 0, 0, 0).blocks(384) for registers in (80, 81, 168, 169)] == [2, 1, 1, 0]
