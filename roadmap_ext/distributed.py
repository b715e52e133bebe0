"""The batches of several processes as one: each rank's queries against every rank's references, by torch.distributed.

    embeddings [b, D] ── gather ──► references [N, D] ──┐
            └───────────► loss of these b queries ◄─────┘ ── add up ──► the loss of all queries, on every rank

gather's backward gives each rank the sum of what all ranks have for its rows, and that of the sum over ranks gives each
the sum of what arrives at all of them. So a backward on every rank makes the gradient of the sum of what the ranks
return: W times the gradient of the one loss that all W of them return, which DistributedDataParallel divides by W.

Before anything is sent, the ranks shake hands: each says what it brings, or that its arguments are bad, and where these
do not fit together all ranks raise. Sums over ranks are taken in the order of the ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ._autograd import resolve_method
from ._checks import Objective
from ._chunks import embedding_loss
from ._relation import from_labels

dist = torch.distributed

# torch 2.13 gave it a new name, and warns of the old one.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

_MESSAGE = 256  # bytes of an error that the other ranks get to read


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, [n, ...], in the order of the ranks; differentiable, any number of times.

    Every rank has to call it. Backward gives a rank the sum of the gradients that all ranks have for its rows, so every
    rank has to run it, too.

    Args:
        rows: [n_rank, ...] any dtype; ranks may bring different numbers of rows, or none.

    Raises:
        RuntimeError: torch.distributed is not initialised; another rank failed.
        TypeError: ``rows`` is no tensor.
        ValueError: the ranks' rows differ in shape or dtype; no backend for the device.

    Example:
        >>> gather(torch.ones(2, 3)).shape  # doctest: +SKIP
        torch.Size([4, 3])  # of two ranks
    """

    def check() -> None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"gather takes a torch.Tensor, got {type(rows).__name__}")
        if rows.dim() == 0:
            raise ValueError("gather takes a tensor of rows, [n, ...], got one without dimensions: use rows[None]")

    world_size()
    return gather_together(check, rows)[0]


def gather_together(check: Callable[[], None], *tensors: Tensor) -> list[Tensor]:
    """:func:`gather` of tensors with as many rows each. What ``check`` raises on one rank ends the call on all."""

    def check_all() -> None:
        check()
        for tensor in tensors:
            _check_backend(tensor.device)

    error = _error_of(check_all)
    facts: dict[str, int | str] = {}
    for place, tensor in enumerate(() if error else tensors):
        facts |= {f"{name} of tensor {place}": value for name, value in _kind(tensor).items()}
    if not error:
        facts["rows"] = len(tensors[0])
    gradients = [f"gradient of tensor {place}" for place in range(len(tensors))]
    brought = _handshake(error, tensors[0].device if not error else None, facts, ["rows", *gradients])
    return [
        _gather(_joined(tensor, brought[gradient]), brought["rows"])
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def world_size() -> int:
    """The number of ranks. Raises RuntimeError where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group() first, in a program "
            "started by torchrun, or leave gather_across_devices at False in a single process"
        )
    return dist.get_world_size()


def roadmap_loss(
    embeddings: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    checked: Callable[[], tuple[Tensor | None, Tensor | None, Tensor | None]],
    everywhere: bool,
    objective: Objective,
    include_self: bool,
    chunk_size: int | None,
    method: str,
) -> Tensor:
    """:func:`roadmap_ext.roadmap_loss` of the batches of all ranks as one.

    Args:
        checked: checks all arguments of this rank, and returns ref_emb, ref_labels and ref_ids.
        everywhere: the references are the same on every rank, and need not be gathered.
        embeddings, labels, ids, objective, include_self, chunk_size, method: as there.
    """
    refs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def check() -> None:
        nonlocal refs, method
        refs = checked()
        _check_backend(embeddings.device)
        method = resolve_method(method, *(x for x in (embeddings, refs[0]) if x is not None))

    error = _error_of(check)
    ref_emb, ref_labels, ref_ids = refs
    own = ref_emb is None or ref_emb is embeddings
    facts: dict[str, int | str] = {}
    free = ["rows", "gradient"]
    if error is None:
        facts = {"rows": len(embeddings), **_kind(embeddings)}
        facts |= {"ids": ids is not None, "settings": f"{objective}, {include_self=}, {method == 'reference'}"}
        if ref_emb is not None and not own:
            facts |= {"references": len(ref_emb), **{f"{name} of ref_emb": x for name, x in _kind(ref_emb).items()}}
            free += ["gradient of ref_emb", *([] if everywhere else ["references"])]
    brought = _handshake(error, embeddings.device if isinstance(embeddings, Tensor) else None, facts, free)

    rank, rows = dist.get_rank(), brought["rows"]
    embeddings = _joined(embeddings, brought["gradient"])
    first = sum(rows[:rank])
    every_labels, every_ids = labels, ids
    whole = method == "reference"  # which takes the whole batch on every rank
    if own or whole:
        every_labels, every_ids = _gather_integers(labels, ids, rows)
    if ref_emb is None or own:
        references, ref_labels, ref_ids = _gather(embeddings, rows), every_labels, every_ids
    elif everywhere:
        references = ref_emb
    else:
        ref_rows = brought["references"]
        references = _gather(_joined(ref_emb, brought["gradient of ref_emb"]), ref_rows)
        ref_labels, ref_ids = _gather_integers(cast(Tensor, ref_labels), ref_ids, ref_rows)
    ref_labels = cast(Tensor, ref_labels)
    if whole:
        queries = references if own else _gather(embeddings, rows)
        relation = from_labels(every_labels, ref_labels, every_ids, ref_ids, own, include_self)
        loss = embedding_loss(queries, None if own else references, relation, objective, chunk_size, method)
        return loss[first : first + rows[rank]] if objective.reduction == "none" else loss
    relation = from_labels(labels, ref_labels, ids, ref_ids, own, include_self, first)
    share = embedding_loss(embeddings, references, relation, objective, chunk_size, method, _sum_over_ranks)
    return share if objective.reduction == "none" else _add_up(share)


# --- the handshake ---------------------------------------------------------------------------------------------------


def _error_of(check: Callable[[], object]) -> Exception | None:
    try:
        check()
    except Exception as error:  # whatever it is, the other ranks have to hear of it
        return error
    return None


def _kind(x: Tensor) -> dict[str, int | str]:
    """What the ranks' tensors have to have in common, and whether this one wants a gradient."""
    wants = torch.is_grad_enabled() and x.requires_grad
    sizes = {f"dimension {d}": size for d, size in enumerate(x.shape[1:], 1)}
    return {"dtype": str(x.dtype), **sizes, "grad mode": torch.is_grad_enabled(), "gradient": wants}


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def _handshake(
    error: Exception | None, device: torch.device | None, facts: Mapping[str, int | str], free: Sequence[str]
) -> dict[str, list[int]]:
    """What each rank brings, by name. The host waits for it once.

    Raises ``error``, where this rank has one; RuntimeError where another has; ValueError where the ranks differ in
    anything but what is ``free``.
    """
    names = _digest(repr(list(facts)))
    words = [error is not None, names, *(_digest(x) if isinstance(x, str) else x for x in facts.values())]
    message = f"{type(error).__name__}: {error}".encode()[:_MESSAGE] if error else b""
    most = 32  # words: the same on every rank, whatever it brings
    assert len(words) <= most
    sent = torch.zeros(most + _MESSAGE // 8, dtype=torch.int64)
    sent[: len(words)] = torch.tensor(words, dtype=torch.int64)
    sent[most:] = torch.frombuffer(bytearray(message.ljust(_MESSAGE, b"\0")), dtype=torch.int64)
    try:
        heard = _all_gather(sent.to(_place(device))).cpu()
    except RuntimeError as missing:
        if error is not None:
            raise error from missing
        raise RuntimeError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} waited in vain for the others: one of them has "
            "stopped, or does not make this call, which every rank has to make"
        ) from missing
    if error is not None:
        raise error
    failed = heard[:, 0].nonzero().flatten().tolist()
    if failed:
        text = bytes(heard[failed[0], most:].view(torch.uint8).tolist()).rstrip(b"\0").decode(errors="replace")
        raise RuntimeError(f"rank {failed[0]} of {len(heard)} failed, and so all of them do: {text}")
    if (heard[:, 1] != names).any():
        raise ValueError(f"the ranks make different calls: this one, rank {dist.get_rank()}, brings {', '.join(facts)}")
    brought = dict(zip(facts, heard[:, 2 : len(words)].T.tolist(), strict=True))
    for name, values in brought.items():
        if name not in free and len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"the ranks have to agree in {name}, and ranks 0 and {other} do not: this one, rank {dist.get_rank()}, "
                f"has {facts[name]}"
            )
    return brought


def _check_backend(device: torch.device) -> None:
    """Raises ValueError where the process group cannot send from a device."""
    backends = str(dist.get_backend_config())
    if f"{device.type}:" not in backends:
        raise ValueError(
            f"the process group has no backend for tensors on {device}, only {backends}: move them there, or call "
            "init_process_group with a backend for each device, such as 'cpu:gloo,cuda:nccl'"
        )


def _place(device: torch.device | None) -> torch.device:
    """Where a few numbers are exchanged: by the CPU, where it has a backend, for that waits for no kernel."""
    if "cpu:" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return device if device is not None and device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())


def _joined(x: Tensor, gradient: Sequence[int]) -> Tensor:
    """``x``, in the graph of a backward that other ranks run, even if nobody wants its own gradient."""
    return x.detach().requires_grad_() if any(gradient) and not x.requires_grad else x


# --- collectives -----------------------------------------------------------------------------------------------------


def _all_gather(x: Tensor) -> Tensor:
    """[ranks, ...] of a tensor of the same shape on every rank."""
    received = x.new_empty((dist.get_world_size(), *x.shape))
    getattr(dist, _ALL_GATHER)(_bytes(received), _bytes(x.contiguous()[None]))
    return received


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes, [n, bytes of a row]: no backend knows every dtype."""
    return (rows[:, None] if rows.dim() == 1 else rows.flatten(1)).view(torch.uint8)


def _sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in their order: the same bits on each."""
    return _all_gather(x).sum(0)


def _gather(x: Tensor, rows: list[int]) -> Tensor:
    """The rows of all ranks, [sum(rows), ...]; ``rows`` says how many each brings."""
    gathered: Tensor = _Gather.apply(x, rows) if sum(rows) else x
    return gathered


def _add_up(x: Tensor) -> Tensor:
    """The sum over ranks of a number of each, differentiable."""
    total: Tensor = _Total.apply(x)
    return total


def _gather_integers(labels: Tensor, ids: Tensor | None, rows: list[int]) -> tuple[Tensor, Tensor | None]:
    """Labels and ids of all ranks, in one exchange."""
    columns = [labels.long()] if ids is None else [labels.long(), ids.long()]
    gathered = _gather(torch.stack(columns, dim=1), rows)
    return gathered[:, 0], None if ids is None else gathered[:, 1]


class _Gather(torch.autograd.Function):
    """Rows [n_rank, ...] of each rank to those of all, [n, ...] on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        most = max(rows)
        if len(x) < most:  # collectives of all backends take equal shares alone
            x = torch.cat([x, x.new_zeros((most - len(x), *x.shape[1:]))])
        received = _all_gather(x)
        if min(rows) == most:
            return received.flatten(0, 1)
        return torch.cat([share[:count] for share, count in zip(received, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(gradient, ctx.rows), None


class _Scatter(torch.autograd.Function):
    """The adjoint of _Gather: [n, ...] of each rank to the sum over ranks of a rank's own rows, [n_rank, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        world, own = len(rows), rows[dist.get_rank()]
        received = x.new_empty((world * own, *x.shape[1:]))
        dist.all_to_all_single(_bytes(received), _bytes(x.contiguous()), [own] * world, rows)
        wide = torch.promote_types(x.dtype, torch.float32)
        return received.view(world, own, *x.shape[1:]).sum(0, dtype=wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.rows), None


class _Total(torch.autograd.Function):
    """The sum over ranks of a number of each; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_over_ranks(x.double()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _add_up(gradient)
