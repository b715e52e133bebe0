"""The same picture in several places: in a class, in several classes, in training and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import some
from .images import Images

Place = tuple[int, int]  # which of several sets of images, and the image's number in it


@dataclass(frozen=True)
class Copies:
    """Groups of images that are the same picture.

    Attributes:
        within: of one class, all in training or all in the test.
        across: of several classes.
        split: in training and test, of one class or of several.
    """

    within: list[list[Place]]
    across: list[list[Place]]
    split: list[list[Place]]


def find(parts: Sequence[Images]) -> Copies:
    """The copies in some sets of images, such as training and test."""
    places: dict[bytes, list[Place]] = {}
    for number, part in enumerate(parts):
        for image, content in enumerate(part.contents):
            places.setdefault(content, []).append((number, image))
    copies = Copies([], [], [])
    for group in places.values():
        if len(group) == 1:
            continue
        several = len({class_of(parts, place) for place in group}) > 1
        both = len({number for number, _ in group}) > 1
        if several:
            copies.across.append(group)
        if both:
            copies.split.append(group)
        if not several and not both:
            copies.within.append(group)
    return copies


def class_of(parts: Sequence[Images], place: Place) -> str:
    """The class of an image."""
    return parts[place[0]].classes[int(parts[place[0]].labels[place[1]])]


def where(parts: Sequence[Images], groups: Sequence[Sequence[Place]]) -> str:
    """In which classes the pictures of groups are, those that most have in common first."""
    together = Counter(" and ".join(sorted({class_of(parts, place) for place in group})) for group in groups)
    order = sorted(together.items(), key=lambda counted: (-counted[1], counted[0]))
    return some([f"{count:,} in {names}" for names, count in order], 5)


def without(parts: Sequence[Images], copies: Copies) -> list[Images]:
    """The images but for those in several classes, and those of the test that training has, too."""
    dropped = {place for group in copies.across for place in group}
    dropped |= {place for group in copies.split for place in group if place[0]}
    return [
        part.take(torch.tensor([i for i in range(len(part)) if (number, i) not in dropped], dtype=torch.int64))
        for number, part in enumerate(parts)
    ]
