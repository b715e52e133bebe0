"""The losses in plain PyTorch, as the papers write them: the oracle of every kernel, and readable before it is fast.

One query at a time, |P| x N in memory, differentiable by autograd alone (twice, too), on any device. float16 and
bfloat16 scores and embeddings are widened to float32 first, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from . import margins
from .autograd import savable
from .pairs import _ignored, blank
from .relevance import of_levels, of_relevance
from .settings import (
    GRADED,
    SMALLEST_NORM,
    Objective,
    PlainEmbeddingKeywords,
    PlainHAPKeywords,
    PlainNDCGKeywords,
    PlainRecallKeywords,
    PlainScoreKeywords,
    Ranking,
    Surrogate,
    SurrogateKeywords,
    accepts,
    checked,
    defaults_of,
)
from .validation import check_embeddings, check_levels, check_relation, check_relevance, check_scores

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


def _row_ranks(
    row: Tensor, positive: Tensor, negative: Tensor, surrogate: Surrogate, above: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rank+ and rank- of each positive of one query, [P] each; positives of a level ``above`` count for rank+."""
    positives, negatives = row[positive], row[negative]
    others = positives if above is None else torch.cat([positives, row[above]])
    negative_rank = surrogate_step(_gaps(negatives, positives), surrogate).sum(1)
    if surrogate.surrogate == "smooth":
        itself = torch.eye(len(positives), len(others), dtype=torch.bool, device=row.device)
        positive_rank = 1 + (surrogate_step(_gaps(others, positives), surrogate) * ~itself).sum(1)
    else:  # the true step: itself, and every other positive at least as high
        positive_rank = (others.detach()[None] >= positives.detach()[:, None]).sum(1).to(row.dtype)
    nan = _nan_if_any(row[positive | negative])
    return positive_rank + nan.detach(), negative_rank + nan


class _Ranked(NamedTuple):
    """The positives of one query, level after level."""

    score: Tensor  # [P]
    level: Tensor  # [P]
    worth: Tensor  # [P]
    positive_rank: Tensor  # [P] among those of its level and of higher ones
    negative_rank: Tensor  # [P] among all others
    surrogate: Surrogate

    @property
    def rank(self) -> Tensor:
        """[P] among all."""
        return self.positive_rank + self.negative_rank


def _ranked(row: Tensor, level: Tensor, kept: Tensor, worth: Tensor | None, surrogate: Surrogate) -> _Ranked:
    """``level`` [N] is 0 for a negative; ``worth`` [L] says what an item of each level is worth (None: 1)."""
    scores, levels, ranks = [], [], []
    for each in torch.unique(level[kept & (level > 0)]):
        positive, negative, above = (kept & mask for mask in (level == each, level < each, level > each))
        ranks.append(_row_ranks(row, positive, negative, surrogate, above))
        scores.append(row[positive])
        levels.append(level[positive].long())
    of = torch.cat(levels)
    worths = torch.ones_like(of, dtype=row.dtype) if worth is None else worth.to(row)[of - 1]
    positive_rank, negative_rank = (torch.cat(each) for each in zip(*ranks, strict=True))
    return _Ranked(torch.cat(scores), of, worths, positive_rank, negative_rank, surrogate)


# --- the losses of ranks, of one query -------------------------------------------------------------------------------


def _ap(query: _Ranked, ranking: Ranking) -> Tensor:
    return 1 - (query.positive_rank / query.rank).mean()


def _recall(query: _Ranked, ranking: Ranking) -> Tensor:
    k = query.rank.new_tensor(ranking.k)
    found = torch.sigmoid((k[:, None] - query.rank) / ranking.rank_temperature).sum(1)
    return 1 - (found / k.clamp(max=len(query.rank))).mean()


def _ndcg(query: _Ranked, ranking: Ranking) -> Tensor:
    gain = torch.exp2(query.worth) - 1 if ranking.gain == "exponential" else query.worth
    ideal_rank = torch.arange(1, 1 + len(query.rank), device=query.rank.device, dtype=query.rank.dtype)
    ideal = (gain.sort(descending=True).values / torch.log2(1 + ideal_rank)).sum()
    return 1 - (gain / torch.log2(1 + query.rank)).sum() / ideal


def _mrr(query: _Ranked, ranking: Ranking) -> Tensor:
    before = query.negative_rank[query.score == query.score.max()].mean()  # equal scores, equal ranks
    return 1 - 1 / (1 + before)


def _hap(query: _Ranked, ranking: Ranking) -> Tensor:
    gap = _gaps(query.score, query.score)
    if query.surrogate.surrogate == "smooth":
        step = surrogate_step(gap, query.surrogate)
    else:
        rising = torch.where(gap < 0, ranking.leak * gap, (ranking.beta * gap + ranking.gamma).clamp(max=1))
        rising = rising if ranking.leak or ranking.beta else ranking.gamma * (gap >= 0)
        step = torch.where(query.level[None] > query.level[:, None], rising, (gap >= 0).to(gap.dtype))
    itself = torch.eye(len(gap), dtype=torch.bool, device=gap.device)
    shared = torch.minimum(query.worth[None], query.worth[:, None])
    hierarchical_rank = (shared * torch.where(itself, torch.ones_like(step), step)).sum(1)
    return 1 - (hierarchical_rank / query.rank).sum() / query.worth.sum()


_LOSSES: dict[str, Callable[[_Ranked, Ranking], Tensor]] = {
    "ap": _ap,
    "recall": _recall,
    "ndcg": _ndcg,
    "mrr": _mrr,
    "hap": _hap,
}


def _nan_if_any(kept: Tensor) -> Tensor:
    """0, or NaN with a NaN gradient: a NaN reaches its query's loss whatever it was compared with."""
    return kept[kept.isnan()].square().sum()


def _pair_masks(scores: Tensor, target: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide, positive = scores if scores.dtype == torch.float64 else scores.float(), target > 0
    ignored = torch.zeros_like(positive) if ignore is None else ignore
    return wide, positive & ~ignored, ~positive & ~ignored


@accepts(PlainScoreKeywords)
def ap_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[PlainScoreKeywords]
) -> Tensor:
    """:func:`roadmap_ext.ap_loss` in plain PyTorch, differentiable any number of times.

    Arguments (but ``method``), result and errors are the same.
    """
    objective = checked(settings, defaults_of(PlainScoreKeywords)).objective
    check_scores(scores, target, ignore)
    return rank_loss(scores, target, None, ignore, objective)


@accepts(PlainRecallKeywords)
def recall_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[PlainRecallKeywords]
) -> Tensor:
    """:func:`roadmap_ext.recall_loss` in plain PyTorch, as :func:`ap_loss` here."""
    objective = checked(settings, defaults_of(PlainRecallKeywords), "recall").objective
    check_scores(scores, target, ignore)
    return rank_loss(scores, target, None, ignore, objective)


@accepts(PlainScoreKeywords)
def mrr_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[PlainScoreKeywords]
) -> Tensor:
    """:func:`roadmap_ext.mrr_loss` in plain PyTorch, as :func:`ap_loss` here."""
    objective = checked(settings, defaults_of(PlainScoreKeywords), "mrr").objective
    check_scores(scores, target, ignore)
    return rank_loss(scores, target, None, ignore, objective)


@accepts(PlainNDCGKeywords)
def ndcg_loss(
    scores: Tensor, relevance: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[PlainNDCGKeywords]
) -> Tensor:
    """:func:`roadmap_ext.ndcg_loss` in plain PyTorch, as :func:`ap_loss` here."""
    objective = checked(settings, defaults_of(PlainNDCGKeywords), "ndcg").objective
    check_relevance(scores, relevance, ignore, objective.ranking.gain)
    return rank_loss(scores, *of_relevance(relevance, ignore), ignore, objective)


@accepts(PlainHAPKeywords)
def hap_loss(
    scores: Tensor,
    level: Tensor,
    *,
    relevance: Tensor | None = None,
    ignore: Tensor | None = None,
    **settings: Unpack[PlainHAPKeywords],
) -> Tensor:
    """:func:`roadmap_ext.hap_loss` in plain PyTorch, as :func:`ap_loss` here."""
    objective = checked(settings, defaults_of(PlainHAPKeywords), "hap").objective
    check_levels(scores, level, relevance, ignore)
    return rank_loss(scores, *of_levels(level, relevance, ignore), ignore, objective)


def rank_loss(
    scores: Tensor, level: Tensor, worth: Tensor | None, ignore: Tensor | None, objective: Objective
) -> Tensor:
    """The loss of the ranks that an objective names, of what has been checked.

    ``level`` [B, N] is 0, or False, for a negative; ``worth`` [B, L] says what an item of each level is worth to a
    query (None: all positives are worth the same).
    """
    wide, positive, negative = _pair_masks(scores, level, ignore)
    ranking = objective.ranking
    if ranking.loss not in GRADED:
        level, worth = positive, None
    loss_of, losses = _LOSSES[ranking.loss], []
    for q, row in enumerate(wide):
        kept = positive[q] | negative[q]
        if positive[q].any():
            of_levels = None if worth is None else worth[q]
            losses.append(loss_of(_ranked(row, level[q], kept, of_levels, objective.surrogate), ranking))
        else:  # 0, attached to the graph, but for a NaN
            losses.append(_nan_if_any(row[kept]))
    loss = torch.stack(losses) if losses else wide.sum(1)
    if objective.reduction == "none":
        return loss
    # Queries without positives are left out of the mean; their loss is 0, so the sum need not leave them out.
    return loss.sum() if objective.reduction == "sum" else loss.sum() / positive.any(1).sum().clamp(min=1)


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
    labels: Tensor | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    relevance: Tensor | None = None,
    **settings: Unpack[PlainEmbeddingKeywords],
) -> Tensor:
    """:func:`roadmap_ext.roadmap_loss` in plain PyTorch, differentiable any number of times.

    Arguments (but ``method``, ``chunk_size`` and ``gather_across_devices``), result and errors are the same.
    """
    objective, include_self, ignore_label, *_ = checked(settings, defaults_of(PlainEmbeddingKeywords))
    listed = None
    if positives is not None or relevance is not None:
        gain = objective.ranking.gain if objective.ranking.loss == "ndcg" else "linear"
        listed = check_relation(embeddings, labels, ref_emb, ref_labels, ids, ref_ids, positives, relevance, gain)
    elif labels is None:
        raise TypeError("labels must be a torch.Tensor of integers, got None; or pass positives or relevance")
    else:
        check_embeddings(embeddings, labels, ref_emb, ref_labels, ids, ref_ids, several=True)
    alone = ref_emb is None or ref_emb is embeddings
    columns = len(embeddings if ref_emb is None else ref_emb)
    worth = queries = None
    ignore = torch.zeros(len(embeddings), columns, dtype=torch.bool, device=embeddings.device)
    if alone and not include_self:
        ignore |= torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    if labels is None:
        if listed is not None:
            target = torch.zeros_like(ignore)
            target[listed] = True
        elif relevance is None:
            target = cast(Tensor, positives)
        else:
            target, worth = of_relevance(relevance, None)
    else:
        known, ref_known = labels.long(), (labels if ref_labels is None else ref_labels).long()
        if labels.dtype == torch.bool and labels.dim() == 2:
            target = known @ ref_known.T > 0
        elif labels.dim() == 2:  # the number of levels shared, from the coarsest on
            target = (known[:, None] == ref_known[None]).long().cumprod(2).sum(2)
        else:
            target = known[:, None] == ref_known
        if ignore_label is not None and labels.dtype != torch.bool:
            queries = ~_ignored(known, ignore_label)
            ignore |= ~queries[:, None] | _ignored(ref_known, ignore_label)
            embeddings = blank(embeddings, known, ignore_label)
            ref_emb = ref_emb if ref_emb is None or alone else blank(ref_emb, ref_known, ignore_label)
    if ids is not None and ref_ids is not None and not include_self:
        ignore |= ids.long()[:, None] == ref_ids.long()[None]
    if labels is not None and target.dtype == torch.int64:
        levels = torch.arange(1, 1 + labels.shape[1], dtype=torch.float64, device=target.device)
        number = (target.masked_fill(ignore, 0)[:, :, None] == levels).sum(1).clamp(min=1)
        relative = (levels / len(levels)) ** objective.ranking.alpha
        worth = relative / number if objective.ranking.loss == "hap" else levels.expand_as(number)
    return embedding_loss(embeddings, None if alone else ref_emb, target, ignore, objective, queries, worth)


def embedding_loss(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    target: Tensor,
    ignore: Tensor,
    objective: Objective,
    counted: Tensor | None = None,
    worth: Tensor | None = None,
) -> Tensor:
    """The objective of embeddings [B, D] against references [N, D] (None: themselves) under masks [B, N].

    ``counted`` [B] bool says which rows are queries, for the means; None: all of them. ``target`` may hold levels, and
    ``worth`` [B, L] what they are worth: see :func:`rank_loss`.
    """
    objective = margins.to_fit(objective, embeddings, ref_emb, lambda part: (target[part], ignore[part]))
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
    ranks = rank_loss(scores, target, worth, ignore, objective)
    if weight == 0:
        return ranks
    return (1 - weight) * ranks + weight * _calibration_loss(scores, target, ignore, objective, counted)


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
