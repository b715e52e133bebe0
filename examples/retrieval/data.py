"""Which images are to train on and which to test on, as the options want them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import datasets, images
from .errors import InputError
from .images import Images
from .photos import Photos, Transform


def load(options: argparse.Namespace) -> tuple[Images, Images] | tuple[Photos, Photos]:
    """Which images are to train on and which to test on, as the options want them."""
    if options.data_set is not None:
        return _load_data_set(options)
    if options.data_root is None:
        if options.test_root is not None or options.image_size is not None:
            raise InputError("without --data-root it is digits of 8 pixels: --test-root and --image-size do not apply")
        every = images.digits()
    else:
        size = options.image_size or 64
        every = images.read(options.data_root, size, options.channels, options.hold_mib)
    if every.skipped:
        print(f"Left aside: {every.skipped:,} files that are no images by their names, or hidden")
    every = _checked_classes(every, options, options.data_root)
    if options.test_root is None:
        by_class = options.split == "classes" if options.split else options.data_root is not None
        fraction = options.test_fraction or (1 / 2 if by_class else 1 / 3)
        return (_split_classes if by_class else _split_images)(every, fraction, options.seed)
    if options.split is not None or options.test_fraction is not None:
        raise InputError("--test-root says what the test is: --split and --test-fraction do not apply")
    test = images.read(options.test_root, every.size, every.channels, options.hold_mib)
    shared = _shared_classes(every, test)
    if shared:
        print(f"Left out of the test: {len(shared):,} classes that are trained on ({images.some(shared, 3)})")
        test = _without_classes(test, shared)
    if not len(test):
        raise InputError(
            f"every class of {options.test_root} is in {options.data_root}, too, by its name or by an image: nothing "
            "is left to test on; to hold out images of the same classes take --split images and no --test-root"
        )
    return every, _checked_classes(test, options, options.test_root)


def _load_data_set(options: argparse.Namespace) -> tuple[Photos, Photos]:
    listings = datasets.read(options.data_set, options.data_root)
    for note in datasets.notes(options.data_set, *listings):
        print(f"Note: {note}")
    transform = Transform(
        options.image_size,
        options.train_resize,
        tuple(options.crop_scale or (0.16, 1.0)),
        tuple(options.crop_ratio or (0.75, 1.33)),
        tuple(options.test_resize),
    )
    train, test = (Photos(options.data_root, listing, transform) for listing in listings)
    return train, test


def _checked_classes(every: Images, options: argparse.Namespace, root: Path | None) -> Images:
    """The images of classes that have two at least; others are an error unless they are to be skipped."""
    single = _single_image_classes(every)
    if not single:
        return every
    if not options.skip_small_classes:
        many = f"{len(single):,} classes have" if len(single) > 1 else "a class has"
        raise InputError(
            f"{root}: {many} a single image, which nothing can be retrieved for: {images.some(single)}: add images, "
            "or leave such classes out by --skip-small-classes"
        )
    if len(single) == len(every.classes):
        raise InputError(f"{root}: every class has a single image: nothing can be retrieved")
    print(f"Left out: {len(single):,} classes of a single image")
    return _without_classes(every, single)


def _split_classes(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Training and test images that have no class in common; ``fraction`` of the classes is for the test."""
    count = len(images.classes)
    if count < 2:
        raise InputError(f"there is only the class {images.classes[0]!r}: to test on unseen classes takes another")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tested = torch.zeros(count, dtype=torch.bool)
    tested[order[: min(max(round(fraction * count), 1), count - 1)]] = True
    return _parted(images, tested[images.labels])


def _split_images(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Training and test images of the same classes; ``fraction`` of each class is for the test."""
    generator = torch.Generator().manual_seed(seed)
    tested = torch.zeros(len(images), dtype=torch.bool)
    for label in range(len(images.classes)):
        of_class = (images.labels == label).nonzero().flatten()
        count = len(of_class)
        if count < 4:
            raise InputError(
                f"class {images.classes[label]!r} has {count} images: training and test take at least two each; add "
                "images, or test on unseen classes with --split classes"
            )
        tested[
            of_class[torch.randperm(count, generator=generator)[: min(max(round(fraction * count), 2), count - 2)]]
        ] = True
    return _parted(images, tested)


def _shared_classes(train: Images, test: Images) -> list[str]:
    """The classes of the test that training has, by name or because an image is in both."""
    names, contents = set(train.classes), set(train.contents)
    labels = zip(test.labels.tolist(), test.contents, strict=True)
    met = {test.classes[label] for label, content in labels if content in contents}
    return [name for name in test.classes if name in names or name in met]


def _without_classes(images: Images, names: Sequence[str]) -> Images:
    """The images of all classes but these."""
    left_out = set(names)
    kept = torch.tensor([name not in left_out for name in images.classes], dtype=torch.bool)
    return images.take(kept[images.labels].nonzero().flatten())


def _single_image_classes(images: Images) -> list[str]:
    """The classes of which there is one image alone."""
    count = images.labels.bincount(minlength=len(images.classes))
    return [images.classes[label] for label in (count == 1).nonzero().flatten().tolist()]


def _parted(images: Images, tested: Tensor) -> tuple[Images, Images]:
    return images.take((~tested).nonzero().flatten()), images.take(tested.nonzero().flatten())
