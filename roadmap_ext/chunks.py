"""Chunks of scores: how many rows one has, and its memory, which the next chunk of any thread takes over."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

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


class Chunk:
    """Memory for a chunk of scores, [rows, columns], inside a with statement; on the CPU the idle one, if it will do.

    The C library gives large memory back to the system each time, and to get it anew costs a tenth of the products.
    """

    def __init__(self, like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        storage = None
        if like.device.type == "cpu" and _idle:
            with suppress(IndexError):
                storage = _idle.pop()  # now no other thread's
        if storage is not None and storage.nbytes() >= rows * columns * dtype.itemsize:
            self._scores = like.new_empty(0, dtype=dtype).set_(storage, 0, (rows, columns), (columns, 1))
        else:
            del storage  # before there is another
            self._scores = memory(like, (rows, columns), dtype)

    def __enter__(self) -> Tensor:
        return self._scores

    def __exit__(self, *_: object) -> None:
        """Keep the memory for the next chunk. Nobody may look at it from now on."""
        storage = self._scores.untyped_storage()
        if self._scores.device.type == "cpu" and storage.nbytes() <= BUDGET["cpu"]:
            _idle[:] = [storage]
