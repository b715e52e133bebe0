"""The batches of several processes as one: each rank's queries against every rank's references, by torch.distributed.

    embeddings [b, D] ── gather ──► references [N, D] ──┐
            └───────────► loss of these b queries ◄─────┘ ── add up ──► the loss of all queries, on every rank

gather's backward gives each rank the sum of what all ranks have for its rows, and that of the sum over ranks gives each
the sum of what arrives at all of them. So a backward on every rank makes the gradient of the sum of what the ranks
return: W times the gradient of the one loss that all W of them return, which DistributedDataParallel divides by W.

Every call begins with a handshake: each rank says what it brings, or what is wrong with it, and where that does not fit
together all of them raise. Nothing that one rank can find wrong is found outside it. Sums over ranks are taken in the
order of the ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from . import margins
from .advice import for_rows
from .autograd import resolve_method, savable
from .embedding_loss import embedding_loss
from .pairs import Items, References, blank, from_labels
from .settings import Settings, checked
from .validation import check_given, check_plain

dist = torch.distributed

# torch 2.13 gave it a new name, and warns of the old one.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

_MESSAGE = 256  # bytes of an error that the other ranks get to read

_T = TypeVar("_T")
# What a rank has found out for itself, what all have to have in common, by name, and what each has of its own.
Facts: TypeAlias = tuple[_T, Mapping[str, int | str], Mapping[str, int]]


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, [n, ...], in the order of the ranks; differentiable, any number of times.

    Every rank has to call it. Backward gives a rank the sum of the gradients that all ranks have for its rows, so every
    rank has to run it, too.

    Args:
        rows: [n_rank, ...] any dtype; ranks may bring different numbers of rows, or none.

    Raises:
        RuntimeError: torch.distributed is not initialised; another rank failed.
        TypeError: ``rows`` is no dense tensor.
        ValueError: the ranks' rows differ in shape or dtype; no backend for the device.

    Example:
        >>> gather(torch.ones(2, 3)).shape  # doctest: +SKIP
        torch.Size([4, 3])  # of two ranks
    """

    def check() -> Mapping[str, int | str]:
        check_plain("rows", "a torch.Tensor", rows, lambda: for_rows("rows", rows))
        if rows.dim() == 0:
            raise ValueError("gather takes a tensor of rows, [n, ...], got one without dimensions: use rows[None]")
        return {"call": "gather"}

    world_size()
    return gather_together(check, rows)[0]


def gather_together(check: Callable[[], Mapping[str, int | str]], *tensors: Tensor) -> list[Tensor]:
    """:func:`gather` of tensors with as many rows each.

    What ``check`` raises on one rank ends the call on all; what it returns they have to have in common.
    """

    def describe() -> Facts[None]:
        common, own = dict(check()), {"rows": len(tensors[0])}
        for place, tensor in enumerate(tensors):
            _check_backend(tensor.device)
            common |= {f"{name} of tensor {place}": value for name, value in _kind(tensor).items()}
            own[f"gradient of tensor {place}"] = _wants_gradient(tensor)
        return None, common, own

    _, brought = handshake(describe, tensors[0])
    return [
        _gather(_joined(tensor, brought[f"gradient of tensor {place}"]), brought["rows"])
        for place, tensor in enumerate(tensors)
    ]


def several() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and world_size() > 1


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
    labels: Tensor | None,
    ref_emb: Tensor | References | None,
    ref_labels: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    positives: object,
    relevance: object,
    given: Mapping[str, Any],
) -> Tensor:
    """:func:`roadmap_ext.roadmap_loss` of the batches of all ranks as one; arguments as there, not checked before."""
    everywhere = isinstance(ref_emb, References)  # the same on every rank, and need not be gathered

    def describe() -> Facts[tuple[Settings, Items]]:
        check_given(labels, positives, relevance, "gather_across_devices")
        assert labels is not None
        settings = checked(given)
        items = Items.checked(embeddings, labels, ref_emb, ref_labels, ids, ref_ids)
        _check_backend(embeddings.device)
        method = resolve_method(settings.method, *(x for x in (embeddings, items.ref_emb) if x is not None))
        settings = settings._replace(method=method)
        common = {"call": "a loss", **_kind(embeddings), "ids": ids is not None}
        common["settings"] = f"{settings._replace(chunk_size=None, method='')}, {method == 'reference'}"
        own = {"rows": len(embeddings), "gradient": _wants_gradient(embeddings)}
        if items.ref_emb is not None:
            common |= {f"{name} of ref_emb": value for name, value in _kind(items.ref_emb).items()}
            common["kind of references"] = "a memory" if everywhere else "a tensor"
            own["gradient of ref_emb"] = _wants_gradient(items.ref_emb)
            (common if everywhere else own)["references"] = len(items.ref_emb)
        return (settings, items), common, own

    (settings, items), brought = handshake(describe, embeddings)
    labels = items.labels
    rank, rows, ignore_label = dist.get_rank(), brought["rows"], settings.ignore_label
    first, alone, whole = sum(rows[:rank]), items.ref_emb is None, settings.method == "reference"
    queries = blank(_joined(embeddings, brought["gradient"]), labels, ignore_label)
    every_labels, every_ids, references = labels, ids, items.ref_emb
    ref_labels, ref_ids = items.ref_labels, items.ref_ids
    if alone or whole:  # the reference takes the whole batch on every rank
        every_labels, every_ids = _gather_integers(labels, ids, rows)
    if references is None:
        references, ref_labels, ref_ids = _gather(queries, rows), every_labels, every_ids
    elif not everywhere:
        references = blank(_joined(references, brought["gradient of ref_emb"]), ref_labels, ignore_label)
        references = _gather(references, brought["references"])
        ref_labels, ref_ids = _gather_integers(ref_labels, ref_ids, brought["references"])
    if whole:
        every_query = references if alone else _gather(queries, rows)
        together = Items(every_query, every_labels, None if alone else references, ref_labels, every_ids, ref_ids)
        pairs = together.pairs(settings.include_self, ignore_label)
        loss = embedding_loss(every_query, together.ref_emb, pairs, settings)
        return loss[first : first + rows[rank]] if settings.objective.reduction == "none" else loss
    pairs = from_labels(labels, ref_labels, ids, ref_ids, alone, settings.include_self, first, ignore_label)
    parts = [margins.sample(sum(rows), sum(rows[:place])) for place in range(len(rows))]
    looked_at = [len(range(count)[part]) for count, part in zip(rows, parts, strict=True)]
    masks, gather_rows = partial(pairs.masks_of, columns=len(references)), partial(_gather, rows=looked_at)
    objective = margins.to_fit(settings.objective, queries, references, masks, parts[rank], gather_rows)
    settings = settings._replace(objective=objective)
    share = embedding_loss(queries, references, pairs, settings, _sum_over_ranks)
    return share if settings.objective.reduction == "none" else _add_up(share)


# --- the handshake ---------------------------------------------------------------------------------------------------


def handshake(describe: Callable[[], Facts[_T]], near: object = None) -> tuple[_T, dict[str, list[int]]]:
    """Tells the other ranks what this one brings, or why it cannot, and hears the same of them.

    Every rank has to come. All handshakes are alike, so that ranks whose calls differ find out, too. The host waits for
    the others once.

    Args:
        describe: checks all that this rank can find wrong, and returns anything, what all ranks have to have in common,
            and what each has of its own.
        near: by the device of this, if it is a tensor, the ranks exchange what they say where the CPU has no backend.

    Returns:
        What ``describe`` returned first, and what each rank has of its own, by name.

    Raises:
        Exception: whatever ``describe`` raises.
        RuntimeError: on all other ranks, where it raises on one; a rank has stopped, or does not come.
        ValueError: the ranks differ in what they have to have in common.
    """
    described: Facts[_T] | None = None
    found: Exception | None = None
    try:
        described = describe()
    except Exception as error:  # whatever it is, the other ranks have to hear of it
        if hasattr(error, "_heard_by_all"):  # it comes from a handshake within
            raise
        found = error
    result, common, own = described or (None, {}, {})
    try:
        brought = _exchange(found, near.device if isinstance(near, Tensor) else None, {**common, **own}, own)
    except Exception as error:
        error._heard_by_all = True  # type: ignore[attr-defined]
        raise
    return cast(_T, result), brought


def agreed(name: str, step: Callable[[], _T], near: object = None) -> _T:
    """What ``step`` returns, once all ranks are through with theirs; where one raises, all of them do."""

    def describe() -> Facts[_T]:
        return step(), {"call": name}, {}

    result, _ = handshake(describe, near)
    return result


def _kind(x: Tensor) -> dict[str, int | str]:
    """What the ranks' tensors have to have in common."""
    sizes = {f"dimension {d}": size for d, size in enumerate(x.shape[1:5], 1)}
    sizes_beyond = str([*x.shape[5:]])
    return {"dtype": str(x.dtype), **sizes, "further dimensions": sizes_beyond, "grad mode": torch.is_grad_enabled()}


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def _exchange(
    error: Exception | None, device: torch.device | None, facts: Mapping[str, int | str], free: Collection[str]
) -> dict[str, list[int]]:
    """What each rank brings of what is ``free``, by name.

    Raises ``error``, where this rank has one; RuntimeError where another has; ValueError where the ranks differ in
    anything but what is ``free``.
    """
    names = _digest(repr(list(facts)))
    words = [error is not None, names, *(_digest(x) if isinstance(x, str) else x for x in facts.values())]
    message = f"{type(error).__name__}: {error}".encode()[:_MESSAGE] if error else b""
    most = 32  # words: the same on every rank, whatever it brings
    assert len(words) <= most
    # On the CPU, whatever the default device is.
    sent = torch.zeros(most + _MESSAGE // 8, dtype=torch.int64, device="cpu")
    sent[: len(words)] = torch.tensor(words, dtype=torch.int64, device="cpu")
    sent[most:] = torch.frombuffer(bytearray(message.ljust(_MESSAGE, b"\0")), dtype=torch.int64)
    sent = sent.to(_place(device))
    try:
        heard = _all_gather(sent).cpu()
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
    return {name: brought[name] for name in free}


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
    return savable(x).detach().requires_grad_() if any(gradient) and not x.requires_grad else x


# --- collectives -----------------------------------------------------------------------------------------------------


def _all_gather(x: Tensor) -> Tensor:
    """[ranks, ...] of a tensor of the same shape on every rank."""
    received = x.new_empty((dist.get_world_size(), *x.shape))
    getattr(dist, _ALL_GATHER)(_bytes(received), _bytes(_dense(x)[None]))
    return received


def _dense(x: Tensor) -> Tensor:
    """The numbers as they are in memory: contiguous, and without the conjugate or the sign that a view may owe."""
    return x.resolve_conj().resolve_neg().contiguous()


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
        dist.all_to_all_single(_bytes(received), _bytes(_dense(x)), [own] * world, rows)
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
