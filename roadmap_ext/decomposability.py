"""The decomposability gap: how far the AP of batches stands above the AP of all of them together, and how far it could.

The bound is from counts alone, for the worst ranking. A batch's ranking is perfect if its positives stand above its
negatives. Perfect rankings can be merged in many ways; the worst puts one batch whole after the other, in the worst
order. What a batch adds to the AP there depends on which batches came before, and on nothing else of their order: so
the worst order is found over the 2^K sets of batches, not over the K! orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import ranking
from .chance import Counts
from .chunks import rows_of_a_chunk, rows_that_fit
from .pairs import Items
from .ranking import Array, EvaluationKeywords, of_arrays
from .validation import (
    check_batches,
    check_chunk_size,
    check_counts,
    check_flag,
    check_ignore_label,
    check_scores,
    one_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The worst order is searched for among as many batches that hold positives of a query: 1,024 sets.
MOST_SEARCHED = 10
# Numbers in memory at a time, in each of a few tensors.
_ELEMENTS = 1 << 18


class DecomposabilityGap(NamedTuple):
    """The mean over the queries that have a positive; NaN if none has."""

    gap: float  # batch_ap - ap
    batch_ap: float
    ap: float
    bound: float
    exact: bool  # whether the bound is one for every query; else it is an estimate, from below
    null: float  # the gap of independent scores of the same AP: what of the gap is not of these scores


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
    reduction: Literal["mean"] = "mean",
    **options: Unpack[EvaluationKeywords],
) -> DecomposabilityGap: ...


@overload
def decomposability_gap(
    embeddings: Array,
    labels: Array,
    batches: Array | Sequence[Array],
    ref_emb: Array | None = None,
    ref_labels: Array | None = None,
    *,
    reduction: Literal["none"],
    **options: Unpack[EvaluationKeywords],
) -> DecomposabilityGaps: ...


@of_arrays
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

    A batch holds a part of a query's negatives alone, so its AP is higher whatever the scores are. ``null`` is the gap
    that this makes: of scores drawn independently of each other, normal ones, with the same ``ap`` and the same counts.
    Batches drawn at random have that gap, nearly; :func:`training_gap` is of the batches that are trained on.

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
    items = Items.checked(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
    check_flag("normalize", normalize)
    check_ignore_label("ignore_label", ignore_label)
    one_of("reduction", reduction, ranking.REDUCTIONS)
    chunk_size = check_chunk_size("chunk_size", chunk_size)
    order, sizes = _batch_after_batch(batches, len(items.ref_labels), embeddings.device)
    parts, counts = [], Counts()
    with ranking.reported(progress, len(embeddings)) as report, torch.autocast(embeddings.device.type, enabled=False):
        queries, references = ranking.vectors(embeddings, items.ref_emb, normalize)
        references = references[order]
        step = rows_of_a_chunk(len(queries), rows_that_fit(len(order), queries.element_size(), "cpu"), chunk_size)
        for begin in range(0, max(1, len(queries)), step):
            part = slice(begin, begin + step)
            target, ignore = items.masks(part, order, ignore_label)
            parts.append(_gaps(queries[part] @ references.T, target, ignore, sizes, counts))
            report(len(target))
    return _reduced(parts, reduction, counts)


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


@of_arrays
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
    one_of("reduction", reduction, ranking.REDUCTIONS)
    order, sizes = _batch_after_batch(batches, scores.shape[1], scores.device)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    step = ranking.rows_to_sort(len(order), scores.device)
    parts, counts = [], Counts()
    for begin in range(0, max(1, len(scores)), step):
        part = slice(begin, begin + step)
        kept = torch.zeros_like(target[part]) if ignore is None else ignore[part]
        parts.append(_gaps(scores[part].to(dtype)[:, order], target[part][:, order], kept[:, order], sizes, counts))
    return _reduced(parts, reduction, counts)


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


@of_arrays
def _bound(positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    check_counts(positives, negatives)
    return bound(positives.long(), negatives.long(), ranking.widest(positives.device))


def _gaps(scores: Tensor, target: Tensor, ignore: Tensor, sizes: list[int], counts: Counts) -> DecomposabilityGaps:
    """Of scores [b, N] whose columns are those of one batch after the other. Adds to the counts."""
    ap = _each_ap(scores, target, ignore)
    sums = torch.zeros_like(ap)
    positives, negatives = torch.zeros(2, len(scores), len(sizes), dtype=torch.int64, device=scores.device)
    parts = zip(*(torch.split(tensor, sizes, dim=1) for tensor in (scores, target, ignore)), strict=True)
    for b, (values, relevant, left_out) in enumerate(parts):
        positives[:, b], negatives[:, b] = (relevant & ~left_out).sum(1), (~relevant & ~left_out).sum(1)
        sums += _each_ap(values, relevant, left_out).masked_fill(positives[:, b] == 0, 0)
    own = positives > 0  # [b, K]
    batch_ap = sums / own.sum(1)
    both = torch.stack([positives, negatives], dim=2)  # [b, K, 2]
    counts.add(both.sum(1), both[own], (1 / own.sum(1)).repeat_interleave(own.sum(1)))
    return DecomposabilityGaps(batch_ap - ap, batch_ap, ap, *bound(positives, negatives, ap.dtype))


def _batch_after_batch(batches: object, references: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """The order of references in which each batch is a slice, and the sizes of the slices."""
    number = check_batches(batches, references, device)
    return number.argsort(stable=True), number.bincount().tolist()


def _each_ap(scores: Tensor, target: Tensor, ignore: Tensor) -> Tensor:
    values, _ = (ranking.by_kernel if ranking.has_kernel(scores) else ranking.by_sorting)(scores, target, ignore)
    return values[:, 0]


def _reduced(
    parts: list[DecomposabilityGaps], reduction: str, counts: Counts
) -> DecomposabilityGap | DecomposabilityGaps:
    """Of all chunks together."""
    each = DecomposabilityGaps(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if reduction == "none":
        return each
    counted = ~each.bound.isnan()  # NaN without positives alone; a NaN among the scores is to be seen
    rows = torch.stack(each[:4], dim=1)[counted].T.tolist()
    gap, batch_ap, ap, bound = (math.fsum(row) / len(row) if row else math.nan for row in rows)
    return DecomposabilityGap(gap, batch_ap, ap, bound, bool(each.exact.all()), counts.gap(ap))


# --- the bound -------------------------------------------------------------------------------------------------------


def bound(positives: Tensor, negatives: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The greatest gap of perfect batches, [B] of a float dtype, and whether the worst order was found, [B] bool.

    Counts come as [B, K] integers; NaN, and True, for a query without positives.
    """
    if not positives.numel():
        nothing = torch.full((len(positives),), torch.nan, dtype=dtype, device=positives.device)
        return nothing, nothing.isnan()
    counts, of = torch.unique(torch.stack([positives, negatives], dim=2), dim=0, return_inverse=True)  # [R, K, 2]
    own = counts[:, :, 0] > 0  # [R, K]
    # A batch without positives is worst at the very top.
    before = (counts[:, :, 1] * ~own).sum(1)
    share = counts[:, :, 0] / counts.sum(2)
    order = share.masked_fill(~own, torch.inf).argsort(dim=1, stable=True)
    counts = (counts * own[:, :, None]).take_along_dim(order[:, :, None], dim=1)
    total, batches = counts[:, :, 0].sum(1), own.sum(1)
    least = _in_order(counts, before, dtype)
    # Sorted by a share, batches that are all alike are so if the first is like the last in both counts.
    first, last = counts[:, :1], counts.take_along_dim((batches - 1).clamp(min=0)[:, None, None], dim=1)
    alike = ((counts == first).all(2) | (counts == 0).all(2)).all(1) & (first == last).flatten(1).all(1)
    search = ((batches <= MOST_SEARCHED) & ~alike).nonzero().flatten()
    if len(search):
        width = int(batches[search].max())
        for rows in search.split(max(1, _ELEMENTS >> width)):
            least[rows] = _in_worst_order(counts[rows, :width], before[rows], dtype)
    exact = alike | (batches <= MOST_SEARCHED)
    return (1 - least / total)[of], exact[of]


def _in_order(counts: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the precisions of all positives, [R], if batches [R, K, 2] follow each other as they stand."""
    above = counts.cumsum(1) - counts
    p, n = above[:, :, 0], above[:, :, 1] + before[:, None]
    return _precisions(counts[:, :, 0], p, n, _start(p + n + 1, dtype)).sum(1)


def _in_worst_order(counts: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """The least such sum over all orders, [R]. Batches of no images change nothing."""
    positives, negatives = counts.permute(2, 1, 0)  # [K, R]: whole rows of sets are taken below
    batches = len(positives)
    p, n = torch.zeros_like(before)[None], before[None]  # [sets, R]; a set is its bits
    for b in range(batches):
        p, n = torch.cat([p, p + positives[b]]), torch.cat([n, n + negatives[b]])
    start = _start(p + n + 1, dtype)
    least = torch.full_like(p, torch.inf, dtype=dtype)
    least[0] = 0
    sets = torch.arange(1 << batches, device=counts.device)
    size = torch.stack([sets >> b & 1 for b in range(batches)]).sum(0)
    for level in range(batches):
        of_size = sets[size == level]
        for b in range(batches):
            s = of_size[of_size >> b & 1 == 0]
            after = s | 1 << b
            added = _precisions(positives[b], p[s], n[s], start[s])
            least[after] = torch.minimum(least[after], least[s] + added)
    return least[-1]


def _precisions(positives: Tensor, p: Tensor, n: Tensor, start: Tensor) -> Tensor:
    """The sum over j = 1 .. positives of (j + p) / (j + p + n), with ``start`` of p + n + 1."""
    return positives - n * _harmonic(p + n + 1, positives, start)


def _start(first: Tensor, dtype: torch.dtype) -> Tensor:
    """What _harmonic needs of its first term, whatever the number of terms."""
    return torch.digamma(first.double()) if dtype == torch.float64 else first.to(dtype)


def _harmonic(first: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """The sum over j = 0 .. terms - 1 of 1 / (first + j)."""
    if start.dtype == torch.float64:
        return torch.digamma((first + terms).double()) - start
    # In float32 that difference would have no digit left: it is taken term by term, from the recurrence of digamma and
    # its asymptotic series.
    m = terms.to(start.dtype)
    near = sum(m / ((start + k) * (start + k + m)) for k in range(8))
    u, v = 1 / (start + 8), 1 / (start + 8 + m)
    return near + torch.log1p(m * u) + m * u * v * (1 / 2 + (u + v) / 12)
