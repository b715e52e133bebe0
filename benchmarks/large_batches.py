"""Batches of thousands of augmented digits on two CPU cores: time of a step, and memory of all processes.

Runs examples/train_retrieval.py for each row of RUNS, as one process or under torchrun, and writes the median step of
each with its provenance: python -m benchmarks.large_batches.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from . import report
from .measure import MIB, status_bytes

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 4 << 30  # bytes of a batch of 16,384, all processes together
MINI = 512
CORES = 2


@dataclass(frozen=True)
class Run:
    """One run of the program; 0 for an option that is not given."""

    batch: int
    mini_batch: int = 0
    memory: int = 0
    processes: int = 1

    def __str__(self) -> str:
        parts = {"in mini-batches of": self.mini_batch, "memory of": self.memory, "processes:": self.processes}
        return ", ".join([f"{self.batch:,}", *(f"{name} {value:,}" for name, value in parts.items() if value)])

    def command(self, steps: int, out: Path) -> list[str]:
        """The program's, as a user would start it."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        options = {"batch-size": self.batch, "mini-batch-size": self.mini_batch, "memory-size": self.memory}
        given = [text for name, value in options.items() if value for text in (f"--{name}", str(value))]
        if self.memory:
            given += ["--memory-warmup", "0"]
        return [
            sys.executable,
            *(launcher if self.processes > 1 else []),
            str(ROOT / "examples" / "train_retrieval.py"),
            *given,
            *("--device", "cpu", "--steps", str(steps), "--out", str(out)),
        ]


RUNS = [
    Run(1024),
    Run(1024, MINI),
    Run(4096),
    Run(4096, MINI),
    Run(4096, MINI, memory=8192),
    Run(4096, MINI, processes=2),
    Run(4096, MINI, memory=8192, processes=2),
    Run(16384, MINI),
    Run(16384, MINI, processes=2),
    Run(16384),
]


class Peaks:
    """The most memory that each process below this one has had resident; looked at ten times a second."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def largest(self, processes: int) -> list[int]:
        """Bytes of the processes that had most: those that train, beside torchrun itself."""
        return sorted(self._peaks.values(), reverse=True)[:processes]

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in _descendants(os.getpid()):
                self._peaks[process] = max(self._peaks.get(process, 0), _high_water_mark(process))


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            direct = [int(child) for child in children.read_text().split()]
        except OSError:  # it has ended
            continue
        for child in direct:
            found += [child, *_descendants(child)]
    return found


def _high_water_mark(process: int) -> int:
    try:
        return status_bytes("VmHWM", process)
    except (OSError, RuntimeError):  # it has ended
        return 0


def measure(run: Run, steps: int) -> dict[str, float]:
    """Seconds of a step and of its loss, medians; MiB of each process that trains, and of all of them."""
    threads = str(max(1, CORES // run.processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder, Peaks() as peaks:
        command = run.command(steps, Path(folder, "run"))
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        with Path(folder, "run", "steps.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    each = [peak / MIB for peak in peaks.largest(run.processes)]
    return {
        "step_s": statistics.median(float(row["step_ms"]) for row in rows) / 1e3,
        "loss_s": statistics.median(float(row["loss_ms"]) for row in rows) / 1e3,
        "largest_process_mib": max(each),
        "all_processes_mib": sum(each),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="of each run (default 3)")
    parser.add_argument("--largest", type=int, default=max(run.batch for run in RUNS), help="leave out larger batches")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from Linux's /proc, which is not there")

    about = report.provenance() | {"threads": f"{CORES} in all", "steps": str(arguments.steps)}
    lines, cells, goals = [], [], []
    for text, run in report.told([(str(run), run) for run in RUNS if run.batch <= arguments.largest]):
        measured = measure(run, arguments.steps)
        lines.append(asdict(run) | {name: f"{value:.4g}" for name, value in measured.items()})
        report.write_csv(arguments.out / "large_batches_cpu.csv", lines, about)
        settings = [f"{value:,}" if value else "" for value in (run.batch, run.mini_batch, run.memory, run.processes)]
        times = [report.duration(measured[name]) for name in ("step_s", "loss_s")]
        used = measured["all_processes_mib"] * MIB
        cells.append([*settings, *times, report.mebibytes(used)])
        if run.batch == 16384 and run.mini_batch:
            goals.append((f"{text}: {used / 2**30:.2f} GiB, less than {LIMIT / 2**30:.0f}", used < LIMIT))
    heads = ["batch", "mini-batch", "memory", "processes", "step", "of it the loss", "memory of all processes"]
    print("\n" + report.table(report.in_words(about), heads, cells))
    report.print_goals(goals, about)


if __name__ == "__main__":
    main()
