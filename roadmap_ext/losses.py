"""The losses of scores and smooth_rank: autograd Functions around the ops; roadmap_loss: from embeddings, by
embedding_loss.py.

A loss of scores computes its gradient in the forward pass, in the launch that computes the loss, and keeps nothing
else: one [B, N] tensor in the dtype of the scores. smooth_rank keeps the scores and masks, and one number a positive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import distributed, notices, ops, reference
from .autograd import FirstDerivativeOnly, anchor, can_be_read, check_loss, may_overwrite, resolve_method, savable
from .embedding_loss import embedding_loss
from .memory import EmbeddingMemory
from .pairs import Items, blank, from_relation
from .reference import SmoothRank
from .relevance import of_levels, of_relevance
from .settings import (
    EmbeddingKeywords,
    HAPKeywords,
    NDCGKeywords,
    Objective,
    RankKeywords,
    RecallKeywords,
    ScoreKeywords,
    Settings,
    Surrogate,
    accepts,
    checked,
    defaults_of,
)
from .validation import check_flag, check_given, check_levels, check_relation, check_relevance, check_scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RANK, _SCORE = defaults_of(RankKeywords), defaults_of(ScoreKeywords)
_RECALL, _NDCG, _HAP = (defaults_of(keywords) for keywords in (RecallKeywords, NDCGKeywords, HAPKeywords))


class _RankLoss(torch.autograd.Function):
    """The reduced loss; the gradient of each query's loss comes with it and waits for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        anchor: Tensor,
        level: Tensor,
        worth: Tensor | None,
        ignore: Tensor | None,
        objective: Objective,
        method: str,
    ) -> Tensor:
        loss, gradient, factor = ops.rank_loss(scores, level, worth, ignore, objective, True, method)
        ctx.save_for_backward(gradient, factor, anchor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient, factor, anchor = ctx.saved_tensors
        if may_overwrite(gradient):  # no second [B, N]
            torch.ops.roadmap_ext.scale_rows_(gradient, grad_loss, factor)
            result = gradient
        else:
            result = torch.ops.roadmap_ext.scale_rows(gradient, grad_loss, factor)
        if torch.is_grad_enabled():
            result = FirstDerivativeOnly.apply(result, anchor, grad_loss)
        return result, None, None, None, None, None, None


class _SmoothRank(torch.autograd.Function):
    """Ranks of every positive, [nnz], with any gradient arriving at them."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, target: Tensor, ignore: Tensor | None, surrogate: Surrogate, method: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, column, positive_rank, negative_rank, slope = ops.smooth_rank(
            scores, target, ignore, surrogate, True, method
        )
        ctx.surrogate, ctx.method = surrogate, method
        ctx.save_for_backward(scores, savable(target), None if ignore is None else savable(ignore), slope)
        ctx.mark_non_differentiable(query, column)
        if surrogate.surrogate == "sup":
            ctx.mark_non_differentiable(positive_rank)
        return query, column, positive_rank, negative_rank

    @staticmethod
    def backward(
        ctx: Any, _query: None, _column: None, positive_grad: Tensor | None, negative_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        scores, target, ignore, slope = ctx.saved_tensors
        if ctx.surrogate.surrogate == "sup":
            positive_grad = None
        result = ops.smooth_rank_backward(
            scores.detach(), target, ignore, slope, positive_grad, negative_grad, ctx.surrogate, ctx.method
        )
        if torch.is_grad_enabled():
            depends_on = [scores, negative_grad] + ([] if positive_grad is None else [positive_grad])
            result = FirstDerivativeOnly.apply(result, *depends_on)
        return result, None, None, None, None


@accepts(ScoreKeywords)
def ap_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[ScoreKeywords]
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
        rho: slope of the linear part, loss per unit of score; not negative.
        delta: threshold where the linear part begins, in units of the scores; not negative.
        start: jump at t = 0.
        offset: value just above the threshold; None for start + sigma(delta / tau), which makes H- continuous.
        reduction: ``"mean"`` over the queries that have a positive (0 where none has), ``"sum"``, or ``"none"``: [B].
        method: ``"pairwise"`` (fused kernels, |P| x N work, nothing of that size in memory; ``"tiled"`` is an alias),
            ``"sorted"`` (the sorted scan: near-linear in N, whatever |P| is; float64 scores, and rows with infinite
            ones, run pairwise), ``"auto"`` (the faster of the two for each row) or ``"reference"`` (plain PyTorch).

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
    check_scores(scores, target, ignore)
    return _rank_loss(scores, target, None, ignore, checked(settings, _SCORE))


@accepts(RecallKeywords)
def recall_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[RecallKeywords]
) -> Tensor:
    """1 - recall at k of each query, smooth, averaged over several k (Patel et al., CVPR 2022; SupRank).

    With the ranks of :func:`ap_loss`, rank = rank+ + rank-::

        loss = 1 - mean over k of (sum over i in P of sigma((k - rank(i)) / rank_temperature)) / min(|P|, k)

    The default is SupRank's, whose gradient does not vanish for a negative far above a positive; it bounds nothing, and
    may fall below 0. ``surrogate="smooth"`` ranks by sigmoids, as Patel et al. do, who cap the sum at k.

    Arguments, result and errors are those of :func:`ap_loss`, and:

    Args:
        scores: [B, N], target: [B, N] bool, ignore: [B, N] bool or None.
        k: the k: one integer of at least 1, or several.
        rank_temperature: of the sigmoid of ranks, in ranks; positive.

    Example:
        >>> scores = torch.tensor([[0.52, 0.5, 0.1]])
        >>> print(f"{recall_loss(scores, torch.tensor([[True, False, False]]), k=1).item():.4f}")
        0.5298
    """
    check_scores(scores, target, ignore)
    return _rank_loss(scores, target, None, ignore, checked(settings, _RECALL, "recall"))


@accepts(NDCGKeywords)
def ndcg_loss(
    scores: Tensor, relevance: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[NDCGKeywords]
) -> Tensor:
    """1 - NDCG of each query, smooth: an upper bound of 1 - NDCG for relevance of any number of grades.

    What is at least as relevant as a reference counts in its rank by the true step, what is less by H- of
    :func:`ap_loss`::

        rank(i) = 1 + #{j != i: r_j >= r_i, s_j >= s_i} + sum over j with r_j < r_i of H-(s_j - s_i)
        loss    = 1 - sum over i with r_i > 0 of gain(r_i) / log2(1 + rank(i)) / ideal

    ``ideal`` is the same sum for the best order. The whole order counts: there is no cut at k.
    ``surrogate="smooth"`` has sigmoids for all pairs, with gradients.

    Arguments, result and errors are those of :func:`ap_loss`, and:

    Args:
        scores: [B, N].
        relevance: [B, N] how relevant a reference is to a query: 0 for a negative; any dtype. Bool is 0 and 1. At most
            16 different values above 0 in a row; ignored pairs may have any.
        ignore: [B, N] bool or None.
        gain: ``"exponential"``, 2^r - 1 (r up to 64), or ``"linear"``, r.

    Raises:
        ValueError: relevance is negative, NaN or too large, or has more than 16 values above 0 in a row.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.3]])
        >>> print(f"{ndcg_loss(scores, torch.tensor([[1, 3, 0]])).item():.4f}")
        0.6948
    """
    made = checked(settings, _NDCG, "ndcg")
    check_relevance(scores, relevance, ignore, made.objective.ranking.gain)
    return _rank_loss(scores, *of_relevance(relevance, ignore), ignore, made)


@accepts(ScoreKeywords)
def mrr_loss(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[ScoreKeywords]
) -> Tensor:
    """1 - the reciprocal rank of the first positive of each query, smooth: an upper bound of 1 - MRR.

    ``loss = 1 - 1 / (1 + rank-(i))`` for the positive i of the highest score, with rank- of :func:`ap_loss`; other
    positives do not stand in its way, and get no gradient. Arguments, result and errors are those of :func:`ap_loss`.

    Example:
        >>> scores = torch.tensor([[0.52, 0.5, 0.1]])
        >>> print(f"{mrr_loss(scores, torch.tensor([[True, False, True]])).item():.4f}")
        0.1065
    """
    check_scores(scores, target, ignore)
    return _rank_loss(scores, target, None, ignore, checked(settings, _SCORE, "mrr"))


@accepts(HAPKeywords)
def hap_loss(
    scores: Tensor,
    level: Tensor,
    *,
    relevance: Tensor | None = None,
    ignore: Tensor | None = None,
    **settings: Unpack[HAPKeywords],
) -> Tensor:
    """1 - hierarchical AP of each query, smooth: an upper bound of 1 - H-AP (Ramzi et al., HAPPIER, ECCV 2022).

    Levels say what deserves to stand higher, relevance r what it is worth. With rank as in :func:`ndcg_loss`, by
    levels::

        hrank(i) = r_i + sum over j != i of min(r_i, r_j) * step(s_j - s_i)
        loss     = 1 - sum over positives i of hrank(i) / rank(i) / sum of r_i

    ``step`` is the true one; towards higher levels it is leak * t for t < 0 and min(beta * t + gamma, 1) from there on,
    which with the defaults is the true step, too. ``surrogate="smooth"`` has sigmoids for all pairs, with gradients.
    With one level it is :func:`ap_loss`.

    Arguments, result and errors are those of :func:`ap_loss`, and:

    Args:
        scores: [B, N].
        level: [B, N] integers from 0, a negative, to 16 at most; or bool.
        relevance: [B, N] what items are worth to the query, positive, and the same for all items of a level in a row.
            None: the level itself.
        ignore: [B, N] bool or None.
        leak: slope of the step towards a higher level that stands below; not negative. With ``leak`` or ``beta`` each
            positive is compared with each higher one, one by one.
        beta: slope of the step towards a higher level that stands above; not negative.
        gamma: its value at equal scores, from 0 to 1.

    Raises:
        ValueError: levels are negative or above 16, relevance is not positive or differs within a level.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.3]])
        >>> print(f"{hap_loss(scores, torch.tensor([[1, 2, 0]])).item():.4f}")
        0.6400
    """
    made = checked(settings, _HAP, "hap")
    check_levels(scores, level, relevance, ignore)
    return _rank_loss(scores, *of_levels(level, relevance, ignore), ignore, made)


def _rank_loss(
    scores: Tensor, level: Tensor, worth: Tensor | None, ignore: Tensor | None, settings: Settings
) -> Tensor:
    """The loss of ranks of what has been checked: ``level`` [B, N], ``worth`` [B, L] or None."""
    objective, method = settings.objective, resolve_method(settings.method, scores)
    loss: Tensor
    if method == "reference":
        loss = reference.rank_loss(scores, level, worth, ignore, objective)
    elif torch.is_grad_enabled() and scores.requires_grad:
        check_loss(scores.device, objective.ranking.loss)
        loss = _RankLoss.apply(scores, anchor(scores), level, worth, ignore, objective, method)
    else:
        check_loss(scores.device, objective.ranking.loss)
        loss, *_ = ops.rank_loss(scores, level, worth, ignore, objective, False, method)
    # The masks are read where the loss is 0 alone.
    all_zero = len(scores) > 0 and can_be_read(loss) and not loss.any()
    if all_zero and can_be_read(level) and not (level if ignore is None else level.masked_fill(ignore, 0)).any():
        notices.without_positive()
    return loss


@accepts(RankKeywords)
def smooth_rank(
    scores: Tensor, target: Tensor, *, ignore: Tensor | None = None, **settings: Unpack[RankKeywords]
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
    made = checked(settings, _RANK)
    surrogate = made.objective.surrogate
    check_scores(scores, target, ignore)
    method = resolve_method(made.method, scores)
    if method == "reference":
        return reference.smooth_rank_of(scores, target, ignore, surrogate)
    if torch.is_grad_enabled() and scores.requires_grad:
        return SmoothRank(*_SmoothRank.apply(scores, target, ignore, surrogate, method))
    *ranks, _ = ops.smooth_rank(scores, target, ignore, surrogate, False, method)
    return SmoothRank(*ranks)


@accepts(EmbeddingKeywords)
def roadmap_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    ref_emb: Tensor | EmbeddingMemory | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    relevance: Tensor | None = None,
    **settings: Unpack[EmbeddingKeywords],
) -> Tensor:
    """The ROADMAP objective straight from embeddings, by three matrix products and in the memory of a chunk of scores.

    Every query is ranked against all references, by cosine similarity s; those of its own label are its positives P,
    all others its negatives Neg (Ramzi et al., NeurIPS 2021, eq. 9)::

        loss        = (1 - calibration_weight) * AP loss + calibration_weight * calibration loss
        calibration = mean over P of relu(positive_margin - s) + mean over Neg of relu(s - negative_margin)

    The AP loss is :func:`ap_loss`'s. Loss and gradients are computed together, a chunk of queries at a time; for
    backward the embeddings and their gradients are kept. Half types, and anything under autocast, are computed in
    float32 on the CPU, and gradients are rounded to the embeddings' dtype after the gradient of the loss (GradScaler's
    factor) has been multiplied in. On CUDA half types enter the products as they are, and the sums are float32. Second
    derivatives raise.

    Args:
        embeddings: [B, D] one row a query; float16, bfloat16, float32 or float64.
        labels: [B] the class of each, any integer dtype; [B, L] integers, its classes from coarse to fine, each of
            which lies in one of the level before: NDCG and H-AP grade by the number of levels shared, to others those
            of the same coarsest class are positive; or [B, C] bool, which classes it is of: positives share one. None:
            see ``positives`` and ``relevance``. Several labels an item are not gathered across devices, nor in a
            memory.
        ref_emb: [N, D] what to rank: a gallery, a second view of the batch; any float dtype. None, or the very tensor
            that ``embeddings`` is: the batch itself. An :class:`EmbeddingMemory` brings its own labels and ids, and
            needs ``ids``; while it is empty the batch ranks itself.
        ref_labels: [N] its classes, or as many a row as labels; given if and only if ``ref_emb`` is a tensor.
        ids: [B] and ref_ids: [N], any integer dtype: what item a row is. Pairs of equal id are left out: references
            that contain the batch, or older copies of it, say so in this way.
        positives: in place of labels, [B, N] bool, or a tuple of the indices of queries and of references, any integer
            dtype, [n] each: which pairs are positive; all others are negative.
        relevance: in place of labels, [B, N] how relevant a reference is, as for :func:`ndcg_loss`; what is above 0 is
            positive. H-AP ranks by it and weighs by it. Neither goes together with a memory or
            ``gather_across_devices``.
        loss: the loss of ranks: ``"ap"``, ``"recall"``, ``"ndcg"``, ``"mrr"`` or ``"hap"``, the functions of scores of
            these names.
        k: integers, and rank_temperature: as for :func:`recall_loss`.
        gain: as for :func:`ndcg_loss`.
        leak: slope of H-AP's step towards higher levels, and beta: another, and gamma: its value at equal scores, as
            for :func:`hap_loss`.
        alpha: H-AP of labels: the relevance of a pair that shares l of L levels is (l / L)^alpha, divided by how many
            references share as many with the query.
        calibration_weight: weight of the calibration loss, 0 to 1; the AP loss has the rest.
        positive_margin: similarity that positives should have.
        negative_margin: similarity that negatives should stay below.
        margins: ``"auto"`` reads both margins from the data, at each call: 0.1 above and below the similarity that as
            large a share of positives lies below as of negatives above, by up to 128 queries from all over the batch.
            They carry no gradient. Waits for a GPU once, and breaks the graph of torch.compile. None: the margins that
            were given, or 0.9 and 0.6.
        calibration_reduction: ``"per_query"``, the paper's, as above: averaged over all queries, a query without
            positives or negatives contributing the part it has; or ``"violating_pairs"``, the released code's: hinges
            averaged over those pairs of the whole batch that violate a margin, positives and negatives apart, which
            costs a fourth matrix product.
        normalize: scale embeddings and references to norm 1. A row of norm below 1e-12 becomes 0, with gradient 0.
        include_self: count the query itself, and items of its id, as what their labels say. Otherwise they are left
            out: by index where the batch is its own reference, by ids where these are given.
        ignore_label: the label of items whose class is not known, such as -1: they are in no ranking, neither queries
            nor positives nor negatives, and no mean counts them, as if they were not there; of ``reduction="none"``
            they have a 0. None: there is no such label.
        chunk_size: queries a chunk; None takes as many as fit in 64 MiB of scores (256 MiB on a GPU).
        gather_across_devices: rank against the references of all ranks of torch.distributed, which is the batch of all
            of them as one, whatever share each brings. Every rank has to call it, with equal settings, and every rank
            gets the loss of the whole batch (with ``"none"`` those of its own queries). Gradients are exact across
            ranks, for DistributedDataParallel: backward on W ranks makes W times the loss's gradient, which DDP divides
            by W. A memory is not gathered: it is the same on every rank.
        surrogate: ``"sup"``, H- as in :func:`ap_loss`, or ``"smooth"``: Smooth-AP's sigmoid.
        tau: temperature of the sigmoid, in units of similarity; positive.
        rho: slope of H-'s linear part, loss per unit of similarity; not negative.
        delta: how far above a positive the linear part begins, in units of similarity; not negative.
        start: jump of H- at equal similarities.
        offset: value of H- just above the threshold; None makes H- continuous there.
        reduction: ``"mean"``: the AP loss over the queries that have a positive, the calibration loss over all;
            ``"sum"``; or ``"none"``: [B], which costs a fourth matrix product. With ``"violating_pairs"`` a query's
            calibration loss is B times its share of the batch's.
        method: ``"auto"``, ``"pairwise"``, ``"sorted"`` or ``"reference"``, as for :func:`ap_loss`.

    Returns:
        A scalar, or [B] with ``reduction="none"``; float64 if either side is, else float32. 0 for an empty batch.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, only one of two arguments that belong together was given, a setting is out
            of range, the ranks do not agree.
        RuntimeError: the kernels for the device were not built; a torch.func transform is active; torch.distributed is
            not initialised, or another rank failed.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, -0.4]], requires_grad=True)
        >>> loss = roadmap_loss(embeddings, torch.tensor([7, 7, 3]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.3336
    """
    gather = check_flag("gather_across_devices", settings.get("gather_across_devices", False))
    if gather and distributed.several():
        across_ranks = distributed.roadmap_loss
        if torch.compiler.is_compiling():  # it looks at what others bring: no graph's matter. Imports the compiler.
            across_ranks = torch.compiler.disable(across_ranks)
        loss: Tensor = across_ranks(
            embeddings, labels, ref_emb, ref_labels, ids, ref_ids, positives, relevance, settings
        )
        return loss
    beside = "gather_across_devices" if gather else "an EmbeddingMemory" if isinstance(ref_emb, EmbeddingMemory) else ""
    check_given(labels, positives, relevance, beside)
    if gather:
        distributed.world_size()  # raises where torch.distributed is not initialised
    if positives is not None or relevance is not None:
        assert not isinstance(ref_emb, EmbeddingMemory)  # as checked above
        made = checked(settings)
        gain = made.objective.ranking.gain if made.objective.ranking.loss == "ndcg" else "linear"
        listed = check_relation(embeddings, labels, ref_emb, ref_labels, ids, ref_ids, positives, relevance, gain)
        ref_emb = None if ref_emb is embeddings else ref_emb
        given = positives if listed is None else listed
        pairs = from_relation(embeddings, ref_emb, ids, ref_ids, given, relevance, made.include_self)
        return embedding_loss(embeddings, ref_emb, pairs, made)
    assert labels is not None  # as checked above
    made, items = (
        checked(settings),
        Items.checked(
            embeddings, labels, ref_emb, ref_labels, ids, ref_ids, several=not isinstance(ref_emb, EmbeddingMemory)
        ),
    )
    references, ignore_label = items.ref_emb, made.ignore_label
    if references is not None and not isinstance(ref_emb, EmbeddingMemory):  # whose entries are numbers
        references = blank(references, items.ref_labels, ignore_label)
    pairs = items.pairs(made.include_self, ignore_label)
    return embedding_loss(blank(embeddings, labels, ignore_label), references, pairs, made)
