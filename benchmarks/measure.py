"""How things are measured here: two sides that agree, timed in turns; peak memory in a fresh process.

Nothing in this file knows what is measured.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIB = 1 << 20

# One call of a side: the seconds of its passes, in a fixed order. Whatever must not be timed happens before it is made.
Side = Callable[[], tuple[float, ...]]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of repeated measurements."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, values: np.ndarray, median: float | None = None) -> Spread:
        p20, p50, p80 = np.percentile(values, [20, 50, 80])
        return cls(float(p50 if median is None else median), float(p20), float(p80), len(values))

    @classmethod
    def once(cls, value: float) -> Spread:
        """A single measurement."""
        return cls(value, value, value, 1)


@dataclass(frozen=True)
class Pair:
    """Two sides measured in turn, a list entry a pass: seconds of each, and the peer's time as a multiple of ours.

    A ratio's median is the ratio of the two medians; its percentiles are those of the ratios of each round's medians.
    """

    ours: list[Spread]
    peer: list[Spread]
    ratio: list[Spread]
    first: Spread  # seconds of all passes of ours when the peer has just run


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step(loss: Callable[..., Tensor], *inputs: Tensor) -> Side:
    """A training step's share of a loss: the passes are forward, backward and both, of the same call."""
    leaves = [given.detach().clone().requires_grad_() for given in inputs]
    device = leaves[0].device

    def run() -> tuple[float, float, float]:
        for leaf in leaves:
            leaf.grad = None
        _synchronise(device)
        begin = time.perf_counter()
        value = loss(*leaves)
        _synchronise(device)
        middle = time.perf_counter()
        value.backward()
        _synchronise(device)
        end = time.perf_counter()
        return middle - begin, end - middle, end - begin

    return run


def timed(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> Side:
    """A side on the CPU without passes: all its time is that of both. ``before`` is not timed."""

    def run() -> tuple[float, float, float]:
        before()
        begin = time.perf_counter()
        call()
        return 0.0, 0.0, time.perf_counter() - begin

    return run


def memory_copy(scores: Tensor) -> Side:
    """The floor of any such step: the scores read once and as many bytes written once, to memory already there."""
    source, destination = scores.detach().clone(), torch.empty_like(scores)
    return timed(lambda: destination.copy_(source))


def gradient_of(loss: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    leaf = inputs.detach().clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether two losses and their gradients differ by rounding alone."""
    far = float((one[1] - other[1]).norm()) > 1e-3 * float(other[1].norm())
    return torch.allclose(one[0], other[0], rtol=1e-4) and not far


def turn(side: Side, budget: float = 0.02) -> tuple[float, np.ndarray]:
    """One side's turn: seconds of its first call, and [calls, passes] of the calls that count.

    Short calls are repeated for about ``budget`` seconds, 20 times at most, and the first does not count: it finds the
    caches full of the other side's data. A call longer than the budget is made once, and counts.
    """
    first = side()
    if first[-1] > budget:
        return first[-1], np.array([first])
    calls = max(1, min(20, int(budget / max(first[-1], 1e-9))))
    return first[-1], np.array([side() for _ in range(calls)])


def paired(
    ours: Side, peer: Side, *, seconds: float = 2.0, least: int = 5, most: int = 100, budget: float = 0.02
) -> Pair:
    """Turns of ours and the peer's, one after the other, for about ``seconds``, between ``least`` and ``most`` rounds.

    ``budget`` is a turn's. One round goes before as a warm-up, unless only one was asked for.
    """
    if most > 1:
        turn(ours, budget), turn(peer, budget)
    rounds = []
    begin = time.perf_counter()
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - begin < seconds):
        rounds.append((turn(ours, budget), turn(peer, budget)))
    sides = [np.concatenate([calls[side][1] for calls in rounds]) for side in (0, 1)]  # [calls, pass] each
    medians = [np.array([np.median(calls[side][1], axis=0) for calls in rounds]) for side in (0, 1)]  # [rounds, pass]
    spreads = [[Spread.of(column) for column in calls.T] for calls in sides]
    ratios = []
    for index in range(sides[0].shape[1]):
        mine, other = medians[0][:, index], medians[1][:, index]
        ratio = spreads[1][index].median / max(spreads[0][index].median, 1e-9)
        ratios.append(Spread.of(other / np.maximum(mine, 1e-9), ratio))
    return Pair(spreads[0], spreads[1], ratios, Spread.of(np.array([calls[0][0] for calls in rounds])))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a Python of its own. It must be importable by name."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_growth(function: Callable[[], Any], left: int = 0) -> float | None:
    """Bytes by which this process's resident memory rises, at the most, while ``function`` runs; None off Linux.

    ``left`` is what it leaves behind and is not counted.
    """
    memory = peak_memory(function)
    return None if memory is None else max(0.0, memory[1] - memory[0] - left)


def peak_memory(function: Callable[[], Any]) -> tuple[int, int] | None:
    """Bytes resident in this process before ``function`` and, at the most, while it runs; None off Linux.

    Making the inputs has peaks of its own, which getrusage's ru_maxrss would go on reporting (and a child process
    inherits its parent's): Linux's own mark can be lowered to the present, after freed memory has been handed back.
    Call it in a fresh process, when thread pools are warm.
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    kept = function()
    peak = status_bytes("VmHWM")
    del kept
    return before, peak


def status_bytes(field: str, process: int | str = "self") -> int:
    """A line of /proc/PID/status; OSError if there is no such process, RuntimeError if it has no such line."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/{process}/status has no {field}")
