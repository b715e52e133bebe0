"""The decomposability gap where it acts: the AP of the batches that are trained on, against that of all of the set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chance import Counts
from .pairs import Items
from .ranking import Array, of_arrays
from .validation import check_flag, check_ignore_label, check_index


class TrainingGap(NamedTuple):
    """The mean over the queries of all batches; NaN if none has a positive in its batch."""

    gap: float  # batch_ap - ap
    batch_ap: float
    ap: float
    null: float  # the gap of independent scores of the same AP: see training_gap


def training_gap(
    embeddings: Array,
    labels: Array,
    batches: Sequence[Array],
    *,
    normalize: bool = True,
    ignore_label: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> TrainingGap:
    """By how much the AP of batches, as training ranks them, exceeds the AP of the whole set.

    Each item of a batch ranks the others of its batch, and then all others of the set: the gap is the mean of the
    differences. So the batches may be those of the sampler: of whole classes, drawn anew in every epoch, with an item
    in several of them or in none.

    A batch is a part of the set, so its AP is higher whatever the embeddings are. ``null`` says by how much that alone
    would raise it: the gap of scores that are drawn independently of each other, normal ones, with the same AP of the
    whole set and the same counts of positives and negatives. What is beyond it, the embeddings make.

    Args:
        embeddings: [N, D] of the whole set, by the network as it is; float16, bfloat16, float32 or float64. Tensors may
            be NumPy arrays.
        labels: [N] any integer dtype.
        batches: a list of int64 tensors, the items of each batch. An item that is in a batch twice is not its own
            positive.
        normalize, ignore_label, progress: as of :func:`retrieval_metrics`; progress counts the set's queries.

    Returns:
        TrainingGap. A query without a positive in its batch has no AP there, and is left out.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices differ, or a batch holds an index that is out of range.

    Example:
        In the batch two of four queries have their class first; in the set items of class 5 come between.

        >>> embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.6, 0.8], [0.8, 0.6], [0.8, 0.6]])
        >>> labels = torch.tensor([7, 7, 3, 3, 5, 5])
        >>> found = training_gap(embeddings, labels, [torch.tensor([0, 1, 3, 2])])
        >>> round(found.batch_ap, 4), round(found.ap, 4)
        (0.75, 0.5208)
    """
    return _training_gap(embeddings, labels, batches, normalize, ignore_label, progress)


@of_arrays
@torch.no_grad()
def _training_gap(
    embeddings: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    normalize: bool,
    ignore_label: int | None,
    progress: Callable[[int], object] | None,
) -> TrainingGap:
    from .metrics import retrieval_metrics  # which has this function, too

    Items.checked(embeddings, labels)
    check_flag("normalize", normalize)
    check_ignore_label("ignore_label", ignore_label)
    if not isinstance(batches, list | tuple):
        raise TypeError(f"batches must be a list of tensors with the items of each batch, got {type(batches).__name__}")
    for place, batch in enumerate(batches):
        check_index(f"batches[{place}]", batch, embeddings.device, len(labels))
    batches = [batch.long() for batch in batches]

    settings: Any = {"normalize": normalize, "ignore_label": ignore_label, "k": (), "reduction": "none"}
    of_all: Tensor = retrieval_metrics(embeddings, labels, progress=progress, **settings)["mAP"]
    size = _occurrences(labels)
    known = torch.ones_like(labels, dtype=torch.bool) if ignore_label is None else labels != ignore_label
    counts, inside, outside = Counts(), [], []
    for batch in batches:
        ap: Tensor = retrieval_metrics(embeddings[batch], labels[batch], ids=batch, ref_ids=batch, **settings)["mAP"]
        counted = ~ap.isnan() & ~of_all[batch].isnan()
        inside += ap[counted].tolist()
        outside += of_all[batch][counted].tolist()
        same, of = _occurrences(labels[batch]), known[batch].sum()
        positives, whole = same - _occurrences(batch), size[batch]
        here = torch.stack([positives, of - same], dim=1)[counted]
        there = torch.stack([whole - 1, known.sum() - whole], dim=1)[counted]
        counts.add(there, here, torch.ones(len(here)))
    if not inside:
        return TrainingGap(math.nan, math.nan, math.nan, math.nan)
    within, of_set = (math.fsum(values) / len(values) for values in (inside, outside))
    return TrainingGap(within - of_set, within, of_set, counts.gap(of_set))


def _occurrences(values: Tensor) -> Tensor:
    """How many of the values equal each of them, itself included, [n]."""
    of: Tensor = torch.unique(values, return_inverse=True)[1]
    return of.bincount()[of]
