"""The border to the kernels: each op as a function of this package's own objects, and its shapes for torch.compile.

Settings and pairs are flattened here, and become objects again in csrc/tensors.h. Ops that take and return tensors
alone are called where they are needed, as torch.ops.roadmap_ext.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunks import rows_of_a_chunk, rows_that_fit
from .extension import _C
from .pairs import Pairs
from .settings import METHODS, REDUCTIONS, Objective, Settings, Surrogate


def rank_loss(
    scores: Tensor,
    level: Tensor,
    worth: Tensor | None,
    ignore: Tensor | None,
    objective: Objective,
    want_gradient: bool,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss; the gradient of each query's [B, N], and its factor [B] or [1], empty where not wanted.

    ``level`` is bool, or uint8 where there is what levels are ``worth``, [B, L] float64.
    """
    place = REDUCTIONS.index(objective.reduction)
    return torch.ops.roadmap_ext.rank_loss(
        scores, level, worth, ignore, objective.flat(), place, want_gradient, METHODS.index(method)
    )


def smooth_rank(
    scores: Tensor, target: Tensor, ignore: Tensor | None, surrogate: Surrogate, want_slope: bool, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each positive its query, reference, rank+, rank- and slope, [nnz] each; no slope where not wanted."""
    return torch.ops.roadmap_ext.smooth_rank(
        scores, target, ignore, surrogate.flat(), want_slope, METHODS.index(method)
    )


def smooth_rank_backward(
    scores: Tensor,
    target: Tensor,
    ignore: Tensor | None,
    slope: Tensor,
    positive_grad: Tensor | None,
    negative_grad: Tensor,
    surrogate: Surrogate,
    method: str,
) -> Tensor:
    """The gradient of the scores [B, N], from those of the ranks [nnz]."""
    return torch.ops.roadmap_ext.smooth_rank_backward(
        scores, target, ignore, slope, positive_grad, negative_grad, surrogate.flat(), METHODS.index(method)
    )


def count_pairs(pairs: Pairs, rows: int, columns: int) -> Tensor:
    """Positives and negatives of each query, [B, 2] int64."""
    if not pairs.made_by_rows:
        return torch.ops.roadmap_ext.count_pairs(pairs.flat(), pairs.first_own, rows, columns)
    step = rows_of_a_chunk(rows, rows_that_fit(columns, 4, pairs.positive.span.device.type), None)
    parts = [slice(begin, min(begin + step, rows)) for begin in range(0, max(rows, 1), step)]
    counts = [count_pairs(pairs.rows(part).ready(), part.stop - part.start, columns) for part in parts]
    return torch.cat(counts)


def rank_metrics(scores: Tensor, pairs: Pairs) -> Tensor:
    """AP, mAP@R, R-precision and the smallest rank of a positive, [B, 4] float64."""
    return torch.ops.roadmap_ext.rank_metrics(scores, pairs.flat(), pairs.first_own)


def sweep(
    embeddings: Tensor,
    references: Tensor | None,
    pairs: Pairs,
    settings: Settings,
    weight: Tensor,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the rows, and the gradients of their weighted sum: see ``sweep`` of embedding_loss.py."""
    want_embeddings, want_references = wants
    return torch.ops.roadmap_ext.sweep(
        embeddings,
        references,
        pairs.flat(),
        pairs.first_own,
        weight,
        settings.objective.flat(),
        settings.objective.normalize,
        settings.chunk_size or 0,
        want_embeddings,
        want_references,
        METHODS.index(settings.method),
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


def _accumulation(scores: Tensor) -> torch.dtype:
    """The dtype of losses and ranks: float64 for float64 scores, float32 for all others."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _rank_loss(
    scores: Tensor,
    level: Tensor,
    worth: Tensor | None,
    ignore: Tensor | None,
    objective: list[float],
    reduction: int,
    want_gradient: bool,
    method: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = scores.shape
    dtype = _accumulation(scores)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    return (
        scores.new_empty((rows,) if reduction == REDUCTIONS.index("none") else (), dtype=dtype),
        scores.new_empty((rows, columns) if want_gradient else (0, 0)),
        scores.new_empty(((rows if half else 1) if want_gradient else 0,), dtype=dtype),
    )


def _smooth_rank(
    scores: Tensor,
    target: Tensor,
    ignore: Tensor | None,
    surrogate: list[float],
    want_slope: bool,
    method: int = 0,
) -> tuple[Tensor, ...]:
    count = torch.library.get_ctx().new_dynamic_size()  # the number of positives: known when the op has run
    dtype = _accumulation(scores)
    return (
        scores.new_empty((count,), dtype=torch.int64),
        scores.new_empty((count,), dtype=torch.int64),
        scores.new_empty((count,), dtype=dtype),
        scores.new_empty((count,), dtype=dtype),
        scores.new_empty((count if want_slope else 0,), dtype=dtype),
    )


def _count_pairs(pairs: list[Tensor | None], own: int, rows: int, columns: int) -> Tensor:
    span = next(tensor for tensor in pairs if tensor is not None)
    return span.new_empty((rows, 2))


def _rank_metrics(scores: Tensor, *pairs: object) -> Tensor:
    return scores.new_empty((scores.shape[0], 4), dtype=torch.float64)


def _equal_lists(values: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty((values.shape[0], 2)), references.new_empty(references.shape)


def _levels_of(relevance: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = relevance.shape[0]
    return (
        relevance.new_empty(relevance.shape, dtype=torch.uint8),
        relevance.new_empty((rows, 16), dtype=torch.float64),
        relevance.new_empty((rows,), dtype=torch.int64),
    )


def _nothing(*arguments: object) -> None:
    pass


def _like_first(first: Tensor, *others: object) -> Tensor:
    return first.new_empty(first.shape)


# Once in a process: imported again, after it was removed from sys.modules, the package finds them in place.
if _C is not None and not torch._C._dispatch_has_kernel_for_dispatch_key("roadmap_ext::rank_loss", "Meta"):
    fakes: dict[str, Callable[..., object]] = {
        "rank_loss": _rank_loss,
        "smooth_rank": _smooth_rank,
        "smooth_rank_backward": _like_first,
        "count_pairs": _count_pairs,
        "objective_rows_": _nothing,
        "rank_metrics": _rank_metrics,
        "rank_metrics_masked": _rank_metrics,
        "equal_lists": _equal_lists,
        "levels_of": _levels_of,
        "symmetrise_": _nothing,
        "remove_radial_": _nothing,
        "prefault_": _nothing,
        "scale_rows": _like_first,
        "scale_rows_": _nothing,
    }
    for name, shapes in fakes.items():
        torch.library.register_fake(f"roadmap_ext::{name}", shapes)
