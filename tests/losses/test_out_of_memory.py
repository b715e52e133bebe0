"""Where memory runs out the error is torch's own, type and text: programs know by these to try a smaller batch."""

import re
import subprocess
import sys

import pytest
import torch

import roadmap_ext
from roadmap_ext import ap_loss

pytestmark = pytest.mark.host

N = 1 << 24  # whose square is more than any process can address, though of a tensor that is expanded nothing is stored
WORDS = "DefaultCPUAllocator: (can't allocate|not enough) memory"  # of torch on Linux, and elsewhere


def expanded(dtype, columns_too=False):
    return torch.zeros((N, 1) if columns_too else (1, N), dtype=dtype).expand(N, N)


CASES = {
    "a gradient": lambda: ap_loss(expanded(torch.float32).requires_grad_(), expanded(torch.bool)),
    "a gradient in half": lambda: ap_loss(expanded(torch.float16).requires_grad_(), expanded(torch.bool)),
    "a copy of scores": lambda: ap_loss(expanded(torch.float32, columns_too=True), expanded(torch.bool)),
    "a copy of masks": lambda: ap_loss(expanded(torch.float32), expanded(torch.bool, columns_too=True)),
    "metrics": lambda: roadmap_ext.metrics.average_precision(
        expanded(torch.float32, columns_too=True), expanded(torch.bool)
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_tensor(what):
    with pytest.raises(RuntimeError, match=f"{WORDS}: you tried to allocate [0-9]+ bytes"):
        CASES[what]()


def test_the_error_keeps_its_type(monkeypatch):
    """As on CUDA, where torch raises one of its own."""

    def empty(size, *, dtype, device):
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size * dtype.itemsize} bytes.")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match=f"CUDA out of memory. Tried to allocate {4 * N * N} bytes"):
        CASES["a gradient"]()


# In a process of its own: the heap of one that has run other tests may have room to spare, whatever it may still map.
IN_A_FRESH_PROCESS = """
import resource
from pathlib import Path
import torch
from roadmap_ext import ap_loss

torch.set_num_threads({threads})
scores, target = torch.rand(1, 6_000_000), torch.rand(1, 6_000_000) < 0.01
small = scores[:, :40_000], target[:, :40_000]
expected = ap_loss(*small, method="sorted")
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (mapped + (16 << 20), before[1]))
try:
    ap_loss(scores, target, method="sorted")
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, before)
assert torch.equal(ap_loss(*small, method="sorted"), expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process maps")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_workspace(threads):
    """On whichever thread; the next call that does fit is none the worse."""
    code = IN_A_FRESH_PROCESS.format(threads=threads)
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert re.search(WORDS, printed)
