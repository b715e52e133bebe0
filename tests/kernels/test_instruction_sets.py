"""Every instruction set that this processor runs passes the accuracy tests; the one in use passes them anyway."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import roadmap_ext

HERE = Path(__file__).parent
INFO = roadmap_ext.build_info()


@pytest.mark.parametrize("name", [n for n in INFO["cpu_available"] if n != INFO["cpu"]] or [None])
def test_accuracy(name):
    if name is None:
        pytest.skip(f"this processor runs {INFO['cpu']} alone")
    modules = ("kernels/test_accuracy", "kernels/test_smooth_rank", "losses/test_ap_loss", "kernels/test_embedding_accuracy")
    files = [HERE.parent / f"{module}.py" for module in modules]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
    # What torch.compile makes of the ops has nothing to do with the instruction set, nor have splits and reductions.
    left_out = "not compile and not opcheck and not split_over and not (combinations and (mean or sum))"
    # These take a quarter of the time: rows so long, or so full, show what schedules do.
    left_out += " and not long_rows and not many_positives and not cluster_of_thousands"
    command += ["-k", left_out]
    result = subprocess.run(
        command, env=os.environ | {"ROADMAP_EXT_CPU": name}, capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("name", [*INFO["cpu_available"], ""])
def test_is_chosen_by_the_environment(name):
    code = "import roadmap_ext; print(roadmap_ext.build_info()['cpu'])"
    environ = os.environ | {"ROADMAP_EXT_CPU": name}
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert out.split() == [name or INFO["cpu_available"][0]]


def test_an_unknown_one_is_an_error():
    code = "import roadmap_ext, torch; roadmap_ext.ap_loss(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))"
    environ = os.environ | {"ROADMAP_EXT_CPU": "avx1024"}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ROADMAP_EXT_CPU=avx1024 cannot be used: this processor runs" in result.stderr
