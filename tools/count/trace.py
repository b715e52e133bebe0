"""What the warps of a launch did, as the PTX runner wrote it (tests/ptx/run.cpp, PTXRUN_TRACE): a file a launch.

Its first line has the entry, the number of blocks, threads a block and bytes of shared memory; then come records of
four numbers:

    warp, first line, last line, 0               instructions of the PTX that the warp ran through without a jump
    warp, line, 1 << 30 | passes, 0              an access to shared memory; bank conflicts make several passes
    warp, line, 1 << 31 | sectors, first sector  one to global memory, adjacent sectors; 3 << 30: more of the same one
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .sass import Kernel

Access = int | list[tuple[int, int]]  # passes in shared memory, or (first, count) of sectors


class Head(NamedTuple):
    entry: str
    blocks: int
    threads: int  # a block
    shared: int  # bytes a block

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)


@dataclass
class Warp:
    visits: list[int] = field(default_factory=list)  # of basic blocks of PTX, in turn
    accesses: dict[int, list[Access]] = field(default_factory=lambda: defaultdict(list))  # by line of PTX, in turn


@dataclass
class Launch:
    """The blocks of the multiprocessor that had most to do."""

    head: Head
    kernel: Kernel
    blocks: dict[int, list[Warp]]
    share: float  # of the instructions of all blocks
    sectors: npt.NDArray[np.uint32]  # that any block touched


def head_of(path: Path) -> Head:
    with path.open("rb") as file:
        entry, *numbers = file.readline().decode().split()
    return Head(entry, *map(int, numbers))


def read(path: Path, kernel: Kernel, multiprocessors: int) -> Launch:
    """A launch whose blocks went to so many multiprocessors in turn."""
    head = head_of(path)
    records = np.frombuffer(path.read_bytes().partition(b"\n")[2], np.uint32).reshape(-1, 4)
    kind, count = records[:, 2] >> 30, records[:, 2] & 0x3FFFFFFF
    sectors = [records[(kind >= 2) & (count > k), 3] + k for k in range(int(count[kind >= 2].max(initial=0)))]
    lines = np.array(sorted(kernel.sources))
    length = np.where(kind == 0, lines.searchsorted(records[:, 2], "right") - lines.searchsorted(records[:, 1]), 0)
    owner = records[:, 0] // head.warps % multiprocessors
    work = np.bincount(owner, length)
    begins = sorted(kernel.begins)
    numbers = [kernel.begins[line] for line in begins]
    blocks: dict[int, list[Warp]] = defaultdict(lambda: [Warp() for _ in range(head.warps)])
    for number, first, last, more in records[owner == work.argmax()].tolist():
        warp = blocks[number // head.warps][number % head.warps]
        kind, count = last >> 30, last & 0x3FFFFFFF
        if kind == 0:
            warp.visits += numbers[bisect_left(begins, first) : bisect_right(begins, last)]
        elif kind == 3:
            warp.accesses[first][-1].append((more, count))
        else:
            warp.accesses[first].append(count if kind == 1 else [(more, count)])
    touched = np.unique(np.concatenate(sectors)) if sectors else np.zeros(0, np.uint32)
    return Launch(head, kernel, dict(blocks), float(work.max() / work.sum()), touched)


def program(kernel: Kernel, visits: list[int]) -> list[int]:
    """The SASS blocks that a warp executes, from the basic blocks of PTX that it visits."""
    executed: list[int] = []
    for number, group in groupby(visits):
        left = sum(1 for _ in group)
        lists = kernel.same.get(number, [])
        for pieces in lists:  # those that do most at a time first
            times, left = divmod(left, kernel.blocks[pieces[0]].copies)
            executed += pieces * times
        executed += lists[-1] if left and lists else []
    return executed
