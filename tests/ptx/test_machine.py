"""The machine that runs the kernels' PTX: right kernels pass, faults are caught and named, instructions are counted."""

import csv
import subprocess

import emulated_ops
import pytest

pytestmark = pytest.mark.deep
SEEDS = 10


@pytest.fixture(scope="module", params=emulated_ops.ARCHS)
def self_test(request):
    program = emulated_ops.built(request.param, self_test=True)

    def run(*case, **environ):
        done = subprocess.run([program, *case], capture_output=True, text=True, timeout=60, env=environ, check=True)
        return done.stdout.splitlines()

    return run


def test_right_kernels_pass_and_faults_are_caught(self_test):
    cases = self_test()
    assert len(cases) == 33
    assert {case: self_test(case) for case in cases} == {case: ["ok"] * SEEDS for case in cases}


def test_counts(self_test, tmp_path):
    """PTXRUN_STATS: a line for each instruction that a launch has executed."""
    self_test("orders", PTXRUN_STATS=str(tmp_path / "counts.csv"))
    with (tmp_path / "counts.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["launch"] == "1"]
    stores = [line for line in lines if line["instruction"] == "st.global.u32"]
    assert all(line["source"] == "self_test.cu" for line in stores)
    # Two blocks of two warps, whose lanes write 128 bytes side by side.
    assert [(line["warps"], line["lanes"], line["sectors"]) for line in stores] == [("4", "128", "16")] * 2
