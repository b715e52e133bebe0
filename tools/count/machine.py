"""The figures of three GPUs, and what an instruction takes of one.

Figures are NVIDIA's own: data sheets and architecture white papers of A100 and H100, the data sheet of H200, and for
instructions the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide. NVIDIA states
no latencies; these are rounded from published microbenchmarks (Luo et al., "Benchmarking and Dissecting the Nvidia
Hopper GPU Architecture via Microbenchmarking", 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SCHEDULERS = 4  # of a multiprocessor
SECTOR = 32  # bytes
LAUNCH = 2e-6  # seconds that a launch costs beside its work
DATA_SHEET = 0.9, 0.8  # of its bandwidth a copy reaches so much, of its FLOP/s products do: as measured on an H200


@dataclass(frozen=True)
class Machine:
    """A GPU; cycles are those of its boost clock."""

    name: str
    arch: int
    multiprocessors: int
    clock: float  # Hz
    copy: float  # bytes a second, read and written
    products: float  # FLOP/s of products in bfloat16
    cache: int  # bytes of L2
    shared: int  # bytes of shared memory of a multiprocessor
    float32: int  # cycles of a scheduler's pipe that FFMA takes for a warp
    float64: int  # and DFMA
    l2_rate: float = 5120  # bytes a cycle, all multiprocessors together
    l2: int = 260  # cycles until L2 has answered
    dram: int = 480

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks of a kernel that a multiprocessor holds at a time. Registers are dealt out by 8 a thread."""
        warps = -(-threads // 32)
        by_registers = 65_536 // SCHEDULERS // (-(-registers // 8) * 8 * 32) * SCHEDULERS // warps
        return min(32, 64 // warps, by_registers, self.shared // (shared + 1024))  # the system takes 1 KiB a block


_BANDWIDTH, _PRODUCTS = DATA_SHEET
MACHINES = (
    Machine("H100 SXM", 90, 132, 1.98e9, _BANDWIDTH * 3.35e12, _PRODUCTS * 989e12, 50 << 20, 228 << 10, 1, 2),
    Machine("H200", 90, 132, 1.98e9, _BANDWIDTH * 4.8e12, _PRODUCTS * 989e12, 50 << 20, 228 << 10, 1, 2),
    Machine("A100 SXM", 80, 108, 1.41e9, _BANDWIDTH * 2.039e12, _PRODUCTS * 312e12, 40 << 20, 164 << 10, 2, 4),
)


class Cost(NamedTuple):
    """What an instruction of a warp takes: cycles of a pipe, and cycles until its result is there.

    The latter counts for results that take no fixed time, which are waited for by scoreboards; all others are in the
    stall counts.
    """

    pipe: str
    cycles: int
    latency: int


PIPES = {
    "float32": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
    "imad": "IMAD",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "float64": "DADD DMUL DFMA DSETP",
    "memory": "LD LDG LDS LDSM LDL ST STG STS STL ATOM ATOMG ATOMS RED REDG SHFL",
    "": "BRA EXIT BAR BSSY BSYNC WARPSYNC NOP CALL RET BREAK YIELD BRX DEPBAR MEMBAR LDC S2R S2UR B2R MATCH VOTE R2UR",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


def cost_of(opcode: str, machine: Machine) -> Cost:
    """Of an opcode with its suffixes, as in IMAD.MOV.U32."""
    name = opcode.partition(".")[0]
    pipe = PIPE_OF.get(name, "" if name.startswith("U") else "integer")
    if pipe == "imad" and machine.float32 == 2:
        pipe = "float32"  # one pipe does both
    cycles = {
        "float32": machine.float32,
        "float64": machine.float64,
        "imad": 2,
        "integer": 2,
        "special": 8,
        "memory": 1,
    }
    latency = {"special": 24, "float64": 16}.get(pipe, 24 if name == "SHFL" else 30)
    return Cost(pipe, cycles.get(pipe, 0), latency)
