"""Batches larger than the memory for their activations: the model runs twice, a mini-batch at a time (GradCache).

    1  inputs ── model, no graph, a mini-batch at a time ──► embeddings [B, D]
    2  embeddings ── loss ──► gradient of the embeddings [B, D]
    3  inputs ── model again, with graph ──► backward from its rows of that gradient, a mini-batch at a time

The loss sees the whole batch, and only a mini-batch's activations are in memory (Gao et al., RepL4NLP 2021). CachedLoss
does 1 and the loss, and leaves the rest to the backward of what it returns; cached_backward calls that at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map  # torch's pytrees have no public name yet

from . import distributed
from .validation import check_count


class CachedLoss(nn.Module):
    """A loss of a batch of any size, in the memory of a mini-batch's activations, for trainers that own the backward.

    What it returns is the loss of the whole batch. The model has run without graph then; it runs again in the
    ``backward()`` of the loss, a mini-batch at a time, which adds to the parameters' gradients what that of
    ``loss(model(inputs), labels)`` would, whatever the trainer multiplied the loss by. What :func:`cached_backward`
    says of chance, buffers, autocast and several ranks holds here, too; the second run is under the autocast of the
    first. With gradients switched off, in an evaluation, there is one run and no graph.

    The parameters are not in the graph of what is returned: ``backward()`` reaches them, ``torch.autograd.grad`` does
    not, and a second ``backward()`` raises.

    Args:
        model: as for :func:`cached_backward`: the network in its wrapper, if it has one, such as
            DistributedDataParallel.
        loss: ``loss(embeddings [B, D], labels)`` is a scalar.
        mini_batch_size: rows of a mini-batch, whose activations are in memory.
        call: ``call(model, inputs)``, for models that take more than one argument; None: ``model(inputs)``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`cached_backward`; arguments are looked at when it is called.

    Example:
        >>> from roadmap_ext import RoadmapLoss
        >>> model = torch.nn.Linear(3, 2)
        >>> cached = CachedLoss(model, RoadmapLoss(), mini_batch_size=2)
        >>> loss = cached(torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> (loss / 4).backward()
        >>> model.weight.grad.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        loss: Callable[..., Tensor],
        mini_batch_size: int,
        *,
        call: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.mini_batch_size, self.call = model, loss, mini_batch_size, call

    def forward(self, inputs: Any, labels: Any) -> Tensor:
        """The loss of inputs [B, ...], a tensor or a pytree of tensors, and of labels: see :func:`cached_backward`."""
        step = _Cached(self.model, inputs, labels, self.loss, self.mini_batch_size, self.call, False, None)
        loss, backward = step.forward()
        if backward is None:
            return loss
        anchor = torch.zeros((), device=loss.device, requires_grad=True)
        handed_on: Tensor = _LaterBackward.apply(loss, anchor, backward)
        return handed_on


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
    loss, backward = _Cached(model, inputs, labels, loss_fn, mini_batch_size, call, True, scaler).forward()
    if backward is None:
        _backward(loss if scaler is None else scaler.scale(loss), None)
    else:
        backward(torch.ones_like(loss) if scaler is None else scaler.scale(torch.ones_like(loss)))
    return loss.detach()


class _Cached:
    """A step: its loss, and the second run of the model, which is the backward of it."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        inputs: Any,
        labels: Any,
        loss_fn: Callable[..., Tensor],
        mini_batch_size: int,
        call: Callable[[Any, Any], Tensor] | None,
        at_once: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._labels, self._loss_fn = labels, loss_fn
        self._modules = _modules_of(model)
        wrappers = _wrappers(self._modules)
        self._across = distributed.several() and (_spans_all_ranks(wrappers) or _gathers(loss_fn))
        in_step = any(map(_exchanges_in_forward, self._modules))
        self._near = next((parameter for module in self._modules for parameter in module.parameters()), None)
        self._run = _Forward(model, inputs, call)

        def describe() -> distributed.Facts[list[slice]]:
            _check_arguments(model, loss_fn, mini_batch_size, scaler, call)
            if at_once and not torch.is_grad_enabled():
                raise RuntimeError(
                    "cached_backward computes gradients, and they are switched off: call it outside no_grad()"
                )
            rows, size = _length(inputs), mini_batch_size
            parts = [slice(begin, min(begin + size, rows)) for begin in range(0, max(rows, 1), size)]
            wrapped = f"wrapped in {[type(wrapper).__name__ for wrapper in wrappers]}, exchanges in forward: {in_step}"
            common: dict[str, int | str] = {
                "call": "cached_backward",
                "kind of model": wrapped,
                "scaler": scaler is not None,
                "grad mode": torch.is_grad_enabled(),
            }
            number = {"number of mini-batches (the model exchanges in each forward)": len(parts)}
            return (parts, {**common, **number}, {}) if in_step else (parts, common, number)

        self._parts, *_ = distributed.handshake(describe, self._near) if self._across else describe()
        # Where ranks train together, all do the same whatever their share: DistributedDataParallel exchanges more than
        # gradients in its forward, now and then, and that has to meet the loss's exchange in the same order on each.
        self._no_sync = [wrapper.no_sync for wrapper in wrappers if hasattr(wrapper, "no_sync")]
        self._chance = _Chance(_devices(model, inputs))
        self._before: list[list[Tensor]] = []

    def forward(self) -> tuple[Tensor, Callable[[Tensor], None] | None]:
        """The loss, and its backward, which takes a gradient: None where the loss has a graph, or needs none."""
        if len(self._parts) == 1 and not (self._across or self._no_sync):
            embeddings = self._run(self._parts[0])
            return self._loss(_with_graph(embeddings) if torch.is_grad_enabled() else embeddings), None
        with nullcontext() if not torch.is_grad_enabled() else _kept_buffers(self._modules):
            leaf = self._agreed("first pass", _labelled("first pass", self._first_pass))
        if not torch.is_grad_enabled():
            return self._agreed("loss", lambda: self._loss(leaf)), None
        loss = self._agreed("loss", lambda: self._loss(leaf.requires_grad_()))
        autocast = _Autocast(self._chance.devices)

        def backward(grad_loss: Tensor) -> None:
            _backward(loss, grad_loss)
            gradient = self._agreed("gradient of the loss", lambda: _gradient_of(leaf))
            now = self._chance.state()
            with autocast.as_it_was():
                embeddings = self._agreed("second pass", _labelled("second pass", lambda: self._second_pass(gradient)))
            _backward(embeddings, gradient[self._parts[-1]])
            self._chance.restore(now)  # what comes next draws what it would have drawn

        return loss.detach(), backward

    def _agreed(self, name: str, step: Callable[[], Tensor]) -> Tensor:
        return distributed.agreed(f"cached_backward, {name}", step, self._near) if self._across else step()

    def _first_pass(self) -> Tensor:
        """Embeddings of the whole batch, without graph."""
        out = []
        with torch.no_grad():
            for part in self._parts:
                self._before.append(self._chance.state())
                out.append(self._run(part))
            return torch.cat(out)

    def _loss(self, embeddings: Tensor) -> Tensor:
        loss = self._loss_fn(embeddings, self._labels)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn has to return a tensor, got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(f'loss_fn has to return a scalar, got shape {tuple(loss.shape)}: reduction="mean" is one')
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise _independent()
        return loss

    def _second_pass(self, gradient: Tensor) -> Tensor:
        """Up to the last backward, which exchanges gradients: once, when all of this rank's are there."""
        for part, state in zip(self._parts[:-1], self._before, strict=False):
            self._chance.restore(state)
            with ExitStack() as held_back:
                for context in self._no_sync:
                    held_back.enter_context(context())
                _backward(_with_graph(self._run(part)), gradient[part])
        self._chance.restore(self._before[-1])
        return _with_graph(self._run(self._parts[-1]))


class _LaterBackward(torch.autograd.Function):
    """A loss as it is, and what its backward calls with the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.call = backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[None, None, None]:
        if ctx.call is None:
            raise RuntimeError("the backward of a CachedLoss runs the model, and has done so: it can be called once")
        call, ctx.call = ctx.call, None
        with torch.enable_grad():
            call(grad_loss.detach())
        return None, None, None


def _check_arguments(model: object, loss_fn: object, mini_batch_size: object, scaler: object, call: object) -> None:
    check_count("mini_batch_size", mini_batch_size, 1)
    for name, value in (("loss_fn", loss_fn), ("model", model) if call is None else ("call", call)):
        if not callable(value):
            raise TypeError(f"{name} must be something to call, got {type(value).__name__}")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")


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


def _labelled(name: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same, with a label for torch.profiler."""

    def run() -> Tensor:
        with torch.profiler.record_function(f"roadmap_ext::cached {name}"):
            return step()

    return run


def _independent() -> ValueError:
    return ValueError("the loss does not depend on the embeddings that loss_fn was given")


def _gradient_of(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise _independent()
    return leaf.grad


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
        self.devices = devices
        self._generators = [_generator(device) for device in devices]

    def state(self) -> list[Tensor]:
        return [get() for get, _ in self._generators]

    def restore(self, state: list[Tensor]) -> None:
        for (_, put), value in zip(self._generators, state, strict=True):
            put(value)


class _Autocast:
    """What autocast does on some devices, which the thread of a backward may not know."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kinds = {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
        self._states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        with ExitStack() as entered:
            for kind, enabled, dtype in self._states:
                entered.enter_context(torch.autocast(kind, dtype, enabled, self._cached))
            yield


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
