"""Everything that needs a GPU, in one command and under 8 minutes: `make gpu-check`, or `python -m tools.gpu_check`.

It builds in place, runs the tests marked gpu and the benchmark, and runs small calls of every op under
compute-sanitizer where there is one that works. It installs nothing and needs no network: a Python with a CUDA build of
torch, numpy, pytest, ninja, pybind11 and setuptools serves. A step that fails does not stop the later ones. Logs go to
$OUT or build/gpu-check; a table of the steps, and the benchmark's, come last.
"""

from __future__ import annotations

import argparse
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
SECONDS = 470
"""For everything together."""
SANITIZERS = ("memcheck", "racecheck", "synccheck")


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


def sanitizer() -> str | None:
    """The compute-sanitizer on the PATH or in a toolkit."""
    roots = [root for root in toolkit_candidates(os.environ) if is_toolkit(root)]
    places = [root / folder / "compute-sanitizer" for root in roots for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if place.is_file()), None)


def steps(out: Path, quick: bool) -> list[Step]:
    """What is run, in this order."""
    python, cores = sys.executable, str(os.cpu_count() or 1)
    build = [python, "setup.py", "build_ext", "--inplace", "--force"]
    tests = [python, "-m", "pytest", "-m", "gpu", "tests/cuda", "-q", "-rfE", "--tb=short", "--durations=5"]
    tests += ["-p", "no:cacheprovider", "--show-capture=no"]
    small = [python, "-m", "tools.gpu_check", "--small-cases"]
    bench = [python, "-m", "benchmarks.cuda", "--out", str(out), *(["--quick"] if quick else [])]
    # Each tensor in memory of its own, so that memcheck sees where it ends.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    planned = [
        Step("build", build, 150, {"FORCE_CUDA": "1", "MAX_JOBS": cores, "TORCH_CUDA_ARCH_LIST": ""}),
        Step("tests", tests, 130, {}),
        Step("benchmark", bench, 80, {}),
        Step("small cases", small, 20, exact),
    ]
    tool = sanitizer()
    if tool:
        options = ["--report-api-errors", "no", "--error-exitcode", "9"]
        for name in SANITIZERS:
            planned.append(Step(name, [tool, "--tool", name, *options, *small], 30, exact))
    return planned


def run(step: Step, seconds: float, log: Path) -> tuple[int | None, float]:
    """The exit code, or None where time ran out, and the seconds it took. All that it started ends with it."""
    begin = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.environ}
    code: int | None = None
    with log.open("w") as file:
        print("$", *step.command, file=file, flush=True)
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, time.monotonic() - begin


def judge(name: str, code: int | None, text: str) -> tuple[str, bool]:
    """In words what a step's exit code and log say, and whether that is a failure."""
    if name in SANITIZERS:
        return judge_sanitizer(name, code, text)
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
    if not sanitizer():
        outcomes.append(Outcome("sanitizer", "there is no compute-sanitizer", False, 0.0))
    print(f"\n{'step':<13}{'seconds':>8}  result")
    for outcome in outcomes:
        print(f"{outcome.name:<13}{outcome.seconds:>8.0f}  {outcome.words}")
    table = out / "cuda.txt"
    print("\n" + (table.read_text() if table.is_file() else "The benchmark left no table."))
    return not any(outcome.failed for outcome in outcomes)


def small_cases() -> None:
    """Small calls of every op: what the sanitizers watch. Inputs are made on the CPU, to keep other kernels few."""
    import torch

    import roadmap_ext

    device = torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for surrogate in ("sup", "smooth"):
            for rows, columns, density in ((3, 33, 0.2), (2, 5000, 0.01), (2, 1200, 0.7)):
                scores = torch.randn(rows, columns, generator=generator).mul(0.3).to(dtype)
                scores[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
                target, ignore = (torch.rand(rows, columns, generator=generator) < p for p in (density, 0.1))
                leaf = scores.to(device).requires_grad_()
                target, ignore = target.to(device), ignore.to(device)
                ranks = roadmap_ext.smooth_rank(leaf, target, surrogate=surrogate)
                loss = roadmap_ext.ap_loss(leaf, target, ignore=ignore, surrogate=surrogate)
                torch.autograd.backward(loss + ranks.negative_rank.sum())
        x, labels = torch.randn(40, 16, generator=generator).to(dtype), (torch.arange(40) % 7).to(device)
        batch, others = (part.to(device).requires_grad_() for part in (x, x.roll(1, 0)))
        for calibration in ("per_query", "violating_pairs"):
            function = roadmap_ext.RoadmapLoss(calibration_reduction=calibration, chunk_size=16)
            named = {"ref_labels": labels, "ids": labels, "ref_ids": labels + 1}
            torch.autograd.backward(function(batch, labels) + function(batch, labels, ref_emb=others, **named))
    torch.cuda.synchronize()
    print("small cases done")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter benchmark")
    parser.add_argument("--small-cases", action="store_true", help="only what runs under compute-sanitizer")
    arguments = parser.parse_args()
    if arguments.small_cases:
        small_cases()
        return
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    sys.exit(0 if check(out.resolve(), arguments.quick) else 1)


if __name__ == "__main__":
    main()
