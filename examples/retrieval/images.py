"""Images with a class each: from what was surveyed, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import decode
from .sources import MIB
from .survey import Survey, in_threads


class Images:
    """Square images of one size, with a class each.

    Attributes:
        names: [n] the path of each image within its root.
        classes: the names of the classes.
        labels: [n] int64, into ``classes``.
        channels, size: of an image.
        contents: [n] a digest of each picture as it was before it was cut and resized.
        values: of images of more than 8 bits, the values that become black and white; None where there are none.
        root: the folder, or place in a zip, that ``names`` are within.
        digest: of all that the bits of a run depend on.
    """

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[str],
        labels: Tensor,
        pixels: Tensor | Callable[[int], np.ndarray],  # [m, C, S, S] uint8, or how to get one, [C, S, S]
        channels: int,
        size: int,
        contents: Sequence[bytes],
        places: Tensor | None = None,  # [n] where in ``pixels`` each image is; None: in their order
        values: tuple[int, int] | None = None,
        root: Path = Path(),
    ) -> None:
        self.names, self.classes, self.labels = list(names), list(classes), labels
        self.channels, self.size, self.contents = channels, size, list(contents)
        self.values, self.root = values, root
        about = [f"{channels} x {size}", str(labels.tolist()), *([str(values)] if values else [])]
        self.digest = digest_of([*names, *classes, *self.contents, *about]).hex()
        self._pixels = pixels
        self._places = torch.arange(len(self.names)) if places is None else places

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: Tensor) -> Tensor:
        """[b, C, S, S] uint8 for image numbers [b]."""
        places = self._places[index]
        if isinstance(self._pixels, Tensor):
            return self._pixels[places]
        out = torch.empty(len(index), self.channels, self.size, self.size, dtype=torch.uint8)
        for row, image in zip(out, in_threads(self._pixels, places.tolist()), strict=True):
            row.copy_(torch.from_numpy(image))
        return out

    def to_train_on(self, index: Tensor, share: slice, random: torch.Generator) -> Tensor:
        """The pixels of a share of a batch of image numbers."""
        return self.pixels(index[share])

    def take(self, index: Tensor) -> Images:
        """These images alone, of the same memory, and the classes that are left, in their order."""
        labels = self.labels[index]
        left = labels.unique()
        numbers = index.tolist()
        return Images(
            [self.names[i] for i in numbers],
            [self.classes[c] for c in left.tolist()],
            torch.searchsorted(left, labels),
            self._pixels,
            self.channels,
            self.size,
            [self.contents[i] for i in numbers],
            self._places[index],
            self.values,
            self.root,
        )

    def without(self, classes: Sequence[str]) -> Images:
        """The images of all classes but these."""
        left_out = set(classes)
        kept = torch.tensor([name not in left_out for name in self.classes], dtype=torch.bool)
        return self.take(kept[self.labels].nonzero().flatten())


def digits() -> Images:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels: they come with it."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target).long()
    names = [f"{label}/{number}" for number, label in enumerate(labels.tolist())]
    contents = [digest_of([image.numpy().tobytes()]) for image in pixels]
    return Images(names, [str(d) for d in range(10)], labels, pixels, 1, 8, contents)


def of(
    found: Survey,
    named: Sequence[str],
    channels: int,
    size: int,
    hold_mib: int,
    values: tuple[int, int] | None,
) -> Images:
    """The whole images of a survey. They stay in memory if it holds them, else are decoded whenever they are wanted.

    Args:
        named: [n] the class of each.
        channels: 1 or 3.
        size: of the images' sides, in pixels.
        hold_mib: how many MiB of them may stay in memory.
        values: of deep images, the ones that become black and white.
    """
    classes = sorted(set(named))
    place = {name: number for number, name in enumerate(classes)}
    held = None
    if found.squares is not None and len(named) * channels * size * size <= hold_mib * MIB:
        held = torch.empty(len(named), channels, size, size, dtype=torch.uint8)
        for number in reversed(range(len(named))):  # from the last, to let go of each
            held[number] = torch.from_numpy(decode.pixels(found.squares.pop(), channels, values))
    found.squares = None

    def again(number: int) -> np.ndarray:
        name = found.names[number]
        with found.source.whole(name):
            return decode.pixels(decode.square(found.source.read(name), channels, size), channels, values)

    return Images(
        found.names,
        classes,
        torch.tensor([place[name] for name in named], dtype=torch.int64),
        again if held is None else held,
        channels,
        size,
        [facts.digest for facts in found.facts],
        values=values,
        root=found.source.root,
    )


def digest_of(parts: Sequence[str | bytes]) -> bytes:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.digest()
