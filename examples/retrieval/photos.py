"""Images of a data set's lists, decoded whenever they are wanted: cropped at random to train on, as they are to test.

The data sets of the recipes have up to 462,000 photographs, which neither fit in memory nor can be decoded once to
see whether they are whole. So each file is only looked up before training starts, and one that turns out to be
damaged ends the run when its turn comes; --resume goes on when it is mended.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from .datasets import Listing
from .decode import FORMATS
from .errors import InputError, reason, some
from .images import digest_of, in_threads

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIES = 10  # at a rectangle that lies within the image


@dataclass(frozen=True)
class Transform:
    """From a photograph to a square of ``size`` pixels.

    Attributes:
        size: pixels a side.
        train_resize: pixels of the shorter side before a random crop is taken; None leaves the image as it is.
        scale: least and largest share of the image's area in a random crop.
        ratio: least and largest width by height of a random crop.
        test_resize: (shorter side,) or (width, height) before the middle is cut out.
    """

    size: int
    train_resize: int | None
    scale: tuple[float, float]
    ratio: tuple[float, float]
    test_resize: tuple[int, ...]

    def draw(self, images: int, random: torch.Generator) -> Tensor:
        """How each of some images is to be cropped, [images, tries, 4], from 0 to 1."""
        return torch.rand(images, _TRIES, 4, generator=random, dtype=torch.float64)

    def train(self, image: Image, draw: Tensor) -> Image:
        """A random crop, resized: torchvision's RandomResizedCrop with the chance as drawn, [tries, 4]."""
        if self.train_resize is not None:
            image = _resized(image, (self.train_resize,))
        left, top, width, height = self._box(*image.size, draw.tolist())
        return _resized(image.crop((left, top, left + width, top + height)), (self.size, self.size))

    def _box(self, width: int, height: int, draw: Sequence[Sequence[float]]) -> tuple[int, int, int, int]:
        """Left, top, width and height of the first rectangle drawn that lies within; else the largest in the middle."""
        (least, most), (narrow, broad) = self.scale, self.ratio
        for area, ratio, across, down in draw:
            pixels = width * height * (least + area * (most - least))
            aspect = narrow * (broad / narrow) ** ratio
            w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
        w, h = min(width, max(1, round(height * broad))), min(height, max(1, round(width / narrow)))
        return (width - w) // 2, (height - h) // 2, w, h

    def test(self, image: Image) -> Image:
        """The middle of the resized image."""
        image = _resized(image, self.test_resize)
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class Photos:
    """The images of a listing, in colour, as the training program wants images.

    Attributes:
        names, classes, labels: of the listing; labels [n] int64.
        groups, group_of: the super-classes by name, and the one of each class, [classes] int64.
        channels, size: of an image.
        values: as those of Images; None.
        digest: of the listing, the files' sizes and the transform of the test: of all that bits depend on but the
            pixels, which are not read.
    """

    channels = 3
    values = None

    def __init__(self, root: Path, listing: Listing, transform: Transform) -> None:
        self._root, self._transform, self.size = root, transform, transform.size
        self.names, self.classes, self.groups = listing.names, listing.classes, listing.groups
        self.labels, self.group_of = torch.tensor(listing.labels), torch.tensor(listing.group_of)
        about = [str(transform.size), str(transform.test_resize), str(listing.labels), str(listing.group_of)]
        self.digest = digest_of([*self.names, *self.classes, *map(str, _sizes(root, self.names)), *about]).hex()

    def __len__(self) -> int:
        return len(self.names)

    def to_train_on(self, index: Tensor, share: slice, random: torch.Generator) -> Tensor:
        """The pixels of a share of a batch of image numbers, cropped at random: each as in the whole batch."""
        return self.pixels(index[share], self._transform.draw(len(index), random)[share])

    def pixels(self, index: Tensor, draw: Tensor | None = None) -> Tensor:
        """[b, 3, S, S] uint8 for image numbers [b]: of the test, or cropped as drawn, [b, tries, 4].

        Raises:
            InputError: an image is damaged.
        """
        out = torch.empty(len(index), self.size, self.size, 3, dtype=torch.uint8)
        numbers = index.tolist()

        def decode(place: int) -> None:
            out[place] = self._decode(self.names[numbers[place]], None if draw is None else draw[place])

        for _ in in_threads(decode, range(len(numbers))):
            pass
        return out.permute(0, 3, 1, 2).contiguous()

    def _decode(self, name: str, draw: Tensor | None) -> Tensor:
        """[S, S, 3] uint8."""
        import numpy as np
        from PIL import Image

        try:
            with Image.open(self._root / name, formats=FORMATS) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise ValueError(
                        f"its mode {opened.mode} has more than 8 bits, of which nothing says what is white"
                    )
                image = opened.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises whatever a file's format leads it into
            raise InputError(f"{self._root / name} is damaged or unreadable ({reason(error)}): restore it") from error
        image = self._transform.test(image) if draw is None else self._transform.train(image, draw)
        return torch.from_numpy(np.array(image))


def _resized(image: Image, size: tuple[int, ...]) -> Image:
    """Of that width and height; of one number, that is the shorter side."""
    from PIL import Image as Pillow

    if len(size) == 1:
        width, height = image.size
        shorter = min(width, height)
        size = (size[0] * width // shorter, size[0] * height // shorter)
    return image if size == image.size else image.resize(size, Pillow.Resampling.BILINEAR)


def _sizes(root: Path, names: Sequence[str]) -> list[int]:
    """Bytes of each file; one error names all that are not there."""

    def size(name: str) -> int | None:
        try:
            about = os.stat(root / name)
        except OSError:
            return None
        return about.st_size if stat.S_ISREG(about.st_mode) and about.st_size else None

    sizes = []
    with tqdm(total=len(names), desc="looking for images", unit="image", disable=None, leave=False) as progress:
        for found in in_threads(size, names):
            progress.update()
            sizes.append(found)
    missing = [name for name, found in zip(names, sizes, strict=True) if found is None]
    if missing:
        many = f"{len(missing):,} of the {len(names):,} listed images are" if len(missing) > 1 else "a listed image is"
        raise InputError(f"{root}: {many} not there or empty: {some(missing)}: restore what is named")
    return sizes
