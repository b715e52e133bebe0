"""Margins that fit the data: what ``margins="auto"`` reads from the similarities that a loss is about to rank."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .settings import SMALLEST_NORM, Objective

# What is looked at: queries from all over the batch, and pairs of each kind; little beside the loss of a large batch.
_QUERIES, _PAIRS = 128, 1 << 16
_LEVELS = 100
_ASIDE = 0.1  # of a margin from the threshold

# target and ignore, [b, N] bool, of some of the queries
Masks = Callable[[slice], tuple[Tensor, Tensor]]


def sample(queries: int, first: int = 0) -> slice:
    """Which are looked at of so many ``queries``; among those from the ``first`` on, where these are one part."""
    step = max(1, -(-queries // _QUERIES))
    return slice(-first % step, None, step)


def to_fit(
    objective: Objective,
    embeddings: Tensor,
    references: Tensor | None,
    masks: Masks,
    part: slice | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """The objective with margins on either side of the data's own threshold, if it asks for them.

    The threshold of equal errors: as large a share of the positives lies below it as of the negatives above. It is one
    for the whole batch, lies where the two kinds meet, whatever the space, and moves with them: about as many pairs are
    pulled as are pushed, where fixed margins may do one alone.

    Args:
        embeddings: [B, D]; references [N, D], None for the embeddings themselves.
        part: the queries to look at; None: a sample of these.
        gather: [b, N] of all parts of a batch as one, where these queries are one of several.
    """
    if objective.margins is None or objective.calibration_weight == 0:
        return objective
    margins = _of_equal_errors
    if torch.compiler.is_compiling():  # numbers that change with each batch are no constants of a graph
        margins = torch.compiler.disable(margins)
    part = sample(len(embeddings)) if part is None else part
    positive, negative = margins(embeddings, references, masks, part, gather, objective)
    return objective._replace(margins=None, positive_margin=positive, negative_margin=negative)


@torch.no_grad()
def _of_equal_errors(
    embeddings: Tensor,
    references: Tensor | None,
    masks: Masks,
    part: slice,
    gather: Callable[[Tensor], Tensor] | None,
    objective: Objective,
) -> tuple[float, float]:
    """The two margins; those that stand in the objective where a kind has no pairs."""
    target, ignore = masks(part)  # target may hold levels
    target = target.bool()
    with torch.autocast(embeddings.device.type, enabled=False):
        sides = [embeddings[part], embeddings if references is None else references]
        dtype = torch.promote_types(torch.promote_types(*(side.dtype for side in sides)), torch.float32)
        queries, others = (side.to(dtype) for side in sides)
        if objective.normalize:
            queries, others = (normalize(side, dim=1, eps=SMALLEST_NORM) for side in (queries, others))
        scores = queries @ others.T
    kinds = [scores.masked_fill(~kind | ignore, torch.nan) for kind in (target, ~target)]  # a NaN score counts neither
    levels = torch.linspace(0, 1, _LEVELS + 1, dtype=dtype, device=scores.device)
    # Of positives rising, of negatives falling: they meet at the threshold, or between the two where none is wrong.
    rising, falling = (
        _quantiles(kind if gather is None else gather(kind), at)
        for kind, at in zip(kinds, (levels, 1 - levels), strict=True)
    )
    level = (rising < falling).sum().clamp(max=_LEVELS)
    threshold = ((rising[level] + falling[level]) / 2).item()
    if not math.isfinite(threshold):
        return objective.positive_margin, objective.negative_margin
    return threshold + _ASIDE, threshold - _ASIDE


def _quantiles(scores: Tensor, levels: Tensor) -> Tensor:
    """Of those that are no NaN, or of every so many of them; NaN if all are."""
    found = scores[~scores.isnan()]
    if not len(found):
        return torch.full_like(levels, torch.nan)
    return found[:: -(-len(found) // _PAIRS)].quantile(levels)
