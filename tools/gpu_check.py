"""Everything that needs a GPU, in one command and under 15 minutes: `python3 -m tools.gpu_check`.

It builds in place; holds every op and dtype against the CPU kernels, and the fast functions against what the emulator
takes them for; measures the benchmark's floors, and where their time goes; runs the tests marked gpu and, under
compute-sanitizer, small calls of every op; and last sweeps over what is chosen by size. It installs nothing and needs
no network: a Python with a CUDA build of torch, numpy, pytest, ninja, pybind11 and setuptools serves. A step that fails
does not stop the later ones. Logs go to $OUT or build/gpu-check; a table of the steps, and the benchmark's, come last.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.cuda import is_toolkit, toolkit_candidates

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 840
"""For everything together."""
SANITIZERS = ("memcheck", "racecheck")
METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed.avg.per_cycle_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
)


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it has for sure; what earlier steps leave over it may use, too."""

    name: str
    command: Sequence[str]
    seconds: int
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of a step: a word for the table, and whether it counts as a failure."""

    name: str
    words: str
    failed: bool
    seconds: float


def tool(name: str, folder: str) -> str | None:
    """A program of the toolkit: on the PATH, in a toolkit's bin, or in a folder of its own there."""
    roots = [root for root in toolkit_candidates(os.environ) if is_toolkit(root)]
    places = [root / part / name for root in roots for part in ("bin", folder)]
    return shutil.which(name) or next((str(place) for place in places if place.is_file()), None)


def steps(out: Path, quick: bool) -> list[Step]:
    """What is run, in this order."""
    python, cores = sys.executable, os.cpu_count() or 1
    build = [python, "setup.py", "build_ext", "--inplace", "--force"]
    tests = [python, "-m", "pytest", "-m", "gpu", "tests/cuda", "-v", "-rfE", "--tb=short", "--durations=5"]
    tests += ["-p", "no:cacheprovider", "--show-capture=no"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(min(8, cores))]

    def case(name: str) -> list[str]:
        return [python, "-m", "tools.gpu_cases", name]

    bench = [python, "-m", "benchmarks.cuda", "--out", str(out)]
    planned = [
        Step("build", build, 180, {"FORCE_CUDA": "1", "MAX_JOBS": str(cores), "TORCH_CUDA_ARCH_LIST": ""}),
        Step("smoke", case("smoke"), 30, {}),
        Step("reciprocal", case("reciprocal"), 30, {}),
        Step("floors", [*bench, "--floors"], 90, {}),
        Step("profile", case("profile"), 45, {}),
    ]
    ncu = tool("ncu", "nsight-compute")
    if ncu:
        ours = "::regex:^(row|long_row|scan|scale|reduce|radial|symmetrise|start)_kernel:1"  # the first launch of each
        watch = [ncu, "--clock-control", "none", "--kernel-id", ours, "--metrics", ",".join(METRICS)]
        planned.append(Step("ncu", [*watch, *case("once")], 60, {}))
    planned.append(Step("tests", tests, 150, {}))
    compute_sanitizer = tool("compute-sanitizer", "compute-sanitizer")
    if compute_sanitizer:
        options = ["--kernel-name", "kernel_substring=roadmap", "--report-api-errors", "no", "--error-exitcode", "9"]
        # Each tensor in memory of its own, so that memcheck sees where it ends.
        exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name in SANITIZERS:
            planned.append(Step(name, [compute_sanitizer, "--tool", name, *options, *case("small")], 60, exact))
    planned.append(Step("sweeps", case("sweeps"), 40, {}))
    if not quick:
        planned.append(Step("benchmark", [*bench[:-1], str(out / "all")], 60, {}))
    return planned


def run(step: Step, seconds: float, log: Path) -> tuple[int | None, float]:
    """The exit code, or None where time ran out, and the seconds it took. All that it started ends with it."""
    begin = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.environ}
    with log.open("w") as file, log.open(errors="replace") as said:
        print("$", *step.command, file=file, flush=True)
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < begin + seconds:
                time.sleep(0.2)
                for line in said:  # failures as they come
                    if re.match(r"WRONG|.*\bFAILED\b", line):
                        print("   ", line.rstrip(), flush=True)
        finally:
            code = process.poll()
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, time.monotonic() - begin


def judge(name: str, code: int | None, text: str) -> tuple[str, bool]:
    """In words what a step's exit code and log say, and whether that is a failure."""
    if name in SANITIZERS:
        return judge_sanitizer(name, code, text)
    if name == "ncu" and "==PROF==" not in text:
        return "the machine refuses it", False
    if code is None:
        return "FAILED: ran out of time", True
    if name == "tests":
        counts = re.findall(
            r"^=*\s*(\d+ (?:passed|failed|skipped|error|deselected).*?)(?: in .*)?$", text, re.MULTILINE
        )
        words = counts[-1] if counts else "no test ran"
        failed = bool(code) or "passed" not in words
        return ("FAILED: " if failed else "") + words, failed
    return (f"FAILED: exit code {code}", True) if code else ("ok", False)


def judge_sanitizer(name: str, code: int | None, text: str) -> tuple[str, bool]:
    """The same of a sanitizer, which a machine may refuse, and which may be too slow: neither is a fault of ours."""
    reports = [line for line in text.splitlines() if line.startswith("=========")]
    summary = next((line.strip("= ") for line in reversed(reports) if "SUMMARY" in line), "")
    ours = any("roadmap::" in line for line in reports)
    if code is None:
        return ("FAILED: out of time, and reports", True) if ours else ("out of time, nothing reported", False)
    if "Device not supported" in text or not summary:
        return "the machine refuses it", False
    found = re.search(r"SUMMARY: [1-9]", summary)
    if found and name == "racecheck" and not ours:
        return f"in kernels of others alone: {summary}", False
    failed = bool(found or code)
    return ("FAILED: " if failed else "") + summary, failed


def check(out: Path, quick: bool) -> bool:
    """Run all steps; whether all went well."""
    out.mkdir(parents=True, exist_ok=True)
    for table in out.glob("cuda.*"):
        table.unlink()  # of an earlier run
    deadline = time.monotonic() + SECONDS
    planned, outcomes = steps(out, quick), []
    for index, step in enumerate(planned):
        log = out / f"{step.name.replace(' ', '_')}.log"
        kept = sum(later.seconds for later in planned[index + 1 :])
        print(f"[{index + 1}/{len(planned)}] {step.name} (log in {log})", flush=True)
        code, seconds = run(step, max(1.0, deadline - time.monotonic() - kept), log)
        text = log.read_text(errors="replace")
        words, failed = judge(step.name, code, text)
        outcomes.append(Outcome(step.name, words, failed, seconds))
        if failed:
            print("\n".join(text.splitlines()[-40:]), flush=True)
    if not tool("compute-sanitizer", "compute-sanitizer"):
        outcomes.append(Outcome("sanitizer", "there is no compute-sanitizer", False, 0.0))
    print(f"\n{'step':<13}{'seconds':>8}  result")
    for outcome in outcomes:
        print(f"{outcome.name:<13}{outcome.seconds:>8.0f}  {outcome.words}")
    table = out / "cuda.txt"
    print("\n" + (table.read_text() if table.is_file() else "The benchmark left no table."))
    return not any(outcome.failed for outcome in outcomes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the whole benchmark")
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    sys.exit(0 if check(out.resolve(), arguments.quick) else 1)


if __name__ == "__main__":
    main()
