"""A memory of past embeddings to rank, more than a batch has (Wang et al., "Cross-Batch Memory", CVPR 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .distributed import gather_together, world_size
from .pairs import References
from .validation import DTYPES, check_count, check_embeddings, check_flag


def make_writable(module: nn.Module) -> None:
    """Replaces the buffers that came to be under inference_mode(), which nothing outside of it may write to."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            setattr(module, name, buffer.clone())


class EmbeddingMemory(References):
    """The last ``size`` embeddings, with labels and ids: a ring buffer, whose oldest entries make room for new ones.

    Enqueue each batch before its loss, and let the loss rank the memory::

        memory.enqueue(embeddings, labels, ids)
        loss = loss_function(embeddings, labels, ref_emb=memory, ids=ids)

    Entries carry no gradient. A query's own entry and older copies of the same item have its id, and are left out of
    its ranking. Other duplicates are ranked: equal scores count against the ranking, but equal embeddings need not get
    equal scores, for BLAS may round a product differently in another row. Entries without a label stay out of all
    rankings where the loss has their label as ``ignore_label``.

    Args:
        size: entries at the most.
        dim: dimensions D of an embedding.
        warm_up: calls of :meth:`enqueue` that store nothing, while embeddings still change fast. With an empty memory
            a loss ranks the batch itself.
        gather_across_devices: each rank of torch.distributed stores the batches of all ranks, in the order of the
            ranks, so that the memory is the same on each. Every rank has to call :meth:`enqueue`, then.
        device, dtype: of the embeddings stored; those enqueued are converted. Float16, bfloat16, float32 or float64.

    Attributes:
        embeddings: [n, D], n <= size: the entries, in no particular order. A view, which the next call writes over.
        labels: [n] int64.
        ids: [n] int64.

    A module for the sake of ``state_dict()`` (entries and place, all of them tensors; that of another ``size`` or
    ``dim`` is refused), ``to(device)`` and ``half()``; it has no parameters. Keep it out of the model that
    DistributedDataParallel wraps, which would send it along with every step.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: ``size`` or ``dim`` is below 1, ``warm_up`` below 0.

    Example:
        >>> memory = EmbeddingMemory(3, dim=2)
        >>> memory.enqueue(torch.eye(2), torch.tensor([7, 8]), torch.tensor([0, 1]))
        >>> memory.enqueue(torch.eye(2), torch.tensor([9, 9]), torch.tensor([2, 3]))
        >>> memory
        EmbeddingMemory(3, dim=2, entries=3)
        >>> sorted(memory.ids.tolist())
        [1, 2, 3]
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        warm_up: int = 0,
        gather_across_devices: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size, self.dim = check_count("size", size, 1), check_count("dim", dim, 1)
        self.warm_up = check_count("warm_up", warm_up, 0)
        check_flag("gather_across_devices", gather_across_devices)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype}")
        self.gather_across_devices = gather_across_devices
        self._embeddings: Tensor
        self._labels: Tensor
        self._ids: Tensor
        self.register_buffer("_embeddings", torch.zeros(self.size, self.dim, device=device, dtype=dtype))
        self.register_buffer("_labels", torch.zeros(self.size, device=device, dtype=torch.int64))
        self.register_buffer("_ids", torch.zeros(self.size, device=device, dtype=torch.int64))
        self._entries, self._next, self._calls = 0, 0, 0

    @property
    def embeddings(self) -> Tensor:
        """The entries, [n, D]."""
        return self._embeddings[: self._entries]

    @property
    def labels(self) -> Tensor:
        """Their labels, [n] int64."""
        return self._labels[: self._entries]

    @property
    def ids(self) -> Tensor:
        """Their ids, [n] int64."""
        return self._ids[: self._entries]

    def __len__(self) -> int:
        """The number of entries."""
        return self._entries

    def __bool__(self) -> bool:
        """A memory is there, even if it is empty."""
        return True

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Store a batch over the oldest entries; of one larger than the memory the last rows stay.

        A row that is not finite is stored as zeros, of similarity 0 to all: the loss of its own step shows what
        happened, and no later one has to.

        Args:
            embeddings: [B, D] any float dtype, any device; with or without gradient, which is not kept.
            labels: [B] any integer dtype.
            ids: [B] any integer dtype: what item of the data set a row is, the same each time it comes.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes or devices differ, or D is not the memory's.
            RuntimeError: ``gather_across_devices`` without torch.distributed, or another rank failed.
        """
        given = embeddings, labels, ids
        if self.gather_across_devices and world_size() > 1:
            embeddings, labels, ids = gather_together(lambda: self._check(*given), *given)
        else:
            self._check(*given)
        rows, numbers = embeddings.detach(), torch.stack([labels.long(), ids.long()], dim=1)
        self._calls += 1
        if self._calls <= self.warm_up or not len(rows):
            return
        make_writable(self)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
        rows, numbers = (x[-self.size :].to(self._embeddings.device) for x in (rows, numbers))
        place = torch.arange(self._next, self._next + len(rows), device=rows.device) % self.size
        self._embeddings[place] = rows.to(self._embeddings.dtype)
        self._labels[place], self._ids[place] = numbers.unbind(1)
        self._next = (self._next + len(rows)) % self.size
        self._entries = min(self._entries + len(rows), self.size)

    def clear(self) -> None:
        """Forget all entries; the warm-up is not repeated."""
        self._entries = self._next = 0

    def as_references(
        self, ids: Tensor | None, ref_labels: Tensor | None = None, ref_ids: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``ref_emb``, ``ref_labels`` and ``ref_ids`` for a loss of queries with ``ids`` that was given this memory.

        Raises ValueError where what was given beside it does not fit.
        """
        if ref_labels is not None or ref_ids is not None:
            name = "ref_labels" if ref_labels is not None else "ref_ids"
            raise ValueError(f"{name} was given beside an EmbeddingMemory, which has its own: leave it out")
        if ids is None:
            raise ValueError(
                "ref_emb is an EmbeddingMemory, which holds copies of the batch: ids=... has to say what each row is, "
                "by the ids that were enqueued"
            )
        if not len(self):
            return None, None, ids
        # No copies: where a backward reads them after the next batch was written over them, torch raises.
        return self.embeddings, self.labels, self.ids

    def _check(self, embeddings: Tensor, labels: Tensor, ids: Tensor) -> dict[str, str]:
        """Raises what is wrong with a batch, and returns what the memories of all ranks have to have in common."""
        if ids is None:
            raise TypeError("ids must be a torch.Tensor of integers, got None: a memory has to know what each row is")
        check_embeddings(embeddings, labels, None, None, ids, ids)
        if embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings must have the memory's dimension, {self.dim}, got {embeddings.shape[1]}")
        place = f"next={self._next}, calls={self._calls}, warm_up={self.warm_up}, {self._embeddings.dtype}"
        return {"call": "enqueue", "memory": f"{self}, {place}"}

    def get_extra_state(self) -> Tensor:
        """What state_dict() holds beside the entries, as a tensor, which is what those who walk a state_dict expect."""
        state = [self.size, self.dim, self._entries, self._next, self._calls]
        return torch.tensor(state, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        """The inverse of get_extra_state(), and of that of checkpoints from before it was a tensor."""
        if isinstance(state, dict):
            state = torch.tensor([state[name] for name in ("size", "dim", "entries", "next", "calls")], device="cpu")
        size, dim, *place = map(int, state.tolist())
        if (size, dim) != (self.size, self.dim):
            return  # load_state_dict() raises when it is through, and no entries were loaded
        self._entries, self._next, self._calls = place

    def _load_from_state_dict(self, *arguments: Any) -> None:
        make_writable(self)
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        """The settings, as they were given, and how full it is."""
        return f"{self.size}, dim={self.dim}, entries={self._entries}"
