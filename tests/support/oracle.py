"""The tolerance of every accuracy test, and the inputs they share.

A result may be off the float64 reference by twice the error that plain PyTorch in the same dtype makes on the same
input, plus a stated few ulp: for gradients 4 eps max_i c_i / tau, c_i = rank+ / (rank^2 |P|). Errors are 2-norms a row.

The plain gradient of a half type is computed in float32 and rounded once. Ours is kept in the half type from forward to
backward and rounded again when grad_out arrives, so half an ulp of the row is added for these.

For float64 the truth is long double, and 8 eps of the row (of the largest loss, 1) are added: there is no wider type to
sum in, and plain PyTorch is at times exact to the bit by luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from long_double import loss_and_gradient
from torch import Tensor

import roadmap_ext
from roadmap_ext import reference

PUBLISHED = {
    "paper": {},
    "released": {"offset": 1.44},
    "released inat": {"start": 0.0, "offset": 1.0},
    "released 2021": {"offset": 6.44},
    "without a knee": {"delta": 0.0, "offset": 1.44},
    "soft": {"tau": 0.1, "rho": 10.0, "delta": 0.2},
    "flat tail": {"rho": 0.0},
}
ULPS = 4
ULPS_FLOAT64 = 8


def grid_scores(rows: int, columns: int, dtype: torch.dtype = torch.float32, scale: float = 16.0) -> Tensor:
    """Normal scores on a grid of 1/64: exact in every dtype, many ties, and never on a knee, where slopes jump."""
    return (torch.randn(rows, columns).mul(scale).round() / 64).clamp(-1, 1).to(dtype)


def ragged_target(rows: int, columns: int, density: float = 0.1) -> Tensor:
    """No positive, all positive, one, and some."""
    target = torch.rand(rows, columns) < density
    target[0] = False
    if rows > 1:
        target[1] = True
    if rows > 2:
        target[2] = False
        target[2, columns // 2] = True
    return target


def settings_of(options: dict) -> dict:
    """The surrogate's settings among the keywords of ap_loss, with defaults."""
    defaults = {"surrogate": "sup", "tau": 0.01, "rho": 100.0, "delta": 0.05, "start": 0.5, "offset": None}
    return {name: options.get(name, value) for name, value in defaults.items()}


@dataclass
class Result:
    loss: Tensor  # [B]
    gradient: Tensor  # [B, N], of (loss * weight).sum()


def run(function, scores: Tensor, target: Tensor, weight: Tensor, **options) -> Result:
    leaf = scores.detach().clone().requires_grad_()
    loss = function(leaf, target, reduction="none", **options)
    (loss * weight.to(loss.dtype)).sum().backward()
    return Result(loss.detach(), leaf.grad)


def largest_weight(scores: Tensor, target: Tensor, weight: Tensor, **options) -> Tensor:
    """max_i c_i of each query, times its weight, [B] float64."""
    ignore = options.get("ignore")
    ranks = reference.smooth_rank(scores.double(), target, ignore=ignore, **settings_of(options))
    rank = ranks.positive_rank + ranks.negative_rank
    positives = torch.bincount(ranks.query, minlength=len(scores))
    c = ranks.positive_rank / (rank**2 * positives[ranks.query])
    out = torch.zeros(len(scores), dtype=torch.float64)
    return out.scatter_reduce(0, ranks.query, c, "amax") * weight.double().abs()


def row_error(value: Tensor, truth: Tensor) -> Tensor:
    return (value.double() - truth).flatten(1).norm(dim=1)


def allowed_gradient_error(plain: Tensor, truth: Tensor, largest: Tensor, tau: float) -> Tensor:
    """[B]: twice the error of the plain gradient, plus ULPS eps max_i c_i / tau in the accumulation type."""
    eps = torch.finfo(torch.float64 if plain.dtype == torch.float64 else torch.float32).eps
    allowed = 2 * row_error(plain, truth) + ULPS * eps * largest / tau
    if plain.dtype in (torch.float16, torch.bfloat16):
        allowed += torch.finfo(plain.dtype).eps / 2 * truth.flatten(1).norm(dim=1)
    if plain.dtype == torch.float64:
        allowed += ULPS_FLOAT64 * eps * truth.flatten(1).norm(dim=1)
    return allowed


def assert_accurate(scores: Tensor, target: Tensor, weight: Tensor | None = None, method: str = "pairwise", **options):
    """ap_loss's loss and gradient against the float64 reference, by the rule above. Returns the result."""
    if weight is None:  # powers of two: the gradient is kept rounded, and another factor would round it again
        weight = 2.0 ** (torch.arange(len(scores)) % 3 - 1)
    if scores.dtype == torch.float64:  # the float64 reference has rounding errors of its own
        truth = Result(*loss_and_gradient(scores, target, weight, **options))
    else:
        truth = run(reference.ap_loss, scores.double(), target, weight, **options)
    plain = run(reference.ap_loss, scores, target, weight, **options)
    ours = run(roadmap_ext.ap_loss, scores, target, weight, method=method, **options)
    eps = torch.finfo(ours.loss.dtype).eps
    assert ours.gradient.dtype == scores.dtype
    assert ours.loss.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    ulps = ULPS_FLOAT64 if scores.dtype == torch.float64 else ULPS
    loss_allowed = 2 * (plain.loss.double() - truth.loss).abs() + ulps * eps
    loss_error = (ours.loss.double() - truth.loss).abs()
    assert (loss_error <= loss_allowed).all(), f"loss: {(loss_error / loss_allowed).max():.3g} of what is allowed"
    largest = largest_weight(scores, target, weight, **options)
    allowed = allowed_gradient_error(plain.gradient, truth.gradient, largest, options.get("tau", 0.01))
    error = row_error(ours.gradient, truth.gradient)
    assert (error <= allowed).all(), f"gradient: {(error / allowed.clamp(min=1e-300)).max():.3g} of what is allowed"
    return ours
