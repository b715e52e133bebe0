"""The CUDA kernels and ops, emulated on the CPU: the tests of the ops once more, and what CUDA alone promises.

The emulator (tests/emulated/emulator.h) checks every access and every barrier; the tests check the results. Two processes
share the work; what they print is shown where one fails.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
# Long rows and many calls are for the real kernels: emulated, they would take minutes and show nothing more. Fake
# tensors are known to the real ops only, and the threads of torch have no part in this.
LEFT_OUT = " and ".join(
    f"not {word}"
    for word in (
        *("opcheck", "compile", "fake", "leak", "threads", "who_shares", "other_devices", "heap", "serves_all_calls"),
        *(
            "keep_memory_safe",
            "check_for_themselves",
            "split_over",
            "upper_bound",
            "grad_scaler",
            "test_exponents",
            "doc",
            "many_positives",
            "cluster_of_thousands",
        ),
    )
)
HALVES = {
    "the row op": (
        ["emulated/test_cuda_scan.py", "kernels/test_accuracy.py", "losses/test_ap_loss.py", "kernels/test_smooth_rank.py"],
        # The longest rows; two of the four dtypes will do.
        " and not (4128 and (bfloat16 or float64))",
    ),
    "embeddings": (
        ["emulated/test_cuda_ops.py", "kernels/test_embedding_accuracy.py", "losses/test_roadmap_loss.py"],
        # These take as long as all others.
        " and not gradcheck and not (combinations and (75 or mean or sum))"
        " and not (published and (float16 or bfloat16))",
    ),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda under the emulator, for the torch of this run."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    root = Path(torch.__file__).parent
    out = tmp_path_factory.mktemp("emulated") / "emulated.so"
    include = [HERE, root / "include", root / "include/torch/csrc/api/include"]
    command = [
        *compiler.split(),
        *("-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-U_FORTIFY_SOURCE", "-DROADMAP_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *(f"-I{path}" for path in include),
        *(str(HERE / "emulated_ops.cpp"), "-o", str(out)),
        *(f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_the_emulated_kernels_pass(library):
    environment = os.environ | {
        "ROADMAP_EMULATED": str(library),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS / "support")]),
        "OMP_NUM_THREADS": "1",
    }
    options = ["-p", "emulated_ops", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=short", "-W", "ignore"]
    runs = {}
    for name, (files, more) in HALVES.items():
        command = [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "-k",
            LEFT_OUT + more,
            *(str(TESTS / file) for file in files),
        ]
        runs[name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
    for name, run in runs.items():
        output, _ = run.communicate(timeout=600)
        print(name, *output.splitlines()[-2:], sep="\n")
        assert run.returncode == 0, output[-20_000:]
        assert " launches emulated" in output
