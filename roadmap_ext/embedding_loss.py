"""From embeddings to loss and gradients, a chunk of query rows at a time: [B, N] is never in memory.

A chunk costs three matrix products: its scores; then, with the scores overwritten by their gradient, one product into
the gradients of its queries and one into those of the references. `sweep` does this for given weights of the rows'
losses, and is one opaque op to torch.compile. What a reduction needs is put together around it:

    mean, sum         the weights are known beforehand: one sweep, in forward
    violating_pairs   they rest on counts over the whole batch: a sweep for the values, then one for the gradients
    none              they arrive in backward: a sweep for the values in forward, one for the gradients in backward
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import margins, notices, ops, reference
from .autograd import (
    FirstDerivativeOnly,
    anchor,
    can_be_read,
    check_loss,
    check_no_transform,
    is_known_to_be_1,
    may_overwrite,
    resolve_method,
    savable,
)
from .chunks import Chunk, memory, rows_of_a_chunk, rows_that_fit
from .pairs import Pairs
from .settings import SMALLEST_NORM, Objective, Settings

# Sums a tensor over all parts of a batch.
Total = Callable[[Tensor], Tensor]


def embedding_loss(
    embeddings: Tensor,
    references: Tensor | None,
    pairs: Pairs,
    settings: Settings,
    total: Total | None = None,
) -> Tensor:
    """The objective of embeddings [B, D] against references [N, D] (None: themselves) under any pairs.

    ``total`` sums a tensor over all parts of a batch, where these queries are one of several: the loss is then their
    share of the batch's, and the shares of all parts add up to it.
    """
    tensors = (embeddings,) if references is None else (embeddings, references)
    columns, objective = len(embeddings if references is None else references), settings.objective
    method = resolve_method(settings.method, *tensors)
    if method == "reference":
        assert total is None  # the reference takes the whole batch
        pairs = pairs.ready()
        pairs = pairs.of_loss(objective.ranking, columns, lambda of: _count(of, columns))
        target, ignore = pairs.masks(columns)
        none = objective.calibration_weight < 1 and len(target) and can_be_read(target)
        if none and not target.masked_fill(ignore, 0).any():
            notices.without_positive()
        return reference.embedding_loss(embeddings, references, target, ignore, objective, pairs.queries, pairs.worth)
    check_loss(embeddings.device, objective.ranking.loss if objective.calibration_weight < 1 else "ap")
    if objective.margins is not None:
        objective = margins.to_fit(objective, embeddings, references, partial(pairs.masks_of, columns=columns))
        settings = settings._replace(objective=objective)
    pairs = pairs.of_loss(objective.ranking, columns, lambda of: ops.count_pairs(of, len(embeddings), columns))
    if settings.chunk_size is not None or settings.method != method:
        chunk_size = settings.chunk_size and min(settings.chunk_size, max(1, len(embeddings)))  # to fit in an int64
        settings = settings._replace(chunk_size=chunk_size, method=method)
    counts = ops.count_pairs(pairs, len(embeddings), columns)
    if pairs.queries is not None:
        counts = counts.masked_fill(~pairs.queries[:, None], -1)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        anchors = [anchor(x) if x is not None and x.requires_grad else None for x in (embeddings, references)]
        loss: Tensor = _EmbeddingLoss.apply(
            embeddings, references, *anchors, counts, settings, total, pairs.first_own, *pairs.flat()
        )
        return loss
    values, weight, _ = _evaluate(embeddings, references, pairs, counts, settings, total, (False, False))
    return _reduced(values, weight, objective, embeddings, references)


def _count(pairs: Pairs, columns: int) -> Tensor:
    """Positives of each query in plain PyTorch, [B, 1]."""
    target, ignore = pairs.masks(columns)
    return (target & ~ignore).sum(1, keepdim=True)


class _EmbeddingLoss(torch.autograd.Function):
    """The reduced loss. Its gradient is computed with it, but for reduction="none"."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        references: Tensor | None,
        anchor: Tensor | None,
        ref_anchor: Tensor | None,
        counts: Tensor,
        settings: Settings,
        total: Total | None,
        first_own: int,
        *flat_pairs: Tensor | None,
    ) -> Tensor:
        want_embeddings, want_references, *_ = ctx.needs_input_grad
        pairs, wants = Pairs.of(flat_pairs, first_own), (want_embeddings, want_references)
        values, weight, gradients = _evaluate(embeddings, references, pairs, counts, settings, total, wants)
        ctx.settings, ctx.first_own = settings, first_own
        ctx.dtypes = embeddings.dtype, None if references is None else references.dtype
        ctx.known = settings.objective.reduction != "none"
        ctx.held = None
        saved: list[Tensor | None] = []
        if not ctx.known:
            saved += [x if x is None else savable(x) for x in (embeddings, references, weight, *flat_pairs)]
        elif torch.compiler.is_compiling():  # a compiled graph has to see what is saved
            saved += gradients
        else:  # held by ctx alone, the gradients can be handed on without a copy
            ctx.held = gradients
        ctx.save_for_backward(anchor, ref_anchor, *saved)
        return _reduced(values, weight, settings.objective, embeddings, references)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            check_no_transform(grad_loss)
        want_embeddings, want_references, *others = ctx.needs_input_grad
        wants = want_embeddings, want_references
        anchor, ref_anchor, *saved = ctx.saved_tensors
        if ctx.known:
            gradients = saved if ctx.held is None else ctx.held
            if may_overwrite(gradients[0]):
                ctx.held = None
                if not is_known_to_be_1(grad_loss):
                    for gradient in gradients:
                        gradient.mul_(grad_loss.detach())
            else:
                gradients = [gradient * grad_loss.detach() for gradient in gradients]
        else:
            embeddings, references, weight, *flat_pairs = saved
            _, *gradients = ops.sweep(
                embeddings.detach(),
                None if references is None else references.detach(),
                Pairs.of(flat_pairs, ctx.first_own),
                ctx.settings,
                weight * grad_loss.detach().to(weight.dtype).reshape(-1, 1),
                wants,
            )
        # Cast last: what GradScaler's factor lifts into the range of a half type has not been lost before.
        results = [
            gradient.to(dtype) if want else None
            for gradient, dtype, want in zip(gradients, ctx.dtypes, wants, strict=True)
        ]
        if torch.is_grad_enabled():
            depends_on = [tensor for tensor in (anchor, ref_anchor, grad_loss) if tensor is not None]
            results = [None if result is None else FirstDerivativeOnly.apply(result, *depends_on) for result in results]
        return (*results, *(None for _ in others))


def _evaluate(
    embeddings: Tensor,
    references: Tensor | None,
    pairs: Pairs,
    counts: Tensor,
    settings: Settings,
    total: Total | None,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Values [B, 5] of the rows, their weights [B, 3] in the loss, and the gradients that forward can know."""
    objective = settings.objective
    if objective.reduction == "none":
        wants = (False, False)
    if objective.calibration_weight == 0 or objective.calibration_reduction == "per_query":
        weight = _weights(counts, None, objective, total)
        values, *gradients = ops.sweep(embeddings, references, pairs, settings, weight, wants)
        return values, weight, gradients
    unknown = counts.new_zeros((len(counts), 3), dtype=torch.float64)
    values, *gradients = ops.sweep(embeddings, references, pairs, settings, unknown, (False, False))
    violating = values[:, 3:].sum(0, keepdim=True)
    weight = _weights(counts, violating if total is None else total(violating), objective, total)
    if any(wants):
        _, *gradients = ops.sweep(embeddings, references, pairs, settings, weight, wants)
    return values, weight, gradients


def _weights(counts: Tensor, violating: Tensor | None, objective: Objective, total: Total | None = None) -> Tensor:
    """What a row's AP loss and its sums of positive and negative hinges weigh in the loss, [B, 3] float64.

    counts [B, 2]: positives and negatives of a row, -1 where it is no query. violating [1, 2]: over how many hinges of
    the whole batch each kind is averaged; None: over those of each row.
    """
    # Numbers of rows as tensors: torch.compile of 2.11 fails on symbolic ones inside an autograd Function.
    numbers = torch.stack([(counts[:, 0] >= 0).sum(), (counts[:, 0] > 0).sum()])
    if total is not None:
        numbers = total(numbers)
    if objective.calibration_weight < 1 and can_be_read(numbers):
        queries, ranked_queries = numbers.tolist()
        if queries and not ranked_queries:
            notices.without_positive()
    # AP's mean leaves out queries without a positive, calibration's does not.
    rows, ranked = numbers.clamp(min=1).double().unbind()
    mean = objective.reduction == "mean"
    ap = (1 - objective.calibration_weight) / (ranked if mean else torch.ones_like(ranked))
    hinges = counts.clamp(min=1).double() if violating is None else violating.clamp(min=1) / rows
    calibration = objective.calibration_weight / ((rows if mean else 1) * hinges)
    return torch.cat([ap.expand_as(counts[:, :1]), calibration.expand_as(counts)], dim=1)


def _reduced(
    values: Tensor, weight: Tensor, objective: Objective, embeddings: Tensor, references: Tensor | None
) -> Tensor:
    loss = (values[:, :3] * weight).sum(1)
    loss = loss if objective.reduction == "none" else loss.sum()
    # A copy in any case: torch.compile of 2.11 loses the gradient of a Function's result that may be returned as it is.
    return loss.to(_compute_dtype(embeddings, references), copy=True)


def _compute_dtype(embeddings: Tensor, references: Tensor | None) -> torch.dtype:
    """The dtype of scores and of kept gradients, named whatever autocast says: half types are widened.

    A score of 16 bits would be as coarse as the temperature.
    """
    double = embeddings.dtype == torch.float64 or (references is not None and references.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def sweep(
    embeddings: Tensor,
    references: Tensor | None,
    pairs: Sequence[Tensor | None],
    own: int,
    weight: Tensor,
    objective: Sequence[float],
    normalize: bool,
    chunk_size: int,
    want_embeddings: bool,
    want_references: bool,
    method: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the rows, and the gradients of their weighted sum.

    Args:
        embeddings: [B, D] any float dtype; references [N, D], or None for the embeddings themselves, whose gradient
            then holds both shares.
        pairs, own: ``flat()`` and ``first_own`` of :class:`Pairs`.
        weight: [B, 3] float64: what the first three values of a row weigh.
        objective: ``flat()`` of :class:`Objective`.
        chunk_size: queries a chunk, 0 to choose.
        method: its place in METHODS.

    Returns:
        values [B, 5] float64: AP loss, sums of the positive and of the negative hinges, numbers of both that are not 0
        (0 where that part is not asked for); the gradients [B, D] and [N, D] in the compute dtype, empty where not
        wanted.
    """
    dtype = _compute_dtype(embeddings, references)
    want = want_embeddings or want_references
    kind, tau, rho, *_ = objective
    with torch.autocast(embeddings.device.type, enabled=False):
        product_dtype = _product_dtype(embeddings, references, dtype)
        queries = _Side(embeddings, product_dtype, dtype, normalize, want_embeddings)
        others = queries if references is None else _Side(references, product_dtype, dtype, normalize, want_references)
        rows, columns, every = len(embeddings), len(others.vectors), slice(None)
        every_pair = Pairs.of(pairs, own)
        raised = None
        if product_dtype == torch.float16 and want:
            raised = _raise(queries, others, weight, max(0.0 if kind else rho, 1 / tau))
            weight = weight * raised
        values = embeddings.new_zeros((rows, 5), dtype=torch.float64)
        step = rows_of_a_chunk(rows, rows_that_fit(columns, dtype.itemsize, embeddings.device.type), chunk_size)
        # The products that follow read the gradient in the dtype of the vectors; where that is not the scores', it does
        # not go over these.
        narrow = product_dtype != dtype and want
        with Chunk(others.vectors, min(step, rows), columns, dtype) as buffer:
            gradients = buffer.new_empty(buffer.shape, dtype=product_dtype) if narrow else buffer
            for begin in range(0, rows, step):
                part = slice(begin, min(begin + step, rows))
                vectors, of_part = queries.vectors[part], every_pair if step >= rows else every_pair.rows(part)
                scores, gradient = buffer[: len(vectors)], gradients[: len(vectors)]
                _multiply(vectors, others.vectors.T, scores, first=True)
                of_part = of_part.ready()
                torch.ops.roadmap_ext.objective_rows_(
                    scores,
                    values[part],
                    of_part.flat(),
                    of_part.first_own,
                    weight[part],
                    objective,
                    None if queries.scale is None else queries.scale[part],
                    others.scale,
                    want,
                    gradient if narrow else None,
                    method,
                )
                first = begin == 0
                if references is None and want_embeddings:
                    alone = step >= rows and not narrow
                    if alone:  # both shares of the gradient in one product
                        torch.ops.roadmap_ext.symmetrise_(gradient)
                    else:
                        queries.add(gradient.T, vectors, every, first)
                    queries.add(gradient, queries.vectors, part, alone)
                else:
                    if want_embeddings:
                        queries.add(gradient, others.vectors, part, True)
                    if want_references:
                        others.add(gradient.T, vectors, every, first)
        if not rows:
            others.gradient.zero_()
        first_gradient = queries.finish(raised)
        none = first_gradient.new_empty((0, 0))
        return values, first_gradient, none if references is None else others.finish(raised)


def _product_dtype(embeddings: Tensor, references: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the matrix products read. On CUDA a half type stays what it is: sums and scores are float32."""
    half = embeddings.dtype in (torch.float16, torch.bfloat16)
    alike = references is None or references.dtype == embeddings.dtype
    return embeddings.dtype if half and alike and embeddings.device.type in _HALF_PRODUCTS else dtype


_HALF_PRODUCTS = {"cuda"}


def _raise(queries: _Side, others: _Side, weight: Tensor, steepest: float) -> Tensor:
    """A power of two that lifts the gradient of every score into the range of float16, with room to spare."""
    bound = weight[:, :1].abs() * steepest + weight[:, 1:].abs().sum(1, keepdim=True)
    bound = bound.nan_to_num(0.0, 0.0, 0.0)
    for side in (queries, others):
        if side.scale is not None and side.scale.numel():
            bound = bound * side.scale.double().nan_to_num(0.0, 0.0, 0.0).max()
    largest = torch.cat([bound, bound.new_full((1, 1), 2.0**-200)]).max()
    return torch.exp2((12 - largest.log2().ceil()).clamp(-100, 100))


def _multiply(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """out = left @ right, or with ``first`` off out += it; half types are summed in float32."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=0 if first else 1, out=out)
    elif out.device.type == "cuda":  # which fake tensors do not know; `sweep` is opaque to them
        # float32 to be added to is accepted from torch 2.11 on, the oldest that this works with; 2.8 refused it.
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, beta=0 if first else 1, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=0 if first else 1, out=out)


class _Side:
    """One side of the products: its vectors as they were given [n, D], and the gradient that gathers for them.

    Normalised vectors are never in memory: a cosine is a plain product times both inverse norms (`scale`), which the
    row op takes in, and its gradient carries them out again.
    """

    def __init__(
        self, given: Tensor, product_dtype: torch.dtype, dtype: torch.dtype, normalize: bool, wanted: bool
    ) -> None:
        self.vectors = given.to(product_dtype)
        self.scale: Tensor | None = None  # [n] 1 / |x|, or 0 where there is no direction
        if normalize:
            norm = torch.linalg.vector_norm(self.vectors, dim=1, dtype=dtype)
            norm.masked_fill_(norm == torch.inf, torch.nan)  # must not pass for a vector without direction
            self.scale = norm.masked_fill_(norm < SMALLEST_NORM, torch.inf).reciprocal_()
        self.gradient = memory(self.vectors, self.vectors.shape if wanted else (0, 0), dtype)

    def add(self, left: Tensor, right: Tensor, rows: slice, first: bool) -> None:
        """Add left @ right to rows of the gradient, or begin them with it."""
        _multiply(left, right, self.gradient[rows], first)

    def finish(self, raised: Tensor | None) -> Tensor:
        """The gradient of the vectors as they were given, with u = x / |x|: d u = (I - u u') dx / |x|."""
        if raised is not None:
            self.gradient.mul_(1 / raised)
        if self.scale is not None and self.gradient.numel():  # 1 / |x| is in it
            torch.ops.roadmap_ext.remove_radial_(self.gradient, self.vectors, self.scale)
        return self.gradient


def _sweep_shapes(
    embeddings: Tensor,
    references: Tensor | None,
    pairs: Sequence[Tensor | None],
    own: int,
    weight: Tensor,
    objective: Sequence[float],
    normalize: bool,
    chunk_size: int,
    want_embeddings: bool,
    want_references: bool,
    method: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(embeddings, references)
    return (
        embeddings.new_empty((len(embeddings), 5), dtype=torch.float64),
        embeddings.new_empty(embeddings.shape if want_embeddings else (0, 0), dtype=dtype),
        embeddings.new_empty(references.shape if references is not None and want_references else (0, 0), dtype=dtype),
    )


def _sweep_flops(
    embeddings: Tensor,
    references: Tensor | None,
    pairs: Sequence[Tensor | None],
    own: int,
    weight: Tensor,
    objective: Sequence[float],
    normalize: bool,
    chunk_size: int,
    want_embeddings: bool,
    want_references: bool,
    method: int = 0,
    **_: object,
) -> int:
    """What torch.utils.flop_counter counts: the matrix products, as in all other ops."""
    rows, dim = embeddings.shape
    columns = rows if references is None else len(references)
    products = 1 + want_embeddings + want_references
    if references is None and want_embeddings:
        dtype = _compute_dtype(embeddings, references)
        step = rows_of_a_chunk(rows, rows_that_fit(columns, dtype.itemsize, embeddings.device.type), chunk_size)
        products = 2 if step >= rows and _product_dtype(embeddings, references, dtype) == dtype else 3
    return 2 * products * rows * columns * dim


# Not by torch.library.custom_op, which at its first call imports the compiler: a second, and 80 MiB. Once in a process,
# as in ops.py.
if not hasattr(torch.ops.roadmap_ext, "sweep"):
    torch.library.define(
        "roadmap_ext::sweep",
        "(Tensor embeddings, Tensor? references, Tensor?[] pairs, int own, Tensor weight, float[] objective, bool "
        "normalize, SymInt chunk_size, bool want_embeddings, bool want_references, int method=0) -> (Tensor, Tensor, "
        "Tensor)",
    )
    torch.library.impl("roadmap_ext::sweep", ("cpu", "cuda"), sweep)
    torch.library.register_fake("roadmap_ext::sweep", _sweep_shapes)
    register_flop_formula(torch.ops.roadmap_ext.sweep, get_raw=True)(_sweep_flops)
