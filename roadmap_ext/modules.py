"""The losses as modules: settings at construction, data at each call."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .distributed import agreed, several
from .losses import ap_loss, roadmap_loss
from .memory import EmbeddingMemory
from .settings import (
    CalibrationKeywords,
    HierarchicalAPKeywords,
    NDCGLossKeywords,
    RecallAtKKeywords,
    RoadmapKeywords,
    ScoreKeywords,
    SmoothAPKeywords,
    SupAPKeywords,
    accepts,
    checked,
    defaults_of,
    without_margins,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Loss(nn.Module):
    """What the losses share. The settings that a subclass takes become attributes, and may be changed."""

    _fixed: ClassVar[dict[str, Any]] = {}  # the settings that make a subclass what it is
    _changed: ClassVar[dict[str, Any]] = {}  # the defaults that are not everybody's

    def __init__(self, keywords: type, settings: Mapping[str, Any]) -> None:
        super().__init__()
        accepted = defaults_of(keywords) | self._changed
        checked(settings, accepted)
        self._names = tuple(accepted)
        for name, default in accepted.items():
            setattr(self, name, settings.get(name, default))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings as keywords of the function behind this module; to change one, set the attribute."""
        return MappingProxyType(self._keywords())

    def _keywords(self) -> dict[str, Any]:
        return without_margins(self._fixed | {name: getattr(self, name) for name in self._names})

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)


class APLoss(_Loss):
    """The module of :func:`roadmap_ext.ap_loss`: the settings at construction, scores and masks at each call.

    Args and errors are those of :func:`roadmap_ext.ap_loss`; settings are checked at construction.

    Shape:
        scores [B, N], target [B, N] bool, ignore [B, N] bool or None; the loss is a scalar, or [B] for
        ``reduction="none"``.

    Example:
        >>> import torch
        >>> loss = APLoss(tau=0.02)
        >>> print(f"{loss(torch.tensor([[0.52, 0.5]]), torch.tensor([[True, False]])):.4f}")
        0.2119
    """

    @accepts(ScoreKeywords)
    def __init__(self, **settings: Unpack[ScoreKeywords]) -> None:
        super().__init__(ScoreKeywords, settings)

    def forward(self, scores: Tensor, target: Tensor, ignore: Tensor | None = None) -> Tensor:
        """The loss of scores [B, N]: see :func:`roadmap_ext.ap_loss`."""
        return ap_loss(scores, target, ignore=ignore, **self._keywords())

    def extra_repr(self) -> str:
        """The settings that have an effect, as they were given."""
        shown = [
            name for name in self._names if self.surrogate == "sup" or name not in ("rho", "delta", "start", "offset")
        ]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class _EmbeddingLoss(_Loss):
    """What the losses of embeddings share."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: None = None,
        ref_emb: Tensor | EmbeddingMemory | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
        positives: Tensor | tuple[Tensor, Tensor] | None = None,
        relevance: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings [B, D] with labels [B]: see :func:`roadmap_ext.roadmap_loss`.

        ``indices_tuple`` stands where pytorch-metric-learning's losses have it; anything but None raises ValueError.
        """

        def refuse() -> None:
            raise ValueError(
                f"the third argument is indices_tuple, which {type(self).__name__} does not take, got "
                f"{type(indices_tuple).__name__}: name references, ref_emb=... and ref_labels=...; a miner's tuple is "
                "for the class of the same name in roadmap_ext.integrations.pytorch_metric_learning"
            )

        if indices_tuple is not None:
            agreed("a loss", refuse) if self.settings["gather_across_devices"] and several() else refuse()
        return roadmap_loss(
            embeddings,
            labels,
            ref_emb,
            ref_labels,
            ids=ids,
            ref_ids=ref_ids,
            positives=positives,
            relevance=relevance,
            **self._keywords(),
        )


class RoadmapLoss(_EmbeddingLoss):
    """ROADMAP: the SupAP loss and the calibration loss of a batch of embeddings (Ramzi et al., NeurIPS 2021, eq. 9).

    What the settings do in full, and the errors, are those of :func:`roadmap_ext.roadmap_loss`; settings are checked
    at construction.

    Args:
        calibration_weight: weight of the calibration loss, 0 to 1; the AP loss has the rest.
        positive_margin: similarity that positives should have.
        negative_margin: similarity that negatives should stay below.
        margins: ``"auto"`` reads both margins from each batch; None takes those given.
        calibration_reduction: mean over the pairs of each query, ``"per_query"``, or over those of the whole batch that
            violate a margin, ``"violating_pairs"``.
        normalize: rank by cosine similarity; else by plain products.
        include_self: count each query as its own positive.
        chunk_size: queries at a time; None takes as many as fit in 64 MiB of scores (256 MiB on a GPU).
        gather_across_devices: rank against the references of all ranks of torch.distributed.
        ignore_label: the label of items whose class is not known: they are in no ranking. None: there is no such label.
        surrogate: what stands for the steps of a rank: ``"sup"``, or ``"smooth"`` for Smooth-AP's sigmoid.
        tau: temperature of the sigmoid, in units of similarity; positive.
        rho: slope of the linear part beyond ``delta``; not negative.
        delta: how far above a positive the linear part begins, in units of similarity; not negative.
        start: jump of the surrogate at equal similarities.
        offset: value at which the linear part begins; None makes the surrogate continuous.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for a loss of each query.
        method: ``"auto"``, ``"pairwise"``, ``"sorted"``, or ``"reference"`` for plain PyTorch.

    Shape:
        embeddings [B, D], labels [B], ref_emb [N, D], ref_labels [N]; the loss is a scalar, or [B] for
        ``reduction="none"``.

    Example:
        >>> import torch
        >>> loss = RoadmapLoss()
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.3917
    """

    @accepts(RoadmapKeywords)
    def __init__(self, **settings: Unpack[RoadmapKeywords]) -> None:
        super().__init__(RoadmapKeywords, settings)


class SupAPLoss(_EmbeddingLoss):
    """ROADMAP's smooth average precision alone, an upper bound of 1 - AP (Ramzi et al., NeurIPS 2021, eq. 5).

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``calibration_weight=0``.

    Example:
        >>> import torch
        >>> loss = SupAPLoss()
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.3333
    """

    _fixed: ClassVar[dict[str, Any]] = {"calibration_weight": 0.0}

    @accepts(SupAPKeywords)
    def __init__(self, **settings: Unpack[SupAPKeywords]) -> None:
        super().__init__(SupAPKeywords, settings)


class SmoothAPLoss(_EmbeddingLoss):
    """Smooth-AP: every step of the rank a sigmoid of temperature ``tau`` (Brown et al., ECCV 2020).

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``surrogate="smooth", calibration_weight=0``.

    Example:
        >>> import torch
        >>> loss = SmoothAPLoss()
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.2500
    """

    _fixed: ClassVar[dict[str, Any]] = {"calibration_weight": 0.0, "surrogate": "smooth"}

    @accepts(SmoothAPKeywords)
    def __init__(self, **settings: Unpack[SmoothAPKeywords]) -> None:
        super().__init__(SmoothAPKeywords, settings)


class CalibrationLoss(_EmbeddingLoss):
    """ROADMAP's calibration loss alone: positives above one margin, negatives below another (eq. 8 of the paper).

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``calibration_weight=1``.

    Example:
        >>> import torch
        >>> loss = CalibrationLoss()
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.4500
    """

    _fixed: ClassVar[dict[str, Any]] = {"calibration_weight": 1.0}

    @accepts(CalibrationKeywords)
    def __init__(self, **settings: Unpack[CalibrationKeywords]) -> None:
        super().__init__(CalibrationKeywords, settings)


class _RankLoss(_EmbeddingLoss):
    """What the losses of other ranks than AP's share: by default, no calibration."""

    _changed: ClassVar[dict[str, Any]] = {"calibration_weight": 0.0}


class RecallAtKLoss(_RankLoss):
    """Recall@k of embeddings: :func:`roadmap_ext.recall_loss`, with all that :class:`RoadmapLoss` can do.

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``loss="recall", calibration_weight=0``.

    Example:
        >>> import torch
        >>> loss = RecallAtKLoss(k=1)
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.6904
    """

    _fixed: ClassVar[dict[str, Any]] = {"loss": "recall"}

    @accepts(RecallAtKKeywords, calibration_weight=0.0)
    def __init__(self, **settings: Unpack[RecallAtKKeywords]) -> None:
        super().__init__(RecallAtKKeywords, settings)


class NDCGLoss(_RankLoss):
    """NDCG of embeddings: :func:`roadmap_ext.ndcg_loss`, with all that :class:`RoadmapLoss` can do.

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``loss="ndcg", calibration_weight=0``.

    Example:
        >>> import torch
        >>> loss = NDCGLoss()  # labels of two levels, coarse to fine
        >>> labels = torch.tensor([[5, 50], [5, 51], [6, 60], [5, 50]])
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], labels):.4f}")
        0.3765
    """

    _fixed: ClassVar[dict[str, Any]] = {"loss": "ndcg"}

    @accepts(NDCGLossKeywords, calibration_weight=0.0)
    def __init__(self, **settings: Unpack[NDCGLossKeywords]) -> None:
        super().__init__(NDCGLossKeywords, settings)


class MRRLoss(_RankLoss):
    """The rank of the first positive: :func:`roadmap_ext.mrr_loss`, with all that :class:`RoadmapLoss` can do.

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``loss="mrr", calibration_weight=0``.

    Example:
        >>> import torch
        >>> loss = MRRLoss()
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6])):.4f}")
        0.3333
    """

    _fixed: ClassVar[dict[str, Any]] = {"loss": "mrr"}

    @accepts(RoadmapKeywords, calibration_weight=0.0)
    def __init__(self, **settings: Unpack[RoadmapKeywords]) -> None:
        super().__init__(RoadmapKeywords, settings)


class HierarchicalAPLoss(_RankLoss):
    """Hierarchical AP of embeddings: :func:`roadmap_ext.hap_loss`, with all that :class:`RoadmapLoss` can do.

    Labels [B, L] are the classes of each item from coarse to fine.

    Args and errors are those of :func:`roadmap_ext.roadmap_loss` with ``loss="hap", calibration_weight=0``.

    Example:
        >>> import torch
        >>> loss = HierarchicalAPLoss()
        >>> labels = torch.tensor([[5, 50], [5, 51], [6, 60], [5, 50]])
        >>> print(f"{loss(torch.eye(4)[[0, 0, 1, 2]], labels):.4f}")
        0.4225
    """

    _fixed: ClassVar[dict[str, Any]] = {"loss": "hap"}

    @accepts(HierarchicalAPKeywords, calibration_weight=0.0)
    def __init__(self, **settings: Unpack[HierarchicalAPKeywords]) -> None:
        super().__init__(HierarchicalAPKeywords, settings)
