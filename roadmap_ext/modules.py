"""The losses as modules."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from ._checks import REDUCTIONS, check_method, make_embedding_objective, make_settings, one_of
from .distributed import agreed, several
from .functional import ap_loss, roadmap_loss
from .memory import EmbeddingMemory


class APLoss(nn.Module):
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

    def __init__(
        self,
        *,
        surrogate: str = "sup",
        tau: float = 0.01,
        rho: float = 100.0,
        delta: float = 0.05,
        start: float = 0.5,
        offset: float | None = None,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__()
        check_method(method)
        one_of("reduction", reduction, REDUCTIONS)
        make_settings(surrogate, tau, rho, delta, start, offset)
        self.surrogate = surrogate
        self.tau = tau
        self.rho = rho
        self.delta = delta
        self.start = start
        self.offset = offset
        self.reduction = reduction
        self.method = method

    def forward(self, scores: Tensor, target: Tensor, ignore: Tensor | None = None) -> Tensor:
        """The loss of scores [B, N]: see :func:`roadmap_ext.ap_loss`."""
        return ap_loss(
            scores,
            target,
            ignore=ignore,
            surrogate=self.surrogate,
            tau=self.tau,
            rho=self.rho,
            delta=self.delta,
            start=self.start,
            offset=self.offset,
            reduction=self.reduction,
            method=self.method,
        )

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        shape = f"rho={self.rho}, delta={self.delta}, start={self.start}, offset={self.offset}, "
        return (
            f"surrogate={self.surrogate!r}, tau={self.tau}, {shape if self.surrogate == 'sup' else ''}"
            f"reduction={self.reduction!r}, method={self.method!r}"
        )


class _EmbeddingLoss(nn.Module):
    """What the losses of embeddings share. The settings that a subclass takes become attributes, and may be changed."""

    _fixed: ClassVar[dict[str, Any]] = {}  # the settings that make a subclass what it is

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        make_embedding_objective(**self._fixed, **settings)  # for what it raises
        self._names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings as keywords of :func:`roadmap_ext.roadmap_loss`; to change one, set the attribute."""
        return MappingProxyType(self._fixed | {name: getattr(self, name) for name in self._names})

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | EmbeddingMemory | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
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
        return roadmap_loss(embeddings, labels, ref_emb, ref_labels, ids=ids, ref_ids=ref_ids, **self.settings)

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)


class RoadmapLoss(_EmbeddingLoss):
    """ROADMAP: the SupAP loss and the calibration loss of a batch of embeddings (Ramzi et al., NeurIPS 2021, eq. 9).

    What the settings do in full, and the errors, are those of :func:`roadmap_ext.roadmap_loss`; settings are checked
    at construction.

    Args:
        calibration_weight: weight of the calibration loss, 0 to 1; the AP loss has the rest.
        positive_margin: similarity that positives should have.
        negative_margin: similarity that negatives should stay below.
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

    def __init__(
        self,
        *,
        calibration_weight: float = 0.5,
        positive_margin: float = 0.9,
        negative_margin: float = 0.6,
        calibration_reduction: str = "per_query",
        normalize: bool = True,
        include_self: bool = False,
        ignore_label: int | None = None,
        chunk_size: int | None = None,
        gather_across_devices: bool = False,
        surrogate: str = "sup",
        tau: float = 0.01,
        rho: float = 100.0,
        delta: float = 0.05,
        start: float = 0.5,
        offset: float | None = None,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__(
            calibration_weight=calibration_weight,
            positive_margin=positive_margin,
            negative_margin=negative_margin,
            calibration_reduction=calibration_reduction,
            normalize=normalize,
            include_self=include_self,
            ignore_label=ignore_label,
            chunk_size=chunk_size,
            gather_across_devices=gather_across_devices,
            surrogate=surrogate,
            tau=tau,
            rho=rho,
            delta=delta,
            start=start,
            offset=offset,
            reduction=reduction,
            method=method,
        )


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

    def __init__(
        self,
        *,
        normalize: bool = True,
        include_self: bool = False,
        ignore_label: int | None = None,
        chunk_size: int | None = None,
        gather_across_devices: bool = False,
        tau: float = 0.01,
        rho: float = 100.0,
        delta: float = 0.05,
        start: float = 0.5,
        offset: float | None = None,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__(
            normalize=normalize,
            include_self=include_self,
            ignore_label=ignore_label,
            chunk_size=chunk_size,
            gather_across_devices=gather_across_devices,
            tau=tau,
            rho=rho,
            delta=delta,
            start=start,
            offset=offset,
            reduction=reduction,
            method=method,
        )


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

    def __init__(
        self,
        *,
        normalize: bool = True,
        include_self: bool = False,
        ignore_label: int | None = None,
        chunk_size: int | None = None,
        gather_across_devices: bool = False,
        tau: float = 0.01,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__(
            normalize=normalize,
            include_self=include_self,
            ignore_label=ignore_label,
            chunk_size=chunk_size,
            gather_across_devices=gather_across_devices,
            tau=tau,
            reduction=reduction,
            method=method,
        )


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

    def __init__(
        self,
        *,
        positive_margin: float = 0.9,
        negative_margin: float = 0.6,
        calibration_reduction: str = "per_query",
        normalize: bool = True,
        include_self: bool = False,
        ignore_label: int | None = None,
        chunk_size: int | None = None,
        gather_across_devices: bool = False,
        reduction: str = "mean",
        method: str = "auto",
    ) -> None:
        super().__init__(
            positive_margin=positive_margin,
            negative_margin=negative_margin,
            calibration_reduction=calibration_reduction,
            normalize=normalize,
            include_self=include_self,
            ignore_label=ignore_label,
            chunk_size=chunk_size,
            gather_across_devices=gather_across_devices,
            reduction=reduction,
            method=method,
        )
