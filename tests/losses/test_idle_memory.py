"""What is kept between calls, so that the next one need not ask the system for it: bounded, however many threads."""

import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch

from roadmap_ext import ap_loss, metrics, roadmap_loss

pytestmark = pytest.mark.host

MIB = 1 << 20


def held():
    """Bytes of memory that this process has, without what only the C library has kept."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nothing says what the process holds")
def test_idle_threads_keep_little():
    """Of six, each of which has called everything at once: not six chunks and six workspaces, some 16 MiB each."""
    torch.set_num_threads(1)
    scores, target = torch.rand(1, 500_000), torch.rand(1, 500_000) < 0.1
    embeddings, labels = torch.randn(2000, 16), torch.arange(2000) % 100
    begin, stop, done = threading.Barrier(6), threading.Event(), threading.Semaphore(0)

    def call_everything():
        for dtype in (torch.float16, torch.float32):
            ap_loss(scores.to(dtype).requires_grad_(), target, method="sorted").backward()
        roadmap_loss(embeddings.clone().requires_grad_(), labels).backward()
        metrics.retrieval_metrics(embeddings, labels)

    def call():
        begin.wait()
        call_everything()
        done.release()
        stop.wait()

    call_everything()  # and import what torch does at first
    before = held()
    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in threads:
        done.acquire()
    grown = held() - before
    stop.set()
    for thread in threads:
        thread.join()
    assert grown < (48 + 16 + 6 * 2 + 12) * MIB  # workspaces, a chunk, buffers of fixed size, and some slack


def test_a_chunk_is_used_again():
    """By the next call, whatever its dtype; not by two at once, nor where it is too small. A large one is let go."""
    from roadmap_ext import chunks

    def memory(rows, dtype):
        return chunks.Chunk(torch.empty(0), rows, 1000, dtype)

    chunks._idle.clear()
    with memory(100, torch.float32) as first:
        pass
    with memory(50, torch.float64) as again, memory(50, torch.float64) as other:
        assert again.data_ptr() == first.data_ptr()
        assert again.shape == (50, 1000)
        assert other.data_ptr() != first.data_ptr()
    with memory(101, torch.float32) as larger:  # than there is
        assert larger.data_ptr() != first.data_ptr()
    chunks._idle.clear()
    with memory(chunks.BUDGET["cpu"] // 4000 + 1, torch.float32):
        pass
    assert not chunks._idle
