"""The machine that runs the kernels' PTX: right kernels pass, faults are caught and named, instructions are counted."""

import csv
import subprocess

import emulated_ops
import pytest

pytestmark = pytest.mark.deep
SEEDS = 10
RIGHT = ["integers", "floats", "bit_functions", "blocks_and_warps", "orders", "fast_functions"]
BARRIER, BLOCKS = "with no barrier between; self_test.cu:", "what another block has "
INCOMPLETE = "a warp-wide instruction that others have reached than its mask names; "
FAULTS = {
    "no_barrier_after_write": ("race on shared memory: ", BARRIER),
    "no_barrier_after_read": ("race on shared memory: ", BARRIER),
    "two_writers": ("race on shared memory: writes what thread ", BARRIER),
    "race_in_warp": ("race on shared memory: reads what thread ", BARRIER),
    "race_of_warps": ("race on shared memory: ", BARRIER),
    "race_with_readers": ("race on shared memory: ", BARRIER),
    "global_no_barrier": ("race on global memory: ", BARRIER),
    "global_two_blocks": ("race on global memory: writes ", BLOCKS),
    "global_read_of_another_block": ("race on global memory: ", BLOCKS),
    "half_and_whole": ("race on shared memory: writes what thread ", BARRIER),
    "atomic_and_plain": ("race on global memory: reads what thread ", BARRIER),
    "past_the_end": ("out of bounds of global memory; ", "(st.global.u32), thread 9 of 64"),
    "before_the_begin": ("out of bounds of global memory; ", "thread 9 of 64"),
    "shared_past_the_end": ("out of bounds of shared memory: byte ", "thread 63 of 64"),
    "null_pointer": ("out of bounds of global memory; ", "thread 5 of 64"),
    "read_only": ("a write to memory that is only to be read; self_test.cu:",),
    "never_written": ("reads what was never written; ", "(ld.shared.u32), thread 4 of 64"),
    "never_written_global": ("reads what was never written; ", "(ld.global.u32)"),
    "divergent_barrier": ("lanes of a warp at different barriers; ",),
    "barriers_too_many": ("a barrier that some warps have returned before; ",),
    "early_return": ("a barrier that some lanes have returned before; ",),
    "lanes_missing": (INCOMPLETE, "(shfl.sync.down.b32), thread 32 of 64"),
    "lanes_of_another_mask": (INCOMPLETE,),
    "lane_out_of_mask": ("a shuffle from a lane that takes no part; ",),
    "misaligned": ("a misaligned access to shared memory; ", "thread 3 of 64"),
    "float_atomic": ("not supported: an instruction; ", "(atom.global.add.f32)"),
    "odd_threads": ("a launch of 1 blocks of 48 threads",),
}


@pytest.fixture(scope="module", params=emulated_ops.ARCHS)
def self_test(request):
    program = emulated_ops.built(request.param, self_test=True)

    def run(*case, **environ):
        done = subprocess.run([program, *case], capture_output=True, text=True, timeout=60, env=environ)
        return done.returncode, done.stdout.splitlines()

    return run


def test_every_case_is_tested(self_test):
    assert self_test() == (0, [*RIGHT, *FAULTS])


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernel_passes(self_test, case):
    assert self_test(case) == (0, ["ok"] * SEEDS)


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_caught(self_test, case):
    status, lines = self_test(case)
    assert status == 0
    assert len(lines) == SEEDS
    for line in lines:  # under every seed
        assert all(part in line for part in FAULTS[case]), line


def test_counts(self_test, tmp_path):
    """PTXRUN_STATS: a line for each instruction that a launch has executed."""
    self_test("orders", PTXRUN_STATS=str(tmp_path / "counts.csv"))
    with (tmp_path / "counts.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["launch"] == "1"]
    stores = [line for line in lines if line["instruction"] == "st.global.u32"]
    assert all(line["source"] == "self_test.cu" for line in stores)
    # Two blocks of two warps, whose lanes write 128 bytes side by side.
    assert [(line["warps"], line["lanes"], line["sectors"]) for line in stores] == [("4", "128", "16")] * 2
