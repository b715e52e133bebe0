"""ap_loss and smooth_rank: autograd Functions around the ops, and the choice of method.

ap_loss computes its gradient in the forward pass, in the launch that computes the loss, and keeps nothing else: one
[B, N] tensor in the dtype of the scores. smooth_rank keeps the scores and masks, and one number a positive.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops, reference
from ._checks import METHODS, REDUCTIONS, Settings, check_scores, make_settings, one_of
from ._extension import _REFERENCE_ONLY, check_kernels, warn_reference_only
from ._ranks import SmoothRank

_NO_TRANSFORMS = (
    "roadmap_ext: the kernels do not take part in torch.func transforms (grad, vmap, jvp, ...) or in forward-mode "
    "differentiation: use loss.backward() or torch.autograd.grad, or pass method='reference', which is differentiable "
    "by all of them."
)
_NO_SECOND_DERIVATIVE = (
    "roadmap_ext: the kernels have first derivatives only, and this asks for a second one (a gradient penalty, or "
    "backward through a gradient taken with create_graph=True): pass method='reference', which has them all."
)


def _anchor(scores: Tensor) -> Tensor:
    """An empty tensor with the scores' place in the graph and none of their memory."""
    return scores.narrow(0, 0, 0).clone()


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes a gradient on, joined to everything it depends on, so that a second derivative meets an error.

    once_differentiable would cut those ties instead: where another path leads to the scores, autograd would then return
    that path's share as if it were the whole second derivative.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


class _AveragePrecision(torch.autograd.Function):
    """The reduced loss; the gradient of each query's loss comes with it and waits for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        anchor: Tensor,
        target: Tensor,
        ignore: Tensor | None,
        settings: Settings,
        reduction: str,
    ) -> Tensor:
        loss, gradient, factor = torch.ops.roadmap_ext.average_precision(
            scores, target, ignore, *settings.for_op(), REDUCTIONS.index(reduction), True
        )
        ctx.save_for_backward(gradient, factor, anchor)
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient, factor, anchor = ctx.saved_tensors
        result = torch.ops.roadmap_ext.scale_rows(gradient, grad_loss, factor)
        if torch.is_grad_enabled():
            result = _FirstDerivativeOnly.apply(result, anchor, grad_loss)
        return result, None, None, None, None, None


class _SmoothRank(torch.autograd.Function):
    """Ranks of every positive, [nnz], with any gradient arriving at them."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, target: Tensor, ignore: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, column, positive_rank, negative_rank, slope = torch.ops.roadmap_ext.smooth_rank(
            scores, target, ignore, *settings.for_op(), True
        )
        ctx.settings = settings
        ctx.save_for_backward(scores, target, ignore, slope)
        ctx.mark_non_differentiable(query, column)
        if settings.surrogate == "sup":
            ctx.mark_non_differentiable(positive_rank)
        return query, column, positive_rank, negative_rank

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, target, ignore, slope = ctx.saved_tensors
        positive_grad = None if ctx.settings.surrogate == "sup" else grads[2]
        negative_grad = grads[3]
        result = torch.ops.roadmap_ext.smooth_rank_backward(
            scores.detach(), target, ignore, slope, positive_grad, negative_grad, *ctx.settings.for_op()
        )
        if torch.is_grad_enabled():
            depends_on = [scores, negative_grad] + ([] if positive_grad is None else [positive_grad])
            result = _FirstDerivativeOnly.apply(result, *depends_on)
        return result, None, None, None


def _resolve(method: str, scores: Tensor) -> str:
    """The method to run. Raises RuntimeError where its kernels were not built."""
    if method == "reference":
        return method
    if method == "auto" and _REFERENCE_ONLY:
        warn_reference_only()
        return "reference"
    check_kernels(scores.device, method)
    # torch would return derivatives of zero, or none, without a word.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(scores).tangent is not None
    ):
        raise RuntimeError(_NO_TRANSFORMS)
    return "tiled"


def ap_loss(
    scores: Tensor,
    target: Tensor,
    *,
    ignore: Tensor | None = None,
    surrogate: str = "sup",
    tau: float = 0.01,
    rho: float = 100.0,
    delta: float = 0.05,
    start: float = 0.5,
    offset: float | None = None,
    reduction: str = "mean",
    method: str = "auto",
) -> Tensor:
    """1 - average precision of each query, smooth: an upper bound of 1 - AP that has a gradient everywhere.

    For a query with positives P and negatives Neg::

        rank+(i) = 1 + #{j in P, j != i: s_j >= s_i}          rank-(i) = sum over j in Neg of H-(s_j - s_i)
        loss     = 1 - 1/|P| * sum over i in P of rank+(i) / (rank+(i) + rank-(i))

        H-(t) = sigma(t / tau)                 for t < 0
                start + sigma(t / tau)         for 0 <= t <= delta
                rho * (t - delta) + offset     for t > delta

    SupAP is ROADMAP's (Ramzi et al., NeurIPS 2021, eq. 3 to 5). ``surrogate="smooth"`` is Smooth-AP (Brown et al., ECCV
    2020): sigma(t / tau) for every pair, positives included, with gradients through both ranks; rho, delta, start and
    offset then play no part. ``1 - AP_sup >= 1 - AP`` for ``start >= 1/2`` and ``offset >= 1``.

    The gradient is computed with the loss; for backward one [B, N] tensor in the dtype of the scores is kept. Sums run
    in float32 at least. Autocast leaves the scores as they come. Results are bitwise equal from run to run and for
    every number of CPU threads. Second derivatives, forward mode and torch.func transforms raise, except with
    ``method="reference"``.

    Args:
        scores: [B, N] similarity of each query to each reference, higher is closer; float16, bfloat16, float32 or
            float64, any strides.
        target: [B, N] bool, True where the reference is relevant to the query.
        ignore: [B, N] bool, True where a pair is left out of every sum (a query's own row, a duplicate), positive or
            not. None for no such pair.
        surrogate: ``"sup"`` or ``"smooth"``.
        tau: temperature of the sigmoid, in units of the scores; positive.
        rho: slope of the linear tail, loss per unit of score; not negative.
        delta: knee where the tail begins, in units of the scores; not negative.
        start: jump at t = 0.
        offset: value just above the knee; None for start + sigma(delta / tau), which makes H- continuous.
        reduction: ``"mean"`` over the queries that have a positive (0 where none has), ``"sum"``, or ``"none"``: [B].
        method: ``"auto"``, ``"tiled"`` (fused kernels, |P| x N work, nothing of that size in memory) or ``"reference"``
            (plain PyTorch).

    Returns:
        A scalar, or [B] with ``reduction="none"``; float64 for float64 scores, float32 for all others. A query without
        positives has loss 0, one without negatives 0. A NaN score that is not ignored makes its row's loss NaN.

    Raises:
        TypeError: scores, target or ignore is no tensor or has the wrong dtype; a setting is no number.
        ValueError: shapes or devices differ, a setting is out of range, an unknown surrogate, reduction or method.
        RuntimeError: the kernels for the scores' device were not built; a torch.func transform is active.

    Example:
        >>> scores = torch.tensor([[0.52, 0.5, 0.1]], requires_grad=True)
        >>> loss = ap_loss(scores, torch.tensor([[True, False, False]]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", [round(x, 3) for x in scores.grad[0].tolist()])
        0.1065 [-8.382, 8.382, 0.0]
    """
    one_of("method", method, METHODS)
    one_of("reduction", reduction, REDUCTIONS)
    settings = make_settings(surrogate, tau, rho, delta, start, offset)
    check_scores(scores, target, ignore)
    if _resolve(method, scores) == "reference":
        return reference.ap_loss(scores, target, ignore=ignore, reduction=reduction, **settings._asdict())
    if torch.is_grad_enabled() and scores.requires_grad:
        loss: Tensor = _AveragePrecision.apply(scores, _anchor(scores), target, ignore, settings, reduction)
    else:
        loss = torch.ops.roadmap_ext.average_precision(
            scores, target, ignore, *settings.for_op(), REDUCTIONS.index(reduction), False
        )[0]
    return loss


def smooth_rank(
    scores: Tensor,
    target: Tensor,
    *,
    ignore: Tensor | None = None,
    surrogate: str = "sup",
    tau: float = 0.01,
    rho: float = 100.0,
    delta: float = 0.05,
    start: float = 0.5,
    offset: float | None = None,
    method: str = "auto",
) -> SmoothRank:
    """The smooth ranks of every positive: what :func:`ap_loss` is made of, for losses yet to be written.

    ``positive_rank`` is rank+ and ``negative_rank`` rank- of :func:`ap_loss`; any gradient may arrive at
    ``negative_rank``, and with ``surrogate="smooth"`` at ``positive_rank`` (with ``"sup"`` it is a true step, carries
    none and does not require grad). The arguments are those of :func:`ap_loss`, and so are the errors.

    The number of positives decides the shape of the result, so on a GPU the host waits for it once; under
    torch.compile it is a dynamic size.

    Returns:
        :class:`SmoothRank` (query, reference, positive_rank, negative_rank), each [nnz], row after row, columns
        ascending. The ranks are float64 for float64 scores and float32 for all others.

    Example:
        Recall@k of each query, smooth in the manner of Patel et al. (CVPR 2022): the share of positives with rank <= k.

        >>> scores = torch.tensor([[0.9, 0.5, 0.4, 0.1], [0.2, 0.8, 0.7, 0.3]], requires_grad=True)
        >>> target = torch.tensor([[True, False, True, False], [True, True, False, False]])
        >>> ranks = smooth_rank(scores, target, surrogate="smooth")
        >>> hit = torch.sigmoid(1 + 0.5 - ranks.positive_rank - ranks.negative_rank)  # k = 1, temperature 1 on ranks
        >>> recall = torch.zeros(2).index_add(0, ranks.query, hit) / target.sum(1)
        >>> [round(x, 3) for x in recall.tolist()]
        [0.402, 0.349]
    """
    one_of("method", method, METHODS)
    settings = make_settings(surrogate, tau, rho, delta, start, offset)
    check_scores(scores, target, ignore)
    if _resolve(method, scores) == "reference":
        return reference.smooth_rank(scores, target, ignore=ignore, **settings._asdict())
    if torch.is_grad_enabled() and scores.requires_grad:
        return SmoothRank(*_SmoothRank.apply(scores, target, ignore, settings))
    return SmoothRank(*torch.ops.roadmap_ext.smooth_rank(scores, target, ignore, *settings.for_op(), False)[:4])


# The fake kernels are registered by importing them; the name is not used otherwise.
del _ops
