"""Warnings that come once in a process: that there are no kernels, and that a batch has no positive."""

from __future__ import annotations

import sys
import warnings

import torch

_said: set[str] = set()
# The warning names the first line outside of these.
_LIBRARIES = ("roadmap_ext", "torch", "pytorch_metric_learning", "sentence_transformers", "transformers")


def without_kernels() -> None:
    """The package was installed without kernels on purpose, and runs the reference instead."""
    _once(
        "roadmap_ext was installed with ROADMAP_EXT_NO_BUILD=1: the plain PyTorch reference runs instead of the "
        "kernels, hundreds of times slower.",
        RuntimeWarning,
    )


def without_positive() -> None:
    """No query has a positive. The AP loss is then 0, as if every ranking were perfect."""
    _once(
        "roadmap_ext: no query of this batch has a positive (or a miner named none), so its AP loss is 0 and teaches "
        "nothing. A batch needs several items of each class: give the DataLoader "
        "batch_sampler=roadmap_ext.data.PerClassBatchSampler(labels, per_class=4, batch_size=...), or "
        "sampler=pytorch_metric_learning.samplers.MPerClassSampler(labels, m=4, batch_size=...). (This is said once.)",
        UserWarning,
    )


def _once(message: str, category: type[Warning]) -> None:
    if message in _said or torch.compiler.is_compiling():
        return
    _said.add(message)
    caller, level = sys._getframe(), 1
    while caller.f_back and caller.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        caller, level = caller.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
