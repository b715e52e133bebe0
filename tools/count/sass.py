"""The kernels as ptxas makes them: SASS in blocks, with control codes, and the PTX that each block comes from.

nvdisasm prints a cubin, with `-gp` the line of PTX of each instruction and with `-hex` its 128 bits, of which some tell
the scheduler what to wait for. NVIDIA documents them nowhere; the layout is that of Jia et al., "Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking" (2018).
"""

from __future__ import annotations

import hashlib
import re
import statistics
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

Source = tuple[str, int]  # file and line


class Control(NamedTuple):
    """What the scheduler is told with an instruction. There are six scoreboards; 7 is none."""

    stall: int  # cycles until the warp's next instruction may issue
    result: int  # the scoreboard that is released when the result is there
    operands: int  # that for when the operands have been read
    wait: tuple[int, ...]  # those to wait for

    @classmethod
    def of(cls, bits: int) -> Control:
        """From the upper 64 bits of an instruction."""
        mask = bits >> 52 & 0x3F
        return cls(bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, tuple(k for k in range(6) if mask >> k & 1))


class Instruction(NamedTuple):
    opcode: str  # with its suffixes
    line: int  # of the PTX
    target: str  # label of a branch or a call
    control: Control


@dataclass
class Block:
    """Instructions without a branch into or out of their middle."""

    labels: list[str]
    code: list[Instruction] = field(default_factory=list)
    copies: int = 1  # how often it does what its PTX does once: more where ptxas has unrolled a loop


@dataclass
class Kernel:
    entry: str
    registers: int
    blocks: list[Block]
    begins: dict[int, int]  # line of PTX where a basic block of PTX begins -> its number
    # By that number the SASS blocks that do the same. The pieces of a list are all executed, of several lists one is.
    same: dict[int, list[list[int]]]
    sources: dict[int, Source]  # of a line of PTX


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);\s+/\* 0x[0-9a-f]{16} \*/")
UPPER_BITS = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
LINE = re.compile(r'\s*//## File "\.nv_debug_ptx_txt", line (\d+)')
LABEL = re.compile(r"(\.L_\w+|\$\S+):")
LEAVES = {"BRA", "EXIT", "RET", "BRX", "BREAK", "CALL"}


def parse_sass(listing: str, entry: str) -> list[Block]:
    """The blocks of a kernel in what `nvdisasm -c -gp -hex` prints, subroutines included."""
    blocks: list[Block] = []
    labels: list[str] = []
    line, fresh, begun = 0, True, ("", "")
    for row in listing.partition(f"\n.text.{entry}:")[2].splitlines():
        if row.startswith(".text."):
            break
        if match := INSTRUCTION.match(row):
            begun = match[1], match[2]
        elif begun[0] and (match := UPPER_BITS.match(row)):
            if fresh:
                blocks.append(Block(labels))
            target = re.search(r"`\((\S+)\)", begun[1])
            control = Control.of(int(match[1], 16))
            blocks[-1].code.append(Instruction(begun[0], line, target[1] if target else "", control))
            fresh, labels, begun = begun[0].partition(".")[0] in LEAVES, [], ("", "")
        elif match := LINE.match(row):
            line = int(match[1])
        elif match := LABEL.match(row):
            fresh = True
            labels.append(match[1])
    return blocks


def parse_ptx(ptx: str, entry: str) -> tuple[dict[int, int], dict[int, Source]]:
    """Of each line of a kernel: the number of its basic block, and its source."""
    files = {int(number): Path(name).name for number, name in re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.M)}
    basic: dict[int, int] = {}
    sources: dict[int, Source] = {}
    begin = re.search(rf"\.entry {entry}\b", ptx)
    assert begin, f"no {entry} in this PTX"
    block, fresh, depth, source = -1, True, 0, ("", 0)
    for number, row in enumerate(ptx[begin.start() :].splitlines(), 1 + ptx.count("\n", 0, begin.start())):
        depth += row.count("{") - row.count("}")  # those of vectors are in one line
        word = row.strip().lstrip("{ \t")
        if row.strip().startswith(".loc"):
            _, file, line, *_ = row.split()
            source = files.get(int(file), ""), int(line)
        elif word.startswith("$"):
            fresh = True
        elif depth and re.match(r"[@\w]", word):
            block += fresh
            basic[number], sources[number] = block, source
            fresh = re.sub(r"^@\S+\s+", "", word).startswith(("bra", "ret", "exit"))
        elif basic and not depth:
            break
    return basic, sources


def hot(blocks: list[Block]) -> list[Block]:
    """The blocks that warps usually meet, with subroutines in place of their calls.

    What serves warps whose lanes went apart at a shuffle lies behind all others, and subroutines behind that. A block
    that calls what serves rare operands, of a division say, is left out.
    """
    place = {label: k for k, block in enumerate(blocks) for label in block.labels}
    apart = [place[i.target] for block in blocks for i in block.code if i.opcode.startswith("BRA.DIV")]
    routines = [k for k, block in enumerate(blocks) if any(label.startswith("$") for label in block.labels)]
    called = {
        label: [i for block in blocks[begin:end] for i in block.code]
        for begin, end in zip(routines, [*routines[1:], len(blocks)], strict=False)
        for label in blocks[begin].labels
    }
    kept = []
    for block in blocks[: min([*apart, *routines, len(blocks)])]:
        calls = [i.target for i in block.code if i.opcode.startswith("CALL")]
        if any("slowpath" in name or name.endswith("_full") for name in calls):
            continue
        for name in calls:
            block.code += called.get(name, [])
        kept.append(block)
    return kept


def attribute(blocks: list[Block], basic: dict[int, int]) -> dict[int, list[list[int]]]:
    """The SASS blocks of each basic block of PTX: those to which it has given most lines."""
    owned: dict[int, list[int]] = defaultdict(list)
    for k, block in enumerate(blocks):
        owners = Counter(basic[line] for line in {i.line for i in block.code} if line in basic)
        if not owners:
            continue
        owner = owners.most_common(1)[0][0]
        owned[owner].append(k)
        times = Counter((i.line, i.opcode) for i in block.code if basic.get(i.line) == owner)
        if len(times) >= 4:
            block.copies = max(1, int(statistics.median(times.values())))
    same: dict[int, list[list[int]]] = {}
    for owner, members in owned.items():
        lists: list[list[int]] = []
        for k in members:  # pieces of one have their lines for themselves
            lines = {i.line for i in blocks[k].code}
            for pieces in lists:
                if len(lines & {i.line for j in pieces for i in blocks[j].code}) <= len(lines) / 2:
                    pieces.append(k)
                    break
            else:
                lists.append([k])
        same[owner] = sorted(lists, key=lambda pieces: -blocks[pieces[0]].copies)
    return same


def kernel_of(entry: str, registers: int, ptx: str, listing: str) -> Kernel:
    """A kernel from its PTX, and from what nvdisasm makes of its SASS."""
    basic, sources = parse_ptx(ptx, entry)
    blocks = hot(parse_sass(listing, entry))
    begins: dict[int, int] = {}
    for line, number in basic.items():
        begins.setdefault(number, line)
    return Kernel(entry, registers, blocks, {v: k for k, v in begins.items()}, attribute(blocks, basic), sources)


def modules(library: Path) -> list[str]:
    """The PTX in a library of host code, a text a source."""
    return [text.decode() for text in re.findall(rb"\.version \d[^\0]+", library.read_bytes()) if b".entry" in text]


def assemble(entry: str, ptx: str, arch: int, ptxas: Path, nvdisasm: Path, folder: Path) -> Kernel:
    """A kernel by ptxas and nvdisasm, whose results stay in a folder."""
    name = folder / hashlib.sha256(entry.encode()).hexdigest()[:16]
    source, cubin, report, listing = (name.with_suffix(f".{kind}") for kind in ("ptx", "cubin", "txt", "sass"))
    if not listing.exists():
        source.write_text(ptx)
        flags = ["-v", "-lineinfo", f"-arch=sm_{arch}", "--entry", entry]
        for out, command in (
            (report, [ptxas, *flags, source, "-o", cubin]),
            (listing, [nvdisasm, "-c", "-gp", "-hex", cubin]),
        ):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")
            out.write_text(done.stdout + done.stderr)
    used = re.search(r"Used (\d+) registers", report.read_text())
    assert used, f"{report} says no registers"
    return kernel_of(entry, int(used[1]), ptx, listing.read_text())
