"""Batches of two super-classes, whose images are harder to tell apart than those of any two classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from .batches import draw_from, generator
from .errors import InputError


class HierarchicalBatches:
    """Batches of two super-classes, half of the images from each, ``per_class`` of each class.

    An epoch has ``batches_per_pair`` batches of each pair of super-classes, in random order: with 12 super-classes and
    10 batches a pair it is 660. Each batch draws its classes anew, from those of a super-class without repetition; so
    are the images of a class as far as it has enough, and from then on they come again.

    A batch is a function of the seed and the step alone, which is what going on to the same bits takes and
    pytorch-metric-learning's samplers, which remember where they are, do not give. This is the sampler of ROADMAP's
    released code but for three things: that one draws the images of a class that has too few with replacement, fills a
    half with as many classes as there are, and takes its chance from numpy.

    Args:
        labels: [n] int64, 0 to the number of classes.
        group_of: [classes] int64, the super-class of each.
        groups: the names of the super-classes, for errors.
        per_class: None for 4.

    Raises:
        InputError: a batch cannot be filled so.
    """

    def __init__(
        self,
        labels: Tensor,
        group_of: Tensor,
        groups: Sequence[str],
        batch_size: int,
        per_class: int | None,
        seed: int,
        batches_per_pair: int = 10,
    ) -> None:
        self.per_class = 4 if per_class is None else per_class
        self.batch_size, self.seed, self._batches_per_pair = batch_size, seed, batches_per_pair
        self._images = labels.argsort(stable=True).split(labels.bincount().tolist())
        self._classes = [(group_of == group).nonzero().flatten() for group in range(len(groups))]
        self._pairs = list(combinations(range(len(groups)), 2))
        self._half = batch_size // 2 // self.per_class  # classes of each super-class
        if not self._pairs:
            raise InputError(
                f"--sampler hierarchical takes two super-classes, and the images to train on have {len(groups)}: "
                "--sampler per-class"
            )
        if batch_size % (2 * self.per_class):
            raise InputError(
                f"half a batch of {batch_size:,} is not of whole classes of {self.per_class} images: choose a "
                f"--batch-size that {2 * self.per_class} divides"
            )
        fewest = min(range(len(groups)), key=lambda group: len(self._classes[group]))
        have = len(self._classes[fewest])
        if have < self._half:
            raise InputError(
                f"half a batch of {batch_size:,} with {self.per_class} images a class takes {self._half:,} classes of "
                f"a super-class, and {groups[fewest]!r} has {have:,} to train on: a --batch-size of at most "
                f"{2 * self.per_class * have:,}"
            )

    @property
    def epoch(self) -> int:
        """How many batches an epoch has."""
        return len(self._pairs) * self._batches_per_pair

    @property
    def repeating(self) -> int:
        """How many classes have too few images for a batch, so that these come again."""
        return sum(len(images) < self.per_class for images in self._images)

    def pair(self, step: int) -> tuple[int, int]:
        """The super-classes of a step."""
        order = torch.randperm(self.epoch, generator=generator("pairs", self.seed, step // self.epoch))
        return self._pairs[int(order[step % self.epoch]) // self._batches_per_pair]

    def __call__(self, step: int) -> Tensor:
        """Image numbers [batch_size] of a step, in random order: any part of a batch is of both super-classes."""
        random = generator("batch", self.seed, step)
        classes = torch.cat([draw_from(self._classes[group], self._half, random) for group in self.pair(step)])
        drawn = [draw_from(self._images[label], self.per_class, random) for label in classes.tolist()]
        return torch.cat(drawn)[torch.randperm(self.batch_size, generator=random)]
