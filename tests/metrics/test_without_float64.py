"""Devices without float64, such as Apple's MPS: metrics, reference losses and memory, on a CPU that refuses it."""

import pytest
import torch
from oracle import grid_scores
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from roadmap_ext import (
    CalibrationLoss,
    EmbeddingMemory,
    RoadmapLoss,
    SmoothAPLoss,
    SupAPLoss,
    ap_loss,
    metrics,
    ranking,
    smooth_rank,
)

ROWS, DIM = 70, 8


class NoFloat64(TorchDispatchMode):
    """Raises what MPS raises at any float64 tensor that an operation takes or makes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Looks at all that goes in and comes out."""
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, made)):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"Cannot convert a tensor to float64 dtype as the device does not have it ({func})")
        return made


def test_the_mode_refuses():
    for make in (lambda: torch.zeros(1).double(), lambda: torch.rand(3, dtype=torch.float64)):
        with NoFloat64(), pytest.raises(TypeError, match="float64"):
            make()


def batch():
    """Embeddings with and without ties, labels of which one is to be ignored, ids, and batches."""
    x, labels = torch.randn(ROWS, DIM), torch.arange(ROWS) % 9 - 1
    x[:20] = x[20:40]
    return x, labels, torch.arange(ROWS) // 2, torch.arange(ROWS) % 4


def of_scores(function):
    scores, target = grid_scores(20, 60), torch.rand(20, 60) < 0.2
    target[0] = False
    return function(scores, target, torch.rand(20, 60) < 0.1)


def of_embeddings(function, *batches, **options):
    x, labels, ids, _ = batch()
    return function(x, labels, *batches, ids=ids, ref_ids=ids, ignore_label=-1, **options)


METRICS = {
    "average_precision": lambda: of_scores(metrics.average_precision),
    "retrieval_metrics": lambda: of_embeddings(metrics.retrieval_metrics, reduction="none"),
    "their mean": lambda: of_embeddings(metrics.retrieval_metrics),
    "of a gallery": lambda: metrics.retrieval_metrics(*batch()[:2], torch.ones(5, DIM), torch.arange(5), k=2),
    "of nothing": lambda: metrics.retrieval_metrics(*batch()[:2], torch.ones(0, DIM), torch.arange(0)),
    "decomposability_gap": lambda: of_embeddings(metrics.decomposability_gap, batch()[3], reduction="none"),
    "its mean": lambda: of_embeddings(metrics.decomposability_gap, batch()[3]),
    "decomposability_gap_of_scores": lambda: of_scores(
        lambda scores, target, ignore: metrics.decomposability_gap_of_scores(
            scores, target, torch.arange(60) % 12, ignore, reduction="none"
        )
    ),
    "decomposability_bound": lambda: metrics.decomposability_bound(
        torch.randint(5, (9, 6)) * torch.tensor([0, 1, 1, 2, 100, 10_000]), torch.randint(5, (9, 6)) * 10**6
    ),
    "of many batches": lambda: metrics.decomposability_bound(torch.randint(3, (9, 30)), torch.randint(50, (9, 30))),
}


def of_a_memory(loss):
    x, labels, ids, _ = batch()
    memory = EmbeddingMemory(100, DIM)
    memory.enqueue(x, labels, ids)
    memory.enqueue(x[:40] + 1, labels[:40], ids[:40])
    leaf = x.requires_grad_()
    return loss(leaf, labels, ref_emb=memory, ids=ids), leaf


def of_a_batch(loss):
    x, labels, _, _ = batch()
    leaf = x.requires_grad_()
    return loss(leaf, labels), leaf


# On such devices the reference runs.
LOSSES = {
    "roadmap": lambda: of_a_batch(RoadmapLoss(method="reference", ignore_label=-1)),
    "violating pairs": lambda: of_a_batch(RoadmapLoss(method="reference", calibration_reduction="violating_pairs")),
    "sup": lambda: of_a_batch(SupAPLoss(method="reference", reduction="none")),
    "smooth": lambda: of_a_batch(SmoothAPLoss(method="reference", normalize=False)),
    "calibration": lambda: of_a_batch(CalibrationLoss(method="reference")),
    "memory": lambda: of_a_memory(RoadmapLoss(method="reference", ignore_label=-1)),
    "ap_loss": lambda: of_scores(lambda s, t, i: (ap_loss(s.requires_grad_(), t, ignore=i, method="reference"), s)),
    "smooth_rank": lambda: of_scores(
        lambda s, t, i: (smooth_rank(s.requires_grad_(), t, ignore=i, method="reference").negative_rank, s)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    with NoFloat64():
        loss, leaf = LOSSES[name]()
        loss.sum().backward()
    assert loss.sum() > 0
    assert leaf.grad.any()


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name, monkeypatch):
    monkeypatch.setattr(ranking, "has_kernel", lambda x: False)
    torch.manual_seed(1)
    expected = METRICS[name]()
    torch.manual_seed(1)
    with NoFloat64():
        measured = METRICS[name]()
    for one, other in zip(tree_leaves(measured), tree_leaves(expected), strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            assert one.dtype == torch.float32
            one = one.double()
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6, equal_nan=True, check_dtype=False)
