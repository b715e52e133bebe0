"""The model that counts: what it reads is understood, and its multiprocessor has the limits that it claims."""

import dataclasses
import shutil

import pytest

from benchmarks.cuda import Case
from tools.count import __main__ as count
from tools.count.machine import MACHINES, SCHEDULERS
from tools.count.replay import BARRIER, Cache, replay
from tools.count.sass import Block, Control, Instruction, Kernel, kernel_of
from tools.count.trace import Head, Launch, Warp, program

H200 = next(machine for machine in MACHINES if machine.name == "H200")


def test_control_codes():
    assert Control.of(0x000FF00000000800) == (8, 7, 7, ())  # LDC R1, c[0x0][0x28] of every kernel
    assert Control.of(0x004FEC0003800000) == (6, 7, 7, (2,))  # @!P0 BRA that waits for an S2UR


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(384, 137, 25_640, 1), (384, 80, 25_640, 2), (256, 32, 0, 8), (64, 16, 200 << 10, 1), (64, 255, 0, 4)],
)
def test_resident_blocks(threads, registers, shared, blocks):
    assert H200.resident(threads, registers, shared) == blocks


# --- from PTX and SASS to blocks -------------------------------------------------------------------------------------

PTX = """.version 9.0
.entry other(
)
{
ret;
}
.entry sums(
)
{
.file 1 "/somewhere/sums.cuh"
.loc 1 7 0
mov.u32 %r1, %tid.x;
$L_1:
.loc 1 8 0
{ add.s32 %r2, %r2, 1;
}
ld.shared.v2.u32 {%r3, %r4}, [%r2];
@%p1 bra $L_1;
.loc 1 9 0
div.rn.f32 %f1, %f2, %f3;
st.global.u32 [%r5], %r3;
ret;
}
"""


def listing(*rows):
    """As nvdisasm prints (line, instruction), or a label."""
    text = ["\t.section .text.sums", ".text.sums:"]
    for row in rows:
        if isinstance(row, str):
            text.append(f"{row}:")
        else:
            text.append(f'\t//## File ".nv_debug_ptx_txt", line {row[0]}')
            text.append(f"        /*0010*/   {row[1]} ;  /* 0x00000000ff177b82 */")
            text.append("                                /* 0x000ff00000000800 */")
    return "\n".join(text)


LOOP = [(15, "IADD3 R2, R2, 0x1, RZ"), (17, "LDS.64 R4, [R2]"), (15, "VIADD R6, R2, 0x1"), (18, "MOV R7, R8")]
KERNEL = kernel_of(
    "sums",
    32,
    PTX,
    listing(
        *[(12, "S2R R1, SR_TID.X"), ".L_x_4"],
        *[*LOOP, *LOOP, *LOOP, *LOOP, (18, "@P0 BRA `(.L_x_4)"), ".L_x_1"],
        *[*LOOP, (18, "@P1 BRA `(.L_x_1)"), ".L_x_2"],
        *[(20, "MUFU.RCP R1, R2"), (20, "@P0 BRA `(.L_x_3)"), (20, "CALL.REL.NOINC `($div_slowpath)"), ".L_x_3"],
        *[(21, "STG.E desc[UR4][R2.64], R1"), (21, "BRA.DIV UR4, `(.L_x_9)"), (22, "EXIT"), ".L_x_9"],
        *[(21, "WARPSYNC.COLLECTIVE R1, `(.L_x_9)"), "$div_slowpath", (21, "FFMA R1, R2, R3, R4"), (21, "RET")],
    ),
)


def opcodes(block):
    return [i.opcode for i in KERNEL.blocks[block].code]


def test_blocks_belong_to_their_ptx():
    assert KERNEL.begins == {12: 0, 15: 1, 20: 2}
    assert [block.copies for block in KERNEL.blocks] == [1, 4, 1, 1, 1, 1]  # without what is rare
    assert KERNEL.sources[15] == ("sums.cuh", 8)
    assert opcodes(3) == ["MUFU.RCP", "BRA"]
    assert opcodes(-1) == ["EXIT"]


def test_an_unrolled_loop_is_executed_as_often_as_its_ptx():
    assert program(KERNEL, [0, *[1] * 10, 2]) == [0, 1, 1, 2, 2, 3, 4, 5]
    assert program(KERNEL, [1, 2, 1]) == [2, 3, 4, 5, 2]


# --- the multiprocessor ----------------------------------------------------------------------------------------------


def instruction(opcode, line=1, stall=1, result=7, wait=()):
    return Instruction(opcode, line, "", Control(stall, result, 7, wait))


def cycles(code, blocks=1, warps=SCHEDULERS, accesses=None, registers=32, cache=None, machine=H200):
    """Of blocks whose warps execute some code once; accesses: by line, of each warp (block, number)."""
    kernel = Kernel("one", registers, [Block([], code)], {1: 0}, {0: [[0]]}, {})
    of = {
        block: [Warp([0], {line: get(block, k) for line, get in (accesses or {}).items()}) for k in range(warps)]
        for block in range(blocks)
    }
    launch = Launch(Head("one", blocks, warps * 32, 0), kernel, of, 1.0, [])
    return replay(launch, machine, cache or Cache(1 << 20), flush=False)


@pytest.mark.parametrize(
    ("opcode", "rate"), [("FFMA", 1), ("IADD3", 0.5), ("IMAD", 0.5), ("MUFU.EX2", 1 / 8), ("DFMA", 0.5), ("BRA", 1)]
)
def test_an_instruction_has_the_rate_of_its_pipe(opcode, rate):
    outcome = cycles([instruction(opcode)] * 100, warps=4 * SCHEDULERS)
    assert outcome.issued == 100 * 4 * SCHEDULERS
    assert outcome.cycles == pytest.approx(100 * 4 / rate, rel=0.02)
    assert max(outcome.busy.values()) == pytest.approx(outcome.cycles, rel=0.02)


def test_a_lone_warp_waits_for_stalls_and_scoreboards():
    assert cycles([instruction("FFMA", stall=4)] * 100).cycles == pytest.approx(400, abs=5)
    chain = [instruction("LDS", result=0), instruction("FFMA", wait=(0,))]
    assert cycles(chain * 100).cycles == pytest.approx(100 * 32, rel=0.1)


def test_resident_blocks_fill_the_wait():
    chain = [instruction("LDS", result=0), instruction("FFMA", wait=(0,))] * 100
    one = cycles(chain).cycles
    assert cycles(chain, blocks=4, registers=128).cycles == pytest.approx(one, rel=0.1)
    assert cycles(chain, blocks=5, registers=128).cycles == pytest.approx(2 * one, rel=0.1)  # which does not fit


def test_a_barrier_waits_for_the_last_warp():
    accesses = {1: lambda block, warp: [200] if warp == 0 else []}  # bank conflicts of one warp alone
    code = [instruction("LDS", result=0), instruction("BAR.SYNC", line=2, wait=(0,)), instruction("FFMA", line=3)]
    assert cycles(code, accesses=accesses).cycles == pytest.approx(230 + BARRIER, abs=10)


def test_a_copy_takes_as_long_as_its_bytes():
    loads = {1: lambda block, warp: [[((8 * block + warp) * 1000 + 16 * k, 16)] for k in range(50)]}
    code = [instruction("LDG.E.128")] * 50
    outcome = cycles(code, blocks=20, warps=8, accesses=loads)
    size = 20 * 8 * 50 * 16 * 32
    assert outcome.dram == size
    assert outcome.cycles == pytest.approx(size / (H200.copy / H200.clock / H200.multiprocessors), rel=0.05)
    assert outcome.unmatched == 0
    twice_as_fast = dataclasses.replace(H200, copy=2 * H200.copy)
    again = cycles(code, blocks=20, warps=8, accesses=loads, machine=twice_as_fast)
    assert again.cycles == pytest.approx(outcome.cycles / 2, rel=0.1)


def test_l2_keeps_what_was_touched_last():
    cache = Cache(4 * 32)
    assert [cache.touch(sector, write=sector == 1)[0] for sector in (1, 2, 3, 4, 1, 5)] == [False] * 4 + [True, False]
    assert cache.touch(2, write=False) == (False, False)  # 3 left, unchanged
    assert [cache.touch(sector, write=False)[1] for sector in (6, 7, 8)] == [False, True, False]  # 1 had been changed


@pytest.mark.deep
@pytest.mark.skipif(not shutil.which("nvdisasm"), reason="there is no nvdisasm on the PATH")
def test_a_loss_is_traced_and_replayed():
    """From the loss to the table: nearly all accesses of the PTX are found in the SASS, and what has to move moves."""
    found = count.estimate(Case(4, 4096, 3), H200, lines=0)
    assert found.unmatched < 0.05 * found.cycles
    assert 9 < found.dram / (4 * 4096) < 20  # scores and mask in, gradient out; both again where it is scaled
    assert 10 < found.instructions / (4 * 4096) < 1000
    assert 0 < found.warps <= 64
    assert 0 < found.registers < 256
