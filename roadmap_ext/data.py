"""Which items a batch has: several of each of some classes, without which there is nothing to rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import Sampler

from .validation import check_count

__all__ = ["PerClassBatchSampler"]


class PerClassBatchSampler(Sampler[list[int]]):
    """Batches of ``per_class`` random items of each of ``batch_size / per_class`` random classes, for a DataLoader.

        sampler = PerClassBatchSampler(labels, per_class=4, batch_size=256)
        loader = DataLoader(dataset, batch_sampler=sampler)

    An epoch is as many batches as the items fill. Classes are drawn by how many items they have left, so that an epoch
    has each item about once, unless a class is so large that ``per_class`` of it in every batch are not all of it. No
    batch holds an item twice. A class of fewer than ``per_class`` items gives all it has, and further classes fill the
    batch, the last of them in part. Items of classes that have a single item are left out: nothing could be relevant
    to them.

    What an epoch holds depends on the seed and on its number alone. Each pass over the sampler is the next epoch;
    ``set_epoch`` says which it is, and trainers call it (accelerate, Hugging Face's, Lightning's).

    Args:
        labels: [n] the class of each item of the data set: integers, or names; a tensor, an array or a sequence.
        per_class: items of each class in a batch, at least 2.
        batch_size: items of a batch, on each rank.
        seed: of all chance.
        rank, world_size: this process and how many there are, where each takes its own batches of the epoch and all
            equally many. Leave them out where the trainer shares out batches itself, as accelerate and Hugging Face's
            do.
        ignore_label: the label of items without a class, which are left out. None: there is no such label.

    Raises:
        TypeError: a number is no integer.
        ValueError: ``labels`` is not one-dimensional, or a number is out of range; there are too few items or classes
            to fill a batch.

    Example:
        >>> sampler = PerClassBatchSampler(["cat", "dog", "cat", "dog", "owl", "cat", "dog"], per_class=2, batch_size=4)
        >>> [len(batch) for batch in sampler]
        [4]
    """

    drop_last = True  # every batch is full: what trainers that share batches out ask for

    def __init__(
        self,
        labels: Any,
        per_class: int = 4,
        batch_size: int = 256,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        ignore_label: int | str | None = None,
    ) -> None:
        self.per_class = check_count("per_class", per_class, 2)
        self.batch_size = check_count("batch_size", batch_size, 2)
        self.seed, self.epoch = check_count("seed", seed, 0), 0
        self.rank, self.world_size = check_count("rank", rank, 0), check_count("world_size", world_size, 1)
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size, {world_size}, got {rank}")
        self.sampler = self  # where trainers look for set_epoch()
        self._items, self._sizes = _by_class(labels, ignore_label)
        items, most = int(self._sizes.sum()), int(self._sizes.clamp(max=self.per_class).sum())
        if most < self.batch_size:
            classes = len(self._sizes)
            fits = -(-self.batch_size // max(1, classes))
            remedy = f"per_class={fits}, or " if items >= self.batch_size else ""
            raise ValueError(
                f"a batch of {self.batch_size} cannot be filled with {self.per_class} items of each class: {classes} "
                f"classes have two items or more, {items} in all. Choose {remedy}a batch_size of {most} at most"
            )
        self._batches = items // self.batch_size // self.world_size
        if not self._batches:
            raise ValueError(
                f"{items} items in classes of two or more do not fill a batch of {self.batch_size} for each of "
                f"{self.world_size} ranks: choose a batch_size of {items // self.world_size} at most"
            )

    def __len__(self) -> int:
        """Batches of an epoch, on each rank."""
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of ``epoch``, an integer of at least 0."""
        self.epoch = check_count("epoch", epoch, 0)

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) % 2**63)
        self.epoch += 1
        sizes = self._sizes
        begin = sizes.cumsum(0) - sizes
        order = torch.randperm(len(self._items), generator=random)
        of_class = torch.arange(len(sizes)).repeat_interleave(sizes)
        items = self._items[order[of_class[order].argsort(stable=True)]]  # class by class, in random order within
        place, left = torch.zeros_like(sizes), sizes.double()
        enough = min(len(sizes), -(-self.batch_size // 2))  # classes: each has two items
        for batch in range(self._batches * self.world_size):
            # Drawn without repetition, as often as items are left; those that have none left come last.
            chance = left.clamp(min=1e-9) / torch.empty_like(left).exponential_(generator=random)
            classes = chance.topk(enough).indices
            taken = sizes[classes].clamp(max=self.per_class)
            taken = (self.batch_size - (taken.cumsum(0) - taken)).clamp(min=0).minimum(taken)
            classes, taken = classes[taken > 0], taken[taken > 0]
            within = torch.arange(self.batch_size) - (taken.cumsum(0) - taken).repeat_interleave(taken)
            which = classes.repeat_interleave(taken)
            chosen = items[begin[which] + (place[which] + within) % sizes[which]]
            place[classes] += taken
            left[classes] -= taken
            chosen = chosen[torch.randperm(self.batch_size, generator=random)]  # any part of it is of many classes
            if batch % self.world_size == self.rank:
                yield chosen.tolist()


def _by_class(labels: Any, ignore_label: int | str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Items class by class, and how many each class has, of the classes that have two at least."""
    given = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels
    array = numpy.asarray(given if isinstance(given, Sequence | numpy.ndarray) else list(given))
    if array.ndim != 1:
        raise ValueError(f"labels must have one class for each item, [n], got shape {array.shape}")
    _, of_item, sizes = numpy.unique(array, return_inverse=True, return_counts=True)
    keep = sizes >= 2
    if ignore_label is not None:
        keep[of_item[array == ignore_label]] = False
    items = numpy.argsort(of_item, kind="stable")
    items = items[keep[of_item[items]]]
    return torch.from_numpy(items), torch.from_numpy(sizes[keep])
