"""The benchmarks of this field as they lie on disk: which images train and test have, and what these show.

Only the data sets' own lists are read here; no image is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import InputError, some


@dataclass(frozen=True)
class Listing:
    """The images of a split, in the order of its file.

    Attributes:
        names: [n] the path of each image within the root.
        classes: the names of the classes.
        labels: [n] into ``classes``.
        groups: the names of the super-classes; none where the data set has none.
        group_of: [classes] into ``groups``.
    """

    names: list[str]
    classes: list[str]
    labels: list[int]
    groups: list[str]
    group_of: list[int]


@dataclass(frozen=True)
class Layout:
    """A data set on disk.

    Attributes:
        title: its name.
        files: the lists that it consists of, within its root.
        size: images and classes of train and test, in the whole of it.
    """

    title: str
    files: tuple[str, ...]
    size: tuple[tuple[int, int], tuple[int, int]]


LAYOUTS = {
    "sop": Layout(
        "Stanford Online Products", ("Ebay_train.txt", "Ebay_test.txt"), ((59_551, 11_318), (60_502, 11_316))
    ),
    "cub": Layout("CUB-200-2011", ("images.txt", "image_class_labels.txt"), ((5_864, 100), (5_924, 100))),
    "inat": Layout(
        "iNaturalist 2018",
        (
            "train2018.json",
            "Inat_dataset_splits/Inaturalist_train_set1.txt",
            "Inat_dataset_splits/Inaturalist_test_set1.txt",
        ),
        ((325_846, 5_690), (136_093, 2_452)),
    ),
}


def read(name: str, root: Path) -> tuple[Listing, Listing]:
    """The images to train on and those to test on, of the data set of that name.

    Raises:
        InputError: the root is no folder, or that of another data set; a file is missing or is not what it should be.
    """
    _check_root(name, root)
    train, test = {"sop": _sop, "cub": _cub, "inat": _inat}[name](root)
    for what, listing in (("train", train), ("test", test)):
        if not listing.names:
            raise InputError(f"{root}: the lists of {LAYOUTS[name].title} name no images to {what} on: restore them")
    shared = sorted(set(train.classes) & set(test.classes))
    if shared:
        raise InputError(
            f"{root}: {LAYOUTS[name].title} tests on classes that are not trained on, and its lists have "
            f"{len(shared):,} in both ({some(shared, 3)}): restore them"
        )
    return train, test


def notes(name: str, train: Listing, test: Listing) -> list[str]:
    """How a listing differs from the whole data set, in words."""
    layout = LAYOUTS[name]
    return [
        f"{layout.title} has {images:,} images of {classes:,} classes to {what} on; this one lists "
        f"{len(listing.names):,} of {len(listing.classes):,}"
        for what, listing, (images, classes) in zip(("train", "test"), (train, test), layout.size, strict=True)
        if (len(listing.names), len(listing.classes)) != (images, classes)
    ]


def _check_root(name: str, root: Path) -> None:
    layout = LAYOUTS[name]
    if not root.is_dir():
        what = "is a file: unpack it" if root.exists() else "does not exist"
        raise InputError(f"--data-root {root} {what}; it has to be the folder of {layout.title}")
    missing = [file for file in layout.files if not (root / file).is_file()]
    if not missing:
        return
    message = f"{root} is not {layout.title}: there is no {' and no '.join(missing)} in it"
    others = [key for key, other in LAYOUTS.items() if all((root / file).is_file() for file in other.files)]
    if others:
        message += f"; it looks like {LAYOUTS[others[0]].title}, whose recipes begin with {others[0]}-"
    else:
        below = sorted(path.parent for path in root.glob(f"*/{layout.files[0]}"))
        message += f"; name the folder below it: --data-root {below[0]}" if below else ""
    raise InputError(message)


# --- Stanford Online Products ----------------------------------------------------------------------------------------

_SOP = "image_id class_id super_class_id path"


def _sop(root: Path) -> tuple[Listing, Listing]:
    """Ebay_train.txt, Ebay_test.txt: four fields a line under a heading."""
    return _sop_split(root / "Ebay_train.txt"), _sop_split(root / "Ebay_test.txt")


def _sop_split(path: Path) -> Listing:
    lines = _lines(path)
    number, heading = next(lines, (1, ""))
    if heading.split() != _SOP.split():
        raise _damaged(path, number, f"the heading {_SOP!r}", heading)
    rows = []
    for number, line in lines:
        fields = line.split()
        if len(fields) != 4 or not all(field.isdecimal() for field in fields[:3]):
            raise _damaged(path, number, f"{_SOP!r}, the first three of them numbers", line)
        rows.append((fields[3], int(fields[1]), int(fields[2])))
    return _listing(path, rows)


# --- CUB-200-2011 ----------------------------------------------------------------------------------------------------


def _cub(root: Path) -> tuple[Listing, Listing]:
    """images.txt, image_class_labels.txt: a path, a class for each image; the first half of the classes trains."""
    paths = _numbered(root / "images.txt", "image_id path, such as 1 001.Name/file.jpg")
    labels = _numbered(root / "image_class_labels.txt", "image_id class_id, two numbers")
    if paths.keys() != labels.keys():
        lonely = sorted(paths.keys() ^ labels.keys())
        raise InputError(
            f"{root}: images.txt and image_class_labels.txt are not of the same images: image "
            f"{some([str(image) for image in lonely], 3)} is in one of them alone: restore both"
        )
    rows = []
    for image, (number, path) in paths.items():
        line, label = labels[image]
        if not label.isdecimal():
            raise _damaged(root / "image_class_labels.txt", line, "image_id class_id, two numbers", f"{image} {label}")
        folder = PurePosixPath(path).parts[0]
        if not folder.split(".")[0].isdecimal():
            raise _damaged(root / "images.txt", number, "a path such as 001.Name/file.jpg", path)
        if int(folder.split(".")[0]) != int(label):
            raise InputError(
                f"{root / 'image_class_labels.txt'}, line {line}, says that image {image} is of class {label}, and its "
                f"path in images.txt that it is of {folder}: restore both"
            )
        rows.append((f"images/{path}", folder, ""))
    classes = sorted({folder for _, folder, _ in rows})
    first = set(classes[: len(classes) // 2])
    train, test = ([row for row in rows if (row[1] in first) == there] for there in (True, False))
    return _listing(root / "images.txt", train, False), _listing(root / "images.txt", test, False)


def _numbered(path: Path, fields: str) -> dict[int, tuple[int, str]]:
    """What stands beside each image's number, and in which line."""
    found: dict[int, tuple[int, str]] = {}
    for number, line in _lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) != 2 or not parts[0].isdecimal():
            raise _damaged(path, number, fields, line)
        if int(parts[0]) in found:
            raise InputError(
                f"{path}, line {number}: image {parts[0]} is in line {found[int(parts[0])][0]} already: restore the "
                "file"
            )
        found[int(parts[0])] = number, parts[1].strip()
    return found


# --- iNaturalist 2018, in Smooth-AP's split --------------------------------------------------------------------------


def _inat(root: Path) -> tuple[Listing, Listing]:
    """Inaturalist_{train,test}_set1.txt: a path a line, whose folders are the classes that train2018.json names."""
    path = root / "train2018.json"
    try:
        known = {category["id"] for category in json.loads(path.read_bytes())["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: expected JSON with a list 'categories', each with an 'id' ({error}): restore the file"
        ) from error
    train, test = (_inat_split(root / file, known) for file in LAYOUTS["inat"].files[1:])
    return train, test


def _inat_split(path: Path, known: set[int]) -> Listing:
    rows = []
    for number, line in _lines(path):
        parts = PurePosixPath(line.strip()).parts
        if len(parts) < 3 or not parts[-2].isdecimal():
            raise _damaged(path, number, "a path that ends in SUPER/CLASS/file.jpg, CLASS a number", line)
        if int(parts[-2]) not in known:
            raise InputError(
                f"{path}, line {number}: class {parts[-2]} is not among the categories of train2018.json: restore both"
            )
        rows.append((line.strip(), int(parts[-2]), parts[-3]))
    return _listing(path, rows)


# --- what they share -------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, from 1, but for empty ones."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: expected text in UTF-8 ({error}): restore the file") from error
    return ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _damaged(path: Path, number: int, expected: str, line: str) -> InputError:
    return InputError(f"{path}, line {number}: expected {expected}, got {line[:80]!r}: restore the file")


def _listing(path: Path, rows: Sequence[tuple[str, int | str, int | str]], grouped: bool = True) -> Listing:
    """From the path, class and super-class of each image."""
    groups: dict[int | str, int | str] = {}
    seen: set[str] = set()
    for name, label, group in rows:
        if name in seen:
            raise InputError(f"{path} lists {name} twice: restore the file")
        seen.add(name)
        if groups.setdefault(label, group) != group:
            raise InputError(
                f"{path} has class {label} in super-class {groups[label]} and, with {name}, in {group}: restore the "
                "file"
            )
    classes = sorted(groups)
    of_group = sorted(set(groups.values())) if grouped else []
    place = {label: number for number, label in enumerate(classes)}
    return Listing(
        [name for name, _, _ in rows],
        [str(label) for label in classes],
        [place[label] for _, label, _ in rows],
        [str(group) for group in of_group],
        [of_group.index(groups[label]) for label in classes] if grouped else [],
    )
