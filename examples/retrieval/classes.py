"""Classes from paths: what a folder is called as a class, and where that can be meant in several ways."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import some

BY = {
    "path": "the whole path of its folder",
    "first": "the first folder of its path",
    "last": "the folder that it lies in",
}
"""What an image's class is named by."""
_TRAIN = {"train", "training", "trainval"}
_TEST = {"val", "valid", "validation", "test", "testing", "query", "queries", "gallery", "probe", "eval", "evaluation"}
_BESIDE = {"", "set", "split", "data", "images", "image", "img", "bounding", "box"}  # words that such names have, too


def folder_of(name: str) -> str:
    """The folder of an image; empty for one that lies in none."""
    return name.rpartition("/")[0]


def class_of(folder: str, by: str | None) -> str:
    """The class of the images in a folder, named by one of BY; None for the path."""
    parts = folder.split("/")
    return parts[0] if by == "first" else parts[-1] if by == "last" else folder


def lies_in(folder: str, name: str, by: str | None) -> bool:
    """Whether a folder is of the class of that name, or lies somewhere below one that is."""
    while folder and class_of(folder, by) != name:
        folder = folder_of(folder)
    return bool(folder)


def alike(classes: Iterable[str]) -> list[str]:
    """The names, quoted, that differ from each other only in case, in Unicode form or in space around their parts."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(classes)):
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
        groups.setdefault("/".join(part.strip() for part in key.split("/")), []).append(name)
    said = []
    for group in groups.values():
        same = len({unicodedata.normalize("NFC", name) for name in group}) < len(group)  # on the screen, too
        said += [" and ".join(map(ascii if same else repr, group))] if len(group) > 1 else []
    return said


def in_doubt(roots: Sequence[tuple[Path, Sequence[str]]]) -> str | None:
    """Why the paths of folders leave open what a class is, and how to say it; None where they do not.

    Args:
        roots: of the images to train on and, if it has one of its own, the test; and the folders of images in each.
    """
    for root, folders in roots:
        where, splits = _splits(sorted(set(folders)))
        if splits:
            return _of_splits(root, where, splits, folders)
    folders = sorted({folder for _, those in roots for folder in those})
    parents: dict[str, list[str]] = {}
    for folder in folders:
        parents.setdefault(class_of(folder, "last"), []).append(folder_of(folder) or "the root itself")
    repeated = [f"{name} (in {some(those, 3)})" for name, those in parents.items() if len(those) > 1]
    if not repeated:
        return None
    where = " and ".join(str(root) for root, _ in roots)
    many = "folders of the same name lie" if len(repeated) > 1 else "a folder of the same name lies"
    return f"{where}: {many} in several places: {some(repeated, 3)}: say what a class is: {_choices(folders)}"


def _choices(folders: Sequence[str], besides: str = "") -> str:
    """What each choice but one would make of the folders."""
    made = {by: sorted({class_of(folder, by) for folder in folders}) for by in BY if by != besides}
    said = [
        f"--class-by {by} for {len(names):,} {'classes' if len(names) > 1 else 'class'} ({some(names, 3)})"
        for by, names in made.items()
        if by == "path" or names != made["path"]
    ]
    return ", ".join(said[::-1])


def _of_splits(root: Path, where: str, splits: Sequence[str], folders: Sequence[str]) -> str:
    """That the folders of a split would become part of the classes' names."""
    below = {
        split: {folder.removeprefix(f"{where}{split}/") for folder in folders if folder.startswith(f"{where}{split}/")}
        for split in splits
    }
    named = " and ".join(f"{where}{split}/" for split in splits)
    message = f"{root}: {named} {'look' if len(splits) > 1 else 'looks'} like "
    message += "parts of a split, not like classes: " if len(splits) > 1 else "a part of a split, not like a class: "
    train = [split for split in splits if _words(split) & _TRAIN and below[split]]
    test = [split for split in splits if split not in train and below[split]]
    whole = root / where if where else root
    if train and test:
        message += f"--data-root {_quoted(whole / train[0])} --test-root {_quoted(whole / test[0])}"
        if below[train[0]] & below[test[0]]:
            message += " --split images"
        message += " tests on what was meant for that; "
    elif train or test:
        message += f"--data-root {_quoted(whole / (train or test)[0])} takes that one alone; "
    return message + "or say what a class is: " + _choices(sorted(set(folders)), besides="first")


def _splits(folders: Sequence[str]) -> tuple[str, list[str]]:
    """Where folders are parts of a split, such as train and val, and which; none where they are not."""
    where = ""
    while True:
        tops = sorted({folder.split("/")[0] for folder in folders})
        named = [top for top in tops if _words(top) & (_TRAIN | _TEST) and _words(top) <= _TRAIN | _TEST | _BESIDE]
        nested = any("/" in folder and folder.split("/")[0] in named for folder in folders)
        if named and (named == tops or (len(named) > 1 and nested)):
            return where, named
        if len(tops) != 1 or tops[0] in folders:
            return "", []
        where += f"{tops[0]}/"
        folders = [folder.removeprefix(f"{tops[0]}/") for folder in folders]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))
