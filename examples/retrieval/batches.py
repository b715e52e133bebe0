"""Which images a step trains on, and how they are distorted: functions of the seed and the step alone.

Nothing here remembers anything, so a run that goes on from step 1,000 needs to know no more than that number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .errors import InputError
from .images import Images

if TYPE_CHECKING:
    from .hierarchy import HierarchicalBatches
    from .photos import Photos


def seed_of(purpose: str, seed: int, step: int) -> int:
    """A seed for one purpose at one step, unlike those of all others."""
    digest = hashlib.blake2b(f"{purpose}, {seed}, {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(purpose: str, seed: int, step: int) -> torch.Generator:
    """Random numbers for one purpose at one step; on the CPU, so that they are the same for every device."""
    return torch.Generator().manual_seed(seed_of(purpose, seed, step))


def draw_from(images: Tensor, count: int, random: torch.Generator) -> Tensor:
    """[count] of some images in random order: each as often as any other, give or take one."""
    order = [torch.randperm(len(images), generator=random) for _ in range(-(-count // len(images)))]
    return images[torch.cat(order)[:count]]


class PerClassBatches:
    """Batches of ``per_class`` images of each of some classes; the last class of a batch may have fewer, but not one.

    Classes are drawn without repetition, and so are the images of a class as far as it has enough; from then on they
    come again.

    Args:
        labels: [n] int64, 0 to the number of classes.
        per_class: None for 4, or as many as it takes to fill a batch from all classes.

    Raises:
        InputError: a batch cannot be filled so.
    """

    epoch = None  # as many as the images fill

    def __init__(self, labels: Tensor, batch_size: int, per_class: int | None, seed: int) -> None:
        self._images = labels.argsort(stable=True).split(labels.bincount().tolist())
        classes = len(self._images)
        self.per_class = max(4, -(-batch_size // classes)) if per_class is None else per_class
        self.batch_size, self.seed = batch_size, seed
        self._classes = -(-batch_size // self.per_class)
        if self._classes > classes:
            fills = next(each for each in range(-(-batch_size // classes), batch_size + 1) if batch_size % each != 1)
            raise InputError(
                f"a batch of {batch_size:,} with {self.per_class} images a class takes {self._classes:,} classes, and "
                f"there are {classes:,} to train on: --per-class {fills}, or a --batch-size of at "
                f"most {classes * self.per_class:,}"
            )
        if batch_size % self.per_class == 1:
            raise InputError(
                f"a batch of {batch_size:,} with {self.per_class} images a class leaves one image alone, without a "
                f"positive: choose a --batch-size that --per-class {self.per_class} divides"
            )

    @property
    def repeating(self) -> int:
        """How many classes have too few images for a batch, so that these come again."""
        return sum(len(images) < self.per_class for images in self._images)

    def __call__(self, step: int) -> Tensor:
        """Image numbers [batch_size] of a step, in random order: any part of a batch is of many classes."""
        random = generator("batch", self.seed, step)
        classes = torch.randperm(len(self._images), generator=random)[: self._classes]
        drawn = [draw_from(self._images[label], self.per_class, random) for label in classes.tolist()]
        return torch.cat(drawn)[: self.batch_size][torch.randperm(self.batch_size, generator=random)]


@dataclass(frozen=True)
class Distortion:
    """How far training images are turned, resized and shifted, each at random, and whether they are mirrored."""

    rotate: float  # degrees, either way
    resize: float  # share of the size, either way
    shift: float  # share of the size, in each direction
    flip: bool

    def draw(self, images: int, random: torch.Generator) -> Tensor:
        """How each of some images is to be distorted, [images, 5], from -1 to 1."""
        return torch.rand(images, 5, generator=random) * 2 - 1

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        """Distorted copies of images [b, C, S, S] float32, each as drawn; what lies outside goes on as the border."""
        if not (self.rotate or self.resize or self.shift or self.flip):
            return images
        angle, size = draw[:, 0] * math.radians(self.rotate), 1 + draw[:, 1] * self.resize
        mirror = torch.where(draw[:, 4] < 0, -1.0, 1.0) if self.flip else torch.ones_like(angle)
        cosine, sine = angle.cos() * size, angle.sin() * size
        shift = draw[:, 2:4] * 2 * self.shift  # the grid is two wide
        rows = [cosine * mirror, -sine, shift[:, 0], sine * mirror, cosine, shift[:, 1]]
        with torch.autocast(images.device.type, enabled=False):  # 16 bits would be coarser than a pixel
            grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
            return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Feed:
    """A share of the images of a step; those that do not lie in memory are decoded while the step before is trained."""

    def __init__(self, images: Images | Photos, batches: PerClassBatches | HierarchicalBatches, share: slice) -> None:
        self._images, self._batches, self._share = images, batches, share
        self._pool = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[tuple[Tensor, Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """[b, C, S, S] uint8, their labels [b] int64, and their numbers [b] int64."""
        here = self._ahead.pop(step, None)
        self._ahead = {step + 1: self._pool.submit(self._read, step + 1)}
        return here.result() if here is not None else self._read(step)

    def _read(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        whole = self._batches(step)
        pixels = self._images.to_train_on(whole, self._share, generator("crop", self._batches.seed, step))
        index = whole[self._share]
        return pixels, self._images.labels[index], index


def ahead(read: Callable[[Tensor], Tensor], items: Sequence[Tensor]) -> Iterator[Tensor]:
    """read(item) for each in order; the next is read while one is at work."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read, item) for item in items[:1]]
        for item in items[1:]:
            coming.append(pool.submit(read, item))
            yield coming.pop(0).result()
        yield from (one.result() for one in coming)
