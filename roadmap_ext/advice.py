"""How an error message ends: each function looks at the value that was refused, and says what to pass instead.

A remedy is code in terms of the argument's name. tests/losses/test_advice.py applies each one to the value that caused
it. The value is looked at once an error is certain; where it cannot be, in a graph or a transform, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from numbers import Integral, Real
from typing import Any, Concatenate, ParamSpec

import numpy
import torch
from torch import Tensor

_P = ParamSpec("_P")
# Where a network's output has one vector an item, before what has the shape of it.
_VECTORS = ("sentence_embedding", "image_embeds", "text_embeds", "pooler_output")


def spelled(name: str, value: object) -> str:
    """Code for a tensor that the user gave, or that as_tensor() in validation.py made of an array of theirs."""
    return f"torch.as_tensor({name})" if getattr(value, "of_array", False) else name


def _looking(advise: Callable[Concatenate[str, Any, _P], str]) -> Callable[Concatenate[str, Any, _P], str]:
    @wraps(advise)
    def end(name: str, value: Any, /, *arguments: _P.args, **keywords: _P.kwargs) -> str:
        if torch.compiler.is_compiling():
            return ""
        try:
            remedy = advise(spelled(name, value), value, *arguments, **keywords)
        except Exception:  # the error that is being raised matters more
            return ""
        return remedy and f": {remedy}"

    return end


@_looking
def for_vectors(name: str, value: object) -> str:
    """For a value that is not a matrix of embeddings, [items, dimension]."""
    return _vectors(name, value)


@_looking
def for_scores(name: str, value: object) -> str:
    """For a value that is not a matrix of scores, [queries, references]."""
    return _scores(name, value)


@_looking
def for_labels(name: str, value: object, rows: int | None) -> str:
    """For a value that is not a vector of integers, one for each of ``rows`` rows (None: of any length)."""
    return _labels(name, value, rows)


@_looking
def for_mask(name: str, value: object, scores: Tensor) -> str:
    """For a value that is not a bool mask with the shape of the scores."""
    return _mask(name, value, scores)


@_looking
def for_rows(name: str, value: object) -> str:
    """For a value that is not a plain tensor of rows; any shape and dtype will do."""
    return _plain(name, value, lambda code, made: "", "torch.cat({}.unbind())")


def _vectors(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        tensors = {key: each for key, each in value.items() if isinstance(each, Tensor) and each.is_floating_point()}
        vectors = [key for key, each in tensors.items() if each.dim() == 2]
        vectors.sort(key=lambda key: key not in _VECTORS)
        tokens = [key for key, each in tensors.items() if each.dim() == 3]
        codes = [f"{name}[{key!r}]" for key in vectors[:1]] + [f"{name}[{key!r}].mean(1)" for key in tokens[:1]]
        return f"pass one vector per item of the network's output, {' or '.join(codes)}" if codes else ""
    if isinstance(value, tuple | list) and value and all(isinstance(each, Tensor) for each in value):
        if all(each.is_floating_point() and each.shape == value[0].shape[:1] for each in value):
            return f"use torch.stack({name})"
        if value[0].is_floating_point():
            return f"pass one tensor, {name}[0] or another"
        return "pass one tensor; a miner's tuple is for the losses of roadmap_ext.integrations"
    if remedy := _plain(name, value, _vectors, "torch.stack([rows.mean(0) for rows in {}.unbind()])"):
        return remedy
    code = name
    if value.is_complex():
        code = f"torch.view_as_real({name}).flatten(-2)"
    elif not value.is_floating_point() or value.element_size() == 1:
        code = f"{name}.float()"
    if value.dim() == 1:
        code += "[None]"
    elif value.dim() > 2 and set(value.shape[2:]) == {1}:
        code += ".flatten(1)"
    elif value.dim() == 3:
        views = f"{code}.flatten(0, 1) if it counts views, each with a label of its own"
        return f"use {code}.mean(1) if the second dimension counts tokens or places, {views}"
    elif value.dim() > 3:
        return f"use {code}.flatten(2).mean(2), one vector an item, or {code}.flatten(1)"
    swapped = ", unless it stands where labels belong" if value.dim() == 1 and code.startswith(f"{name}.float") else ""
    return "" if code == name else f"use {code}{swapped}"


def _scores(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        codes = [f"{name}[{key!r}]" for key, each in value.items() if isinstance(each, Tensor) and each.dim() == 2]
        return f"pass one of its matrices, {' or '.join(codes)}" if codes else ""
    if remedy := _plain(name, value, _scores, "torch.nested.to_padded_tensor({}, -math.inf)"):
        return remedy
    code = name
    if not value.is_complex() and (not value.is_floating_point() or value.element_size() == 1):
        code += ".float()"
    if value.dim() == 1:
        code += "[None]"
    elif value.dim() == 3:
        code += ".flatten(0, 1)"
    return "" if code == name else f"use {code}"


def _labels(name: str, value: Any, rows: int | None) -> str:
    if isinstance(value, Mapping):
        codes = [
            f"{name}[{key!r}]" for key, each in value.items() if isinstance(each, Tensor) and each.shape == (rows,)
        ]
        return f"pass its class numbers, {' or '.join(codes)}" if codes else ""
    if numpy.ma.is_masked(value):
        code = f"torch.as_tensor({name}.astype(int).filled(-1))"
        return f"use {code}, and ignore_label=-1 for the items that are masked"
    if not isinstance(value, Tensor) and _made(name, value) is None:
        return _numbered(name, value)
    if remedy := _plain(name, value, lambda code, made: _labels(code, made, rows), "torch.cat({}.unbind())"):
        return remedy
    rows = len(value) if rows is None else rows
    code = name
    if value.dim() == 2 and sorted(value.shape) == [1, rows]:
        code, value = f"{name}.flatten()", value.flatten()
    elif value.dim() == 2 and len(value) == rows:
        return _rows_of_labels(name, value)
    elif value.dim() == 1 and 0 < len(value) < rows and rows % len(value) == 0:
        code = f"{name}.repeat({rows // len(value)})"
    elif value.shape != (rows,):
        return ""
    if value.dtype == torch.bool:
        code += ".long()"
    elif value.is_complex():
        pairs = f"torch.view_as_real({code})"
        return f"use {pairs}.unique(dim=0, return_inverse=True)[1] to number the distinct ones"
    elif value.is_floating_point():
        numbers = value[~value.isnan()]
        if (numbers.isinf() | (numbers != numbers.round())).any():
            return f"they are not whole numbers; use {code}.unique(return_inverse=True)[1] to number the distinct ones"
        if len(numbers) < len(value):
            return f"use {code}.nan_to_num(nan=-1).long(), and ignore_label=-1 for the items that have none"
        code += ".long()"
    return "" if code == name else f"use {code}"


def _numbered(name: str, value: Any) -> str:
    """For labels that are no numbers, but names, dates and such; None where there is none."""
    known, number, ignored = f"set({name})", "classes.index(each)", ""
    if None in (distinct := set(value)):
        known, number = f"{known} - {{None}}", f"-1 if each is None else {number}"
        ignored = ", and ignore_label=-1 for the items that have none"
    sorted(distinct - {None})  # raises where they have no order
    return (
        f"number the classes, once for the whole data set: classes = sorted({known}), then "
        f"torch.tensor([{number} for each in {name}]){ignored}"
    )


def _rows_of_labels(name: str, value: Tensor) -> str:
    """For labels [B, C]: what they are decides."""
    number = f"{name}.float()" if not value.is_floating_point() else name
    wide = value.float()
    binary = bool(((wide == 0) | (wide == 1)).all())
    if len(wide) == wide.shape[1] and torch.equal(wide, wide.T):
        target, what = f"{name}.bool()" if binary else f"{name} > 0.5", "related pairs"
    elif binary and (wide.sum(1) == 1).all():
        return f"one-hot rows become {name}{'.int()' if value.dtype == torch.bool else ''}.argmax(1)"
    elif binary:
        target, what = f"{number} @ {number}.T > 0", "items of several classes"
    elif (wide >= 0).all() and torch.allclose(wide.sum(1), torch.ones(len(wide), device=wide.device), atol=1e-2):
        target, what = f"{number} @ {number}.T > 0.5", "soft labels"
    else:
        return "" if value.is_floating_point() else f"pass one column of classes, such as {name}[:, 0]"
    return (
        f"{what} are ranked by ap_loss(scores, {target}, ignore=itself), where scores compare each item with each and "
        "itself is the diagonal (docs/roadmap-loss.md, Items of several classes)"
    )


def _mask(name: str, value: Any, scores: Tensor) -> str:
    if remedy := _plain(
        name, value, lambda code, made: _mask(code, made, scores), "torch.nested.to_padded_tensor({}, 0)"
    ):
        return remedy
    rows, columns = scores.shape
    code = name
    if value.dim() == 1 and value.dtype != torch.bool and not value.is_floating_point():
        if rows == columns == len(value):
            return f"make a mask of labels with {name}[:, None] == {name}"
        return "make a mask of labels with labels[:, None] == reference_labels[None]"
    if value.shape == (rows,) and rows != columns:
        code = f"{name}[:, None].expand_as(scores)"
    elif value.shape == (columns, rows) and rows != columns:
        code = f"{name}.T"
    elif value.shape != scores.shape:
        value.expand_as(scores)  # raises where nothing is to be broadcast
        code = f"{name}.expand_as(scores)"
    if value.dtype != torch.bool:
        code = f"{code}.bool()" if ((value == 0) | (value == 1)).all() else f"{code} > 0, or another threshold"
    return "" if code == name else f"use {code}"


def _plain(name: str, value: Any, further: Callable[[str, Tensor], str], nested: str) -> str:
    """For a value that is not a plain dense tensor: the code that makes it one, and what ``further`` says of that."""
    if not isinstance(value, Tensor):
        found = _made(name, value)
        if found is None:
            return ""
        code, made = found
    elif hasattr(value, "full_tensor"):  # only all ranks together could look at it
        return f"use {name}.full_tensor(), or {name}.to_local() and gather_across_devices=True"
    elif value.is_nested:
        return f"use {nested.format(name)}"
    elif value.layout != torch.strided:
        code, made = f"{name}.to_dense()", value.to_dense()
    elif value.is_quantized:
        code, made = f"{name}.dequantize()", value.dequantize()
    else:
        return ""
    return further(code, made) or f"use {code}"


def _made(name: str, value: Any) -> tuple[str, Tensor] | None:
    """Code for a tensor with the numbers of a list or an array as they are, and that tensor; None if there is none."""
    if numpy.ma.is_masked(value):
        return None
    ways: dict[str, Callable[[], Any]] = {"{0}": lambda: value}
    if isinstance(value, numpy.ndarray):
        ways["{0}.copy()"] = value.copy  # forwards in memory
        ways["{0}.astype({0}.dtype.newbyteorder('='))"] = lambda: value.astype(value.dtype.newbyteorder("="))
        if value.dtype.kind in "fO" and all(isinstance(each, Real) for each in value.flat):
            kind = int if all(isinstance(each, Integral) for each in value.flat) else float
            ways[f"{{0}}.astype({kind.__name__})"] = lambda: value.astype(kind)
    for code, way in ways.items():
        with suppress(TypeError, ValueError, RuntimeError):
            return f"torch.as_tensor({code.format(name)})", torch.as_tensor(way())
    return None
