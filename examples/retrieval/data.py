"""Which images are to train on and which to test on, as the options want them, and what would spoil them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import classes, datasets, duplicates, images, stops, survey
from .classes import class_of, folder_of
from .errors import InputError, counted, some
from .images import Images
from .photos import Photos, Transform
from .report import Findings, rows
from .sources import Folder


def load(options: argparse.Namespace, folder: Path | None = None) -> tuple[Images, Images] | tuple[Photos, Photos]:
    """The images to train on and those to test on, after what was found in them is printed.

    Args:
        folder: of the run, for lists of damaged, skipped and other files; None to write none.

    Raises:
        InputError: something would spoil the training, and no option says to go on.
    """
    if options.data_set is not None:
        return _load_data_set(options)
    if options.data_root is None:
        if options.test_root is not None or options.image_size is not None:
            raise InputError("without --data-root it is digits of 8 pixels: --test-root and --image-size do not apply")
        return _split(images.digits(), options)
    findings = Findings(folder)
    parts = _examine(options, findings)
    print(findings)
    if findings.stops or parts is None:
        raise InputError("\n  ".join(findings.stops))
    return parts


def check(options: argparse.Namespace, folder: Path) -> int:
    """Reads everything once and prints what is there. Returns 1 if something would stop training, else 0."""
    findings = Findings(folder)
    if options.data_set is not None:
        _examine_data_set(options, findings)
    else:
        _examine(options, findings)
    print(findings)
    print("Training would stop:" if findings.stops else "Nothing here stops training.")
    for stop in findings.stops:
        print(f"  {stop}")
    return 1 if findings.stops else 0


def _examine(options: argparse.Namespace, findings: Findings) -> tuple[Images, Images] | None:
    """Reads all images, and puts what is found in them into ``findings``; None where there is no split of them."""
    if options.test_root is not None and (options.split == "classes" or options.test_fraction is not None):
        raise InputError("--test-root says what the test is: --split classes and --test-fraction do not apply")
    size = options.image_size or 64
    held = None if options.check else size
    name, by = options.ignore_label, options.class_by

    def ignored(folder: str) -> bool:
        return name is not None and classes.lies_in(folder, name, by)

    found = [survey.read(options.data_root, options.channels, held, options.hold_mib, ignored)]
    channels = options.channels or (1 if found[0].gray else 3)
    if options.test_root is not None:
        found.append(survey.read(options.test_root, channels, held, options.hold_mib, ignored))
    stops.ignored(found, options, findings)
    stops.doubt(found, options, findings)
    values = next((one.values for one in found if one.values), None)
    if options.value_range and values is None:
        findings.note("--value-range has no effect: no image has more than 8 bits")
    elif options.value_range:
        values = tuple(options.value_range)
    named_by = f"{classes.BY[by or 'path']} (--class-by {by or 'path'})"
    parts = []
    for one in found:
        named = [class_of(folder_of(image), by) for image in one.names]
        parts.append(images.of(one, named, channels, size, options.hold_mib, values))
        findings.table(f"{one.root}", rows(one, parts[-1], named_by))
        stops.files(one, options, findings)
        stops.blanks(one, values, options, findings)
    try:
        return _parts(parts, options, findings)
    except InputError as error:
        findings.stops.append(str(error))
        return None
    finally:
        findings.write()


def _parts(every: Sequence[Images], options: argparse.Namespace, findings: Findings) -> tuple[Images, Images]:
    """Training and test, without what the options leave out."""
    try:
        every = [stops.small_classes(part, options, findings) for part in every]
        if options.test_root is None:
            parts = _split(every[0], options)
        else:
            parts = every[0], every[1] if options.split == "images" else _unseen(*every, findings)
    except InputError:
        stops.tell_duplicates(duplicates.find(every), every, findings)
        raise
    train, test = stops.copies(parts, options, findings)
    # Classes may have a single image now.
    train, test = stops.small_classes(train, options, findings), stops.small_classes(test, options, findings)
    stops.single_class(train, "train", findings)
    stops.single_class(test, "test", findings)
    return train, test


# --- training and test -----------------------------------------------------------------------------------------------


def _split(every: Images, options: argparse.Namespace) -> tuple[Images, Images]:
    """What the options hold out."""
    by_class = options.split == "classes" if options.split else options.data_root is not None
    fraction = options.test_fraction or (1 / 2 if by_class else 1 / 3)
    return (_split_classes if by_class else _split_images)(every, fraction, options.seed)


def _split_classes(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Training and test images that have no class in common; ``fraction`` of the classes is for the test."""
    count = len(images.classes)
    if count < 4:
        raise InputError(
            f"{counted(count, 'class', 'es')} ({some(images.classes)}): to train on some and to test on others takes "
            "two at least for each: add classes, or test on other images of the same classes by --split images"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tested = torch.zeros(count, dtype=torch.bool)
    tested[order[: min(max(round(fraction * count), 2), count - 2)]] = True
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


def _unseen(train: Images, test: Images, findings: Findings) -> Images:
    """The test images of classes that are not trained on."""
    shared = sorted(set(train.classes) & set(test.classes))
    if len(shared) == len(test.classes):
        raise InputError(
            f"every class of {test.root} is in {train.root}, too: nothing is left to test on; to test on other images "
            "of the same classes add --split images"
        )
    if shared:
        findings.note(f"Left out of the test: {len(shared):,} classes that are trained on ({some(shared, 3)})")
    return test.without(shared)


def _parted(images: Images, tested: Tensor) -> tuple[Images, Images]:
    return images.take((~tested).nonzero().flatten()), images.take(tested.nonzero().flatten())


# --- data sets -------------------------------------------------------------------------------------------------------


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


def _examine_data_set(options: argparse.Namespace, findings: Findings) -> None:
    """Reads all images that a data set lists, and puts what is found in them into ``findings``."""
    listings = datasets.read(options.data_set, options.data_root)
    for note in datasets.notes(options.data_set, *listings):
        findings.note(f"Note: {note}")
    parts = []
    for name, listing in zip(("train", "test"), listings, strict=True):
        source = Folder(options.data_root, listing.names)
        found = survey.look_at_all(options.data_root, source, 3, None, 0)
        label_of = dict(zip(listing.names, listing.labels, strict=True))
        named = [listing.classes[label_of[image]] for image in found.names]
        parts.append(images.of(found, named, 3, options.image_size, 0, found.values))
        findings.table(f"{options.data_root}, {name}", rows(found, parts[-1], "the data set's lists"))
        stops.files(found, options, findings)
    stops.tell_duplicates(duplicates.find(parts), parts, findings)
    findings.write()
