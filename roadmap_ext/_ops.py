"""What torch.compile needs to know of the ops in csrc/ops.cpp: the shapes they return, without running them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import REDUCTIONS
from ._extension import _C


def accumulation_dtype(scores: Tensor) -> torch.dtype:
    """The dtype of losses and ranks: float64 for float64 scores, float32 for all others."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _average_precision(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, want_gradient = arguments[8:10]
    rows, columns = scores.shape
    dtype = accumulation_dtype(scores)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    return (
        scores.new_empty((rows,) if reduction == REDUCTIONS.index("none") else (), dtype=dtype),
        scores.new_empty((rows, columns) if want_gradient else (0, 0)),
        scores.new_empty(((rows if half else 1) if want_gradient else 0,), dtype=dtype),
    )


def _smooth_rank(scores: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    want_slope = arguments[8]
    count = torch.library.get_ctx().new_dynamic_size()  # the number of positives: known when the op has run
    dtype = accumulation_dtype(scores)
    return (
        scores.new_empty((count,), dtype=torch.int64),
        scores.new_empty((count,), dtype=torch.int64),
        scores.new_empty((count,), dtype=dtype),
        scores.new_empty((count,), dtype=dtype),
        scores.new_empty((count if want_slope else 0,), dtype=dtype),
    )


def _count_pairs(positive_span: Tensor, *arguments: Any) -> Tensor:
    return positive_span.new_empty((positive_span.shape[0], 2))


def _rank_metrics(scores: Tensor, *arguments: Any) -> Tensor:
    return scores.new_empty((scores.shape[0], 4), dtype=torch.float64)


def _equal_lists(values: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty((values.shape[0], 2)), references.new_empty(references.shape)


def _nothing(*arguments: Any) -> None:
    pass


def _like_first(first: Tensor, *arguments: Any) -> Tensor:
    return first.new_empty(first.shape)


# Once in a process: imported again, after it was removed from sys.modules, the package finds them in place.
if _C is not None and not torch._C._dispatch_has_kernel_for_dispatch_key("roadmap_ext::average_precision", "Meta"):
    torch.library.register_fake("roadmap_ext::average_precision", _average_precision)
    torch.library.register_fake("roadmap_ext::smooth_rank", _smooth_rank)
    torch.library.register_fake("roadmap_ext::count_pairs", _count_pairs)
    torch.library.register_fake("roadmap_ext::objective_rows_", _nothing)
    torch.library.register_fake("roadmap_ext::rank_metrics", _rank_metrics)
    torch.library.register_fake("roadmap_ext::rank_metrics_masked", _rank_metrics)
    torch.library.register_fake("roadmap_ext::equal_lists", _equal_lists)
    torch.library.register_fake("roadmap_ext::symmetrise_", _nothing)
    torch.library.register_fake("roadmap_ext::remove_radial_", _nothing)
    torch.library.register_fake("roadmap_ext::prefault_", _nothing)
    torch.library.register_fake("roadmap_ext::scale_rows", _like_first)
    torch.library.register_fake("roadmap_ext::scale_rows_", _nothing)
    torch.library.register_fake("roadmap_ext::smooth_rank_backward", _like_first)
