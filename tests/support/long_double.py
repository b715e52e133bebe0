"""The loss and its gradient in numpy's long double, written from the formulas and not from the package: the truth that
the float64 reference and the float64 kernels are both held against. (80 bits on x86-64, 128 on aarch64 Linux.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _surrogate(t: np.ndarray, surrogate, tau, rho, delta, start, offset) -> tuple[np.ndarray, np.ndarray]:
    """H- and its derivative; decisions on t rounded to float64, as the kernels take them."""
    y = _sigmoid(t / tau)
    slope = y * (1 - y) / tau
    if surrogate == "smooth":
        return y, slope
    decided = t.astype(np.float64)
    if offset is None:
        offset = start + _sigmoid(np.longdouble(delta) / tau)
    tail = decided > delta
    return np.where(tail, rho * (t - delta) + offset, y + start * (decided >= 0)), np.where(tail, rho, slope)


def loss_and_gradient(
    scores: Tensor, target: Tensor, weight: Tensor, ignore: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """loss [B] and the gradient [B, N] of (loss * weight).sum(), rounded to float64."""
    settings = {"surrogate": "sup", "tau": 0.01, "rho": 100.0, "delta": 0.05, "start": 0.5, "offset": None} | options
    surrogate = settings["surrogate"]
    numbers = {k: v if v is None else np.longdouble(v) for k, v in settings.items() if k != "surrogate"}
    losses, gradient = np.zeros(len(scores), np.longdouble), np.zeros(scores.shape, np.longdouble)
    for q, row in enumerate(scores.double().numpy().astype(np.longdouble)):
        kept = np.ones(len(row), bool) if ignore is None else ~ignore[q].numpy()
        positive = np.flatnonzero(target[q].numpy() & kept)
        negative = np.flatnonzero(~target[q].numpy() & kept)
        if not len(positive):
            continue
        u, v = row[positive], row[negative]
        value, slope = _surrogate(v[None] - u[:, None], surrogate, **numbers)
        rank_negative = value.sum(1)
        if surrogate == "smooth":
            own, own_slope = _surrogate(u[None] - u[:, None], surrogate, **numbers)
            np.fill_diagonal(own, 0)
            np.fill_diagonal(own_slope, 0)
            rank_positive = 1 + own.sum(1)
        else:
            rank_positive = (u[None] >= u[:, None]).sum(1).astype(np.longdouble)
        rank = rank_positive + rank_negative
        losses[q] = (rank_negative / rank).mean()
        c = rank_positive / rank**2 / len(u)
        gradient[q, negative] = c @ slope
        gradient[q, positive] = -c * slope.sum(1)
        if surrogate == "smooth":
            g = -rank_negative / rank**2 / len(u)
            gradient[q, positive] += g @ own_slope - g * own_slope.sum(1)
    gradient *= weight.double().numpy().astype(np.longdouble)[:, None]
    return torch.from_numpy(losses.astype(np.float64)), torch.from_numpy(gradient.astype(np.float64))
