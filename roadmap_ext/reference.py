"""The losses in plain PyTorch, as the papers write them: the oracle of every kernel, and readable before it is fast.

One query at a time, |P| x |Neg| in memory, differentiable by autograd alone (twice, too), on any device. float16 and
bfloat16 scores and embeddings are widened to float32 first, as the kernels do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .autograd import savable
from .pairs import blank
from .settings import (
    SMALLEST_NORM,
    Objective,
    PlainEmbeddingKeywords,
    PlainScoreKeywords,
    Surrogate,
    SurrogateKeywords,
    accepts,
    checked,
    defaults_of,
)
from .validation import check_embeddings, check_scores

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SmoothRank(NamedTuple):
    """Smooth ranks of the positives of all queries, one entry a positive, row after row, columns ascending.

    Attributes:
        query: [nnz] int64, the row of each positive.
        reference: [nnz] int64, its column.
        positive_rank: [nnz], its rank among the positives, from 1.
        negative_rank: [nnz], the smooth number of negatives ranked at or above it.
    """

    query: Tensor
    reference: Tensor
    positive_rank: Tensor
    negative_rank: Tensor


def surrogate_step(gap: Tensor, surrogate: Surrogate) -> Tensor:
    """H- of ``gap`` = s_j - s_i, elementwise: an upper bound of the step [gap >= 0] (ROADMAP, eq. 4)."""
    below = torch.sigmoid(gap / surrogate.tau)
    if surrogate.surrogate == "smooth":
        return below
    below = below + surrogate.start * (gap >= 0).to(gap.dtype)
    # With a slope of 0 the linear part is flat, even at an infinite gap.
    linear = surrogate.rho * (gap - surrogate.delta) if surrogate.rho else torch.zeros_like(gap)
    return torch.where(gap > surrogate.delta, linear + surrogate.value_above_threshold(), below)


def _gaps(references: Tensor, positives: Tensor) -> Tensor:
    """s_j - s_i, [P, references]. Equal infinities are ties; they carry no gradient."""
    gap = references[None] - positives[:, None]
    tie = references.isinf()[None] & (references[None] == positives[:, None])
    return torch.where(tie, torch.zeros_like(gap), gap)


def _row_ranks(row: Tensor, positive: Tensor, negative: Tensor, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """rank+ and rank- of each positive of one query, [P] each."""
    positives, negatives = row[positive], row[negative]
    negative_rank = surrogate_step(_gaps(negatives, positives), surrogate).sum(1)
    if surrogate.surrogate == "smooth":
        others = ~torch.eye(len(positives), dtype=torch.bool, device=row.device)
        positive_rank = 1 + (surrogate_step(_gaps(positives, positives), surrogate) * others).sum(1)
    else:  # the true step: itself, and every other positive at least as high
        fixed = positives.detach()
        positive_rank = (fixed[None] >= fixed[:, None]).sum(1).to(row.dtype)
    nan = _nan_if_any(row[positive | negative])
    return positive_rank + nan.detach(), negative_rank + nan


def _nan_if_any(kept: Tensor) -> Tensor:
    """0, or NaN with a NaN gradient: a NaN reaches its query's loss whatever it was compared with."""
    return kept[kept.isnan()].square().sum()


def _pair_masks(scores: Tensor, target: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = scores if scores.dtype == torch.float64 else scores.float()
    ignored = torch.zeros_like(target) if ignore is None else ignore
    return wide, target & ~ignored, ~target & ~ignored


@accepts(PlainScoreKeywords)
def ap_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[PlainScoreKeywords]
) -> Tensor:
    """:func:`roadmap_ext.ap_loss` in plain PyTorch, differentiable any number of times.

    Arguments (but ``method``), result and errors are the same.
    """
    objective = checked(settings, defaults_of(PlainScoreKeywords)).objective
    check_scores(scores, target, ignore)
    return ap_loss_of(scores, target, ignore, objective.surrogate, objective.reduction)


def ap_loss_of(scores: Tensor, target: Tensor, ignore: Tensor | None, surrogate: Surrogate, reduction: str) -> Tensor:
    """The same of what has been checked."""
    wide, positive, negative = _pair_masks(scores, target, ignore)
    losses = []
    for row, is_positive, is_negative in zip(wide, positive, negative, strict=True):
        if is_positive.any():
            positive_rank, negative_rank = _row_ranks(row, is_positive, is_negative, surrogate)
            losses.append(1 - (positive_rank / (positive_rank + negative_rank)).mean())
        else:  # 0, attached to the graph, but for a NaN
            losses.append(_nan_if_any(row[is_negative]))
    loss = torch.stack(losses) if losses else wide.sum(1)
    if reduction == "none":
        return loss
    # Queries without positives are left out of the mean; their loss is 0, so the sum need not leave them out.
    return loss.sum() if reduction == "sum" else loss.sum() / positive.any(1).sum().clamp(min=1)


@accepts(SurrogateKeywords)
def smooth_rank(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[SurrogateKeywords]
) -> SmoothRank:
    """:func:`roadmap_ext.smooth_rank` in plain PyTorch, differentiable any number of times.

    Arguments (but ``method``), result and errors are the same.
    """
    surrogate = checked(settings, defaults_of(SurrogateKeywords)).objective.surrogate
    check_scores(scores, target, ignore)
    return smooth_rank_of(scores, target, ignore, surrogate)


def smooth_rank_of(scores: Tensor, target: Tensor, ignore: Tensor | None, surrogate: Surrogate) -> SmoothRank:
    """The same of what has been checked."""
    wide, positive, negative = _pair_masks(scores, target, ignore)
    ranks = [
        _row_ranks(row, is_positive, is_negative, surrogate)
        for row, is_positive, is_negative in zip(wide, positive, negative, strict=True)
    ]
    query, reference = positive.nonzero(as_tuple=True)
    empty, smooth = wide.reshape(-1)[:0], surrogate.surrogate == "smooth"
    return SmoothRank(
        query,
        reference,
        torch.cat([empty if smooth else empty.detach()] + [positive_rank for positive_rank, _ in ranks]),
        torch.cat([empty] + [negative_rank for _, negative_rank in ranks]),
    )


@accepts(PlainEmbeddingKeywords)
def roadmap_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    **settings: Unpack[PlainEmbeddingKeywords],
) -> Tensor:
    """:func:`roadmap_ext.roadmap_loss` in plain PyTorch, differentiable any number of times.

    Arguments (but ``method``, ``chunk_size`` and ``gather_across_devices``), result and errors are the same.
    """
    objective, include_self, ignore_label, *_ = checked(settings, defaults_of(PlainEmbeddingKeywords))
    check_embeddings(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
    alone = ref_emb is None or ref_emb is embeddings
    known, ref_known = labels.long(), (labels if ref_labels is None else ref_labels).long()
    target = known[:, None] == ref_known
    ignore = torch.zeros_like(target)
    if alone and not include_self:
        ignore |= torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if ids is not None and ref_ids is not None and not include_self:
        ignore |= ids.long()[:, None] == ref_ids.long()[None]
    queries = None
    if ignore_label is not None:
        queries = known != ignore_label
        ignore |= ~queries[:, None] | (ref_known == ignore_label)
    references = None if ref_emb is None or alone else blank(ref_emb, ref_known, ignore_label)
    return embedding_loss(blank(embeddings, known, ignore_label), references, target, ignore, objective, queries)


def embedding_loss(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    target: Tensor,
    ignore: Tensor,
    objective: Objective,
    counted: Tensor | None = None,
) -> Tensor:
    """The objective of embeddings [B, D] against references [N, D] (None: themselves) under masks [B, N].

    ``counted`` [B] bool says which rows are queries, for the means; None: all of them.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        queries = savable(_wide(embeddings))
        references = queries if ref_emb is None else savable(_wide(ref_emb))
        dtype = torch.promote_types(queries.dtype, references.dtype)
        queries, references = queries.to(dtype), references.to(dtype)
        if objective.normalize:
            queries, references = _unit(queries), _unit(references)
        scores = queries @ references.T
    weight = objective.calibration_weight
    if counted is None:
        counted = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    if weight == 1:
        return _calibration_loss(scores, target, ignore, objective, counted)
    ap = ap_loss_of(scores, target, ignore, objective.surrogate, objective.reduction)
    if weight == 0:
        return ap
    return (1 - weight) * ap + weight * _calibration_loss(scores, target, ignore, objective, counted)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    """Rows of norm 1. A row of norm below 1e-12 has no direction: it becomes 0, and gets no gradient."""
    with torch.no_grad():
        none = torch.linalg.vector_norm(x, dim=1, keepdim=True) < SMALLEST_NORM
    x = torch.where(none, torch.zeros_like(x), x)
    norm: Tensor = torch.linalg.vector_norm(torch.where(none, torch.ones_like(x), x), dim=1, keepdim=True)
    norm = torch.where(norm.isinf(), torch.nan, norm)  # a direction is lost, and that must not pass for a zero vector
    return x / norm


def _calibration_loss(scores: Tensor, target: Tensor, ignore: Tensor, objective: Objective, counted: Tensor) -> Tensor:
    """Mean hinge of a query's positives below one margin, plus that of its negatives above the other (ROADMAP, eq. 8).

    "violating_pairs" is the released code's: over the whole batch, hinges are averaged over those that are not 0,
    positives and negatives apart. A query's loss then is B times its share, so that the mean is the batch's.
    """
    wide, positive, negative = _pair_masks(scores, target, ignore)
    below = torch.relu(objective.positive_margin - wide)
    above = torch.relu(wide - objective.negative_margin)
    rows = counted.sum().clamp(min=1)
    if objective.calibration_reduction == "per_query":
        per_positive = 1 / positive.sum(1).clamp(min=1).to(wide.dtype)
        per_negative = 1 / negative.sum(1).clamp(min=1).to(wide.dtype)
    else:  # of the queries that are numbers: a NaN stays with its own
        sane = ~(wide.isnan() & (positive | negative)).any(1, keepdim=True)
        per_positive = rows / (sane & positive & (below > 0)).sum().clamp(min=1).to(wide.dtype).expand(len(wide))
        per_negative = rows / (sane & negative & (above > 0)).sum().clamp(min=1).to(wide.dtype).expand(len(wide))
    losses = [
        low[i].sum() * by_positive + high[j].sum() * by_negative + _nan_if_any(row[i | j])
        for row, low, high, i, j, by_positive, by_negative in zip(
            wide, below, above, positive, negative, per_positive, per_negative, strict=True
        )
    ]
    loss = torch.stack(losses) if losses else wide.sum(1)
    if objective.reduction == "none":
        return loss
    return loss.sum() if objective.reduction == "sum" else loss.sum() / rows
