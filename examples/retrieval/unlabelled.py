"""Images whose class is not known: they lie in a folder of their own, and are in no ranking."""

from __future__ import annotations

import argparse

from .errors import InputError, some
from .images import Images
from .photos import Photos


def leave_out(
    options: argparse.Namespace, train: Images | Photos, test: Images | Photos
) -> tuple[Images | Photos, Images | Photos]:
    """Training and test images without those of the class that --ignore-label names.

    Raises:
        InputError: there is no such class, or hardly another.
    """
    name = options.ignore_label
    if name is None:
        return train, test
    if not isinstance(train, Images) or not isinstance(test, Images):
        raise InputError("--ignore-label names a folder of images, and does not go with --data-set")
    if name not in train.classes and name not in test.classes:
        raise InputError(f"--ignore-label: there is no class {name!r}; there are {some(train.classes + test.classes)}")
    kept = []
    for part in (train, test):
        without = part.without([name])
        if not len(without):
            raise InputError(f"--ignore-label {name} leaves nothing to train or to test on: choose another --split")
        kept.append(without)
    print(f"Ignored: {len(train) + len(test) - sum(map(len, kept)):,} images of {name!r}, which are in no ranking")
    return kept[0], kept[1]
