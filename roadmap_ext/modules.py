"""The losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ._checks import METHODS, REDUCTIONS, make_settings, one_of
from .functional import ap_loss


class APLoss(nn.Module):
    """The module of :func:`roadmap_ext.ap_loss`: the settings at construction, scores and masks at each call.

    Args and errors are those of :func:`roadmap_ext.ap_loss`; settings are checked at construction.

    Shape:
        scores [B, N], target [B, N] bool, ignore [B, N] bool or None; the loss is a scalar, or [B] for
        ``reduction="none"``.

    Example:
        >>> import torch
        >>> loss = APLoss(tau=0.02)
        >>> print(f"{loss(torch.tensor([[0.52, 0.5]]), torch.tensor([[True, False]])):.4f}")
        0.2119
    """

    def __init__(
        self,
        *,
        surrogate: str = "sup",
        tau: float = 0.01,
        rho: float = 100.0,
        delta: float = 0.05,
        start: float = 0.5,
        offset: float | None = None,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__()
        one_of("method", method, METHODS)
        one_of("reduction", reduction, REDUCTIONS)
        make_settings(surrogate, tau, rho, delta, start, offset)
        self.surrogate = surrogate
        self.tau = tau
        self.rho = rho
        self.delta = delta
        self.start = start
        self.offset = offset
        self.reduction = reduction
        self.method = method

    def forward(self, scores: Tensor, target: Tensor, ignore: Tensor | None = None) -> Tensor:
        """The loss of scores [B, N]: see :func:`roadmap_ext.ap_loss`."""
        return ap_loss(
            scores,
            target,
            ignore=ignore,
            surrogate=self.surrogate,
            tau=self.tau,
            rho=self.rho,
            delta=self.delta,
            start=self.start,
            offset=self.offset,
            reduction=self.reduction,
            method=self.method,
        )

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        shape = f"rho={self.rho}, delta={self.delta}, start={self.start}, offset={self.offset}, "
        return (
            f"surrogate={self.surrogate!r}, tau={self.tau}, {shape if self.surrogate == 'sup' else ''}"
            f"reduction={self.reduction!r}, method={self.method!r}"
        )
