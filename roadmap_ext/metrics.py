"""Exact retrieval metrics, for evaluation: no surrogate, no gradient.

Each query's metrics follow from the ranks of its positives. On the CPU a kernel counts them (csrc/cpu/ranking.h); on
other devices, and where there are no kernels, plain PyTorch sorts. Both give the same ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import numpy
import torch
from torch import Tensor

from . import decomposability, ops
from .embedding_loss import _chunk, _done_with
from .extension import _REFERENCE_ONLY
from .pairs import from_labels
from .settings import SMALLEST_NORM
from .validation import (
    as_tensor,
    check_batches,
    check_chunk_size,
    check_counts,
    check_embeddings,
    check_flag,
    check_ignore_label,
    check_ks,
    check_progress,
    check_scores,
    one_of,
)

# Scores that are worked on at a time: bounds the memory beyond the input to a few such tensors where they are sorted or
# widened.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}
# Bytes of a chunk of scores for the kernel. A smaller one would be nearer to the caches, but the products would lose
# more than this gains.
_BUDGET = 64 << 20

_REDUCTIONS = ("mean", "none")
# In place of the smallest rank of a positive, where there is no positive and where a score is NaN.
_NO_POSITIVE, _NO_RANK = 1 << 62, 0

_T = TypeVar("_T")
Array: TypeAlias = Tensor | numpy.ndarray[Any, Any]


def _of_arrays(function: Callable[..., _T]) -> Callable[..., _T]:
    """The same function, which takes NumPy arrays as well: as tensors on the same memory."""

    @wraps(function)
    def taking(*arguments: Any, **keywords: Any) -> _T:
        made: dict[int, Any] = {}  # that the same array twice is the same tensor twice

        def tensor(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [tensor(each) for each in value]
            return made.setdefault(id(value), as_tensor(value)) if isinstance(value, numpy.ndarray) else value

        given = [tensor(value) for value in arguments]
        named = {name: tensor(value) for name, value in keywords.items()}
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        if tensors and all(value.is_meta for value in tensors):
            raise ValueError("metrics are of values, and tensors on the meta device have none")
        return function(*given, **named)

    return taking


def average_precision(scores: Array, target: Array, ignore: Array | None = None) -> Tensor:
    """Exact average precision of each query.

    AP = 1/|P| * sum over positives i of rank+(i) / rank(i), where rank(i) counts the references, and rank+(i) the
    positives, with a score of at least s_i: ties count against the ranking, as in :func:`roadmap_ext.ap_loss`. Where no
    scores are tied this is scikit-learn's ``average_precision_score``.

    Args:
        scores: [B, N] float16, bfloat16, float32 or float64. Tensors may be NumPy arrays.
        target: [B, N] bool, True where relevant.
        ignore: [B, N] bool, True where a pair is left out; None for none.

    Returns:
        [B], float64 for float64 scores and float32 for all others; NaN for a query without positives or with a NaN
        score that is not ignored.

    Raises:
        TypeError, ValueError: as :func:`roadmap_ext.ap_loss`.
    """
    return _average_precision(scores, target, ignore)


@_of_arrays
@torch.no_grad()
def _average_precision(scores: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
    check_scores(scores, target, ignore)
    rows, columns = scores.shape
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    kernel = _has_kernel(scores)
    if kernel and scores.dtype == dtype:
        return _masked(scores, target, ignore)[:, 0].to(dtype)
    out = scores.new_empty(rows, dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS.get(scores.device.type, 1 << 20) // max(1, columns))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        masks = target[part], None if ignore is None else ignore[part]
        values = _masked(scores[part].to(dtype), *masks) if kernel else _sorted(scores[part], *masks)[0]
        out[part] = values[:, 0]
    return out


@overload
def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    ids: Array | None = None,
    ref_ids: Array | None = None,
    k: int | Iterable[int] = (1, 10, 100),
    normalize: bool = True,
    ignore_label: int | None = None,
    reduction: Literal["mean"] = "mean",
    chunk_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> dict[str, float]: ...


@overload
def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    ids: Array | None = None,
    ref_ids: Array | None = None,
    k: int | Iterable[int] = (1, 10, 100),
    normalize: bool = True,
    ignore_label: int | None = None,
    reduction: Literal["none"],
    chunk_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> dict[str, Tensor]: ...


@_of_arrays
@torch.no_grad()
def retrieval_metrics(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    k: int | Iterable[int] = (1, 10, 100),
    normalize: bool = True,
    ignore_label: int | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> dict[str, float] | dict[str, Tensor]:
    """Exact mAP, mAP@R, R-precision and R@k of embeddings, over any number of references in the memory of a chunk.

    With rank(i) and rank+(i) of a positive i as in :func:`average_precision` and R the number of positives:

        mAP           the mean over queries of AP = 1/R * sum over positives of rank+ / rank
        mAP@R         the same sum over the positives of rank <= R alone (Musgrave et al., "A Metric Learning Reality
                      Check", ECCV 2020)
        R-precision   the share of positives of rank <= R
        R@k           1 if some positive has rank <= k, else 0: the hit rate, called recall at k in image retrieval.
                      (In text retrieval recall at k is another number, the share of positives of rank <= k.)

    Ties count against the ranking. The query itself is left out: by index where the batch is its own reference, by ids
    where these are given, and never by its place in the ranking, which a duplicate may hold.

    Args:
        embeddings: [B, D] one row a query; float16, bfloat16, float32 or float64. Tensors may be NumPy arrays.
        labels: [B] the class of each, any integer dtype.
        ref_emb: [N, D] what to rank; any float dtype. None, or the very tensor that ``embeddings`` is: the batch
            itself.
        ref_labels: [N] its classes; given if and only if ``ref_emb`` is.
        ids: [B] and ref_ids: [N], any integer dtype: what item a row is. Pairs of equal id are left out.
        k: the k of R@k: one integer of at least 1, or several in the order in which they are to be returned.
        normalize: rank by cosine similarity, where a row of norm below 1e-12 has similarity 0 to all; else by plain
            products.
        ignore_label: the label of items whose class is not known, such as -1: they are in no ranking, neither queries
            nor positives nor negatives. None: there is no such label.
        reduction: ``"mean"`` over the queries that have a positive; or ``"none"``, each query's own.
        chunk_size: queries a chunk; None takes as many as fit in 64 MiB of scores (8 Mi scores on a GPU, where sorting
            takes ten times their memory).
        progress: True shows a bar (which needs tqdm); or what is called after each chunk with the number of queries in
            it, such as ``tqdm(total=len(embeddings)).update``. None and False for neither.

    Returns:
        "mAP", "mAP@R", "R-precision" and "R@1", ... in this order. With ``reduction="mean"`` floats; NaN if no query
        has a positive, or one that has meets a NaN among its scores. With ``"none"`` [B] tensors on the device of the
        embeddings, float64 (float32 on a device without it); NaN for a query without positives, or with a NaN among its
        scores.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, only one of two arguments that belong together was given, a setting is out
            of range.
        ImportError: ``progress=True`` without tqdm.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, -0.4]])
        >>> retrieval_metrics(embeddings, torch.tensor([7, 7, 3]), k=(1, 2))
        {'mAP': 0.75, 'mAP@R': 0.5, 'R-precision': 0.5, 'R@1': 0.5, 'R@2': 1.0}
    """
    check_embeddings(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
    ks = check_ks(k)
    check_flag("normalize", normalize)
    check_ignore_label("ignore_label", ignore_label)
    one_of("reduction", reduction, _REDUCTIONS)
    check_chunk_size("chunk_size", chunk_size)
    report, close = _reporter(progress, len(embeddings))
    alone = ref_emb is None or ref_emb is embeddings
    ref_labels = labels if ref_labels is None else ref_labels
    dtype = _scores_dtype(embeddings, ref_emb)
    with torch.autocast(embeddings.device.type, enabled=False):
        queries = _vectors(embeddings, dtype, normalize)
        references = queries if ref_emb is None or alone else _vectors(ref_emb, dtype, normalize)
        evaluate = _by_kernel if _has_kernel(queries) else _by_sorting
        try:
            values, smallest = evaluate(
                queries, references, labels, ref_labels, ids, ref_ids, alone, ignore_label, chunk_size, report
            )
        finally:
            close()
    metrics = dict(zip(("mAP", "mAP@R", "R-precision"), values.unbind(1), strict=True))
    undefined = (smallest == _NO_POSITIVE) | (smallest == _NO_RANK)
    for each in ks:
        hit = (smallest <= min(each, _NO_POSITIVE)).to(values.dtype)
        metrics[f"R@{each}"] = hit.masked_fill(undefined, math.nan)
    if reduction == "none":
        return metrics
    counted = smallest != _NO_POSITIVE
    rows = torch.stack([*metrics.values()], dim=1)[counted].T.tolist()
    # Summed exactly: the result depends on no order, and so on no number of threads.
    return {name: math.fsum(row) / len(row) if row else math.nan for name, row in zip(metrics, rows, strict=True)}


class DecomposabilityGap(NamedTuple):
    """The mean over the queries that have a positive; NaN if none has."""

    gap: float  # batch_ap - ap
    batch_ap: float
    ap: float
    bound: float
    exact: bool  # whether the bound is one for every query; else it is an estimate, from below


class DecomposabilityGaps(NamedTuple):
    """Each query's own, [B]; NaN for a query without positives."""

    gap: Tensor  # float64: batch_ap - ap
    batch_ap: Tensor  # float64: the mean AP of the batches that hold a positive of it
    ap: Tensor  # float64: of all references together
    bound: Tensor  # float64: the greatest gap that batches of these counts can have if batch_ap is 1
    exact: Tensor  # bool: whether it is; else an estimate, from below


@overload
def decomposability_gap(
    embeddings: Array,
    labels: Array,
    batches: Array | Sequence[Array],
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    ids: Array | None = None,
    ref_ids: Array | None = None,
    normalize: bool = True,
    ignore_label: int | None = None,
    reduction: Literal["mean"] = "mean",
    chunk_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> DecomposabilityGap: ...


@overload
def decomposability_gap(
    embeddings: Array,
    labels: Array,
    batches: Array | Sequence[Array],
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    ids: Array | None = None,
    ref_ids: Array | None = None,
    normalize: bool = True,
    ignore_label: int | None = None,
    reduction: Literal["none"],
    chunk_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> DecomposabilityGaps: ...


@_of_arrays
@torch.no_grad()
def decomposability_gap(
    embeddings: Tensor,
    labels: Tensor,
    batches: Tensor | Sequence[Tensor],
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    normalize: bool = True,
    ignore_label: int | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> DecomposabilityGap | DecomposabilityGaps:
    """By how much the AP that training sees, the mean over batches, exceeds the AP of the whole set.

    For a query and a split of its references into batches (Ramzi et al., "Robust and Decomposable Average Precision for
    Image Retrieval", NeurIPS 2021),

        gap = 1/K * sum over batches b of AP_b - AP

    which may be negative. AP is :func:`average_precision`. A batch without a positive of the query has no AP, and, as
    in training, it is left out of that query's mean: K counts the others. Its negatives are in the AP of the whole.

    Beside it stands the bound: the greatest gap that batches with these numbers of positives and negatives can have
    *when every batch AP is 1*. It does not hold where ``batch_ap`` is less. It is

        1 - 1/|P| * sum over b, and over j = 1 .. |P_b|, of (j + p_b) / (j + p_b + n_b)

    where p_b and n_b count the positives and negatives of the batches before b, for the worst order of the batches.
    That order is found where up to 10 batches hold positives of the query, and for any number that are all alike in
    both counts. Else the bound is that of one order, by falling share of negatives: an estimate from below, with
    ``exact`` False.

    Args:
        embeddings: [B, D], labels: [B], ref_emb: [N, D], ref_labels: [N], ids: [B], ref_ids: [N], normalize,
            ignore_label, chunk_size, progress: as of :func:`retrieval_metrics`. Each query meets all references but
            itself.
        batches: [N] the number of each reference's batch, any integers; or a list of int64 tensors, the references of
            each batch, in which each reference occurs once.
        reduction: ``"mean"`` over the queries that have a positive; or ``"none"``, each query's own.

    Returns:
        DecomposabilityGap of floats, ``exact`` if the bounds of all queries are; or DecomposabilityGaps of tensors [B].

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, ``batches`` is no partition of the references, a setting is out of range.
        ImportError: ``progress=True`` without tqdm.

    Example:
        Of the first query both batches are in order, and yet an image of class 3 ranks above one of class 7.

        >>> embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6], [0.9, -0.4]])
        >>> labels = torch.tensor([7, 7, 3, 3, 7])
        >>> of = decomposability_gap(embeddings, labels, torch.tensor([0, 0, 0, 1, 1]), reduction="none")
        >>> of.batch_ap[0].item(), round(of.ap[0].item(), 4), round(of.bound[0].item(), 4)
        (1.0, 0.8333, 0.1667)
    """
    check_embeddings(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
    check_flag("normalize", normalize)
    check_ignore_label("ignore_label", ignore_label)
    one_of("reduction", reduction, _REDUCTIONS)
    check_chunk_size("chunk_size", chunk_size)
    alone = ref_emb is None or ref_emb is embeddings
    ref_labels = labels if ref_labels is None else ref_labels
    number = check_batches(batches, len(ref_labels), embeddings.device)
    report, close = _reporter(progress, len(embeddings))
    # Batch after batch, so that each is a slice.
    order, sizes = number.argsort(stable=True), number.bincount().tolist()
    dtype = _scores_dtype(embeddings, ref_emb)
    columns, parts = len(order), []
    step = _chunk_rows(len(embeddings), _BUDGET // max(1, columns * dtype.itemsize), chunk_size)
    with torch.autocast(embeddings.device.type, enabled=False):
        queries = _vectors(embeddings, dtype, normalize)
        references = (queries if ref_emb is None or alone else _vectors(ref_emb, dtype, normalize))[order]
        try:
            for begin in range(0, max(1, len(queries)), step):
                part = slice(begin, begin + step)
                masks = _pairs(part, order, labels, ref_labels, ids, ref_ids, alone, ignore_label)
                parts.append(_gaps(queries[part] @ references.T, *masks, sizes))
                report(len(masks[0]))
        finally:
            close()
    return _reduced(parts, reduction)


@overload
def decomposability_gap_of_scores(
    scores: Array,
    target: Array,
    batches: Array | Sequence[Array],
    ignore: Array | None = None,
    *,
    reduction: Literal["mean"] = "mean",
) -> DecomposabilityGap: ...


@overload
def decomposability_gap_of_scores(
    scores: Array,
    target: Array,
    batches: Array | Sequence[Array],
    ignore: Array | None = None,
    *,
    reduction: Literal["none"],
) -> DecomposabilityGaps: ...


@_of_arrays
@torch.no_grad()
def decomposability_gap_of_scores(
    scores: Tensor,
    target: Tensor,
    batches: Tensor | Sequence[Tensor],
    ignore: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> DecomposabilityGap | DecomposabilityGaps:
    """:func:`decomposability_gap` from scores.

    Args:
        scores: [B, N], target: [B, N], ignore: [B, N], as of :func:`average_precision`.
        batches: the batch of each of the N references, and reduction: as of :func:`decomposability_gap`.

    Returns:
        DecomposabilityGap, or with ``reduction="none"`` DecomposabilityGaps.

    Raises:
        TypeError, ValueError: as these two.

    Example:
        >>> scores, target = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]])
        >>> decomposability_gap_of_scores(scores, target, torch.tensor([0, 0, 1, 1])).gap  # 1 - (1 + 2/3) / 2
        0.16666666666666674
    """
    check_scores(scores, target, ignore)
    one_of("reduction", reduction, _REDUCTIONS)
    number = check_batches(batches, scores.shape[1], scores.device)
    order, sizes = number.argsort(stable=True), number.bincount().tolist()
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    step = max(1, _CHUNK_ELEMENTS.get(scores.device.type, 1 << 20) // max(1, len(order)))
    parts = []
    for begin in range(0, max(1, len(scores)), step):
        part = slice(begin, begin + step)
        kept = torch.zeros_like(target[part]) if ignore is None else ignore[part]
        parts.append(_gaps(scores[part].to(dtype)[:, order], target[part][:, order], kept[:, order], sizes))
    return _reduced(parts, reduction)


def decomposability_bound(positives: Array, negatives: Array) -> tuple[Tensor, Tensor]:
    """The bound of :func:`decomposability_gap`, from counts.

    Args:
        positives: [B, K] how many positives of each query are in each batch, any integer dtype.
        negatives: [B, K] how many negatives.

    Returns:
        The bound [B] float64, NaN for a query without positives; and whether it is exact [B] bool, else an estimate.

    Raises:
        TypeError: not integer tensors.
        ValueError: shapes or devices differ, or a count is negative.

    Example:
        >>> decomposability_bound(torch.tensor([[1, 1]]), torch.tensor([[1, 1]]))
        (tensor([0.1667], dtype=torch.float64), tensor([True]))
    """
    return _bound(positives, negatives)


@_of_arrays
def _bound(positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    check_counts(positives, negatives)
    return decomposability.bound(positives.long(), negatives.long(), _widest(positives.device))


def _gaps(scores: Tensor, target: Tensor, ignore: Tensor, sizes: list[int]) -> DecomposabilityGaps:
    """Of scores [b, N] whose columns are those of one batch after the other."""
    ap = _each_ap(scores, target, ignore)
    sums = torch.zeros_like(ap)
    positives, negatives = torch.zeros(2, len(scores), len(sizes), dtype=torch.int64, device=scores.device)
    parts = zip(*(torch.split(tensor, sizes, dim=1) for tensor in (scores, target, ignore)), strict=True)
    for b, (values, relevant, left_out) in enumerate(parts):
        positives[:, b], negatives[:, b] = (relevant & ~left_out).sum(1), (~relevant & ~left_out).sum(1)
        sums += _each_ap(values, relevant, left_out).masked_fill(positives[:, b] == 0, 0)
    batch_ap = sums / (positives > 0).sum(1)
    return DecomposabilityGaps(batch_ap - ap, batch_ap, ap, *decomposability.bound(positives, negatives, ap.dtype))


def _each_ap(scores: Tensor, target: Tensor, ignore: Tensor) -> Tensor:
    return _masked(scores, target, ignore)[:, 0] if _has_kernel(scores) else _sorted(scores, target, ignore)[0][:, 0]


def _reduced(parts: list[DecomposabilityGaps], reduction: str) -> DecomposabilityGap | DecomposabilityGaps:
    """Of all chunks together."""
    each = DecomposabilityGaps(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if reduction == "none":
        return each
    counted = ~each.bound.isnan()  # NaN without positives alone; a NaN among the scores is to be seen
    rows = torch.stack(each[:4], dim=1)[counted].T.tolist()
    gap, batch_ap, ap, bound = (math.fsum(row) / len(row) if row else math.nan for row in rows)
    return DecomposabilityGap(gap, batch_ap, ap, bound, bool(each.exact.all()))


def _by_kernel(
    queries: Tensor,
    references: Tensor,
    labels: Tensor,
    ref_labels: Tensor,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    alone: bool,
    ignore_label: int | None,
    chunk_size: int | None,
    report: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """AP, mAP@R and R-precision, [B, 3] float64, NaN without positives; and the smallest rank of one, [B] int64.

    Queries and references come normalised, [B, D] and [N, D].
    """
    pairs = from_labels(labels, ref_labels, ids, ref_ids, alone, include_self=False, ignore_label=ignore_label)
    rows, columns = len(queries), len(references)
    values = queries.new_empty((rows, 4), dtype=torch.float64)
    step = _chunk_rows(rows, _BUDGET // max(1, columns * queries.element_size()), chunk_size)
    buffer = _chunk(references, min(step, rows), columns, references.dtype)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        vectors = queries[part]
        scores = torch.mm(vectors, references.T, out=buffer[: len(vectors)])
        values[part] = ops.rank_metrics(scores, pairs.rows(part))
        report(len(vectors))
    _done_with(buffer)
    return values[:, :3], values[:, 3].nan_to_num(nan=_NO_RANK, posinf=_NO_POSITIVE).long()


def _by_sorting(
    queries: Tensor,
    references: Tensor,
    labels: Tensor,
    ref_labels: Tensor,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    alone: bool,
    ignore_label: int | None,
    chunk_size: int | None,
    report: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch on any device, without waiting for it; float32 where there is no float64."""
    rows, columns = len(queries), len(references)
    values = queries.new_empty((rows, 3), dtype=_widest(queries.device))
    smallest = torch.empty(rows, dtype=torch.int64, device=queries.device)
    largest = _CHUNK_ELEMENTS.get(queries.device.type, _CHUNK_ELEMENTS["cuda"])
    step = _chunk_rows(rows, largest // max(1, columns), chunk_size)
    index = torch.arange(columns, device=queries.device)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        masks = _pairs(part, index, labels, ref_labels, ids, ref_ids, alone, ignore_label)
        values[part], smallest[part] = _sorted(queries[part] @ references.T, *masks)
        report(part.stop - begin)
    return values, smallest


def _pairs(
    part: slice,
    order: Tensor,
    labels: Tensor,
    ref_labels: Tensor,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    alone: bool,
    ignore_label: int | None,
) -> tuple[Tensor, Tensor]:
    """target and ignore of some queries, [b, N] bool each, for the references in this order."""
    own, others = labels[part, None].long(), ref_labels.long()[order]
    target = own == others
    ignore = torch.zeros_like(target)
    if ids is not None and ref_ids is not None:
        ignore |= ids[part, None].long() == ref_ids.long()[order]
    if alone:
        ignore |= torch.arange(len(labels), device=labels.device)[part, None] == order
    if ignore_label is not None:
        ignore |= others == ignore_label  # and a query of it has no positive then
    return target, ignore


def _masked(scores: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
    values: Tensor = torch.ops.roadmap_ext.rank_metrics_masked(scores, target, ignore)
    return values


def _sorted(scores: Tensor, target: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the kernel computes, by sorting: [B, 3] and [B] as of :func:`_by_kernel`."""
    rows, columns = scores.shape
    dtype = _widest(scores.device)
    if not columns:
        none = torch.full((rows, 3), math.nan, dtype=dtype, device=scores.device)
        return none, torch.full_like(none[:, 0], _NO_POSITIVE, dtype=torch.int64)
    counted = torch.ones_like(target) if ignore is None else ~ignore
    positive = target & counted
    nan = (scores.isnan() & counted).any(1)
    # Ignored pairs stay where they are and weigh nothing.
    ordered, order = scores.sort(dim=1, descending=True)
    positive, counted = positive.gather(1, order), counted.gather(1, order)
    del order
    # Each rank is read at the end of its run of equal scores.
    index = torch.arange(columns, device=scores.device).expand_as(ordered)
    ends = torch.ones_like(positive)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    end = torch.where(ends, index, columns - 1).flip(1).cummin(1).values.flip(1)
    rank = counted.cumsum(1).gather(1, end)
    precision = (positive.cumsum(1).gather(1, end).to(dtype) / rank).masked_fill(~positive, 0)
    size = positive.sum(1)
    near = positive & (rank <= size[:, None])
    smallest = rank.masked_fill(~positive, _NO_POSITIVE).amin(1)
    sums = torch.stack([precision.sum(1), (precision * near).sum(1), near.sum(1).to(dtype)], dim=1)
    nan &= size > 0
    return (sums / size[:, None]).masked_fill(nan[:, None], math.nan), smallest.masked_fill(nan, _NO_RANK)


def _widest(device: torch.device) -> torch.dtype:
    """The widest float dtype of a device: Apple's MPS has no float64."""
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def _has_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and not _REFERENCE_ONLY


def _scores_dtype(embeddings: Tensor, ref_emb: Tensor | None) -> torch.dtype:
    double = embeddings.dtype == torch.float64 or (ref_emb is not None and ref_emb.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def _vectors(given: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Rows in ``dtype``, of norm 1 if ``normalize``; a row without direction becomes 0."""
    given = given.detach().to(dtype)
    if not normalize:
        return given
    norm = torch.linalg.vector_norm(given, dim=1, keepdim=True)
    norm.masked_fill_(norm == math.inf, math.nan)  # must not pass for a vector without direction
    vectors: Tensor = given / norm.masked_fill_(norm < SMALLEST_NORM, math.inf)
    return vectors


def _chunk_rows(rows: int, largest: int, chunk_size: int | None) -> int:
    """Queries a chunk: those asked for, or ``largest`` at the most, in chunks as equal as can be."""
    if chunk_size is not None:
        return int(chunk_size)
    chunks = -(-max(1, rows) // max(1, largest))
    return -(-max(1, rows) // chunks)


def _reporter(progress: object, total: int) -> tuple[Callable[[int], object], Callable[[], object]]:
    """What to call with the number of queries of each chunk, and what at the end."""
    if callable(progress):
        return progress, lambda: None
    check_progress(progress)
    if not progress:
        return lambda _: None, lambda: None
    try:
        bar = import_module("tqdm").tqdm(total=total, desc="retrieval metrics", unit=" queries")
    except ImportError as error:
        raise ImportError(
            "progress=True draws its bar with tqdm, which is not installed: pip install tqdm, or pass a function that "
            "takes the number of queries done since its last call"
        ) from error
    return bar.update, bar.close
