"""Every check of an argument, before any kernel runs: what was given, what is accepted, what to do."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SURROGATES = ("sup", "smooth")  # the ops take their places
REDUCTIONS = ("none", "mean", "sum")  # the ops take their places
METHODS = ("auto", "tiled", "reference")

# Multiples of tau, 1 / tau and the settings themselves must be finite in float32.
_SMALLEST_TAU, _LARGEST_TAU = 1e-37, 1e36
_LARGEST = 3e38


class Settings(NamedTuple):
    """The rank surrogate's settings, checked. The order is the ops' own."""

    surrogate: str
    tau: float
    rho: float
    delta: float
    start: float
    offset: float | None  # None: continuous at the knee

    def for_op(self) -> tuple[int, float, float, float, float, float | None]:
        """The same as the ops take them: words as numbers."""
        return (SURROGATES.index(self.surrogate), *self[1:])

    def value_above_knee(self) -> float:
        """The offset, or the default that makes the surrogate continuous."""
        return self.start + sigmoid(self.delta / self.tau) if self.offset is None else self.offset


def one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the ``accepted`` words."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = ", which cannot be learnt here: use .item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")
    number = float(value)
    if not -_LARGEST <= number <= _LARGEST:  # nor is NaN; torch.compile can trace a comparison
        raise ValueError(f"{name} must be finite (in float32), got {value}")
    return number


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def make_settings(surrogate: str, tau: float, rho: float, delta: float, start: float, offset: float | None) -> Settings:
    """Check the settings of the rank surrogate. Raises TypeError for what is no number, ValueError for a bad one."""
    one_of("surrogate", surrogate, SURROGATES)
    tau, rho, delta, start = (
        _number(name, value) for name, value in (("tau", tau), ("rho", rho), ("delta", delta), ("start", start))
    )
    if tau < _SMALLEST_TAU or tau > _LARGEST_TAU:
        raise ValueError(f"tau must be positive, from {_SMALLEST_TAU:g} to {_LARGEST_TAU:g}, got {tau}")
    if rho < 0:
        raise ValueError(f"rho must not be negative, got {rho}")
    if delta < 0:
        raise ValueError(f"delta must not be negative, got {delta}")
    if rho * tau > _LARGEST:
        raise ValueError(f"rho * tau must be finite (in float32), got {rho} * {tau}")
    return Settings(surrogate, tau, rho, delta, start, None if offset is None else _number("offset", offset))


def check_scores(scores: Tensor, target: Tensor, ignore: Tensor | None) -> None:
    """Check scores [B, N] and its masks. Raises TypeError for types and dtypes, ValueError for shapes and devices."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}: use torch.as_tensor(scores)")
    if scores.layout != torch.strided:
        raise TypeError(f"scores must be a dense tensor, got layout {scores.layout}: call scores.to_dense()")
    if scores.dtype not in DTYPES:
        raise TypeError(
            f"scores must be float16, bfloat16, float32 or float64, got {scores.dtype}: convert it, for example with "
            "scores.float()"
        )
    if scores.dim() != 2:
        raise ValueError(
            f"scores must be 2-D, [queries, references], got shape {tuple(scores.shape)}"
            + (": one query is scores[None]" if scores.dim() == 1 else "")
        )
    _check_mask("target", target, scores)
    if ignore is not None:
        _check_mask("ignore", ignore, scores)


def _check_mask(name: str, mask: Tensor, scores: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of dtype torch.bool, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must have dtype torch.bool, got {mask.dtype}: a 0/1 mask becomes one with {name}.bool(), and "
            "labels with labels[:, None] == reference_labels[None]"
        )
    if mask.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {mask.layout}: call {name}.to_dense()")
    if mask.shape != scores.shape:
        raise ValueError(
            f"{name} must have the shape of scores, {tuple(scores.shape)}, got {tuple(mask.shape)}: use "
            f"{name}.expand_as(scores) where it is to be broadcast"
        )
    if mask.device != scores.device:
        raise ValueError(
            f"{name} must be on the device of scores, {scores.device}, got {mask.device}: use {name}.to(scores.device)"
        )
