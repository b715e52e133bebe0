"""How every benchmark reports: its options, progress, tables and goals, and a CSV with the provenance of each line.

Nothing in this file knows what is measured.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

import roadmap_ext

from .measure import MIB, Pair, Spread, in_fresh_process

T = TypeVar("T")

RESULTS = Path(__file__).resolve().parent / "results"
NONE = "\N{EN DASH}"  # in a table, where there is no figure
UNITS = {"memory": ("MiB", MIB), "resident": ("MiB", MIB), "error": ("1", 1.0)}  # of a row's `what`; all else is in ms

# --- a measurement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measurement in seconds or bytes, or an error without a unit, and what took turns with it."""

    case: Any  # a dataclass: its fields are the first columns of the CSV
    method: str
    what: str  # "time" or a pass; "memory": beyond what was there; "resident": of the whole process; "error"
    value: Spread
    against: str = ""
    other: Spread | None = None  # of `against`
    ratio: Spread | None = None  # of the value to that

    @classmethod
    def beside(cls, case: Any, method: str, against: str, pair: Pair, **more: Any) -> Row:
        """The peer of a pair, as a multiple of what was ours: all passes together."""
        return cls(case, method, "time", pair.peer[-1], against, pair.ours[-1], pair.ratio[-1], **more)

    @classmethod
    def memory(
        cls, memory_of: Callable[..., float | None], case: Any, methods: Iterable[str], threads: int, **more: Any
    ) -> list[Row]:
        """What ``memory_of(method, case, threads)`` grows by in a process of its own; none where that is not known."""
        sizes = {method: in_fresh_process(memory_of, method, case, threads) for method in methods}
        return [cls(case, key, "memory", Spread.once(size), **more) for key, size in sizes.items() if size is not None]

    def cells(self, ratio: Callable[[float], str]) -> list[str]:
        """Of a table: its time, that of the other side, and the ratio."""
        return [interval(self.value, duration), interval(self.other, duration), interval(self.ratio, ratio)]

    def columns(self) -> dict[str, object]:
        """Of the CSV."""
        unit, scale = UNITS.get(self.what, ("ms", 1e-3))
        median, p20, p80 = figures(self.value, scale)
        ratio, ratio_p20, ratio_p80 = figures(self.ratio)
        measured = {"method": self.method, "what": self.what, "unit": unit, "median": median, "p20": p20, "p80": p80}
        compared = {"against": self.against, "against_median": figures(self.other, scale)[0]}
        ratios = {"ratio": ratio, "ratio_p20": ratio_p20, "ratio_p80": ratio_p80}
        return {**asdict(self.case), **measured, "repeats": self.value.repeats, **compared, **ratios}


def figures(value: Spread | None, unit: float = 1.0) -> list[str]:
    """Median, 20th and 80th percentile, in a unit of that size, for a CSV."""
    return [f"{x / unit:.6g}" for x in (value.median, value.p20, value.p80)] if value else [""] * 3


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The first row with these attributes."""
    return next((row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())), None)


# --- numbers as text -------------------------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    return f"{three_digits(seconds / scale)} {unit}"


def multiple(ratio: float) -> str:
    return f"{three_digits(ratio)}x" if ratio >= 1 else f"1/{three_digits(1 / ratio)}x"


def hundredths(ratio: float) -> str:
    """Of ratios near 1, on either side of it."""
    return f"{ratio:.2f}"


def mebibytes(size: float) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 100 * MIB else f"{size / MIB:,.0f} MiB"


def median(value: Spread | None, text: Callable[[float], str]) -> str:
    return text(value.median) if value else NONE


def interval(value: Spread | None, text: Callable[[float], str]) -> str:
    """Median (20th - 80th percentile)."""
    return f"{text(value.median)} ({text(value.p20)} - {text(value.p80)})" if value else NONE


# --- what is printed -------------------------------------------------------------------------------------------------


def told(jobs: Sequence[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Each job, once its name is printed."""
    for number, (name, job) in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {name}", flush=True)
        yield name, job


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need, the first to the left. A row of one cell is a title of those below it."""
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*(line for line in lines if len(line) > 1), strict=True)]
    text = [title]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        text.append("  ".join(["", first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(text)


def markdown_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def markdown_head(names: Sequence[str]) -> str:
    return f"{markdown_row(names)}\n|{' --- |' * len(names)}"


def print_goals(goals: Iterable[tuple[str, bool | None]], about: Mapping[str, str]) -> None:
    """Each with whether it is met; None where a figure has no goal."""
    goals = list(goals)
    print("\nGoals" if goals else "\nNo goals")
    before, after = about["load"], about.get("load_after")
    if float(before) > 1 or (after and float(after) > int(about["threads"]) + 1):
        text = f"{before} before" + (f", {after} after" if after else "")
        print(f"  Other work was on this machine: load {text}. Run it again when idle.")
    for text, met in goals:
        print(f"  {text}: {'no goal' if met is None else 'met' if met else 'MISSED'}")


# --- the whole of it -------------------------------------------------------------------------------------------------


def parser(about: str | None, **flags: str) -> argparse.ArgumentParser:
    """The options that benchmarks of time share, and flags with their help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written (default: results)")
    return parser


def carry_out(
    options: argparse.Namespace,
    name: str,
    jobs: Sequence[tuple[str, Callable[[], list[Any]]]],
    tables: Callable[[list[Any]], Iterable[str]],
    goals: Callable[[list[Any]], Iterable[tuple[str, bool | None]]],
    plot: Callable[[list[Any], Mapping[str, str], Path], None] | None = None,
) -> None:
    """A benchmark from its options to its exit status: jobs, tables, goals; unless it is --quick, a CSV and a plot.

    Args:
        name: of the files, in --out.
        jobs: by name; each returns rows. One that fails costs the others nothing.
        tables, goals, plot: of all rows.
    """
    torch.set_num_threads(options.threads)
    about, path = provenance(), options.out / f"{name}.csv"
    rows: list[Any] = []
    failed: list[str] = []
    for title, job in told(jobs):
        try:
            rows += job()
        except RuntimeError as error:
            failed.append(f"{title}: {error}")
            print(f"  FAILED: {error}", flush=True)
        about["load_after"] = load()
        if rows and not options.quick:  # after each, lest all be lost with one
            write_csv(path, (row.columns() for row in rows), about)
    print(f"\n{in_words(about)}\nfloat32. Median (20th - 80th percentile). Sides of a ratio take turns.")
    for text in tables(rows):
        print(f"\n{text}")
    print_goals(goals(rows), about)
    if options.quick:
        print("\n--quick: nothing written")
    else:
        if plot:
            plot(rows, about, path.with_suffix(".png"))
        print(f"\nWrote {path}{' and .png' if plot else ''}")
    if failed:
        raise SystemExit("\nParts that failed, and are not in it:\n  " + "\n  ".join(failed))


# --- the file --------------------------------------------------------------------------------------------------------


def write_csv(path: Path, lines: Iterable[Mapping[str, object]], about: Mapping[str, str]) -> None:
    """A line a measurement, each with its provenance."""
    whole = [{**line, **about} for line in lines]  # one at least
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(whole[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(whole)


def load() -> str:
    """Of the last minute: near 0 before a run, or other work is in the figures; after it its own threads are."""
    return f"{os.getloadavg()[0]:.1f}"


def provenance() -> dict[str, str]:
    """Where, when and with what the figures were taken."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    dirty = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instruction_set": str(roadmap_ext.build_info()["cpu"]),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "roadmap_ext": roadmap_ext.__version__,
        "commit": commit + ("-dirty" if dirty else ""),
        "load": load(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def in_words(about: Mapping[str, str]) -> str:
    """A provenance on a line."""
    return ", ".join(f"{name} {value}" for name, value in about.items())


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    # Some virtual machines leave the name bare: family and model tell what it is.
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
