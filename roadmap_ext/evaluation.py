"""Metrics of embeddings that come batch by batch, from several ranks, as evaluation loops have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import distributed
from .metrics import retrieval_metrics
from .validation import check_embeddings, check_flag, check_ignore_label, check_ks


class RetrievalMetrics:
    """Collects embeddings, and has the exact metrics of all of them against each other in the end.

        metrics = RetrievalMetrics(k=(1, 10))
        for images, labels, ids in loader:
            metrics.update(model(images), labels, ids)
        print(metrics.compute())

    The methods are torchmetrics'; the figures those of :func:`roadmap_ext.metrics.retrieval_metrics`, which says what
    they mean. Nothing of the size queries x references is in memory.

    With several ranks of torch.distributed, ``compute()`` is of the embeddings of all, on every rank; each has to call
    it. Samplers that give ranks equal shares repeat some items: with ``ids`` an item counts once.

    Args:
        k: the k of R@k: one integer of at least 1, or several.
        normalize: rank by cosine similarity, else by plain products.
        ignore_label: the label of items whose class is not known. None: there is no such label.
        device: where embeddings are kept and compared; None: where the first batch is.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or out of range.

    Example:
        >>> metrics = RetrievalMetrics(k=1)
        >>> metrics.update(torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([7, 7]))
        >>> metrics.update(torch.tensor([[0.9, -0.4]]), torch.tensor([3]))
        >>> metrics.compute()
        {'mAP': 0.75, 'mAP@R': 0.5, 'R-precision': 0.5, 'R@1': 0.5}
    """

    def __init__(
        self,
        *,
        k: int | Iterable[int] = (1, 10, 100),
        normalize: bool = True,
        ignore_label: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._k = check_ks(k)
        self._normalize = check_flag("normalize", normalize)
        self._ignore_label = check_ignore_label("ignore_label", ignore_label)
        self._given = self._device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forgets all embeddings, for the next evaluation."""
        self._rows: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._device = self._given

    def __len__(self) -> int:
        """Embeddings collected on this rank."""
        return sum(len(labels) for _, labels, _ in self._rows)

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            embeddings: [B, D] any float dtype, any device; what it is a view of is not kept.
            labels: [B] any integer dtype.
            ids: [B] any integer dtype: which item of the data set a row is; of rows of equal id the first counts. With
                all batches or with none.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes differ, or only some batches have ids.
        """
        if isinstance(embeddings, Tensor):
            labels = labels.to(embeddings.device) if isinstance(labels, Tensor) else labels
            ids = ids.to(embeddings.device) if isinstance(ids, Tensor) else ids
        check_embeddings(embeddings, labels, None, None, ids, ids)
        if self._rows:
            first, _, first_ids = self._rows[0]
            if first.shape[1:] != embeddings.shape[1:] or first.dtype != embeddings.dtype:
                raise ValueError(
                    f"embeddings must be like those of the first batch, {first.dtype} of {first.shape[1]} dimensions, "
                    f"got {embeddings.dtype} of {embeddings.shape[1]}: call reset() before another evaluation"
                )
            if (first_ids is None) != (ids is None):
                raise ValueError("ids were given with some batches and not with others: give them with all, or none")
        self._device = self._device or embeddings.device
        copies = (None if x is None else x.detach().to(self._device, copy=True) for x in (embeddings, labels, ids))
        self._rows.append(tuple(copies))  # type: ignore[arg-type]  # three, which a generator cannot say

    @torch.no_grad()
    def compute(self, progress: bool | Callable[[int], object] | None = None) -> dict[str, float]:
        """The metrics of all that was collected, as :func:`roadmap_ext.metrics.retrieval_metrics` returns them.

        Args:
            progress: as there: True shows a bar.

        Raises:
            RuntimeError: nothing was collected; another rank failed.
            ValueError: the ranks do not agree.
        """
        several = distributed.several()
        if not self._rows and not several:
            raise RuntimeError("there are no embeddings to measure: call update(embeddings, labels) first")
        embeddings, labels, ids = self._together() if several else self._own()
        if ids is not None:
            ids, place = ids.sort(stable=True)
            first = torch.ones_like(ids, dtype=torch.bool)
            first[1:] = ids[1:] != ids[:-1]
            place = place[first].sort().values
            embeddings, labels = embeddings[place], labels[place]
        return retrieval_metrics(
            embeddings,
            labels,
            k=self._k,
            normalize=self._normalize,
            ignore_label=self._ignore_label,
            progress=progress,
        )

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None]:
        embeddings, labels, ids = zip(*self._rows, strict=True)
        with_ids = ids[0] is not None
        return (
            torch.cat(embeddings),
            torch.cat([each.long() for each in labels]),
            torch.cat([each.long() for each in ids]) if with_ids else None,
        )

    def _together(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of all ranks. One without rows raises, and so do all, unless it knows what the others' are like."""

        def check() -> dict[str, str]:
            if not self._rows:
                raise RuntimeError("this rank has no embeddings to measure: call update(embeddings, labels) first")
            return {"call": "compute", "ids": str(self._rows[0][2] is not None)}

        near = self._own() if self._rows else (torch.empty(0, 0), torch.empty(0, dtype=torch.int64), None)
        tensors = [x for x in near if x is not None]
        embeddings, labels, *ids = distributed.gather_together(check, *tensors)
        return embeddings, labels, ids[0] if ids else None
