"""The gap of training batches against loops; the gap by chance against every ranking, and against drawn scores."""

import doctest
import math
from itertools import combinations

import numpy
import pytest
import torch
from torch.nn.functional import normalize

from roadmap_ext import chance
from roadmap_ext import training_gap as module
from roadmap_ext.chance import Counts, expected_ap
from roadmap_ext.metrics import average_precision, decomposability_gap, training_gap


def expected(positives, negatives, separation):
    return expected_ap(numpy.array([positives]), numpy.array([negatives]), separation).item()


class TestChance:
    @pytest.mark.parametrize("counts", [(1, 0), (4, 0), (1, 3), (3, 5), (5, 6)])
    def test_without_separation_every_ranking_is_as_likely(self, counts):
        positives, negatives = counts
        each = [
            sum(number / (place + 1) for number, place in enumerate(places, 1)) / positives
            for places in combinations(range(positives + negatives), positives)
        ]
        assert expected(*counts, 0.0) == pytest.approx(math.fsum(each) / len(each), abs=1e-9)

    @pytest.mark.parametrize("counts", [(1, 7, 0.5), (3, 28, 1.0), (40, 60, -0.4), (4, 3000, 2.5)])
    def test_drawn_scores(self, counts):
        positives, negatives, separation = counts
        scores = torch.randn(4000, positives + negatives, dtype=torch.float64)
        scores[:, :positives] += separation
        drawn = average_precision(scores, torch.arange(positives + negatives).lt(positives).expand_as(scores))
        assert expected(*counts) == pytest.approx(drawn.mean().item(), abs=5 * drawn.std().item() / 4000**0.5)

    def test_any_number_of_counts(self, monkeypatch):
        positives, negatives = torch.randint(1, 9, (7,)).numpy(), torch.randint(0, 99, (7,)).numpy()
        whole = expected_ap(positives, negatives, 0.7)
        monkeypatch.setattr(chance, "_ELEMENTS", 2 * len(chance._X) * len(chance._Z))
        assert expected_ap(positives, negatives, 0.7) == pytest.approx(whole, rel=1e-12)
        assert expected_ap(positives[:0], negatives[:0], 0.7).shape == (0,)

    def test_the_separation_is_that_of_the_ap(self):
        """Two queries of other counts; the first has two batches, of which one has no positive."""
        counts = Counts()
        counts.add(torch.tensor([[3, 40]]), torch.tensor([[3, 9], [0, 31]]), torch.tensor([1.0, 1.0]))
        for _ in range(2):  # equal ones add up
            counts.add(torch.tensor([[5, 38]]), torch.tensor([[2, 20], [3, 18]]), torch.tensor([0.5, 0.5]))
        ap = (expected(3, 40, 1.3) + 2 * expected(5, 38, 1.3)) / 3
        batch_ap = (expected(3, 9, 1.3) + expected(2, 20, 1.3) + expected(3, 18, 1.3)) / 3
        assert counts.gap(ap) == pytest.approx(batch_ap - ap, abs=1e-6)
        assert counts.gap(1.0) == pytest.approx(0, abs=1e-6)
        assert math.isnan(counts.gap(math.nan))
        assert math.isnan(Counts().gap(0.5))


def clustered(items=600, classes=30, noise=1.2):
    labels = torch.arange(items) % classes
    return torch.randn(classes, 16)[labels] + noise * torch.randn(items, 16), labels


def test_a_random_split_has_the_gap_of_chance():
    embeddings, labels = clustered()
    found = decomposability_gap(embeddings, labels, torch.randperm(600).split(60))
    assert found.null == pytest.approx(found.gap, rel=0.15)
    assert found.gap > 0.1


def by_loops(embeddings, labels, batches, ignore_label=None):
    """(AP in the batch, AP of all) of each query, in float64."""
    scores = normalize(embeddings.double(), dim=1) @ normalize(embeddings.double(), dim=1).T
    found = []

    def ap(query, others):
        kept = [j for j in others if j != query and labels[j] != ignore_label]
        row, target = scores[query, kept], labels[kept] == labels[query]
        return average_precision(row[None], target[None]).item()

    for batch in batches:
        for query in batch.tolist():
            within = ap(query, batch.tolist()) if labels[query] != ignore_label else math.nan
            if not math.isnan(within):
                found.append((within, ap(query, range(len(labels)))))
    return torch.tensor(found).mean(0).tolist()


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_each_query_meets_its_batch_and_the_set(ignore_label):
    """Batches overlap, leave items out, and hold some twice; some have no positive."""
    embeddings, labels = clustered(60, 9)
    twice = torch.tensor([*range(18), *range(18), 18, 27], dtype=torch.int32)
    batches = [torch.randperm(60)[:20], torch.randperm(60)[:15], twice]
    found = training_gap(embeddings.double(), labels, batches, ignore_label=ignore_label)
    batch_ap, ap = by_loops(embeddings, labels, batches, ignore_label)
    assert (found.batch_ap, found.ap) == pytest.approx((batch_ap, ap))
    assert found.gap == pytest.approx(batch_ap - ap)


def test_the_null_is_of_the_counts_in_batch_and_set():
    embeddings, labels = clustered()
    batches = [torch.arange(600).view(20, 30)[:4, k : k + 5].flatten() for k in (0, 10)]  # 4 items of each of 5 classes
    found, counts = training_gap(embeddings, labels, batches), Counts()
    counts.add(torch.tensor([[19, 580]]), torch.tensor([[3, 16]]), torch.tensor([1.0]))
    assert found.null == pytest.approx(counts.gap(found.ap))


def test_the_null_of_an_item_twice_and_of_labels_that_are_none():
    """Class 29 is no class, and items 0 and 1 are of classes 0 and 1: each has 3 others of its class in the batch."""
    embeddings, labels = clustered()
    batch, counts = torch.tensor([0, 0, 30, 60, 90, 1, 31, 61, 91, 29, 59]), Counts()
    found = training_gap(embeddings, labels, [batch], ignore_label=29)
    of_batch = torch.tensor([[3, 4]] * 2 + [[4, 4]] * 3 + [[3, 5]] * 4)
    counts.add(torch.tensor([[19, 560]] * 9), of_batch, torch.ones(9))
    assert found.null == pytest.approx(counts.gap(found.ap))


def test_arrays_and_nothing():
    embeddings, labels = clustered(60, 9)
    found = training_gap(embeddings.numpy(), labels.numpy(), [numpy.arange(30)], normalize=False)
    assert found == training_gap(embeddings, labels, [torch.arange(30)], normalize=False)
    assert all(map(math.isnan, training_gap(embeddings, labels, [torch.arange(9)])))


def test_what_it_refuses():
    embeddings, labels = clustered(60, 9)
    with pytest.raises(TypeError, match="batches must be a list of tensors"):
        training_gap(embeddings, labels, torch.arange(60))
    with pytest.raises(ValueError, match=r"batches\[1\] must be at least 0 and below 60, got 60"):
        training_gap(embeddings, labels, [torch.arange(4), torch.tensor([3, 60])])
    with pytest.raises(TypeError, match=r"batches\[0\] must have an integer dtype"):
        training_gap(embeddings, labels, [torch.arange(4.0)])


def test_examples():
    assert not doctest.testmod(module, extraglobs={"torch": torch}).failed
