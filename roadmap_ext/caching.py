"""Batches larger than the memory for their activations: the model runs twice, a mini-batch at a time (GradCache).

    1  inputs ── model, no graph, a mini-batch at a time ──► embeddings [B, D]
    2  embeddings ── loss ──► gradient of the embeddings [B, D]
    3  inputs ── model again, with graph ──► backward from its rows of that gradient, a mini-batch at a time

The loss sees the whole batch, and only a mini-batch's activations are in memory (Gao et al., RepL4NLP 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map  # torch's pytrees have no public name yet

from . import distributed
from .validation import check_count


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
    - FSDP and SyncBatchNorm exchange something in every forward: there the ranks need equal numbers of mini-batches.
    - Where all ranks train the model, or the loss gathers, what one rank finds wrong is raised by all of them.
    - Gradients add to those that are there: ``optimizer.zero_grad()`` is the caller's.

    Args:
        model: the network, in DistributedDataParallel or FSDP if it is trained in it; or a method of it, such as
            ``model.encode_image``; or another function of it, which has to show it: as a variable that it refers to, or
            as an attribute of what it is a method of. A network that lies deeper is not found, and its buffers would
            see each mini-batch twice: pass it here, and the function as ``call``.
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
        TypeError: ``mini_batch_size`` is no integer, ``scaler`` no GradScaler; what has to be called cannot be; the
            model or the loss returns no tensor.
        ValueError: ``mini_batch_size`` is below 1; inputs have no tensor, tensors of different length, or one that is
            itself the result of something differentiable; the model's rows are not those of its inputs, or have no
            gradient; the loss is no scalar, or does not depend on the embeddings; the ranks do not agree, or have
            different numbers of mini-batches where they need equal ones.
        RuntimeError: gradients are switched off; another rank failed.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> from roadmap_ext import RoadmapLoss
        >>> loss = cached_backward(model, x, y, RoadmapLoss(), mini_batch_size=2)
        >>> model.weight.grad.shape
        torch.Size([2, 3])
    """
    modules = _modules_of(model)
    wrappers = _wrappers(modules)
    across = distributed.several() and (_spans_all_ranks(wrappers) or _gathers(loss_fn))
    in_step = any(map(_exchanges_in_forward, modules))
    near = next((parameter for module in modules for parameter in module.parameters()), None)
    run = _Forward(model, inputs, call)

    def describe() -> distributed.Facts[list[slice]]:
        _check_arguments(model, loss_fn, mini_batch_size, scaler, call)
        rows = _length(inputs)
        parts = [slice(begin, min(begin + mini_batch_size, rows)) for begin in range(0, max(rows, 1), mini_batch_size)]
        wrapped = f"wrapped in {[type(wrapper).__name__ for wrapper in wrappers]}, exchanges in forward: {in_step}"
        common: dict[str, int | str] = {
            "call": "cached_backward",
            "kind of model": wrapped,
            "scaler": scaler is not None,
        }
        number = {"number of mini-batches (the model exchanges in each forward)": len(parts)}
        return (parts, {**common, **number}, {}) if in_step else (parts, common, number)

    def agreed(name: str, step: Callable[[], Tensor]) -> Tensor:
        return distributed.agreed(f"cached_backward, {name}", step, near) if across else step()

    parts, *_ = distributed.handshake(describe, near) if across else describe()
    # Where ranks train together, all do the same whatever their share: DistributedDataParallel exchanges more than
    # gradients in its forward, now and then, and that has to meet the loss's exchange in the same order on each.
    no_sync = [wrapper.no_sync for wrapper in wrappers if hasattr(wrapper, "no_sync")]
    if len(parts) == 1 and not (across or no_sync):
        embeddings = _with_graph(run(parts[0]))
        loss, gradient = _loss_and_gradient(embeddings, labels, loss_fn, scaler, agreed)
        _backward(embeddings, gradient)
        return loss

    chance = _Chance(_devices(model, inputs))
    before: list[list[Tensor]] = []

    def first_pass() -> Tensor:
        out = []
        with torch.no_grad(), _kept_buffers(modules):
            for part in parts:
                before.append(chance.state())
                out.append(run(part))
            return torch.cat(out)

    first = agreed("first pass", first_pass)
    loss, gradient = _loss_and_gradient(first, labels, loss_fn, scaler, agreed)
    del first
    after = chance.state()

    def second_pass() -> Tensor:
        """Up to the last backward, which exchanges gradients: once, when all of this rank's are there."""
        for part, state in zip(parts[:-1], before, strict=False):
            chance.restore(state)
            with ExitStack() as held_back:
                for context in no_sync:
                    held_back.enter_context(context())
                _backward(_with_graph(run(part)), gradient[part])
        chance.restore(before[-1])
        return _with_graph(run(parts[-1]))

    embeddings = agreed("second pass", second_pass)
    _backward(embeddings, gradient[parts[-1]])
    chance.restore(after)
    return loss


def _check_arguments(model: object, loss_fn: object, mini_batch_size: object, scaler: object, call: object) -> None:
    check_count("mini_batch_size", mini_batch_size, 1)
    for name, value in (("loss_fn", loss_fn), ("model", model) if call is None else ("call", call)):
        if not callable(value):
            raise TypeError(f"{name} must be something to call, got {type(value).__name__}")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_backward computes gradients, and they are switched off: call it outside no_grad()")


def _modules_of(model: object) -> list[nn.Module]:
    """The modules that something is, is a method of, or shows: the outermost of them."""
    found = _shown(model, 2)
    inner = {child for module in found for child in module.modules() if child is not module}
    return [module for module in dict.fromkeys(found) if module not in inner]


def _shown(what: object, depth: int) -> list[nn.Module]:
    if isinstance(what, partial):
        near: list[Any] = [what.func, *what.args, *what.keywords.values()]
        return [module for each in near for module in _shown(each, depth)]
    owner = getattr(what, "__self__", what)
    if isinstance(owner, nn.Module):
        return [owner]
    if not depth or isinstance(owner, ModuleType | type):
        return []
    near = list(getattr(owner, "__dict__", {}).values())
    if isinstance(what, FunctionType):
        near += [what.__globals__.get(name) for name in what.__code__.co_names]
        near += [cell.cell_contents for cell in what.__closure__ or () if cell != CellType()]
    return [module for each in near for module in _shown(each, depth - 1)]


def _is_wrapper(module: object) -> bool:
    """Whether it exchanges gradients in its backward: DistributedDataParallel, FSDP of either kind, and their like."""
    return hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync")


def _wrappers(modules: Iterable[nn.Module]) -> list[Any]:
    """The outermost modules that exchange gradients."""
    each = ([module] if _is_wrapper(module) else _wrappers(module.children()) for module in modules)
    return [wrapper for found in each for wrapper in found]


def _spans_all_ranks(wrappers: list[Any]) -> bool:
    """Whether all ranks train together, and not those of a smaller group."""
    groups = (getattr(wrapper, "process_group", None) for wrapper in wrappers)
    return any(torch.distributed.get_world_size(group) == torch.distributed.get_world_size() for group in groups)


def _gathers(loss_fn: object) -> bool:
    return getattr(loss_fn, "gather_across_devices", False) is True


def _exchanges_in_forward(module: nn.Module) -> bool:
    """Whether every forward is one of all ranks: FSDP of either kind gathers parameters, SyncBatchNorm its sums."""
    return any(
        hasattr(each, "set_requires_gradient_sync")
        or hasattr(each, "summon_full_params")
        or (isinstance(each, nn.SyncBatchNorm) and each.training)
        for each in module.modules()
    )


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
    tensors += [parameter for module in _modules_of(model) for parameter in module.parameters()]
    used = {torch.device("cpu")} | {tensor.device for tensor in tensors}
    if torch.cuda.is_initialized():  # a callable may have its parameters there, out of sight
        used.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(used, key=str)


def _loss_and_gradient(
    embeddings: Tensor,
    labels: Any,
    loss_fn: Callable[..., Tensor],
    scaler: torch.amp.GradScaler | None,
    agreed: Callable[[str, Callable[[], Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with the scaler's factor, [B, D]."""
    leaf = embeddings.detach()
    independent = ValueError("the loss does not depend on the embeddings that loss_fn was given")

    def forward() -> Tensor:
        loss = loss_fn(leaf.requires_grad_(), labels)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn has to return a tensor, got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(f'loss_fn has to return a scalar, got shape {tuple(loss.shape)}: reduction="mean" is one')
        if not loss.requires_grad:
            raise independent
        return loss

    def its_gradient() -> Tensor:
        if leaf.grad is None:
            raise independent
        return leaf.grad

    loss = agreed("loss", forward)
    _backward(loss if scaler is None else scaler.scale(loss), None)
    return loss.detach(), agreed("gradient of the loss", its_gradient)


def _with_graph(embeddings: Tensor) -> Tensor:
    if not embeddings.requires_grad:
        raise ValueError(
            "the model's embeddings have no gradient: are all of its parameters frozen, or does it detach them?"
        )
    return embeddings


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
def _kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts buffers back to what they were: the second pass is the one that counts."""
    kept: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, *_: object) -> None:
        if isinstance(module, DistributedDataParallel):  # before its first forward it sends those of rank 0 to all
            hooks.enter_context(module.module.register_forward_pre_hook(keep))
            return
        for name, buffer in module.named_buffers(recurse=False):
            if (module, name) not in kept and not buffer.is_inference():  # which nothing can change
                kept[module, name] = buffer, buffer.clone()
        for child in module.children():
            keep(child)

    with ExitStack() as hooks:
        for module in modules:
            keep(module)
        try:
            yield
        finally:
            for (owner, name), (buffer, value) in kept.items():
                setattr(owner, name, buffer.copy_(value))
