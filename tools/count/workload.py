"""The losses whose launches are traced, called on CPU tensors with the CUDA ops on the PTX runner (tests/ptx)."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import roadmap_ext
import tools
from benchmarks.cuda import EMBEDDINGS, FEW, MANY, Case
from benchmarks.loop import clustered_embeddings
from roadmap_ext import embedding_loss
from roadmap_ext.chunks import BUDGET, rows_of_a_chunk, rows_that_fit

ROOT = Path(tools.__file__).resolve().parents[1]  # of the kernels, wherever this file is
CASES = (FEW, MANY, EMBEDDINGS, Case(1, 1_000_000, 100_000), Case(65_536, 65_536, 4, 768, torch.bfloat16))
# Of a case with more rows, those that run, on one multiprocessor. Fewer than twice its blocks would share rows.
ROWS = 4


def chunk_rows(case: Case) -> int:
    """Queries of a launch."""
    if not case.dim:
        return case.queries
    return rows_of_a_chunk(case.queries, rows_that_fit(case.references, 4, "cuda"), None)


@dataclass
class Rest:
    """What torch does beside our launches and the products; bytes of any queries, or of ROWS."""

    calls: int = 0
    fixed: int = 0
    grown: int = 0


class _Noted(TorchDispatchMode):
    """Adds up torch's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = Rest()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in args if isinstance(x, Tensor)]
        outputs = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, Tensor)]
        old = {x.untyped_storage().data_ptr() for x in inputs}
        written = func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in old for x in outputs)
        if func.namespace == "aten" and "empty" not in str(func) and written:
            self.rest.calls += 1
            for x in {id(x): x for x in inputs + outputs}.values():
                if ROWS in x.shape:
                    self.rest.grown += x.nbytes
                else:
                    self.rest.fixed += x.nbytes
        return result


def _multiply(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    """The product of embedding_loss.py: known by its size, and not by what the CPU makes of it."""
    with torch.utils._python_dispatch._disable_current_modes():
        torch.addmm(out, left.float(), right.float(), beta=0 if first else 1, out=out)


def emulated_ops() -> Any:
    """tests/support/emulated_ops.py."""
    folder = str(ROOT / "tests" / "support")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("emulated_ops")


def record(case: Case, arch: int, multiprocessors: int, folder: Path) -> None:
    """Run a case in a process of its own; traces of its launches, and rest.json, go to `folder`."""
    os.environ["ROADMAP_PTX"] = str(arch)
    emulated = emulated_ops()
    real = torch.ops.roadmap_ext
    ops = emulated.Ops(real)
    ops.sweep = embedding_loss.sweep  # as an op it would hide those in it
    vars(torch.ops)["roadmap_ext"] = ops
    embedding_loss._HALF_PRODUCTS.add("cpu")
    embedding_loss._multiply = _multiply
    BUDGET["cpu"] = BUDGET["cuda"]
    emulated.load().emulate_device(multiprocessors, *emulated.DEVICES[0][1:], 1, 1)  # all else as it is chosen

    rows, classes = case.queries, case.references // case.positives
    points, labels = clustered_embeddings(case.references, classes, dim=case.dim or 64, noise=case.noise)
    loss: Callable[..., Tensor] = roadmap_ext.ap_loss
    inputs: tuple[Tensor, ...] = (points[:rows] @ points.T).requires_grad_(), labels[:rows, None] == labels[None]
    if case.dim:
        loss = roadmap_ext.roadmap_loss
        queries, references = points[:rows].to(case.dtype), points.to(case.dtype)
        inputs = queries.requires_grad_(), labels[:rows], references.requires_grad_(), labels.clone()
    folder.mkdir(parents=True)
    os.environ["PTXRUN_TRACE"] = str(folder)
    with _Noted() as noted:
        torch.autograd.grad(loss(*inputs), [x for x in inputs if x.requires_grad])
    vars(torch.ops)["roadmap_ext"] = real
    (folder / "rest.json").write_text(json.dumps(vars(noted.rest if case.dim else Rest())))
