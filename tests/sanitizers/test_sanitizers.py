"""Memory safety of the CPU kernels, by the sanitizers: `make asan` runs the same, and twice as many rows."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.sh"


@pytest.mark.deep
def test_sanitizers_find_nothing(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or os.uname().sysname != "Linux":
        pytest.skip("needs a C++ compiler on Linux")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = subprocess.run(
        [compiler, "-fsanitize=address,undefined", str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    )
    if linked.returncode != 0:
        pytest.skip(f"{compiler} has no sanitizers here")
    result = subprocess.run(
        ["bash", str(RUN)], capture_output=True, text=True, env=os.environ | {"ROADMAP_ROUNDS": "3"}
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout
