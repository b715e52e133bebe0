"""Chunks of scores: how many rows one has, and its memory, which the next chunk of any thread takes over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Bytes of a chunk of scores, by kind of device. A smaller chunk would be nearer to the caches, but the products would
# lose more than this gains.
BUDGET = {"cpu": 64 << 20, "cuda": 256 << 20}

# Memory of the chunk that was done with last, whoever did it: one for the process, and none for a thread that is idle.
_idle: list[torch.UntypedStorage] = []


def rows_that_fit(columns: int, itemsize: int, device: str) -> int:
    """As many rows as the budget holds."""
    return BUDGET.get(device, BUDGET["cuda"]) // max(1, columns * itemsize)


def rows_of_a_chunk(rows: int, most: int, chunk_size: int | None) -> int:
    """Those asked for, or ``most`` at the most, in chunks as equal as can be."""
    if chunk_size:
        return chunk_size
    chunks = -(-max(1, rows) // max(1, most))
    return -(-max(1, rows) // chunks)


def memory(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of another; on the CPU its pages are prefaulted."""
    made = like.new_empty(shape, dtype=dtype)
    if made.device.type == "cpu":
        torch.ops.roadmap_ext.prefault_(made)
    return made


@contextmanager
def chunk(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Memory for a chunk of scores, [rows, columns], to be used inside alone; on the CPU the idle one, if it is large
    enough.

    The C library gives large memory back to the system each time, and to get it anew costs a tenth of the products.
    """
    if like.device.type != "cpu":
        yield memory(like, (rows, columns), dtype)
        return
    try:
        storage = _idle.pop()  # now no other thread's
    except IndexError:
        storage = None
    if storage is None or storage.nbytes() < rows * columns * dtype.itemsize:
        storage = None  # before there is another
        scores = memory(like, (rows, columns), dtype)
    else:
        scores = like.new_empty(0, dtype=dtype).set_(storage, 0, (rows, columns), (columns, 1))
    yield scores
    storage = scores.untyped_storage()
    if storage.nbytes() <= BUDGET["cpu"]:
        _idle[:] = [storage]
