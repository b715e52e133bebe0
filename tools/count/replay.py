"""A multiprocessor that executes the trace of a launch.

Warps go to four schedulers. One issues an instruction a cycle, of the warp that has been ready for longest: the stall
count of its last instruction is over, the scoreboards that the next one waits for are released, and the pipe is free. A
barrier holds the warps of a block until the last one is there; a block that ends makes room for the next. An access
takes a cycle a pass of 128 bytes, and beyond that this multiprocessor's share of the rates of L2 and of DRAM. L2 holds
its share of the sectors, and the least recently used one leaves first.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .machine import PIPES, SCHEDULERS, SECTOR, Machine, cost_of
from .sass import Source
from .trace import Access, Launch, Warp, program

BARRIER = 20  # cycles from the last arrival on
JUMP = 8  # cycles beside the stall count
OPERANDS = 12  # cycles until an access has read its registers
QUEUE = 64  # cycles of accesses that may wait for their turn
STORES = {"ST", "STG", "RED", "REDG"}


@dataclass
class Outcome:
    """What a launch took of one multiprocessor."""

    cycles: float
    issued: int  # instructions of warps
    dram: int  # bytes
    unmatched: float  # share of the accesses in the trace that no instruction made
    busy: dict[str, float]  # cycles of each limit: the busiest scheduler's issue slots and pipes, memory, L2 and DRAM
    counts: Counter[Source]  # instructions of warps
    waits: Counter[Source]  # cycles of warps from the instruction before to the one of this source


class Cache:
    """Sectors in L2, the least recently used first, and whether they have been changed."""

    def __init__(self, size: int) -> None:
        self.size, self.sectors = size // SECTOR, OrderedDict[int, bool]()

    def touch(self, sector: int, write: bool) -> tuple[bool, bool]:
        """Whether it was there, and whether a changed one had to be written to DRAM for it."""
        held = self.sectors.pop(sector, None)
        self.sectors[sector] = bool(held) or write
        return held is not None, len(self.sectors) > self.size and self.sectors.popitem(last=False)[1]


class _Running:
    """A warp on the multiprocessor."""

    def __init__(self, warp: Warp, launch: Launch, block: int, scheduler: int, now: float) -> None:
        self.block, self.scheduler, self.last = block, scheduler, now
        self.program = iter(program(launch.kernel, warp.visits))
        self.accesses: dict[int, Iterator[Access]] = {line: iter(all_) for line, all_ in warp.accesses.items()}
        self.at, self.place, self.end = -2, 0, 0  # SASS block, instruction in it, how many it has
        self.scoreboards = [0.0] * 8


def replay(launch: Launch, machine: Machine, cache: Cache, flush: bool) -> Outcome:
    """Execute a launch. flush: what is left changed in L2 goes to DRAM, too, as where there are many more rows."""
    kernel = launch.kernel
    pipes = {name: number for number, name in enumerate(PIPES)} | {"integer": len(PIPES)}
    memory = pipes["memory"]
    decoded = [[(i, cost_of(i.opcode, machine), i.opcode.partition(".")[0]) for i in b.code] for b in kernel.blocks]
    code = [
        [(pipes[c.pipe], c.cycles, c.latency, i.control, i.line, name == "BAR", name in STORES) for i, c, name in block]
        for block in decoded
    ]
    queue = iter(launch.blocks.items())
    live: Counter[int] = Counter()
    waiting: dict[int, list[_Running]] = defaultdict(list)
    heap: list[tuple[float, int, _Running]] = []  # when a warp may issue; ties in the order of their coming
    executed: Counter[int] = Counter()
    waits: Counter[int] = Counter()
    slot, issued, dram, came, end = [0.0] * SCHEDULERS, 0, 0, 0, 0.0
    free = [[0.0] * len(pipes) for _ in slot]
    used = [[0] * (len(pipes) + 1) for _ in slot]  # the last: issue slots
    port, l2, bus = 0.0, 0.0, 0.0  # when memory, L2 and DRAM are done with what they have been asked for
    passes_all = l2_bytes = matched = 0
    l2_rate = machine.l2_rate / machine.multiprocessors
    dram_rate = machine.copy / machine.clock / machine.multiprocessors

    def push(now: float, warp: _Running) -> None:
        nonlocal came
        came += 1
        heapq.heappush(heap, (now, came, warp))

    def begin(now: float) -> None:
        block, warps = next(queue, (0, []))
        live[block] += len(warps)
        for k, warp in enumerate(warps):
            push(now, _Running(warp, launch, block, k % SCHEDULERS, now))

    def pass_barrier(block: int, now: float) -> None:
        if live[block] == len(waiting[block]):
            for warp in waiting.pop(block, []):
                push(now + BARRIER, warp)

    for _ in range(max(1, machine.resident(launch.head.threads, kernel.registers, launch.head.shared))):
        begin(0.0)
    while heap:
        ready, number, warp = heapq.heappop(heap)
        if warp.place == warp.end:
            at = next(warp.program, -1)
            if at < 0:
                end = max(end, ready)
                live[warp.block] -= 1
                pass_barrier(warp.block, ready)
                if not live[warp.block]:
                    begin(ready)
                continue
            ready += JUMP if at != warp.at + 1 and warp.at >= 0 else 0
            warp.at, warp.place, warp.end = at, 0, len(code[at])
            executed[at] += 1
        pipe, cycles, latency, control, line, barrier, store = code[warp.at][warp.place]
        stall, result, operands, wait = control
        scoreboards, scheduler = warp.scoreboards, warp.scheduler
        now = max(ready, slot[scheduler], port - QUEUE if pipe == memory else free[scheduler][pipe])
        for scoreboard in wait:
            now = max(now, scoreboards[scoreboard])
        if now > ready:
            heapq.heappush(heap, (now, number, warp))
            continue
        issued += 1
        warp.place += 1
        waits[line] += now - warp.last  # type: ignore[assignment]  # Counter takes floats, its type does not say so
        warp.last = now
        slot[scheduler] = now + 1
        used[scheduler][-1] += 1
        used[scheduler][pipe] += cycles
        free[scheduler][pipe] = now + cycles
        done = now + latency
        if pipe == memory:
            access = next(warp.accesses.get(line, iter(())), 0)
            matched += access != 0
            passes = access if isinstance(access, int) else sum(count for _, count in access) * SECTOR // 128
            passes = max(1, passes)
            port = max(port, now) + passes
            passes_all += passes
            done = port + latency
            if not isinstance(access, int):
                missed = evicted = 0
                for first, count in access:
                    for sector in range(first, first + count):
                        hit, changed = cache.touch(sector, store)
                        missed += not hit and not store
                        evicted += changed
                    l2_bytes += count * SECTOR
                    l2 = max(l2, now) + count * SECTOR / l2_rate
                dram += (missed + evicted) * SECTOR
                bus = max(bus, now) + (missed + evicted) * SECTOR / dram_rate
                done = max(l2 + machine.l2, bus + machine.dram if missed else 0.0)
        if result != 7:
            scoreboards[result] = max(scoreboards[result], done)
        if operands != 7:
            scoreboards[operands] = max(scoreboards[operands], now + OPERANDS, port if pipe == memory else 0.0)
        if barrier:
            waiting[warp.block].append(warp)
            pass_barrier(warp.block, now)
        else:
            heapq.heappush(heap, (now + max(1, stall), number, warp))

    if flush:
        left = sum(cache.sectors.values()) * SECTOR
        dram, bus = dram + left, bus + left / dram_rate
    busy: dict[str, float] = {name: max(of[number] for of in used) for name, number in pipes.items() if name}
    busy |= {
        "issue": max(of[-1] for of in used),
        "memory": passes_all,
        "L2": l2_bytes / l2_rate,
        "DRAM": dram / dram_rate,
    }
    counts: Counter[Source] = Counter()
    for at, times in executed.items():
        for i in kernel.blocks[at].code:
            counts[kernel.sources.get(i.line, ("", 0))] += times
    of_source: Counter[Source] = Counter()
    for line, cycles in waits.items():
        of_source[kernel.sources.get(line, ("", 0))] += cycles
    accesses = sum(len(a) for warps in launch.blocks.values() for warp in warps for a in warp.accesses.values())
    unmatched = 1 - matched / accesses if accesses else 0.0
    return Outcome(max(end, port, l2, bus), issued, dram, unmatched, busy, counts, of_source)
