"""The checks of tensors and other data, before any kernel runs: what was given, what is accepted, what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from .advice import for_labels, for_mask, for_scores, for_vectors, spelled
from .autograd import can_be_read

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def one_of(name: str, value: object, accepted: tuple[str, ...]) -> str:
    """Return ``value``, one of the ``accepted`` words. Raises ValueError for anything else."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value


def as_tensor(array: numpy.ndarray[Any, Any]) -> Any:
    """A tensor on the same memory. An array that torch does not take is returned as it is: a check will refuse it.

    So is one with masked items, which torch would take with whatever lies under the mask.
    """
    if numpy.ma.is_masked(array):
        return array
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an array that cannot be written, which nobody does
            made: Any = torch.as_tensor(array)
    except (TypeError, ValueError):
        return array
    made.of_array = True  # for advice.py: what the user has is no tensor
    return made


def check_flag(name: str, value: object) -> bool:
    """Return ``value``, a bool. Raises TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_count(name: str, value: object, least: int) -> int:
    """Check a number of things, and return it. Raises TypeError for what is no integer, ValueError for a small one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_ignore_label(name: str, value: object) -> int | None:
    """Return the label of items that are in no ranking, or None. Raises TypeError, ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be None or an integer, the label of items to ignore, got {value!r}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must be an int64, as labels are, got {value}")
    return int(value)


def check_chunk_size(name: str, value: object) -> int | None:
    """Return the number of queries a chunk; None leaves it to the library. Raises TypeError, ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be None or an integer, a number of queries, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: leave it out to have it chosen")
    return int(value)


def check_ks(value: object) -> tuple[int, ...]:
    """Check the k of R@k, and return them. Raises TypeError for what is no integer, ValueError for one below 1."""
    value = value.tolist() if isinstance(value, Tensor) else value
    ks = tuple(value) if isinstance(value, Iterable) else (value,)
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, Integral):
            raise TypeError(f"k must be an integer or a sequence of integers, such as (1, 10, 100), got {k!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, for ranks begin there, got {k}")
    return tuple(int(k) for k in ks)


def check_batches(value: object, references: int, device: torch.device) -> Tensor:
    """Check a partition of references into batches, and return the number of each one's batch, [N] int64 from 0 on.

    It comes as these numbers, or as a list of the references of each batch.
    """
    if isinstance(value, Tensor):
        check_index("batches", value, device)
        if len(value) != references:
            raise ValueError(f"batches must have one entry a reference, {references}, got {len(value)}")
        number: Tensor = torch.unique(value.long(), return_inverse=True)[1]
        return number
    if not isinstance(value, list | tuple):
        raise TypeError(
            "batches must be a tensor with the number of each reference's batch, or a list of tensors with the "
            f"references of each batch, got {type(value).__name__}"
        )
    for place, batch in enumerate(value):
        check_index(f"batches[{place}]", batch, device)
    index = torch.cat([batch.long() for batch in value]) if value else torch.empty(0, dtype=torch.int64, device=device)
    # One comparison says all: every reference once.
    if not torch.equal(index.sort().values, torch.arange(references, device=device)):
        raise ValueError(
            f"batches must hold each of the {references} references once: they hold {len(index)} indices, "
            f"{len(set(index.tolist()))} of them different"
            + (f", from {int(index.min())} to {int(index.max())}" if len(index) else "")
            + "; leave references in no batch out of ref_emb"
        )
    number = torch.empty_like(index)
    sizes = torch.tensor([len(batch) for batch in value], device=device, dtype=torch.int64)
    number[index] = torch.arange(len(value), device=device).repeat_interleave(sizes)
    return number


def check_counts(positives: Tensor, negatives: Tensor) -> None:
    """Check the numbers of positives and negatives in batches, [B, K] each."""
    for name, value in (("positives", positives), ("negatives", negatives)):
        check_plain(name, "an integer torch.Tensor, [queries, batches]", value, str)
        if value.dtype.is_floating_point or value.dtype.is_complex:
            raise TypeError(f"{name} must be an integer torch.Tensor, [queries, batches], got {value.dtype}")
        if value.dim() != 2:
            raise ValueError(f"{name} must be 2-D, [queries, batches], got shape {tuple(value.shape)}")
        if value.numel() and value.min() < 0:
            raise ValueError(f"{name} must not be negative, got {int(value.min())}")
    if positives.shape != negatives.shape:
        raise ValueError(
            f"negatives must have the shape of positives, {tuple(positives.shape)}, got {tuple(negatives.shape)}"
        )


def check_index(name: str, value: object, device: torch.device, items: int | None = None) -> None:
    """Check indices [n] of any integer dtype, of a number of items if it is given. Raises TypeError, ValueError."""
    check_plain(name, "a torch.Tensor of integers", value, lambda: for_labels(name, value, None))
    index = cast(Tensor, value)
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {index.dtype}{for_labels(name, index, None)}")
    if index.dim() != 1:
        raise ValueError(f"{name} must be 1-D, got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(
            f"{name} must be on the device of what is ranked, {device}, got {index.device}: use "
            f"{_to(name, index, device)}"
        )
    if items is not None and len(index):
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= items:
            raise ValueError(f"{name} must be at least 0 and below {items}, got {low if low < 0 else high}")


def check_progress(value: object) -> bool:
    """Whether a bar is wanted. Raises TypeError unless ``value``, which cannot be called, says so."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(
            "progress must be None, True (a bar) or a function that takes a number of queries, got "
            f"{type(value).__name__}"
        )
    return value is True


def check_given(labels: object, positives: object, relevance: object, beside: str) -> None:
    """Raise where nothing says what is relevant, or what cannot be known of references ``beside`` the batch's own."""
    if beside and (positives is not None or relevance is not None):
        name = "relevance" if positives is None else "positives"
        raise ValueError(f"{name} was given together with {beside}, whose references it does not know: pass labels")
    if labels is None and positives is None and relevance is None:
        raise TypeError("labels must be a torch.Tensor of integers, got None; or pass positives or relevance")


def check_embeddings(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    several: bool = False,
) -> None:
    """Check embeddings, labels and ids of queries and references: TypeError for types, ValueError for the rest.

    Where ``several`` labels an item are taken, these may be [B, L] integers whose levels nest, or [B, C] bool.
    """
    check_matrices(embeddings, ref_emb)
    many = several and _several("labels", labels, embeddings)
    if not many:
        _check_integers("labels", labels, "embeddings", embeddings)
    if (ref_emb is None) != (ref_labels is None):
        given, missing = ("ref_labels", "ref_emb") if ref_emb is None else ("ref_emb", "ref_labels")
        raise ValueError(
            f"{given} was given without {missing}: references need both; without either, the batch is its own"
        )
    if (ids is None) != (ref_ids is None):
        given, missing = ("ref_ids", "ids") if ids is None else ("ids", "ref_ids")
        raise ValueError(
            f"{given} was given without {missing}: an item is recognised by equal ids on both sides; where the batch "
            "is its own reference, a query is left out by its index and needs no ids"
        )
    references, name = embeddings, "embeddings"
    if ref_emb is not None and ref_labels is not None:
        references, name = ref_emb, "ref_emb"
        if many:
            if not _several("ref_labels", ref_labels, ref_emb):
                _check_integers("ref_labels", ref_labels, name, ref_emb)
            if ref_labels.shape[1:] != labels.shape[1:] or (ref_labels.dtype == torch.bool) != (
                labels.dtype == torch.bool
            ):
                raise ValueError(
                    f"ref_labels must be of the kind of labels, {labels.dtype} and [N, {labels.shape[1]}], got "
                    f"{ref_labels.dtype} and shape {tuple(ref_labels.shape)}"
                )
        else:
            _check_integers("ref_labels", ref_labels, name, ref_emb)
    if many and labels.dtype != torch.bool:
        _check_nesting(labels if ref_labels is None else torch.cat([labels.long(), ref_labels.long()]))
    if ids is not None and ref_ids is not None:
        _check_integers("ids", ids, "embeddings", embeddings)
        _check_integers("ref_ids", ref_ids, name, references)


def _several(name: str, labels: object, matrix: Tensor) -> bool:
    """Whether labels are several an item, [B, L] or [B, C]: all else is for the check of one. Raises for 0 and 1."""
    # A subclass may be a fake one, in a graph.
    if not isinstance(labels, Tensor) or labels.is_nested or labels.layout != torch.strided:
        return False
    if labels.dim() != 2 or labels.shape[1] < 2 or len(labels) != len(matrix):
        return False
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.is_quantized:
        return False
    if labels.device != matrix.device:
        return False
    if labels.dtype != torch.bool and can_be_read(labels) and labels.numel() and ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"{name} of 0 and 1 could be classes or levels: use {name}.bool() if each column is a class, or number the "
            f"classes of each level, coarse to fine{for_labels(name, labels, len(matrix))}"
        )
    if labels.dtype != torch.bool and labels.shape[1] > 16:
        raise ValueError(
            f"{name} must have at most 16 levels, coarse to fine, got {labels.shape[1]} columns: classes of several "
            f"are bool, [items, classes]"
        )
    return True


def _check_nesting(labels: Tensor) -> None:
    """Raise ValueError unless each class of a level lies in one of the level before."""
    if not can_be_read(labels) or not len(labels):
        return
    for level in range(1, labels.shape[1]):
        fine, order = labels[:, level].sort()
        coarse = labels[:, level - 1][order]
        wrong = ((fine[1:] == fine[:-1]) & (coarse[1:] != coarse[:-1])).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                "labels must nest from coarse to fine, each class of a column in one of the column before: class "
                f"{int(fine[at])} of column {level} lies in {int(coarse[at])} and in {int(coarse[at + 1])} of column "
                f"{level - 1}; labels.flip(1) turns columns around"
            )


def check_relation(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    positives: Tensor | tuple[Tensor, Tensor] | None,
    relevance: Tensor | None,
    gain: str,
) -> tuple[Tensor, Tensor] | None:
    """Check embeddings whose relevance is given pair by pair. Returns positives that are lists of indices.

    Raises TypeError for types and dtypes, ValueError for the rest.
    """
    name = "relevance" if positives is None else "positives"
    given = [what for what, value in (("labels", labels), ("ref_labels", ref_labels)) if value is not None]
    if given or (positives is not None and relevance is not None):
        raise ValueError(
            f"{' and '.join(given) or 'relevance'} was given beside {name}, which says all that is relevant: pass one "
            f"of them (labels=None beside {name})"
        )
    check_matrices(embeddings, ref_emb)
    references = embeddings if ref_emb is None else ref_emb
    if (ids is None) != (ref_ids is None):
        raise ValueError("ids and ref_ids belong together: an item is recognised by equal ids on both sides")
    if ids is not None and ref_ids is not None:
        _check_integers("ids", ids, "embeddings", embeddings)
        _check_integers("ref_ids", ref_ids, "references", references)
    if isinstance(positives, tuple | list):
        if len(positives) != 2:
            raise ValueError(f"positives must be a mask, or two tensors (query, reference), got {len(positives)}")
        return check_pairs("positives", *positives, len(embeddings), len(references), embeddings.device)
    value = relevance if positives is None else positives
    check_plain(name, "a torch.Tensor [queries, references]", value, lambda: "")
    shape = (len(embeddings), len(references))
    made = cast(Tensor, value)
    if made.shape != shape:
        raise ValueError(f"{name} must be [queries, references], {shape}, got {tuple(made.shape)}")
    if made.device != embeddings.device:
        raise ValueError(f"{name} must be on the device of embeddings, {embeddings.device}, got {made.device}")
    if positives is not None and made.dtype != torch.bool:
        raise TypeError(f"positives must have dtype torch.bool, got {made.dtype}: grades are relevance=")
    _check_grade_values(name, made, None, 64 if gain == "exponential" else 1e28)
    return None


def check_matrices(embeddings: Tensor, ref_emb: Tensor | None) -> None:
    """Check embeddings [B, D] and references [N, D]: TypeError for types and dtypes, ValueError for the rest."""
    _check_matrix("embeddings", embeddings)
    if ref_emb is None:
        return
    _check_matrix("ref_emb", ref_emb)
    if ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"ref_emb must have the dimension of embeddings, {embeddings.shape[1]}, got {ref_emb.shape[1]}: both "
            "come from the same network"
        )
    if ref_emb.device != embeddings.device:
        raise ValueError(
            f"ref_emb must be on the device of embeddings, {embeddings.device}, got {ref_emb.device}: use "
            f"{_to('ref_emb', ref_emb, embeddings.device)}"
        )


def check_pairs(
    name: str, query: Tensor, reference: Tensor, queries: int, references: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Check pairs given as the indices of their queries and of their references; returns both, [n] int64 on ``device``.

    Raises TypeError for types and dtypes, ValueError for shapes and for an index that is out of range.
    """
    checked = []
    for side, value, size in (("query", query, queries), ("reference", reference, references)):
        check_plain(f"{name}: {side} indices", "a torch.Tensor of integers", value, str)
        if value.dim() != 1:
            raise ValueError(f"{name}: {side} indices must be 1-D, got shape {tuple(value.shape)}")
        # A miner that found nothing may return torch.tensor([]), which is float32.
        if len(value) and (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool):
            raise TypeError(f"{name}: {side} indices must have an integer dtype, got {value.dtype}")
        index = value.to(device, torch.int64)
        if len(index):
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name}: {side} indices must be at least 0 and below {size}, got {low if low < 0 else high}"
                )
        checked.append(index)
    if len(checked[0]) != len(checked[1]):
        raise ValueError(
            f"{name}: a pair is a query and a reference, got {len(checked[0])} query and {len(checked[1])} reference "
            "indices"
        )
    return checked[0], checked[1]


def check_plain(name: str, wanted: str, value: object, advice: Callable[[], str]) -> None:
    """Raise TypeError unless ``value`` is a tensor of the only kind that this package takes: plain and dense."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}{advice()}")
    kind = None
    if type(value) is not Tensor and hasattr(value, "full_tensor"):  # its class is not imported for that
        kind = "a DTensor"
    elif value.is_nested:
        kind = "a nested tensor"
    elif value.layout != torch.strided:
        kind = f"layout {value.layout}"
    elif value.is_quantized:
        kind = f"a quantized one, {value.dtype}"
    if kind is not None:
        raise TypeError(f"{name} must be a plain dense tensor, got {kind}{advice()}")


def _to(name: str, value: Tensor, device: torch.device) -> str:
    return f"{spelled(name, value)}.to({str(device)!r})"


def _check_matrix(name: str, value: Tensor) -> None:
    check_plain(name, "a torch.Tensor", value, lambda: for_vectors(name, value))
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}{for_vectors(name, value)}"
        )
    if value.dim() != 2:
        raise ValueError(
            f"{name} must be 2-D, [items, dimension], got shape {tuple(value.shape)}{for_vectors(name, value)}"
        )


def _check_integers(name: str, value: Tensor, owner: str, matrix: Tensor) -> None:
    rows = len(matrix)
    check_plain(name, "a torch.Tensor of integers", value, lambda: for_labels(name, value, rows))
    if value.shape != (rows,):
        raise ValueError(
            f"{name} must be 1-D with one entry a row of {owner}, {rows}, got shape {tuple(value.shape)}"
            f"{for_labels(name, value, rows)}"
        )
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}{for_labels(name, value, rows)}")
    if value.device != matrix.device:
        raise ValueError(
            f"{name} must be on the device of {owner}, {matrix.device}, got {value.device}: use "
            f"{_to(name, value, matrix.device)}"
        )


def check_scores(scores: Tensor, target: Tensor, ignore: Tensor | None) -> None:
    """Check scores [B, N] and its masks. Raises TypeError for types and dtypes, ValueError for shapes and devices."""
    _check_score_matrix(scores)
    _check_mask("target", target, scores)
    if ignore is not None:
        _check_mask("ignore", ignore, scores)


def check_relevance(scores: Tensor, relevance: Tensor, ignore: Tensor | None, gain: str) -> None:
    """Check scores [B, N] and relevance [B, N], bool or numbers that are not negative; the rest as check_scores()."""
    _check_score_matrix(scores)
    if ignore is not None:
        _check_mask("ignore", ignore, scores)
    _check_grades("relevance", relevance, scores, ignore, 64 if gain == "exponential" else 1e28)


def check_levels(scores: Tensor, level: Tensor, relevance: Tensor | None, ignore: Tensor | None) -> None:
    """Check scores [B, N], levels [B, N] of integers from 0 to 16 and their relevance [B, N], if there is one."""
    _check_score_matrix(scores)
    if ignore is not None:
        _check_mask("ignore", ignore, scores)
    check_plain("level", "a torch.Tensor of integers", level, lambda: "")
    if level.dtype.is_floating_point or level.dtype.is_complex:
        raise TypeError(
            f"level must have an integer dtype, got {level.dtype}: levels count from 0, a negative, to 16 at most; "
            "what they are worth is relevance"
        )
    _check_grades("level", level, scores, ignore, 16)
    if relevance is not None:
        _check_grades("relevance", relevance, scores, ignore, 1e28)


def _check_score_matrix(scores: Tensor) -> None:
    check_plain("scores", "a torch.Tensor", scores, lambda: for_scores("scores", scores))
    if scores.dtype not in DTYPES:
        raise TypeError(
            f"scores must be float16, bfloat16, float32 or float64, got {scores.dtype}{for_scores('scores', scores)}"
        )
    if scores.dim() != 2:
        raise ValueError(
            f"scores must be 2-D, [queries, references], got shape {tuple(scores.shape)}{for_scores('scores', scores)}"
        )


def _check_grades(name: str, value: Tensor, scores: Tensor, ignore: Tensor | None, most: float) -> None:
    check_plain(name, "a torch.Tensor", value, lambda: "")
    if value.dtype.is_complex:
        raise TypeError(f"{name} must be bool or real numbers, got {value.dtype}")
    _check_beside(name, value, scores, "")
    _check_grade_values(name, value, ignore, most)


def _check_grade_values(name: str, value: Tensor, ignore: Tensor | None, most: float) -> None:
    if value.dtype.is_complex:
        raise TypeError(f"{name} must be bool or real numbers, got {value.dtype}")
    if value.dtype == torch.bool or not value.numel() or not can_be_read(value):
        return
    low, high = (value if ignore is None else value.masked_fill(ignore, 0)).aminmax()
    if not (low >= 0 and high <= most):  # nor is NaN
        raise ValueError(
            f"{name} must lie between 0, for what is not relevant, and {most:g}, got values from {low.item():g} to "
            f"{high.item():g}: mark pairs that are not to count with ignore"
        )


def _check_mask(name: str, mask: Tensor, scores: Tensor) -> None:
    check_plain(name, "a torch.Tensor of dtype torch.bool", mask, lambda: for_mask(name, mask, scores))
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {mask.dtype}{for_mask(name, mask, scores)}")
    _check_beside(name, mask, scores, for_mask(name, mask, scores) if mask.shape != scores.shape else "")


def _check_beside(name: str, value: Tensor, scores: Tensor, advice: str) -> None:
    if value.shape != scores.shape:
        raise ValueError(
            f"{name} must have the shape of scores, {tuple(scores.shape)}, got {tuple(value.shape)}{advice}"
        )
    if value.device != scores.device:
        raise ValueError(
            f"{name} must be on the device of scores, {scores.device}, got {value.device}: use "
            f"{spelled(name, value)}.to({spelled('scores', scores)}.device)"
        )
