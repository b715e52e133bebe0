"""What gpu_check.py runs in processes of their own: `python -m tools.gpu_cases smoke`, and the others of `CASES`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import roadmap_ext
from tools.cuda import is_toolkit, toolkit_candidates

DEVICE = torch.device("cuda", 0)
DTYPES = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}
"""And how far results of the CPU and of a GPU may be apart, as a share of their norm."""
SURROGATES = ("sup", "smooth")


def scored(rows: int, columns: int, density: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, target and ignore on the CPU, to keep the kernels of others few."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, columns, generator=generator).mul(0.3).to(dtype)
    target, ignore = (torch.rand(rows, columns, generator=generator) < p for p in (density, 0.1))
    return scores, target, ignore


def results(device: torch.device | str, dtype: torch.dtype, surrogate: str) -> Iterator[tuple[str, Tensor]]:
    """What each op makes of a few rows, by name."""
    for rows, columns, density in ((5, 1000, 0.003), (3, 1001, 0.1), (2, 3000, 0.4), (2, 40_000, 0.002)):
        leaf, target, ignore = (x.to(device) for x in scored(rows, columns, density, dtype))
        leaf.requires_grad_()
        for reduction in ("mean", "none"):
            loss = roadmap_ext.ap_loss(leaf, target, ignore=ignore, surrogate=surrogate, reduction=reduction)
            yield f"ap_loss {rows} x {columns} {reduction}", loss
            yield f"ap_loss {rows} x {columns} {reduction}, gradient", torch.autograd.grad(loss.sum(), leaf)[0]
        ranks = roadmap_ext.smooth_rank(leaf, target, ignore=ignore, surrogate=surrogate)
        yield f"smooth_rank {rows} x {columns}", ranks.negative_rank
        gradient = torch.autograd.grad((1 / (1 + ranks.negative_rank)).sum(), leaf)[0]
        yield f"smooth_rank {rows} x {columns}, gradient", gradient
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(300, 32, generator=generator).to(dtype), torch.arange(300) % 70
    for calibration in ("per_query", "violating_pairs"):
        function = roadmap_ext.RoadmapLoss(
            calibration_reduction=calibration, chunk_size=64, surrogate=surrogate, tau=0.1
        )
        batch, others = (part.to(device).requires_grad_() for part in (x[:100], x))
        loss = function(batch, labels[:100].to(device), ref_emb=others, ref_labels=labels.to(device))
        yield f"RoadmapLoss {calibration}", loss
        for name, gradient in zip(("queries", "references"), torch.autograd.grad(loss, (batch, others)), strict=True):
            yield f"RoadmapLoss {calibration}, gradient of {name}", gradient


def smoke(device: torch.device | str = DEVICE) -> None:
    """Every op and dtype beside the CPU kernels."""
    wrong = []
    for dtype, share in DTYPES.items():
        for surrogate in SURROGATES:
            pairs = zip(results(device, dtype, surrogate), results("cpu", dtype, surrogate), strict=True)
            for (name, ours), (_, theirs) in pairs:
                ours, theirs = ours.detach().cpu().double(), theirs.detach().double()
                error, norm = (ours - theirs).norm().item(), theirs.norm().item()
                if not error <= share * norm:
                    wrong.append(f"{name}, {dtype}, {surrogate}: off by {error:.3g} of {norm:.3g}")
                    print("WRONG:", wrong[-1], flush=True)
    print(f"{len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


RECIPROCAL = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>

__global__ void fast(uint32_t first, float* reciprocal, float* power) {
  const uint32_t k = blockIdx.x * blockDim.x + threadIdx.x;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal[k]) : "f"(__uint_as_float(first + k)));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power[k]) : "f"(__uint_as_float(first + k)));
}

static double ulps(float fast, double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::fabs(fast - exact) / std::ldexp(1.0, exponent - 24);
}

int main() {
  constexpr uint32_t kMantissas = 1u << 23;
  float *reciprocal, *power;
  if (cudaMallocManaged(&reciprocal, 4 * kMantissas) || cudaMallocManaged(&power, 4 * kMantissas)) return 2;
  double worst[2] = {};
  int inexact = 0;
  for (uint32_t exponent = 1; exponent < 253; ++exponent) {  // from 2^-126 on: all whose reciprocals are normal
    const bool all = exponent == 126 || exponent == 127;
    fast<<<all ? kMantissas / 256 : 16, 256>>>(exponent << 23, reciprocal, power);
    if (cudaDeviceSynchronize()) return 2;
    inexact += reciprocal[0] != std::ldexp(1.0f, 127 - static_cast<int>(exponent));
    for (uint32_t k = 0; k < (all ? kMantissas : 4096); ++k) {
      const double x = std::ldexp(1.0 + k / 8388608.0, static_cast<int>(exponent) - 127);
      worst[0] = std::fmax(worst[0], ulps(reciprocal[k], 1 / x));
      if (x < 126) worst[1] = std::fmax(worst[1], ulps(power[k], std::exp2(x)));
    }
  }
  std::printf("1 / x: at most %.3f ulp, inexact for %d of 252 powers of two\n", worst[0], inexact);
  std::printf("2^x: at most %.3f ulp\n", worst[1]);
  return worst[0] > 1 || worst[1] > 2;
}
"""


def reciprocal() -> None:
    """The errors of the fast functions, which the emulator takes to be 1 and 2 ulp."""
    root = next(root for root in toolkit_candidates(os.environ) if is_toolkit(root))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "reciprocal.cu")
        source.write_text(RECIPROCAL)
        program = source.with_suffix("")
        subprocess.run([str(root / "bin" / "nvcc"), "-O2", "-arch=native", source, "-o", program], check=True)
        sys.exit(subprocess.run([program]).returncode)


def small() -> None:
    """Small calls of every op: what the sanitizers watch."""
    for dtype in DTYPES:
        for surrogate in SURROGATES:
            for rows, columns, density in ((3, 33, 0.2), (2, 5000, 0.01), (2, 1200, 0.7)):
                scores, target, ignore = scored(rows, columns, density, dtype)
                scores[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
                leaf, target, ignore = scores.to(DEVICE).requires_grad_(), target.to(DEVICE), ignore.to(DEVICE)
                ranks = roadmap_ext.smooth_rank(leaf, target, surrogate=surrogate)
                loss = roadmap_ext.ap_loss(leaf, target, ignore=ignore, surrogate=surrogate)
                torch.autograd.backward(loss + ranks.negative_rank.sum())
        x, labels = torch.randn(40, 16).to(dtype), (torch.arange(40) % 7).to(DEVICE)
        batch, others = (part.to(DEVICE).requires_grad_() for part in (x, x.roll(1, 0)))
        for calibration in ("per_query", "violating_pairs"):
            function = roadmap_ext.RoadmapLoss(calibration_reduction=calibration, chunk_size=16)
            named = {"ref_labels": labels, "ids": labels, "ref_ids": labels + 1}
            torch.autograd.backward(function(batch, labels) + function(batch, labels, ref_emb=others, **named))
    torch.cuda.synchronize()
    print("small cases done")


def profile() -> None:
    """Where the time of the floors' cases goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from benchmarks import cuda

    for case in (cuda.FEW, cuda.MANY, cuda.EMBEDDINGS):
        step = cuda.training_step(cuda.ours(case), cuda.inputs(case))
        step(0)
        torch.cuda.synchronize()
        with profiled(activities=[ProfilerActivity.CUDA]) as seen:
            for index in range(3):
                step(index)
            torch.cuda.synchronize()
        print(
            f"\n{case}, three calls\n{seen.key_averages().table(sort_by='cuda_time_total', row_limit=12)}", flush=True
        )
        del step
        torch.cuda.empty_cache()


def once() -> None:
    """One call of each floor's case: what ncu watches."""
    from benchmarks import cuda

    for case in (cuda.FEW, cuda.MANY, cuda.EMBEDDINGS):
        cuda.training_step(cuda.ours(case), cuda.inputs(case))(0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def sweeps() -> None:
    """Chunk sizes of an embedding loss, and from how many positives on a row is better sorted."""
    from benchmarks import cuda

    sets = cuda.inputs(cuda.EMBEDDINGS)
    for size in (256, 512, 1024, 2048, 4096):
        function = roadmap_ext.RoadmapLoss(chunk_size=size)
        print(f"chunks of {size}: {min(cuda.timed(cuda.training_step(function, sets), 0, 5)) * 1e3:.3f} ms", flush=True)
    del sets
    for positives in (16, 32, 64, 128, 256, 512):
        sets = cuda.inputs(cuda.Case(1024, 65_536, positives))
        for method in ("pairwise", "sorted"):

            def loss(scores: Tensor, target: Tensor, method: str = method) -> Tensor:
                return roadmap_ext.ap_loss(scores, target, method=method)

            seconds = min(cuda.timed(cuda.training_step(loss, sets), 0, 5))
            print(f"{positives} positives, {method}: {seconds * 1e3:.3f} ms", flush=True)


CASES = {case.__name__: case for case in (smoke, reciprocal, small, profile, once, sweeps)}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
