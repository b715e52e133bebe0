"""What all exact metrics share: NumPy arrays in, vectors, the ranks of positives, and how far one is.

On the CPU a kernel counts ranks (csrc/cpu/metrics.h); on other devices, and where there are no kernels, plain PyTorch
sorts. Both give the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy
import torch
from torch import Tensor

from .extension import _REFERENCE_ONLY
from .settings import SMALLEST_NORM
from .validation import as_tensor, check_progress

REDUCTIONS = ("mean", "none")
# In place of the smallest rank of a positive, where there is no positive and where a score is NaN.
NO_POSITIVE, NO_RANK = 1 << 62, 0
# Scores that are worked on at a time: bounds the memory beyond the input to a few such tensors where they are sorted or
# widened.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}

_T = TypeVar("_T")
Array: TypeAlias = Tensor | numpy.ndarray[Any, Any]


def of_arrays(function: Callable[..., _T]) -> Callable[..., _T]:
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


class EvaluationKeywords(TypedDict, total=False):
    """What metrics of embeddings take beside them."""

    ids: Array | None
    ref_ids: Array | None
    normalize: bool
    ignore_label: int | None
    chunk_size: int | None
    progress: bool | Callable[[int], object] | None


def rows_to_sort(columns: int, device: torch.device) -> int:
    """How many rows are sorted or widened at a time."""
    return max(1, _CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // max(1, columns))


def by_kernel(scores: Tensor, target: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """AP, mAP@R and R-precision, [B, 3], NaN without positives; and the smallest rank of a positive, [B] int64."""
    return as_ranks(torch.ops.roadmap_ext.rank_metrics_masked(scores, target, ignore))


def as_ranks(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the values of the kernel, [B, 4] float64."""
    return values[:, :3], values[:, 3].nan_to_num(nan=NO_RANK, posinf=NO_POSITIVE).long()


def by_sorting(scores: Tensor, target: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch on any device, without waiting for it; float32 where there is no float64."""
    rows, columns = scores.shape
    dtype = widest(scores.device)
    if not columns:
        none = torch.full((rows, 3), math.nan, dtype=dtype, device=scores.device)
        return none, torch.full_like(none[:, 0], NO_POSITIVE, dtype=torch.int64)
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
    smallest = rank.masked_fill(~positive, NO_POSITIVE).amin(1)
    sums = torch.stack([precision.sum(1), (precision * near).sum(1), near.sum(1).to(dtype)], dim=1)
    nan &= size > 0
    return (sums / size[:, None]).masked_fill(nan[:, None], math.nan), smallest.masked_fill(nan, NO_RANK)


def widest(device: torch.device) -> torch.dtype:
    """The widest float dtype of a device: Apple's MPS has no float64."""
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel ranks it."""
    return x.device.type == "cpu" and not _REFERENCE_ONLY


def vectors(embeddings: Tensor, references: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor]:
    """Queries and references (None: the queries) in the dtype of their scores; those of one are one tensor."""
    double = embeddings.dtype == torch.float64 or (references is not None and references.dtype == torch.float64)
    dtype = torch.float64 if double else torch.float32
    queries = _vectors(embeddings, dtype, normalize)
    return queries, queries if references is None else _vectors(references, dtype, normalize)


def _vectors(given: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Rows in ``dtype``, of norm 1 if ``normalize``; a row without direction becomes 0."""
    given = given.detach().to(dtype)
    if not normalize:
        return given
    norm = torch.linalg.vector_norm(given, dim=1, keepdim=True)
    norm.masked_fill_(norm == math.inf, math.nan)  # must not pass for a vector without direction
    vectors: Tensor = given / norm.masked_fill_(norm < SMALLEST_NORM, math.inf)
    return vectors


@contextmanager
def reported(progress: object, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with the number of queries of each chunk; a bar is closed at the end."""
    if callable(progress) or not check_progress(progress):
        yield progress if callable(progress) else int
        return
    try:
        bar = import_module("tqdm").tqdm(total=total, desc="retrieval metrics", unit=" queries")
    except ImportError as error:
        raise ImportError(
            "progress=True draws its bar with tqdm, which is not installed: pip install tqdm, or pass a function that "
            "takes the number of queries done since its last call"
        ) from error
    try:
        yield bar.update
    finally:
        bar.close()
