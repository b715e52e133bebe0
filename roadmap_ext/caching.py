"""Batches larger than the memory for their activations: the model runs twice, a mini-batch at a time (GradCache).

    1  inputs ── model, no graph, a mini-batch at a time ──► embeddings [B, D]
    2  embeddings ── loss ──► gradient of the embeddings [B, D]
    3  inputs ── model again, with graph ──► backward from its rows of that gradient, a mini-batch at a time

The loss sees the whole batch, and only a mini-batch's activations are in memory (Gao et al., RepL4NLP 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map  # torch's pytrees have no public name yet

from ._checks import check_count


def cached_backward(
    model: Callable[..., Tensor],
    inputs: Any,
    labels: Any,
    loss_fn: Callable[..., Tensor],
    *,
    mini_batch_size: int,
    scaler: torch.amp.GradScaler | None = None,
    call: Callable[[Any, Any], Tensor] | None = None,
) -> Tensor:
    """Forward and backward of a batch of any size in the memory of a mini-batch's activations. Takes no optimiser step.

    Adds to the parameters' gradients what ``loss_fn(model(inputs), labels).backward()`` would, at the cost of a second
    forward: embeddings come from a first pass without graph, the loss is of all of them at once, and its gradient goes
    through the model a mini-batch at a time (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup", RepL4NLP 2021). A batch that is one mini-batch is trained plainly, with one forward, unless the
    model has a ``no_sync()``.

    Random numbers are drawn alike in both passes, so dropout agrees; buffers, such as the running means of batch norm,
    see each mini-batch once. What a layer computes across its batch, as batch norm does, it computes across a
    mini-batch.

    - Autocast: call this inside ``torch.autocast``; the model and the loss run under it, backward does not.
    - GradScaler: pass it as ``scaler``; then ``scaler.step(optimizer)`` and ``scaler.update()`` as ever.
    - DistributedDataParallel: gradients are exchanged with the last mini-batch alone; ranks may have any number of
      mini-batches. With a loss that gathers (``gather_across_devices=True``) it is the batch of all ranks.
    - Gradients add to those that are there: ``optimizer.zero_grad()`` is the caller's.

    Args:
        model: the network; any callable, of whose ``no_sync()`` use is made if it has one.
        inputs: a tensor [B, ...], or any structure of dicts, lists and tuples (a pytree) whose tensors all have the
            batch first. What is in it and is no tensor, or a tensor without dimensions, every mini-batch gets as it is.
        labels: what ``loss_fn`` takes beside the embeddings, whole.
        loss_fn: ``loss_fn(embeddings [B, D], labels)`` is the loss, a scalar. It is called once, and may enqueue the
            embeddings in a memory first.
        mini_batch_size: rows of a mini-batch, whose activations are in memory.
        scaler: whose factor the loss is multiplied by before backward.
        call: ``call(model, inputs)``, for models that take more than one argument, such as
            ``lambda model, inputs: model(**inputs)``; None: ``model(inputs)``.

    Returns:
        The loss, a scalar without graph and without the scaler's factor.

    Raises:
        TypeError: ``mini_batch_size`` is no integer; the model or the loss returns no tensor.
        ValueError: ``mini_batch_size`` is below 1; inputs have no tensor, tensors of different length, or one that is
            itself the result of something differentiable; the model's rows are not those of its inputs, or have no
            gradient; the loss is no scalar, or does not depend on the embeddings.
        RuntimeError: gradients are switched off.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> from roadmap_ext import RoadmapLoss
        >>> loss = cached_backward(model, x, y, RoadmapLoss(), mini_batch_size=2)
        >>> model.weight.grad.shape
        torch.Size([2, 3])
    """
    check_count("mini_batch_size", mini_batch_size, 1)
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_backward computes gradients, and they are switched off: call it outside no_grad()")
    rows = _length(inputs)
    parts = [slice(begin, min(begin + mini_batch_size, rows)) for begin in range(0, max(rows, 1), mini_batch_size)]
    run = _Forward(model, inputs, call)
    # Where ranks train together, all do the same whatever their share: DistributedDataParallel exchanges more than
    # gradients in its forward, now and then, and that has to meet the loss's exchange in the same order on each.
    if len(parts) == 1 and not hasattr(model, "no_sync"):
        embeddings = run(parts[0])
        loss, gradient = _loss_and_gradient(embeddings, labels, loss_fn, scaler)
        _backward_through_model(embeddings, gradient)
        return loss

    chance = _Chance(_devices(model, inputs))
    before, first_pass = [], []
    with torch.no_grad(), _kept_buffers(model):
        for part in parts:
            before.append(chance.state())
            first_pass.append(run(part))
    loss, gradient = _loss_and_gradient(torch.cat(first_pass), labels, loss_fn, scaler)
    del first_pass
    after = chance.state()
    for part, state in zip(parts, before, strict=True):
        chance.restore(state)
        # DistributedDataParallel exchanges gradients once, when the last are there.
        no_sync = nullcontext if part.stop == rows else getattr(model, "no_sync", nullcontext)
        with no_sync():
            embeddings = run(part)
            _backward_through_model(embeddings, gradient[part])
    chance.restore(after)
    return loss


class _Forward:
    """The model on rows of the inputs."""

    def __init__(self, model: Callable[..., Tensor], inputs: Any, call: Callable[[Any, Any], Tensor] | None) -> None:
        self._model, self._inputs, self._call = model, inputs, call

    def __call__(self, part: slice) -> Tensor:
        inputs = tree_map(lambda leaf: leaf[part] if _has_rows(leaf) else leaf, self._inputs)
        embeddings = self._model(inputs) if self._call is None else self._call(self._model, inputs)
        if not isinstance(embeddings, Tensor):
            raise TypeError(
                f"the model has to return one tensor of embeddings, got {type(embeddings).__name__}: "
                "call=lambda model, inputs: ... picks it"
            )
        if embeddings.dim() == 0 or len(embeddings) != part.stop - part.start:
            raise ValueError(
                f"the model has to return a row for each of {part.stop - part.start} inputs, got shape "
                f"{tuple(embeddings.shape)}: has every tensor of the inputs the batch first?"
            )
        return embeddings


def _has_rows(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _length(inputs: Any) -> int:
    """The number of rows of all tensors."""
    tensors = [leaf for leaf in tree_leaves(inputs) if _has_rows(leaf)]
    if not tensors:
        raise ValueError(
            f"inputs must hold a tensor [B, ...], got {type(inputs).__name__}: dicts, lists and tuples are looked "
            "into, other classes are not (dict(inputs) makes one of those that are like it)"
        )
    lengths = sorted({len(tensor) for tensor in tensors})
    if len(lengths) > 1:
        raise ValueError(f"all tensors of the inputs must have the batch first, got {lengths} rows")
    if any(tensor.requires_grad and not tensor.is_leaf for tensor in tensors):
        raise ValueError(
            "a tensor of the inputs is the result of something differentiable, whose graph would be gone after the "
            "first mini-batch: make it part of the model, or detach it"
        )
    return lengths[0]


def _devices(model: object, inputs: Any) -> list[torch.device]:
    """Where the model may draw random numbers."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if isinstance(model, torch.nn.Module):
        tensors += list(model.parameters())
    used = {torch.device("cpu")} | {tensor.device for tensor in tensors}
    if torch.cuda.is_initialized():  # a callable may have its parameters there, out of sight
        used.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(used, key=str)


def _loss_and_gradient(
    embeddings: Tensor, labels: Any, loss_fn: Callable[..., Tensor], scaler: torch.amp.GradScaler | None
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with the scaler's factor, [B, D]."""
    leaf = embeddings.detach().requires_grad_()
    loss = loss_fn(leaf, labels)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn has to return a tensor, got {type(loss).__name__}")
    if loss.dim():
        raise ValueError(f'loss_fn has to return a scalar, got shape {tuple(loss.shape)}: reduction="mean" is one')
    if loss.requires_grad:
        _backward(loss if scaler is None else scaler.scale(loss), None)
    if leaf.grad is None:
        raise ValueError("the loss does not depend on the embeddings that loss_fn was given")
    return loss.detach(), leaf.grad


def _backward_through_model(embeddings: Tensor, gradient: Tensor) -> None:
    if not embeddings.requires_grad:
        raise ValueError(
            "the model's embeddings have no gradient: are all of its parameters frozen, or does it detach them?"
        )
    _backward(embeddings, gradient)


def _backward(of: Tensor, gradient: Tensor | None) -> None:
    """Backward outside autocast, as it is run by those who call it themselves."""
    with torch.autocast(of.device.type, enabled=False):
        torch.autograd.backward(of, gradient)


class _Chance:
    """The random number generators of some devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._generators = [_generator(device) for device in devices]

    def state(self) -> list[Tensor]:
        return [get() for get, _ in self._generators]

    def restore(self, state: list[Tensor]) -> None:
        for (_, put), value in zip(self._generators, state, strict=True):
            put(value)


def _generator(device: torch.device) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """What reads and writes the state of a device's generator."""
    if device.type == "cpu":
        return torch.get_rng_state, torch.set_rng_state
    module = torch.get_device_module(device)
    where = () if device.type == "mps" else (device,)  # there is one alone
    return (lambda: module.get_rng_state(*where)), (lambda state: module.set_rng_state(state, *where))


@contextmanager
def _kept_buffers(model: object) -> Iterator[None]:
    """Puts a module's buffers back to what they were: the second pass is the one that counts.

    DistributedDataParallel sends those of rank 0 to all others before its first forward, which then is where they were.
    """
    if not isinstance(model, torch.nn.Module):
        yield
        return
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]

    def sent(*_: object) -> None:
        hook.remove()
        before[:] = [buffer.clone() for buffer in buffers]

    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    hook = inner.register_forward_pre_hook(sent)
    try:
        yield
    finally:
        hook.remove()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
