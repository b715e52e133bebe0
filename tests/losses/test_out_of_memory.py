"""Where memory runs out the error is torch's own, type and text: programs know by these to try a smaller batch."""

import contextlib
import sys
from pathlib import Path

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


@contextlib.contextmanager
def at_most(more):
    """This process may map so many bytes more than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process maps")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_workspace(threads):
    """On whichever thread; the next call that does fit is none the worse."""
    torch.set_num_threads(threads)
    scores, target = torch.rand(1, 6_000_000), torch.rand(1, 6_000_000) < 0.01  # whose entries the C library maps
    small = scores[:, :40_000], target[:, :40_000]
    expected = ap_loss(*small, method="sorted")
    with at_most(16 << 20), pytest.raises(RuntimeError, match=WORDS):
        ap_loss(scores, target, method="sorted")
    assert torch.equal(ap_loss(*small, method="sorted"), expected)
