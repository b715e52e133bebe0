"""RetrievalMetrics: batch by batch, and item by item where ids say so, it is retrieval_metrics of all."""

import pytest
import torch

from roadmap_ext import RetrievalMetrics
from roadmap_ext.metrics import retrieval_metrics


@pytest.fixture
def items():
    labels = torch.arange(40) % 7
    return torch.randn(40, 8) + 2 * torch.randn(7, 8)[labels], labels, torch.randperm(40) + 100


def test_batches_are_one(items):
    embeddings, labels, _ = items
    metrics = RetrievalMetrics(k=(1, 5), normalize=False, ignore_label=3)
    for _ in range(2):  # the second time after reset()
        for part in torch.arange(40).split(9):
            metrics.update(embeddings[part].requires_grad_(), labels[part].int())
        assert len(metrics) == 40
        expected = retrieval_metrics(embeddings, labels, k=(1, 5), normalize=False, ignore_label=3)
        assert metrics.compute() == expected
        done = []
        assert metrics.compute(progress=done.append) == expected
        assert sum(done) == 40
        metrics.reset()
    with pytest.raises(RuntimeError, match="no embeddings to measure: call update"):
        metrics.compute()


def test_an_item_counts_once(items):
    embeddings, labels, ids = items
    metrics = RetrievalMetrics(k=1)
    metrics.update(embeddings[:30], labels[:30], ids[:30])
    metrics.update(-embeddings[20:], labels[20:], ids[20:])  # ten again, and not the same: the first counts
    whole = torch.cat([embeddings[:30], -embeddings[30:]])
    assert metrics.compute() == retrieval_metrics(whole, labels, k=1)


def test_what_is_collected_is_no_view(items):
    """A network may write its next embeddings over those of the last batch."""
    embeddings, labels, _ = items
    metrics = RetrievalMetrics(k=1)
    kept = embeddings.clone()
    metrics.update(embeddings, labels)
    embeddings.zero_()
    assert metrics.compute() == retrieval_metrics(kept, labels, k=1)


def test_errors(items):
    embeddings, labels, ids = items
    metrics = RetrievalMetrics()
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        metrics.update(embeddings, labels.float())
    with pytest.raises(ValueError, match="labels must"):
        metrics.update(embeddings, labels[1:])
    assert len(metrics) == 0
    metrics.update(embeddings, labels, ids)
    with pytest.raises(ValueError, match=r"like those of the first batch, torch\.float32 of 8 dimensions, got"):
        metrics.update(embeddings[:, :5], labels, ids)
    with pytest.raises(ValueError, match="like those of the first batch"):
        metrics.update(embeddings.double(), labels, ids)
    with pytest.raises(ValueError, match="give them with all, or none"):
        metrics.update(embeddings, labels)
    assert len(metrics) == 40
    with pytest.raises(ValueError, match="k must be at least 1"):
        RetrievalMetrics(k=0)
    with pytest.raises(TypeError, match="normalize must be True or False"):
        RetrievalMetrics(normalize=1)
