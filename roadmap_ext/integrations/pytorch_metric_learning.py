"""The losses as pytorch-metric-learning's own kind, and its CrossBatchMemory with these losses allowed.

What the library's calls mean becomes pairs of queries and references: labels, an ``indices_tuple``, or what
CrossBatchMemory says. The rest is roadmap_loss's. Only pairs that someone lists are ever listed: a batch or a memory
without a miner costs a chunk of scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modules, ops
from ..advice import for_labels
from ..autograd import resolve_method
from ..embedding_loss import embedding_loss
from ..memory import EmbeddingMemory, make_writable
from ..pairs import Pairs, blank, from_labels, from_pairs
from ..settings import checked, without_margins
from ..validation import check_embeddings, check_matrices, check_pairs, check_plain

_NEEDED = "pytorch-metric-learning>=2.9,<3"


def _check_version(found: str | None) -> None:
    """Raise ImportError unless ``found`` is 2.9 or a later 2.x, which keep its interface; earlier ones are untested."""
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers is None or not (2, 9) <= (int(numbers[1]), int(numbers[2])) < (3, 0):
        raise ImportError(
            f"{__name__} needs {_NEEDED}, but "
            + (f"{found} is installed" if found else "it is not installed")
            + f': pip install "{_NEEDED}"'
        )


try:
    import pytorch_metric_learning
except ModuleNotFoundError as error:
    if error.name != "pytorch_metric_learning":
        raise
    _check_version(None)
else:
    _check_version(pytorch_metric_learning.__version__)
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.reducers import DivisorReducer, MeanReducer, MultipleReducers

__all__ = ["CalibrationLoss", "CrossBatchMemory", "RoadmapLoss", "SmoothAPLoss", "SupAPLoss"]

Indices = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


class _AllButCopies(NamedTuple):
    """An indices_tuple that need not be listed: every pair, as the labels say, but a query's own copy."""

    copy: Tensor  # [B] int64: the reference that is the query itself


class _PairLoss(losses.BaseMetricLossFunction):
    """What the losses share. A subclass names the module whose settings it takes."""

    _module: type[modules._EmbeddingLoss]

    def __init__(
        self,
        *,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
        **settings: Any,
    ) -> None:
        if distance is not None:
            normalize = _normalizes(distance)
            if settings.setdefault("normalize", normalize) != normalize:
                raise ValueError(
                    f"normalize={settings['normalize']!r} contradicts the distance, whose normalize_embeddings is "
                    f"{normalize!r}: leave normalize out"
                )
        if settings.get("gather_across_devices"):
            raise NotImplementedError(
                "gather_across_devices is DistributedLossWrapper's task here: leave it out and wrap the loss in "
                "pytorch_metric_learning.utils.distributed.DistributedLossWrapper"
            )
        module = self._module(**settings)  # checks them all
        if module.settings["reduction"] != "mean":
            raise ValueError(
                "reduction is the reducer's task here: leave it out and pass reducer=SumReducer(), or "
                "DoNothingReducer() for the loss of each query"
            )
        if distance is None:
            normalize = module.settings["normalize"]
            distance = CosineSimilarity() if normalize else DotProductSimilarity(normalize_embeddings=False)
        super().__init__(
            distance=distance,
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
        )
        self._names = tuple(name for name in module._names if name not in ("reduction", "gather_across_devices"))
        for name in self._names:
            setattr(self, name, getattr(module, name))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings as keywords of :func:`roadmap_ext.roadmap_loss`; to change one, set the attribute."""
        own = self._module._fixed | {name: getattr(self, name) for name in self._names}
        return MappingProxyType(without_margins(own))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings [B, D], each ranking the references: the batch itself, or ``ref_emb``.

        Args:
            embeddings: [B, D] float16, bfloat16, float32 or float64.
            labels: [B] any integer dtype; may be None where an ``indices_tuple`` is given, which then says it all.
            indices_tuple: None: every pair counts, as its labels say, but that of a query with itself (not left out
                where ``ref_emb`` is another tensor). Triplets (anchor, positive, negative) or pairs (anchor, positive,
                anchor, negative) of 1-D integer tensors that index embeddings and references: the pairs in it count,
                each once, and all others are ignored. A pair that is listed as both is positive.
            ref_emb: [N, D] what to rank; None: the embeddings.
            ref_labels: [N] its labels, any integer dtype.

        Returns:
            What the reducer makes of it; by default a scalar: float64 if either side is, else float32.

        Raises:
            TypeError: a tensor has the wrong type or dtype.
            ValueError: shapes differ, an index is out of range, labels or references are missing.
            RuntimeError: the kernels for the device were not built.
        """
        if isinstance(ref_emb, EmbeddingMemory):
            raise TypeError(
                "ref_emb is an EmbeddingMemory, which takes ids, and this call has no place for them: use "
                f"roadmap_ext.{type(self).__name__}, or the CrossBatchMemory of {__name__}"
            )
        if ref_emb is None and ref_labels is not None:
            raise ValueError("ref_labels was given without ref_emb: without either, the batch is its own reference")
        # Before the library asks them for their shapes; labels on another device it moves.
        check_matrices(embeddings, ref_emb)
        for name, value, rows in (("labels", labels, len(embeddings)), ("ref_labels", ref_labels, None)):
            if value is not None:
                check_plain(name, "a torch.Tensor of integers", value, partial(for_labels, name, value, rows))
        if indices_tuple is None and labels is not None:
            labels = labels.to(embeddings.device)
            ref_labels = None if ref_labels is None else ref_labels.to(embeddings.device)
            check_embeddings(embeddings, labels, ref_emb, ref_labels, None, None)
        loss: Tensor = super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return loss

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | _AllButCopies | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """What the library's reducers take; its forward gives the embeddings themselves where there is no ref_emb."""
        own = ref_emb is embeddings
        settings = checked(self.settings)
        pairs = self._pairs(embeddings, labels, indices_tuple, ref_emb, ref_labels, settings.ignore_label)
        if own and not settings.include_self:
            pairs = pairs._replace(first_own=0)
        if labels is not None and ref_labels is not None:
            embeddings, ref_emb = (
                blank(rows, of, settings.ignore_label) for rows, of in ((embeddings, labels), (ref_emb, ref_labels))
            )
        objective = settings.objective._replace(reduction="mean" if self._takes_mean() else "none")
        loss = embedding_loss(embeddings, None if own else ref_emb, pairs, settings._replace(objective=objective))
        if objective.reduction == "mean":
            return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}
        counted = torch.arange(len(loss), device=loss.device)
        if pairs.queries is not None:
            counted = counted[pairs.queries]
        if objective.calibration_weight == 0:  # as in our own mean, and in the library's FastAPLoss
            counted = _has_positive(pairs, embeddings, ref_emb, settings.method).nonzero()[:, 0]
        if not len(counted):
            return dict(self.zero_losses())
        return {"loss": {"losses": loss[counted], "indices": counted, "reduction_type": "element"}}

    def set_reducer(self, reducer: Any) -> None:
        """Set what makes one loss of the queries' losses. Raises ValueError for a DivisorReducer."""
        super().set_reducer(reducer)
        if any(isinstance(part, DivisorReducer) for part in self._loss_reducer().modules()):
            raise ValueError(f"{type(self).__name__} has no divisor for a DivisorReducer: use MeanReducer, the default")

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)

    def _pairs(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | _AllButCopies | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
        ignore_label: int | None,
    ) -> Pairs:
        if indices_tuple is not None and not isinstance(indices_tuple, _AllButCopies):
            check_matrices(embeddings, ref_emb)
            listed = _listed_pairs(indices_tuple, embeddings, ref_emb)
            if ignore_label is None or labels is None or ref_labels is None:
                return from_pairs(len(embeddings), len(ref_emb), *listed)
            check_embeddings(embeddings, labels, ref_emb, ref_labels, None, None)
            known, ref_known = labels.long() != ignore_label, ref_labels.long() != ignore_label
            positive, negative = ((i[both], j[both]) for i, j in listed for both in [known[i] & ref_known[j]])
            return from_pairs(len(embeddings), len(ref_emb), positive, negative)._replace(queries=known)
        if labels is None:
            raise ValueError("labels and indices_tuple are both None: one of them has to say what is positive")
        check_embeddings(embeddings, labels, ref_emb, ref_labels, None, None)
        ref_labels = labels if ref_labels is None else ref_labels
        ids = ref_ids = None
        if indices_tuple is not None:
            ids, ref_ids = indices_tuple.copy, torch.arange(len(ref_labels), device=ref_labels.device)
        return from_labels(labels, ref_labels, ids, ref_ids, False, False, ignore_label=ignore_label)

    def _loss_reducer(self) -> Any:
        if not isinstance(self.reducer, MultipleReducers):
            return self.reducer
        return dict(self.reducer.reducers.items()).get("loss", self.reducer.default_reducer)

    def _takes_mean(self) -> bool:
        """Whether the mean is all that is asked for: it costs a matrix product less than the loss of each query."""
        return type(self._loss_reducer()) is MeanReducer  # subclasses sum, or do what we cannot know


class RoadmapLoss(_PairLoss):
    """:class:`roadmap_ext.RoadmapLoss` for pytorch-metric-learning.

    Args:
        distance: None, ``CosineSimilarity()``, or ``DotProductSimilarity()`` with or without ``normalize_embeddings``:
            the same as the setting ``normalize``.
        reducer: None or ``MeanReducer()``: the mean as in :func:`roadmap_ext.roadmap_loss`. Any other reducer gets the
            loss of each query as an "element" (a fourth matrix product); those of the AP losses without calibration
            leave out queries that have no positive.
        embedding_regularizer, embedding_reg_weight, collect_stats: as in the library.
        settings: ``calibration_weight``, ``positive_margin``, ``negative_margin``, ``calibration_reduction``,
            ``normalize``, ``include_self``, ``ignore_label``, ``chunk_size``, ``surrogate``, ``tau``, ``rho``,
            ``delta``, ``start``, ``offset`` and ``method``, as those of :class:`roadmap_ext.RoadmapLoss`; not
            ``reduction`` (the reducer's task) and ``gather_across_devices`` (the library's DistributedLossWrapper's).

    Raises:
        TypeError: an unknown setting, or one of the wrong type.
        ValueError: a setting out of range, a distance that is no dot product, a DivisorReducer.
        NotImplementedError: ``gather_across_devices=True``.

    Example:
        >>> import torch
        >>> loss = RoadmapLoss()
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.3917
    """

    _module = modules.RoadmapLoss


class SupAPLoss(_PairLoss):
    """:class:`roadmap_ext.SupAPLoss` for pytorch-metric-learning; see :class:`RoadmapLoss`."""

    _module = modules.SupAPLoss


class SmoothAPLoss(_PairLoss):
    """:class:`roadmap_ext.SmoothAPLoss` for pytorch-metric-learning; see :class:`RoadmapLoss`.

    Classes of any sizes in any order, unlike the library's loss of this name, whose ``temperature`` is ``tau``.
    """

    _module = modules.SmoothAPLoss


class CalibrationLoss(_PairLoss):
    """:class:`roadmap_ext.CalibrationLoss` for pytorch-metric-learning; see :class:`RoadmapLoss`."""

    _module = modules.CalibrationLoss


_OURS = (RoadmapLoss, SupAPLoss, SmoothAPLoss, CalibrationLoss)


class CrossBatchMemory(losses.CrossBatchMemory):
    """The library's CrossBatchMemory, which takes the losses of this module, too.

    With these, a query's own copy in the memory is never its positive, and without a miner no pair is listed. What the
    memory holds of an item from an earlier call is no own copy: it stays, as in the library, a positive.

    ``state_dict()`` also holds the place of the next entry and whether the memory has been filled, as a tensor. From a
    state of the library's class, which has neither, the memory starts empty, as it does there.

    Args:
        loss: a loss of this module, or one that the library supports.
        embedding_size: D.
        memory_size: embeddings to hold.
        miner: mines pairs of the batch and the memory; None: all of them.
        kwargs: as in the library.

    Raises:
        TypeError: a loss that only shares its name with one of this module.

    Example:
        >>> import torch
        >>> memory = CrossBatchMemory(RoadmapLoss(), embedding_size=4, memory_size=6)
        >>> print(f"{memory(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.3917
    """

    has_been_filled: bool
    queue_idx: int

    def __init__(
        self, loss: torch.nn.Module, embedding_size: int, memory_size: int = 1024, miner: Any = None, **kwargs: Any
    ) -> None:
        kind = type(loss)
        if kind.__name__ in (ours.__name__ for ours in _OURS) and not isinstance(loss, _PairLoss):
            raise TypeError(
                f"CrossBatchMemory takes the {kind.__name__} of {__name__}, got that of {kind.__module__}, which "
                "cannot rank a memory"
            )
        super().__init__(loss, embedding_size, memory_size, miner, **kwargs)

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the losses that it takes."""
        return [*losses.CrossBatchMemory.supported_losses(), *(ours.__name__ for ours in _OURS)]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings [B, D] with labels [B], against the memory with this batch in it.

        Args:
            embeddings, labels: the batch.
            indices_tuple: pairs or triplets of the batch and of places in the memory; as in the library.
            enqueue_mask: [B] bool: rows to enqueue, which are then no queries. None: all are both.

        Raises:
            TypeError: a tensor has the wrong type or dtype.
            ValueError: shapes differ, D is not the memory's, or more rows are enqueued than it holds.
        """
        if isinstance(labels, Tensor) and isinstance(embeddings, Tensor):
            labels = labels.to(embeddings.device)  # as the library does
        check_embeddings(embeddings, labels, None, None, None, None)
        rows, dim = embeddings.shape
        if dim != self.embedding_size:
            raise ValueError(
                f"embeddings must have the memory's dimension, embedding_size={self.embedding_size}, got {dim}"
            )
        enqueued = rows
        if enqueue_mask is not None:
            if not isinstance(enqueue_mask, Tensor) or enqueue_mask.dtype != torch.bool:
                got = enqueue_mask.dtype if isinstance(enqueue_mask, Tensor) else type(enqueue_mask).__name__
                raise TypeError(f"enqueue_mask must be a torch.Tensor of dtype torch.bool, got {got}")
            if enqueue_mask.shape != (rows,):
                raise ValueError(
                    f"enqueue_mask must be 1-D with one entry a row of embeddings, {rows}, got shape "
                    f"{tuple(enqueue_mask.shape)}"
                )
            enqueued = int(enqueue_mask.sum())
        if enqueued > self.memory_size:
            raise ValueError(
                f"{enqueued} embeddings do not fit in a memory of {self.memory_size}: choose memory_size={enqueued} or "
                "more, or a smaller batch"
            )
        loss: Tensor = super().forward(embeddings, labels, indices_tuple, enqueue_mask)
        return loss

    def get_extra_state(self) -> Tensor:
        """What state_dict() holds beside the entries."""
        state = [self.memory_size, self.embedding_size, self.queue_idx, self.has_been_filled]
        return torch.tensor(state, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of get_extra_state()."""
        size, dim, place, filled = map(int, state.tolist())
        if (size, dim) == (self.memory_size, self.embedding_size):  # else load_state_dict() raises when it is through
            self.queue_idx, self.has_been_filled = place, bool(filled)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if f"{prefix}embedding_memory" in state_dict:  # the library's class says no more than what is in it
            empty = torch.tensor([self.memory_size, self.embedding_size, 0, 0], device="cpu")
            state_dict.setdefault(f"{prefix}_extra_state", empty)
        make_writable(self)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Enqueue embeddings [batch_size, D] and labels [batch_size]."""
        filled = self.has_been_filled
        make_writable(self)
        super().add_to_memory(embeddings, labels, batch_size)
        if not batch_size:  # the library takes this for having gone all the way round, and ranks what was never filled
            self.has_been_filled = filled

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory: Tensor,
        known: Tensor,
        input_indices_tuple: Indices | None,
        do_remove_self_comparisons: bool,
    ) -> Indices | _AllButCopies | None:
        """What the loss gets as its indices_tuple, for a memory [M, D] of known labels [M].

        Raises:
            ValueError: the caller's ``indices_tuple``, which as in the library holds places in the memory, is out of
                range or contradicts the labels there.
        """
        if not isinstance(self.loss, _PairLoss):
            pairs: Indices = super().create_indices_tuple(
                embeddings, labels, memory, known, input_indices_tuple, do_remove_self_comparisons
            )
            return pairs
        if input_indices_tuple is not None:
            _check_labels_agree(input_indices_tuple, embeddings, labels, memory, known)
        copy = self.curr_batch_idx if do_remove_self_comparisons else None
        if self.miner is None:  # every pair, so that the caller's are among them
            return None if copy is None else _AllButCopies(copy)
        pairs = super().create_indices_tuple(embeddings, labels, memory, known, input_indices_tuple, False)
        return pairs if copy is None else _without_copies(pairs, copy)


def _normalizes(distance: Any) -> bool:
    """Whether a distance normalises. Raises ValueError for one that is not the dot product that the kernels compute."""
    # By type: a subclass may compute anything.
    if type(distance) not in (CosineSimilarity, DotProductSimilarity) or (distance.p, distance.power) != (2, 1):
        raise ValueError(
            "the losses rank by dot products: distance must be CosineSimilarity() or DotProductSimilarity(), with p=2 "
            f"and power=1, got {distance!r}"
        )
    return bool(distance.normalize_embeddings)


def _listed_pairs(
    indices_tuple: Indices, embeddings: Tensor, ref_emb: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Positive and negative pairs, checked."""
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        raise ValueError(
            "indices_tuple must be (anchor, positive, negative) or (anchor, positive, anchor, negative), got "
            + (f"{len(indices_tuple)} parts" if isinstance(indices_tuple, tuple | list) else repr(type(indices_tuple)))
        )
    anchor, positive, *other, negative = indices_tuple
    sizes = len(embeddings), len(ref_emb), embeddings.device
    return (
        check_pairs("indices_tuple, positives", anchor, positive, *sizes),
        check_pairs("indices_tuple, negatives", other[0] if other else anchor, negative, *sizes),
    )


def _check_labels_agree(
    indices_tuple: Indices, embeddings: Tensor, labels: Tensor, memory: Tensor, known: Tensor
) -> None:
    """The library takes the indices of references as places in the memory. Those of a miner of the batch are not."""
    (anchor, positive), (other, negative) = _listed_pairs(indices_tuple, embeddings, memory)
    wrong = (labels[anchor] != known[positive]).sum() + (labels[other] == known[negative]).sum()
    if wrong:
        raise ValueError(
            f"{int(wrong)} pairs of indices_tuple contradict the labels in the memory: CrossBatchMemory takes its "
            "reference indices as places in the memory, not in the batch. Give it the miner instead: "
            "CrossBatchMemory(..., miner=miner)"
        )


def _without_copies(indices_tuple: Indices, copy: Tensor) -> Indices:
    """Without the pairs, or triplets, in which a query's own copy is its positive.

    The library's remove_self_comparisons overlooks the copy where the batch is a single query.
    """
    anchor, positive, *rest = indices_tuple
    keep = positive != copy[anchor]
    if len(rest) == 1:
        return anchor[keep], positive[keep], rest[0][keep]
    return anchor[keep], positive[keep], rest[0], rest[1]


def _has_positive(pairs: Pairs, embeddings: Tensor, ref_emb: Tensor, method: str) -> Tensor:
    """Which queries have a positive, [B] bool."""
    if resolve_method(method, embeddings) == "reference":
        target, ignore = pairs.masks(len(ref_emb))
        return (target & ~ignore).any(1)
    return ops.count_pairs(pairs, len(embeddings), len(ref_emb))[:, 0] > 0
