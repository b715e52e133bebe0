"""What would spoil a training, and so stops it unless an option says to go on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import classes, duplicates
from .classes import class_of, folder_of
from .duplicates import Copies
from .errors import InputError, counted, some
from .images import Images
from .report import Findings
from .survey import IGNORED, Survey

_LEAST_SPREAD = 16  # of 255: an image whose values all lie closer says nothing


def doubt(found: Sequence[Survey], options: argparse.Namespace, findings: Findings) -> None:
    """Folders that may be meant as something else than a class, and classes that may be meant as one."""
    alike = classes.alike(class_of(folder_of(name), options.class_by) for one in found for name in one.names)
    if alike and not options.keep_alike:
        findings.stops.append(
            f"{' and '.join(str(one.root) for one in found)}: the names of classes differ only in case, in space or in "
            f"Unicode form: {some(alike)}: rename the folders of those "
            "that are the same, or take them as different by --keep-alike"
        )
    if options.class_by is None:
        why = classes.in_doubt([(one.source.root, [folder_of(name) for name in one.names]) for one in found])
        findings.stops += [why] if why else []


def ignored(found: Sequence[Survey], options: argparse.Namespace, findings: Findings) -> None:
    """The class that is in no ranking: it has to be there."""
    if options.ignore_label is None:
        return
    count = sum(reason == IGNORED for one in found for _, reason in one.source.skipped)
    if count:
        findings.note(f"Ignored: {counted(count, 'image')} of {options.ignore_label!r}, which are in no ranking")
        return
    there = sorted({class_of(folder_of(name), options.class_by) for one in found for name in one.names})
    findings.stops.append(f"--ignore-label: there is no class {options.ignore_label!r}; there are {some(there)}")


def files(found: Survey, options: argparse.Namespace, findings: Findings) -> None:
    """Files that are no images, are damaged, or lie in no class's folder."""
    root = found.source.root
    findings.list("skipped.txt", [(root / name, reason) for name, reason in found.source.skipped])
    everywhere = findings.list("damaged.txt", [(root / name, reason) for name, reason in found.damaged])
    if found.damaged and options.skip_damaged:
        findings.note(f"Left out: {counted(len(found.damaged), 'damaged image')}{everywhere}")
    elif found.damaged:
        many = f"{len(found.damaged):,} images are" if len(found.damaged) > 1 else "an image is"
        named = some([f"{name} ({reason})" for name, reason in found.damaged])
        mend = "restore them" if options.data_set else "replace or delete them, or leave them out by --skip-damaged"
        findings.stops.append(f"{found.root}: {many} damaged or unreadable: {named}{everywhere}: {mend}")
    everywhere = findings.list("astray.txt", [(root / name, "in no class's folder") for name in found.astray])
    if found.astray and options.skip_astray:
        findings.note(f"Left out: {counted(len(found.astray), 'image')} in no class's folder{everywhere}")
    elif found.astray:
        lies = "lies" if len(found.astray) == 1 else "lie"
        findings.stops.append(
            f"{found.root}: {some(found.astray)} {lies} in no class's folder{everywhere}: give each class a folder "
            "of its own, or leave them out by --skip-astray"
        )


def blanks(found: Survey, values: tuple[int, int] | None, options: argparse.Namespace, findings: Findings) -> None:
    """Images that show nothing as they are, or as ``values`` make them."""
    blank = [name for name, facts in zip(found.names, found.facts, strict=True) if facts.spread == 0]
    findings.list("blank.txt", [(found.source.root / name, "of a single value") for name in blank])
    if options.keep_blank:
        return
    scale = 255 / max(1, values[1] - values[0]) if values else 1
    groups = {"images": found.facts}
    for mode in sorted({facts.mode for facts in found.facts if facts.deep}):
        # One image of 32 bits would make those of 16 black, which may be few among the others.
        groups[f"images of mode {mode}"] = [f for f in found.facts if f.mode == mode and f.spread >= _LEAST_SPREAD]
    for what, those in groups.items():
        spreads = [facts.spread * (scale if facts.deep else 1) for facts in those]
        shown = [spread for spread in spreads if spread >= _LEAST_SPREAD]
        most = max((spread for spread in spreads if spread < _LEAST_SPREAD), default=0)
        if 2 * len(shown) >= len(spreads):
            continue
        many = (
            f"{len(spreads) - len(shown):,} of the {len(spreads):,} {what} are"
            if shown
            else f"every one of the {what} is"
        )
        cut = any(facts.mode.endswith(";16") and not facts.deep for facts in those)
        why = " (Pillow reads the upper 8 of 16 bits a channel in colour: save them with 8, or in gray)" if cut else ""
        scaled = (
            f"say by --value-range what is black and white (now {values[0]:,} and {values[1]:,}), " if values else ""
        )
        findings.stops.append(
            f"{found.root}: {many} blank, or nearly: values at most {most:.0f} of 255 apart{why}: {scaled}replace "
            "them, or train on them all the same by --keep-blank"
        )
        return


def single_class(part: Images, what: str, findings: Findings) -> None:
    """A ranking of a single class is perfect whatever the network does."""
    if len(part.classes) == 1:
        findings.stops.append(
            f"{part.root}: only the class {part.classes[0]!r} is left to {what} on, of which every ranking is perfect: "
            "add classes, or choose another --test-fraction or --split"
        )


def small_classes(part: Images, options: argparse.Namespace, findings: Findings) -> Images:
    """The images of classes that have two at least."""
    count = part.labels.bincount(minlength=len(part.classes))
    single = [part.classes[label] for label in (count == 1).nonzero().flatten().tolist()]
    if not len(part):
        raise InputError(f"{part.root}: no image is left")
    if len(single) == len(part.classes):
        raise InputError(f"{part.root}: every class has a single image: nothing can be retrieved")
    labels = zip(part.names, part.labels.tolist(), strict=True)
    alone = [(part.root / name, f"alone in class {part.classes[label]}") for name, label in labels if count[label] == 1]
    everywhere = findings.list("small-classes.txt", alone)
    many = f"{len(single):,} classes have" if len(single) > 1 else "a class has"
    if single and options.skip_small_classes:
        findings.note(f"Left out: {many} a single image: {some(single, 5)}{everywhere}")
    elif single:
        findings.stops.append(
            f"{part.root}: {many} a single image, which nothing can be retrieved for: {some(single)}{everywhere}: add "
            "images, or leave such classes out by --skip-small-classes"
        )
    return part.without(single)


def copies(parts: tuple[Images, Images], options: argparse.Namespace, findings: Findings) -> tuple[Images, Images]:
    """Training and test without pictures that are in several classes or in both, if they are to be left out."""
    found = duplicates.find(parts)
    everywhere = tell_duplicates(found, parts, findings)
    if not (found.across or found.split) or options.duplicates == "keep":
        return parts
    if options.duplicates == "skip":
        train, test = duplicates.without(parts, found)
        dropped = sum(map(len, parts)) - len(train) - len(test)
        findings.note(f"Left out: {counted(dropped, 'image')} of pictures in several classes or in training and test")
        return train, test
    alone = [group for group in found.split if len({duplicates.class_of(parts, place) for place in group}) == 1]
    mixed = len(found.split) - len(alone)
    both = f", {mixed:,} of them in training and test" if mixed else ""
    spoiled = {f"several classes{both}": found.across, "training and test": alone}
    said = [
        f"{len(groups):,} in {what} ({duplicates.where(parts, groups)})" for what, groups in spoiled.items() if groups
    ]
    findings.stops.append(
        f"pictures are in several places: {' and '.join(said)}{everywhere}: delete the copies, or leave them out by "
        "--duplicates skip, or train on them all the same by --duplicates keep"
    )
    return parts


def tell_duplicates(found: Copies, parts: Sequence[Images], findings: Findings) -> str:
    """Adds what training and test are, and their copies; says where these are listed."""
    names = ("training", "test")[: len(parts)]
    sizes = [f"{counted(len(part), 'image')} of {len(part.classes):,} classes" for part in parts]
    said = list(zip(names, sizes, strict=True))
    listed = []
    kinds = {"within a class": found.within, "across classes": found.across, "in training and test": found.split}
    for kind, groups in kinds.items():
        many = f"{counted(sum(map(len, groups)), 'image')} of {counted(len(groups), 'picture')}" if groups else "none"
        said.append(("" if kind != "within a class" else "duplicates", f"{kind}: {many}"))
        for number, group in enumerate(groups, 1):
            for place in group:
                part, image = parts[place[0]], place[1]
                remark = f"{kind}: picture {number}, class {duplicates.class_of(parts, place)}"
                listed.append((part.root / part.names[image], remark))
    findings.table("Training and test", said)
    return findings.list("duplicates.txt", listed)
