"""Which instruction set runs. That each computes the right thing: the cells of tests/matrix.py that are named so."""

import os
import subprocess
import sys

import pytest
from cases import deep

import roadmap_ext

AVAILABLE = roadmap_ext.build_info()["cpu_available"]


@pytest.mark.parametrize("name", ["", *deep("avx512", "avx2", "baseline")])
def test_is_chosen_by_the_environment(name):
    if name and name not in AVAILABLE:
        pytest.skip(f"this processor runs {', '.join(AVAILABLE)}")
    code = "import roadmap_ext; print(roadmap_ext.build_info()['cpu'])"
    environ = os.environ | {"ROADMAP_EXT_CPU": name}
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert out.split() == [name or AVAILABLE[0]]


def test_an_unknown_one_is_an_error():
    code = "import roadmap_ext, torch; roadmap_ext.ap_loss(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))"
    environ = os.environ | {"ROADMAP_EXT_CPU": "avx1024"}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ROADMAP_EXT_CPU=avx1024 cannot be used: this processor runs" in result.stderr
