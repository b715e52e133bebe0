"""Exact retrieval metrics, for evaluation: no surrogate, no gradient.

Each query's metrics follow from the ranks of its positives (ranking.py). The decomposability gap: decomposability.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import ops, ranking
from .chunks import Chunk, rows_of_a_chunk, rows_that_fit
from .decomposability import (
    DecomposabilityGap,
    DecomposabilityGaps,
    decomposability_bound,
    decomposability_gap,
    decomposability_gap_of_scores,
)
from .pairs import Items
from .ranking import Array, EvaluationKeywords, of_arrays
from .training_gap import TrainingGap, training_gap
from .validation import check_chunk_size, check_flag, check_ignore_label, check_ks, check_scores, one_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DecomposabilityGap",
    "DecomposabilityGaps",
    "TrainingGap",
    "average_precision",
    "decomposability_bound",
    "decomposability_gap",
    "decomposability_gap_of_scores",
    "retrieval_metrics",
    "training_gap",
]


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


@of_arrays
@torch.no_grad()
def _average_precision(scores: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
    check_scores(scores, target, ignore)
    rows, columns = scores.shape
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    kernel = ranking.has_kernel(scores)
    rank, wide = (ranking.by_kernel, dtype) if kernel else (ranking.by_sorting, scores.dtype)
    step = max(1, rows) if kernel and scores.dtype == dtype else ranking.rows_to_sort(columns, scores.device)
    out = scores.new_empty(rows, dtype=dtype)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        values, _ = rank(scores[part].to(wide), target[part], None if ignore is None else ignore[part])
        out[part] = values[:, 0]
    return out


@overload
def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    k: int | Iterable[int] = (1, 10, 100),
    reduction: Literal["mean"] = "mean",
    **options: Unpack[EvaluationKeywords],
) -> dict[str, float]: ...


@overload
def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    k: int | Iterable[int] = (1, 10, 100),
    reduction: Literal["none"],
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Tensor]: ...


@of_arrays
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
    items = Items.checked(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
    ks = check_ks(k)
    check_flag("normalize", normalize)
    check_ignore_label("ignore_label", ignore_label)
    one_of("reduction", reduction, ranking.REDUCTIONS)
    chunk_size = check_chunk_size("chunk_size", chunk_size)
    with ranking.reported(progress, len(embeddings)) as report, torch.autocast(embeddings.device.type, enabled=False):
        queries, references = ranking.vectors(embeddings, items.ref_emb, normalize)
        evaluate = _by_kernel if ranking.has_kernel(queries) else _by_sorting
        values, smallest = evaluate(queries, references, items, ignore_label, chunk_size, report)
    metrics = dict(zip(("mAP", "mAP@R", "R-precision"), values.unbind(1), strict=True))
    undefined = (smallest == ranking.NO_POSITIVE) | (smallest == ranking.NO_RANK)
    for each in ks:
        hit = (smallest <= min(each, ranking.NO_POSITIVE)).to(values.dtype)
        metrics[f"R@{each}"] = hit.masked_fill(undefined, math.nan)
    if reduction == "none":
        return metrics
    counted = smallest != ranking.NO_POSITIVE
    rows = torch.stack([*metrics.values()], dim=1)[counted].T.tolist()
    # Summed exactly: the result depends on no order, and so on no number of threads.
    return {name: math.fsum(row) / len(row) if row else math.nan for name, row in zip(metrics, rows, strict=True)}


def _by_kernel(
    queries: Tensor,
    references: Tensor,
    items: Items,
    ignore_label: int | None,
    chunk_size: int | None,
    report: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """AP, mAP@R and R-precision, [B, 3] float64, NaN without positives; and the smallest rank of one, [B] int64.

    Queries and references come normalised, [B, D] and [N, D].
    """
    rows, columns = len(queries), len(references)
    pairs = items.pairs(ignore_label=ignore_label)
    values = queries.new_empty((rows, 4), dtype=torch.float64)
    step = rows_of_a_chunk(rows, rows_that_fit(columns, queries.element_size(), "cpu"), chunk_size)
    with Chunk(references, min(step, rows), columns, references.dtype) as buffer:
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            scores = torch.mm(queries[part], references.T, out=buffer[: part.stop - begin])
            values[part] = ops.rank_metrics(scores, pairs.rows(part))
            report(part.stop - begin)
    return ranking.as_ranks(values)


def _by_sorting(
    queries: Tensor,
    references: Tensor,
    items: Items,
    ignore_label: int | None,
    chunk_size: int | None,
    report: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch on any device, without waiting for it; float32 where there is no float64."""
    rows, columns = len(queries), len(references)
    values = queries.new_empty((rows, 3), dtype=ranking.widest(queries.device))
    smallest = torch.empty(rows, dtype=torch.int64, device=queries.device)
    step = rows_of_a_chunk(rows, ranking.rows_to_sort(columns, queries.device), chunk_size)
    index = torch.arange(columns, device=queries.device)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        masks = items.masks(part, index, ignore_label)
        values[part], smallest[part] = ranking.by_sorting(queries[part] @ references.T, *masks)
        report(part.stop - begin)
    return values, smallest
