"""What ranks what, and which pairs are positive, negative or left out: labels, ids and named pairs become lists of
columns for each query.

A list costs its length where a mask costs [B, N]. The lists of all queries lie in one tensor of columns; a span
[begin, end) says which part of it is a query's, and queries of one class share theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .extension import _REFERENCE_ONLY
from .relevance import of_relevance
from .settings import GRADED, Ranking
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
    # [B, N] further positives: bool, or what relevance they have, or levels (uint8) of the relevance in `worth`.
    level: Tensor | None = None
    worth: Tensor | None = None  # [B, L] float64: the relevance of each level; None: all positives are alike
    classes: tuple[Tensor, Tensor] | None = None  # [B, C] and [N, C] bool: further positives share a class
    finer: tuple[Lists, ...] = ()  # which positives have at least level 2, 3, ...

    def flat(self) -> list[Tensor | None]:
        """The same as the ops take it, beside ``first_own``: span and column of each kind, then what few have."""
        none = (None, None)
        lists = [*self.positive, *(self.left_out or none), *(self.negative or none)]
        further = [self.level, self.worth, *(self.classes or none), *(each for finer in self.finer for each in finer)]
        return lists if all(each is None for each in further) else lists + further

    @staticmethod
    def of(flat: Sequence[Tensor | None], first_own: int) -> Pairs:
        """The inverse of flat()."""
        span, column, left_span, left_column, negative_span, negative_column, *further = flat
        positive, left_out, negative = (
            _lists(span, column),
            _lists(left_span, left_column),
            _lists(negative_span, negative_column),
        )
        made = Pairs(cast(Lists, positive), left_out, negative, first_own)
        if not further:
            return made
        level, worth, own, references, *finer = further
        classes = None if own is None or references is None else (own, references)
        lists = tuple(cast(Lists, _lists(*finer[at : at + 2])) for at in range(0, len(finer), 2))
        return made._replace(level=level, worth=worth, classes=classes, finer=lists)

    def rows(self, part: slice) -> Pairs:
        """The same of some of the queries."""

        def cut(lists: Lists) -> Lists:
            return Lists(lists.span[part], lists.column)

        return Pairs(
            cut(self.positive),
            self.left_out and cut(self.left_out),
            self.negative and cut(self.negative),
            self.first_own + part.start if self.first_own >= 0 else -1,
            level=None if self.level is None else self.level[part],
            worth=None if self.worth is None else self.worth[part],
            classes=None if self.classes is None else (self.classes[0][part], self.classes[1]),
            finer=tuple(map(cut, self.finer)),
        )

    @property
    def made_by_rows(self) -> bool:
        """Whether ready() makes something of size [B, N]: of a few queries at a time, then."""
        return self.classes is not None or (
            self.level is not None and self.level.dtype not in (torch.bool, torch.uint8)
        )

    def ready(self) -> Pairs:
        """The same as kernels read it: with levels for relevance, and a mask for shared classes."""
        if not self.made_by_rows:
            return self
        if self.classes is not None:
            own, references = (each.float() for each in self.classes)
            return self._replace(level=own @ references.T > 0, classes=None)
        level, worth = of_relevance(cast(Tensor, self.level), None)
        return self._replace(level=level, worth=worth)

    def of_loss(self, ranking: Ranking, columns: int, count: Callable[[Pairs], Tensor]) -> Pairs:
        """The same with what levels are worth to a loss; without levels, where it knows none.

        Levels of labels are worth their number to NDCG; to H-AP (level / L)^alpha, divided by how many items of the
        level the query has (HAPPIER, eq. 10), which ``count`` counts: [B, 2], positives first.
        """
        if not self.finer:
            return self
        if ranking.loss not in GRADED:
            return self._replace(finer=())
        rows, levels = len(self.positive.span), 1 + len(self.finer)
        level = torch.arange(1.0, 1 + levels, dtype=torch.float64, device=self.positive.span.device).expand(rows, -1)
        if ranking.loss == "ndcg":
            return self._replace(worth=level)
        plain = self._replace(finer=())
        reach = [count(plain._replace(positive=lists))[:, 0] for lists in (self.positive, *self.finer)]
        size = torch.stack(reach, dim=1)
        size = size - torch.nn.functional.pad(size[:, 1:], (0, 1))
        return self._replace(worth=(level / levels) ** ranking.alpha / size.clamp(min=1))

    def masks(self, columns: int) -> tuple[Tensor, Tensor]:
        """target and ignore, [B, columns] bool; target has levels, uint8, where there are several."""
        if self.made_by_rows:
            return self.ready().masks(columns)
        target = self.positive.mask(columns)
        ignore = torch.zeros_like(target) if self.left_out is None else self.left_out.mask(columns)
        if self.first_own >= 0:
            row = torch.arange(len(target), device=target.device)
            ignore[row, row + self.first_own] = True
        if self.negative is not None:
            ignore |= ~(target | self.negative.mask(columns))
        if self.level is not None:
            target = self.level
        if self.finer:
            target = torch.stack([target, *(lists.mask(columns) for lists in self.finer)]).sum(0, dtype=torch.uint8)
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
        several: bool = False,
    ) -> Items:
        """The items that a public function was given. Raises TypeError for types, ValueError for the rest.

        ``several`` labels an item are taken, too: levels [B, L], coarse to fine, or classes [B, C], bool.
        """
        if isinstance(ref_emb, References):
            ref_emb, ref_labels, ref_ids = ref_emb.as_references(ids, ref_labels, ref_ids)
        check_embeddings(embeddings, labels, ref_emb, ref_labels, ids, ref_ids, several)
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
    if labels.dim() == 2 and ignore_label is not None:  # of an unknown class on one level, known on none
        labels, ref_labels = (
            each.masked_fill(_ignored(each, ignore_label)[:, None], ignore_label) for each in (labels, ref_labels)
        )
    if labels.dim() == 1:
        lists = [_equal(labels, ref_labels)]
    elif labels.dtype == torch.bool:
        lists = [_no_lists(labels)]
    else:
        lists = [_equal(*level) for level in zip(labels.unbind(1), ref_labels.unbind(1), strict=True)]
    pairs = Pairs(
        positive=lists[0],
        finer=tuple(lists[1:]),
        classes=(labels, ref_labels) if labels.dtype == torch.bool else None,
        left_out=None if ids is None or ref_ids is None or include_self else _equal(ids, ref_ids),
        first_own=first_own if alone and not include_self else -1,
    )
    if ignore_label is None:
        return pairs
    queries, references = (~_ignored(each, ignore_label) for each in (labels, ref_labels))
    order = references.byte().argsort(stable=True)  # the others, then those with a label: columns ascend in both parts
    others, columns = (~references).sum(), len(order)
    positive, *finer = (Lists(each.span * queries[:, None], each.column) for each in (pairs.positive, *pairs.finer))
    pairs = pairs._replace(finer=tuple(finer))
    if pairs.left_out is None:  # the others are, of each query, and of a row that is none all columns
        span = torch.stack([torch.where(queries, 0, columns), torch.where(queries, others, 2 * columns)], dim=1)
        left_out = Lists(span, torch.cat([order, torch.arange(columns, device=order.device)]))
        return pairs._replace(positive=positive, left_out=left_out, queries=queries)
    # Ids have that place: only those with a label are negatives. It is the longer list.
    negative = Lists(torch.stack([others * queries, columns * queries], dim=1), order)
    return pairs._replace(positive=positive, negative=negative, queries=queries)


def blank(rows: Tensor, labels: Tensor, ignore_label: int | None) -> Tensor:
    """Embeddings [n, D], with zeros for items of the ``ignore_label``: nothing of them, not NaN, is in a gradient."""
    return rows if ignore_label is None else torch.where(_ignored(labels, ignore_label)[:, None], 0, rows)


def _ignored(labels: Tensor, ignore_label: int) -> Tensor:
    """Which items have that label, [B] bool; of several levels, one such label is enough."""
    ignored = labels.long() == ignore_label
    return ignored if ignored.dim() == 1 else ignored.any(1)


def _no_lists(like: Tensor) -> Lists:
    """Lists of nothing, one for each row."""
    none = torch.zeros(0, dtype=torch.int64, device=like.device)
    return Lists(none.new_zeros(len(like), 2), none)


def from_relation(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    positives: Tensor | tuple[Tensor, Tensor] | None,
    relevance: Tensor | None,
    include_self: bool,
) -> Pairs:
    """Pairs that are positive as ``positives`` (a mask or two lists of indices) or ``relevance`` say: no labels."""
    columns = len(embeddings if ref_emb is None else ref_emb)
    listed = _listed(len(embeddings), columns, *positives) if isinstance(positives, tuple) else None
    return Pairs(
        positive=listed or _no_lists(embeddings),
        left_out=None if ids is None or ref_ids is None or include_self else _equal(ids, ref_ids),
        first_own=0 if ref_emb is None and not include_self else -1,
        level=positives if isinstance(positives, Tensor) else relevance,
    )


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
