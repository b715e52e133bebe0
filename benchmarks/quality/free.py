"""Free embeddings: classes around centres, and a common direction that sets how similar negatives are to begin with.

Nothing is shared between items, so only the training set can be measured: what batches make of the whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from retrieval.batches import PerClassBatches
from torch import Tensor
from torch.nn.functional import embedding, normalize

from roadmap_ext.metrics import retrieval_metrics

from .losses import LOSSES
from .runs import TRAINING_GAP, Run, training_gap
from .wordnet import learning_rate

CLASSES, PER_CLASS, DIM, SPREAD = 512, 4, 16, 1.5
MEASURED = ("mAP@R", "R@1", *TRAINING_GAP)


def space(similarity: float, seed: int) -> Tensor:
    """Unit vectors [CLASSES * PER_CLASS, DIM], class by class; pairs of negatives have about this similarity."""
    random = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(CLASSES, 1, DIM, generator=random), dim=2)
    around = normalize(torch.randn(CLASSES, PER_CLASS, DIM, generator=random), dim=2)
    vectors = normalize(centres + SPREAD * around, dim=2).flatten(0, 1)
    common = normalize(torch.randn(DIM, generator=random), dim=0)
    return normalize(math.sqrt(similarity) * common + math.sqrt(1 - similarity) * vectors, dim=1)


def train(run: Run, items: int, similarity: float, report: Callable[[int], object]) -> dict[str, Any]:
    """Moves the vectors of a seed's space by Adam, and measures all of them; the values are empty if it diverged."""
    begin, steps, milliseconds = time.perf_counter(), items // run.batch_size, []
    vectors = space(similarity, run.seed).requires_grad_()
    labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    loss, optimizer = LOSSES[run.loss].make(), torch.optim.SparseAdam([vectors], lr=run.rate)
    batches = PerClassBatches(labels, run.batch_size, PER_CLASS, run.seed)
    for step in range(steps):
        index = batches(step)
        before = time.perf_counter()
        value = loss(embedding(index, vectors, sparse=True), labels[index])
        optimizer.zero_grad()
        value.backward()
        milliseconds.append(1e3 * (time.perf_counter() - before))
        if not value.isfinite():
            report(items - step * run.batch_size)
            return {}
        optimizer.param_groups[0]["lr"] = run.rate * learning_rate(step, steps)
        optimizer.step()
        report(run.batch_size)
    return {
        **retrieval_metrics(vectors.detach(), labels, k=(1,)),
        **training_gap(vectors.detach(), labels, batches),
        "seconds": time.perf_counter() - begin,
        "loss ms": sorted(milliseconds)[steps // 2],
    }
