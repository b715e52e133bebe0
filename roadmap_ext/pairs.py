"""What ranks what, and which pairs are positive, negative or left out: labels, ids and named pairs become lists of
columns for each query.

A list costs its length where a mask costs [B, N]. The lists of all queries lie in one tensor of columns; a span
[begin, end) says which part of it is a query's, and queries of one class share theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .extension import _REFERENCE_ONLY
from .validation import check_embeddings


class Lists(NamedTuple):
    """A list of columns for each query, ascending."""

    span: Tensor  # [B, 2] int64: begin and end within column
    column: Tensor  # [n] int64

    def mask(self, columns: int) -> Tensor:
        """The same as a mask, [B, columns] bool."""
        rows = len(self.span)
        length = self.span[:, 1] - self.span[:, 0]
        row = torch.arange(rows, device=length.device).repeat_interleave(length)
        first = (length.cumsum(0) - length)[row]
        place = torch.arange(len(row), device=row.device) - first + self.span[row, 0]
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=row.device)
        mask[row, self.column[place]] = True
        return mask


def _lists(span: Tensor | None, column: Tensor | None) -> Lists | None:
    return None if span is None or column is None else Lists(span, column)


class Pairs(NamedTuple):
    """What each pair of a query and a reference is. A pair that is left out is that, whatever else it is."""

    positive: Lists
    left_out: Lists | None = None
    negative: Lists | None = None  # None: every pair that is neither positive nor left out; else others are left out
    # The column of the first query itself, of the next the next, and so on: left out. Negative: there is none.
    first_own: int = -1
    # [B] bool: the rows that are queries, which a mean counts. None: all. The ops need not know: others have no pairs.
    queries: Tensor | None = None

    def flat(self) -> list[Tensor | None]:
        """The same as the ops take it, beside ``first_own``: span and column of each kind."""
        none = (None, None)
        return [*self.positive, *(self.left_out or none), *(self.negative or none)]

    @staticmethod
    def of(flat: Sequence[Tensor | None], first_own: int) -> Pairs:
        """The inverse of flat()."""
        span, column, left_span, left_column, negative_span, negative_column = flat
        positive = cast(Lists, _lists(span, column))
        return Pairs(positive, _lists(left_span, left_column), _lists(negative_span, negative_column), first_own)

    def rows(self, part: slice) -> Pairs:
        """The same of some of the queries."""
        positive, left_out, negative = self.positive, self.left_out, self.negative
        return Pairs(
            Lists(positive.span[part], positive.column),
            left_out and Lists(left_out.span[part], left_out.column),
            negative and Lists(negative.span[part], negative.column),
            self.first_own + part.start if self.first_own >= 0 else -1,
        )

    def masks(self, columns: int) -> tuple[Tensor, Tensor]:
        """target and ignore, [B, columns] bool."""
        target = self.positive.mask(columns)
        ignore = torch.zeros_like(target) if self.left_out is None else self.left_out.mask(columns)
        if self.first_own >= 0:
            row = torch.arange(len(target), device=target.device)
            ignore[row, row + self.first_own] = True
        if self.negative is not None:
            ignore |= ~(target | self.negative.mask(columns))
        return target, ignore

    def masks_of(self, part: slice, columns: int) -> tuple[Tensor, Tensor]:
        """The same of some of the queries, every so many of them if the slice has a step."""
        target, ignore = self._replace(first_own=-1).rows(part).masks(columns)
        if self.first_own >= 0:
            row = torch.arange(len(target), device=target.device)
            ignore[row, self.first_own + part.start + row * (part.step or 1)] = True
        return target, ignore


class References(nn.Module):
    """What brings its own labels and ids as ``ref_emb``: :class:`roadmap_ext.EmbeddingMemory`."""

    def as_references(
        self, ids: Tensor | None, ref_labels: Tensor | None = None, ref_ids: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``ref_emb``, ``ref_labels`` and ``ref_ids`` for queries with ``ids``, given what came beside it."""
        raise NotImplementedError


class Items(NamedTuple):
    """Queries and the references that they rank: what a loss or a metric is of."""

    embeddings: Tensor  # [B, D]
    labels: Tensor  # [B]
    ref_emb: Tensor | None  # [N, D]; None: the batch is its own reference
    ref_labels: Tensor  # [N]
    ids: Tensor | None  # [B]
    ref_ids: Tensor | None  # [N]

    @staticmethod
    def checked(
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | References | None = None,
        ref_labels: Tensor | None = None,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Items:
        """The items that a public function was given. Raises TypeError for types, ValueError for the rest."""
        if isinstance(ref_emb, References):
            ref_emb, ref_labels, ref_ids = ref_emb.as_references(ids, ref_labels, ref_ids)
        check_embeddings(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
        ref_emb = None if ref_emb is embeddings else ref_emb
        return Items(embeddings, labels, ref_emb, labels if ref_labels is None else ref_labels, ids, ref_ids)

    def pairs(self, include_self: bool = False, ignore_label: int | None = None) -> Pairs:
        """Which pairs are positive and which are left out: see :func:`from_labels`."""
        alone = self.ref_emb is None
        return from_labels(
            self.labels, self.ref_labels, self.ids, self.ref_ids, alone, include_self, ignore_label=ignore_label
        )

    def masks(self, part: slice, order: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor]:
        """target and ignore of some queries, [b, N] bool, for the references in this order. Waits for no device."""
        own, others = self.labels[part, None].long(), self.ref_labels.long()[order]
        target = own == others
        ignore = torch.zeros_like(target)
        if self.ids is not None and self.ref_ids is not None:
            ignore |= self.ids[part, None].long() == self.ref_ids.long()[order]
        if self.ref_emb is None:
            ignore |= torch.arange(len(self.labels), device=order.device)[part, None] == order
        if ignore_label is not None:
            ignore |= others == ignore_label  # and a query of it has no positive then
        return target, ignore


def from_labels(
    labels: Tensor,
    ref_labels: Tensor,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    alone: bool,
    include_self: bool,
    first_own: int = 0,
    ignore_label: int | None = None,
) -> Pairs:
    """Pairs of equal labels are positive; a query itself is left out unless ``include_self``.

    What is the query itself ids say, and where the batch is ``alone``, its own reference, the index: the queries are
    the references from ``first_own`` on. Items of the ``ignore_label`` are in no pair.
    """
    pairs = Pairs(
        positive=_equal(labels, ref_labels),
        left_out=None if ids is None or ref_ids is None or include_self else _equal(ids, ref_ids),
        first_own=first_own if alone and not include_self else -1,
    )
    if ignore_label is None:
        return pairs
    queries, references = labels.long() != ignore_label, ref_labels.long() != ignore_label
    order = references.byte().argsort(stable=True)  # the others, then those with a label: columns ascend in both parts
    others, columns = (~references).sum(), len(order)
    positive = Lists(pairs.positive.span * queries[:, None], pairs.positive.column)
    if pairs.left_out is None:  # the others are, of each query, and of a row that is none all columns
        span = torch.stack([torch.where(queries, 0, columns), torch.where(queries, others, 2 * columns)], dim=1)
        left_out = Lists(span, torch.cat([order, torch.arange(columns, device=order.device)]))
        return pairs._replace(positive=positive, left_out=left_out, queries=queries)
    # Ids have that place: only those with a label are negatives. It is the longer list.
    negative = Lists(torch.stack([others * queries, columns * queries], dim=1), order)
    return pairs._replace(positive=positive, negative=negative, queries=queries)


def blank(rows: Tensor, labels: Tensor, ignore_label: int | None) -> Tensor:
    """Embeddings [n, D], with zeros for items of the ``ignore_label``: nothing of them, not NaN, is in a gradient."""
    return rows if ignore_label is None else torch.where((labels.long() == ignore_label)[:, None], 0, rows)


def _equal(values: Tensor, references: Tensor) -> Lists:
    """For each of ``values`` [B] the columns of ``references`` [N] that equal it; any integer dtypes."""
    values, references = values.long(), references.long()
    if values.device.type == "cpu" and not _REFERENCE_ONLY:
        return Lists(*torch.ops.roadmap_ext.equal_lists(values, references))
    # Stable: columns ascend within a run of equal values.
    ordered, column = references.sort(stable=True)
    span = torch.stack([torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)], dim=1)
    return Lists(span, column)


def from_pairs(queries: int, columns: int, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor]) -> Pairs:
    """Only the named pairs count, each given as (query, reference) indices [n]; all others are left out."""
    return Pairs(positive=_listed(queries, columns, *positive), negative=_listed(queries, columns, *negative))


def _listed(queries: int, columns: int, query: Tensor, reference: Tensor) -> Lists:
    place = (query.long() * columns + reference.long()).sort().values  # by query, columns ascending; maybe twice
    size = torch.bincount(query.long(), minlength=queries)
    end = size.cumsum(0)
    return Lists(torch.stack([end - size, end], dim=1), place % max(columns, 1))
