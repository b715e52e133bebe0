"""What to paste into a bug report: python -m roadmap_ext, or the command roadmap-ext.

Prints what was built, the versions around it, a self-test of the kernels against the reference (a second) and
a benchmark of this machine (ten). Ends with 1 if the self-test fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata

import torch
from torch import Tensor

from . import build_info, losses, reference

# Whose versions matter where a trainer is in play.
_AROUND = (
    "numpy",
    "pytorch-metric-learning",
    "sentence-transformers",
    "transformers",
    "accelerate",
    "lightning",
    "timm",
)
_SECONDS = 1.2  # for each line of the benchmark


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="roadmap-ext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-benchmark", action="store_true", help="end after the self-test")
    options = parser.parse_args(arguments)
    info = build_info()
    devices = ["cpu", *(["cuda"] if info["cuda"] and torch.cuda.is_available() else [])]
    for title, facts in (("roadmap_ext", info), ("around it", versions())):
        print(title, *(f"  {name:<24}{value}" for name, value in facts.items()), sep="\n")
    if info["cpu"] == "reference":
        print("self-test: none, for there are no kernels")
        return 0
    print("self-test, error of the kernels (of plain PyTorch in the same dtype) against the float64 reference")
    failed = 0
    for name, ours, eager, allowed in (row for device in devices for row in self_test(device)):
        fails = not ours <= allowed  # NaN fails
        failed += fails
        print(f"  {name:<40}{ours:.1e} ({eager:.1e}){'  FAILED' if fails else ''}", flush=True)
    if not options.no_benchmark:
        print("benchmark, forward and backward: median time of kernels, of plain PyTorch")
        for device in devices:
            for name, row in benchmark(device):
                print(f"  {name:<40}{row}", flush=True)
    print(f"self-test: {failed} failed" if failed else "self-test: passed")
    return int(failed > 0)


def versions() -> dict[str, str]:
    """Machine and packages."""
    found = {
        "python": f"{sys.version.split()[0]} ({platform.python_implementation()})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "os": platform.platform(),
        "processor": _processor(),
        "cores, threads of torch": f"{os.cpu_count()}, {torch.get_num_threads()}",
    }
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        found[f"GPU {number}"] = f"{torch.cuda.get_device_name(number)} (compute capability {major}.{minor})"
    for name in _AROUND:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- the self-test ---------------------------------------------------------------------------------------------------


def self_test(device: str) -> Iterator[tuple[str, float, float, float]]:
    """Name, error of the kernels, of plain PyTorch in the same dtype, and how much is allowed, of some cases.

    As in the tests: twice the error of plain PyTorch, and a few ulp.
    """
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 12
    embeddings = torch.randn(96, 24, generator=random) + torch.randn(12, 24, generator=random)[labels]
    scores = torch.randn(12, 400, generator=random) / 4
    target = torch.rand(12, 400, generator=random) < 0.1
    for dtype in (torch.float32, torch.float64):
        for method in ("pairwise", "sorted"):
            for surrogate in ("sup", "smooth"):
                yield _compared(
                    f"{device} ap_loss, {method}, {surrogate}, {str(dtype)[6:]}",
                    partial(losses.ap_loss, method=method, surrogate=surrogate, tau=0.02),
                    partial(reference.ap_loss, surrogate=surrogate, tau=0.02),
                    scores.to(device, dtype),
                    target,
                )
        name = f"{device} roadmap_loss, {str(dtype)[6:]}"
        yield _compared(name, losses.roadmap_loss, reference.roadmap_loss, embeddings.to(device, dtype), labels)


def _compared(
    name: str, ours: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, relevant: Tensor
) -> tuple[str, float, float, float]:
    exact = _loss_and_gradient(plain, x.cpu().double(), relevant)
    size = exact.abs().max().item()
    try:
        of_ours, of_plain = (
            ((_loss_and_gradient(function, x, relevant).cpu().double() - exact).abs().max() / size).item()
            for function in (ours, plain)
        )
    except RuntimeError as error:
        print(f"  {name}: {error}")
        return name, float("nan"), float("nan"), 0.0
    return name, of_ours, of_plain, 2 * of_plain + 16 * torch.finfo(x.dtype).eps


def _loss_and_gradient(function: Callable[..., Tensor], x: Tensor, relevant: Tensor) -> Tensor:
    """Both, in one vector."""
    x = x.clone().requires_grad_()
    loss = function(x, relevant.to(x.device))
    (gradient,) = torch.autograd.grad(loss, x)
    return torch.cat([loss.detach().reshape(1).to(x.dtype), gradient.flatten()])


# --- the benchmark ---------------------------------------------------------------------------------------------------


def benchmark(device: str) -> Iterator[tuple[str, str]]:
    """A line for each of a few sizes: the kernels' time, and that of plain PyTorch where it fits."""
    for rows, dim in ((512, 128), (4096, 128)):
        labels = torch.arange(rows, device=device) // 4
        embeddings = torch.randn(rows, dim, device=device)
        ours = _median(partial(losses.roadmap_loss, embeddings, labels), embeddings)
        text = f"{1e3 * ours:.1f} ms"
        if rows <= 512:
            plain = _median(partial(reference.roadmap_loss, embeddings, labels), embeddings)
            text += f", {1e3 * plain:.1f} ms: {plain / ours:.0f} times as long"
        yield f"{device} RoadmapLoss, {rows} x {dim}", text
    for positives in (4, 400):
        scores = torch.randn(128, 8192, device=device) / 4
        target = torch.zeros_like(scores, dtype=torch.bool)
        target[:, :positives] = True
        ours = _median(partial(losses.ap_loss, scores, target), scores)
        text = f"{1e3 * ours:.1f} ms"
        if positives == 4:
            plain = _median(partial(reference.ap_loss, scores, target), scores)
            text += f", {1e3 * plain:.1f} ms: {plain / ours:.0f} times as long"
        yield f"{device} ap_loss, 128 x 8192, {positives} positives", text


def _median(loss: Callable[[], Tensor], x: Tensor) -> float:
    """Of forward and backward, in seconds, of as many calls as fit."""
    x.requires_grad_()
    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(taken) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        loss().backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        x.grad = None
        if x.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    sys.exit(main())
