"""PerClassBatchSampler: what batches and epochs hold, on one rank and on several."""

import itertools
import pickle

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from roadmap_ext.data import PerClassBatchSampler


@pytest.fixture
def labels():
    """Classes of 1 to 60 items, in random order."""
    sizes = torch.tensor([1, 1, 2, 3, 5, 8, 13, 21, 34, 60])
    return torch.arange(10).repeat_interleave(sizes)[torch.randperm(148)] * 7 - 3


def test_a_batch_is_full_of_classes_with_several_items(labels):
    for batch in PerClassBatchSampler(labels, per_class=4, batch_size=24):
        assert len(set(batch)) == 24
        _, counts = labels[batch].unique(return_counts=True)
        assert counts.max() == 4
        # Of classes that have four each gives four, but the last, which fills the batch.
        assert (counts < 4).sum() <= 3
        assert counts[labels[batch].unique(return_inverse=True)[1]].float().mean() > 3


def test_an_epoch_has_each_item_about_once():
    labels = torch.arange(50).repeat(20)
    sampler = PerClassBatchSampler(labels, per_class=5, batch_size=100)
    drawn = torch.tensor(list(itertools.chain(*sampler))).bincount(minlength=1000)
    assert len(sampler) == 10
    assert (drawn == 1).float().mean() > 0.9
    assert drawn.max() <= 2


def test_epochs(labels):
    """Passes go on from epoch to epoch, set_epoch goes to any, and both depend on the seed alone."""
    sampler = PerClassBatchSampler(labels, batch_size=12, seed=5)
    first, second = list(sampler), list(sampler)
    assert first != second
    other = PerClassBatchSampler(labels, batch_size=12, seed=5)
    torch.rand(3)
    other.set_epoch(1)
    assert list(pickle.loads(pickle.dumps(other))) == second
    other.set_epoch(0)
    assert list(other) == first
    assert list(PerClassBatchSampler(labels, batch_size=12, seed=6)) != first
    # where Lightning and accelerate look for it
    other.sampler.set_epoch(1)
    assert list(other) == second


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(labels, world_size):
    whole = list(PerClassBatchSampler(labels, per_class=3, batch_size=12))
    shares = [
        PerClassBatchSampler(labels, per_class=3, batch_size=12, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    count = len(whole) // world_size
    assert [len(share) for share in shares] == [count] * world_size
    for rank, share in enumerate(shares):
        assert list(share) == whole[rank::world_size][:count]


@pytest.mark.parametrize("kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda x: tuple(map(str, x.tolist()))])
def test_any_labels(labels, kind):
    """Names, arrays and lists; equal ones are a class."""
    batch = next(iter(PerClassBatchSampler(kind(labels), per_class=4, batch_size=16)))
    assert labels[batch].unique(return_counts=True)[1].max() == 4


def test_items_without_a_class_are_left_out(labels):
    ignored = int(labels.mode().values)
    sampler = PerClassBatchSampler(labels, per_class=4, batch_size=12, ignore_label=ignored)
    drawn = torch.tensor(list(itertools.chain(*sampler)))
    assert (labels[drawn] != ignored).all()
    assert (labels[drawn] >= 2 * 7 - 3).all()  # the classes of a single item


def test_with_a_data_loader(labels):
    loader = DataLoader(TensorDataset(torch.arange(148), labels), batch_sampler=PerClassBatchSampler(labels, 4, 16))
    for index, of_index in loader:
        assert index.shape == (16,)
        assert torch.equal(labels[index], of_index)
    assert len(loader) == len(labels[labels >= 11]) // 16


@pytest.mark.parametrize(
    ("kind", "match", "change"),
    [
        (TypeError, "per_class must be an integer, got float", {"per_class": 4.0}),
        (ValueError, "per_class must be at least 2, got 1", {"per_class": 1}),
        (ValueError, "batch_size must be at least 2, got 0", {"batch_size": 0}),
        (ValueError, r"rank must be below world_size, 2, got 2", {"rank": 2, "world_size": 2}),
        (ValueError, r"one class for each item, \[n\], got shape \(3, 2\)", {"labels": numpy.zeros((3, 2))}),
        (ValueError, "8 classes have two items or more, 146 in all. Choose per_class=8, or a batch_size of 29", {}),
        (ValueError, r"0 classes have two items or more, 0 in all. Choose a batch_size of 0", {"labels": range(9)}),
        (ValueError, "do not fill a batch of 24 for each of 7 ranks: choose", {"batch_size": 24, "world_size": 7}),
    ],
)
def test_errors(labels, kind, match, change):
    with pytest.raises(kind, match=match):
        PerClassBatchSampler(**({"labels": labels, "batch_size": 64} | change))
