"""The emulator that runs CUDA kernel bodies on the CPU: right kernels pass under it, each fault is caught and named."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEEDS = 20
RIGHT = [
    "reduction",
    "prefix_sum",
    "shuffles",
    "votes",
    "atomics",
    "atomic_sums",
    "vectors",
    "warp_exchange",
    "shared_elements",
    "global_elements",
    "pointers",
    "orders",
    "fast_functions",
]
FAULTS = {
    "no_barrier_after_write": (
        "data race: ",
        " with nothing between: index ",
        " of 64 of the shared array at byte 0; thread ",
    ),
    "no_barrier_after_read": (
        "data race: ",
        " with nothing between: index ",
        " of 64 of the shared array at byte 0; thread ",
    ),
    "two_writers": ("data race: writes what thread ", " wrote with nothing between: index "),
    "race_in_warp": ("data race: ", " with nothing between: index "),
    "race_of_warps": ("data race: ", " with nothing between: index "),
    "race_with_readers": ("data race: ", "index 7 of 64"),
    "race_with_late_reader": ("data race: ", "index 7 of 64"),
    "shared_atomic_and_read": ("data race: ", "index 7 of 64"),
    "shared_atomic_and_write": ("data race: ", "index 7 of 64"),
    "strict_warp": ("data race: ", " with nothing between: index "),
    "global_no_barrier_after_write": ("race on global memory: ", " with no barrier between; thread "),
    "global_no_barrier_after_read": ("race on global memory: ", " with no barrier between; thread "),
    "global_race_in_warp": ("race on global memory: reads (self_test.cpp:", " has written with no barrier between"),
    "global_two_writers": ("race on global memory: writes (self_test.cpp:", " what block ", " has written; thread "),
    "global_race_of_blocks": ("race on global memory: ", " (self_test.cpp:", " what block "),
    "global_race_of_widths": ("race on global memory: writes (self_test.cpp:", " what block ", " has written; thread "),
    "global_atomic_without_barrier": ("race on global memory: ", " with no barrier between; thread "),
    "global_atomic_of_blocks": ("race on global memory: ", " (self_test.cpp:", " what block "),
    "global_past_end": ("global memory out of bounds: index 70 to 70 of 70; thread 3 of 64, block ",),
    "global_negative": ("global memory out of bounds: index -1 to -1 of 70; thread 3 of 64, block ",),
    "shared_past_end": (
        "shared memory out of bounds: index 30 of 30 of the shared array at byte 256; thread 3 of 64, ",
    ),
    "shared_negative": (
        "shared memory out of bounds: index -1 of 30 of the shared array at byte 256; thread 3 of 64, ",
    ),
    "null_pointer": ("a null pointer, index ",),
    "uninitialised": ("uninitialised shared memory: reads index 5 of 64",),
    "divergent_barrier": ("divergent: barrier (self_test.cpp:", " while others wait in barrier (self_test.cpp:"),
    "barriers_too_many": ("barrier (", " of the block reach: 32 of 64 wait there, 32 of the block's have returned"),
    "early_return": ("barrier (", " of the block reach: 63 of 64 wait there, 1 of the block's have returned"),
    "lanes_missing": ("shuffle_down (", " of the warp reach: 31 of 32 wait there, 0 of the block's have returned"),
    "lanes_gone": ("shuffle_xor (", " of the warp reach: 24 of 32 wait there, 16 of the block's have returned"),
    "lanes_elsewhere": ("divergent: shuffle_", " while others wait in shuffle_"),
    "shuffle_too_far": ("shuffle_down (", " by 32, which is none of 0 to 31"),
    "misaligned_load": ("misaligned vector access: index 6 of 63 lies at no multiple of 16 bytes; thread 3 of 32",),
    "misaligned_store": ("misaligned vector access: index 6 of 63 lies at no multiple of 16 bytes; thread 3 of 32",),
    "vector_past_end": ("global memory out of bounds: index 60 to 63 of 63",),
    "too_little_shared": ("past the launch's shared memory: 64 elements of 4 bytes at byte 16 of 271",),
    "shared_twice": ("threads divide shared memory differently, at byte 0",),
    "odd_threads": ("bad launch: 1 blocks of 48 threads",),
    "stack_overflow": ("stack overflow; thread 9 of 64, block 0 of 1",),
    "fault_after_faults": ("barrier (", " of the block reach: 63 of 64 wait there, 1 of the block's have returned"),
}


@pytest.fixture(scope="module")
def self_test(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or os.uname().sysname != "Linux":
        pytest.skip("needs a C++ compiler on Linux")
    program = tmp_path_factory.mktemp("emulator") / "self_test"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE", "-DROADMAP_EMULATED"]
    folders = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc' / 'cuda'}"]
    source = str(HERE / "self_test.cpp")
    result = subprocess.run([compiler, *flags, *folders, source, "-o", str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr

    def run(*case):
        done = subprocess.run([str(program), *case], capture_output=True, text=True, timeout=60)
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
    assert status == 1
    assert len(lines) == SEEDS
    for line in lines:  # under every seed
        assert all(part in line for part in FAULTS[case]), line
