"""SupAP with KeOps, as a user would write it: rank- as a LazyTensor reduction, one query at a time.

KeOps (`pip install pykeops`) compiles the reduction when it is first used and builds no |P| x |Neg| tensor either.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import os

import torch
from torch import Tensor


@functools.cache
def installed() -> bool:
    """Whether pykeops is there and loads."""
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # it says what it compiles otherwise
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # and whether it finds CUDA
            importlib.import_module("pykeops.torch")
    except Exception:  # absent, or its own check of the compiler failed, in any of several ways
        return False
    return True


def keops_loop(scores: Tensor, target: Tensor, *, tau: float = 0.01, rho: float = 100.0, delta: float = 0.05) -> Tensor:
    """Mean SupAP loss of scores [B, N], differentiable. Every query needs a positive."""
    from pykeops.torch import LazyTensor

    offset = 0.5 + 1 / (1 + math.exp(-delta / tau))
    losses = []
    for row, positive in zip(scores, target, strict=True):
        positives, negatives = row[positive], row[~positive]
        gap = LazyTensor(negatives[None, :, None]) - LazyTensor(positives[:, None, None])  # [P, Neg, 1]
        # Beyond 50 the exponential's square overflows in the gradient.
        below = 1 / (1 + (-(gap / tau).clamp(-50.0, 50.0)).exp()) + 0.5 * gap.step()
        linear = rho * (gap - delta) + offset
        rank_negative = (delta - gap).ifelse(below, linear).sum(1)[:, 0]
        fixed = positives.detach()
        rank_positive = (fixed[None] >= fixed[:, None]).sum(1)
        losses.append(1 - (rank_positive / (rank_positive + rank_negative)).mean())
    return torch.stack(losses).mean()
