"""Where images lie: the files of a folder or zip, which of them are skipped and why, and their bytes up to a limit."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import IO

from .errors import InputError

SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MIB = 1 << 20
MAX_BYTES = 128 * MIB  # of a file
LARGE_BYTES = 8 * MIB
ONE_AT_A_TIME = threading.RLock()  # for what takes much memory, so that the sum does not grow with the threads
_CHUNK = 1 << 16


class Folder:
    """The files below a folder.

    Args:
        names: of the files that are there; None to look for them.

    Attributes:
        root: the folder.
        images: the paths of the images within the root.
        skipped: (path, reason) of what is no image.
    """

    def __init__(self, root: Path, names: Sequence[str] | None = None) -> None:
        self.root = root
        self.images, self.skipped = _sort(self._walk()) if names is None else (list(names), [])

    def _walk(self) -> Iterator[tuple[str, str | None]]:
        """Every file, and the reason for which it is skipped whatever its name is."""
        top = os.path.realpath(self.root)
        above, seen = {str(self.root): ({top}, False)}, {top}  # the real paths that lead to each, and whether a link is
        for folder, folders, files in os.walk(self.root, onerror=_unreadable, followlinks=True):
            holders, linked = above.pop(folder)
            for name in sorted(folders):
                path = os.path.join(folder, name)
                real, link = os.path.realpath(path), os.path.islink(path)
                if real in holders or (link and linked and real in seen):
                    folders.remove(name)
                    held = real in holders
                    yield self._within(path), f"a link to a folder that {'holds it' if held else 'is there already'}"
                else:
                    above[path] = holders | {real}, linked or link
                    seen.add(real)
            folders.sort()
            for name in files:
                path = os.path.join(folder, name)
                yield self._within(path), "neither a file nor a folder" if _is_other(path) else None

    def _within(self, path: str) -> str:
        return Path(path).relative_to(self.root).as_posix()

    def whole(self, name: str) -> AbstractContextManager[object]:
        """To be held while a file is read and decoded."""
        return ONE_AT_A_TIME if os.stat(self.root / name).st_size > LARGE_BYTES else nullcontext()

    def read(self, name: str) -> io.BytesIO:
        """A file's bytes. Raises ValueError where there are more than MAX_BYTES."""
        if _is_other(self.root / name):
            raise ValueError("neither a file nor a folder")
        with (self.root / name).open("rb") as file:
            return _within_limit(file, os.fstat(file.fileno()).st_size)


class Zip:
    """The files of a zip, by their names below the one folder that holds all images, where there is one.

    Args:
        below: a folder of the zip to take the place of that one.

    Attributes:
        root: that folder, as find() takes it.
        images, skipped: as those of Folder.
    """

    def __init__(self, path: Path, below: str = "") -> None:
        self._entries: dict[str, zipfile.ZipInfo] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no folder, and cannot be read as a zip: {error}") from error
        files: list[tuple[str, str | None]] = []
        for entry in self._zip.infolist():
            if entry.is_dir():
                continue
            name = str(PurePosixPath(entry.filename.replace("\\", "/").lstrip("/")))
            if below and not name.startswith(below + "/"):
                continue
            # Of several entries of a name the last counts, as for other programs.
            files.append((name, "replaced by a later entry of the same name" if name in self._entries else None))
            self._entries[name] = entry
        inner = [name for name in self._zip.namelist() if f"{below}/".startswith(f"{name}/")]
        if inner and not files:
            raise InputError(
                f"{path / inner[0]} is a file in a zip: unpack {path}, and name the file where it lies then"
            )
        self.images, self.skipped = _sort(files)
        top = below or _wrapper(self.images)
        self.root = path / top
        if top:
            top += "/"
            self.images = [name.removeprefix(top) for name in self.images]
            self._entries = {name.removeprefix(top): entry for name, entry in self._entries.items()}
            self.skipped = [(name.removeprefix(top), reason) for name, reason in self.skipped]

    def whole(self, name: str) -> AbstractContextManager[object]:
        """To be held while a file is read and decoded."""
        return ONE_AT_A_TIME if self._entries[name].file_size > LARGE_BYTES else nullcontext()

    def read(self, name: str) -> io.BytesIO:
        """A file's bytes. Raises ValueError where there are more than MAX_BYTES, or they cannot be read in bounds."""
        entry = self._entries[name]
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile unpacks those in steps that have no bound: 4 KiB of bzip2 may become gigabytes.
            raise ValueError("neither stored nor deflated, the two methods that are read")
        with self._zip.open(entry) as file:  # which ends where the entry's size is reached
            return _within_limit(file, entry.file_size)


def find(root: Path) -> Folder | Zip:
    """The folder or zip of that name, or the folder within a zip.

    Raises:
        InputError: there is none.
    """
    if root.is_dir():
        return Folder(root)
    for place in (root, *root.parents):
        if place.is_file():
            below = root.relative_to(place).as_posix()
            return Zip(place, "" if below == "." else below)
    raise InputError(f"{root}: there is no such folder or zip")


def suffix(name: str) -> str:
    """That of a file, in lower case."""
    return PurePosixPath(name).suffix.lower() or "no suffix"


def kinds(skipped: Sequence[tuple[str, str]]) -> str:
    """How many files, by reason and suffix."""
    if not skipped:
        return "none"
    by_reason: dict[str, Counter[str]] = {}
    for name, reason in skipped:
        by_reason.setdefault(reason, Counter())[suffix(name)] += 1
    said = []
    for reason, suffixes in sorted(by_reason.items()):
        each = ", ".join(
            f"{count:,} {kind}" for kind, count in sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
        )
        said.append(f"{suffixes.total():,} {reason} ({each})")
    return "; ".join(said)


def _sort(files: Iterable[tuple[str, str | None]]) -> tuple[list[str], list[tuple[str, str]]]:
    """The images, and what is skipped and why, of files that may have a reason to be skipped already."""
    files = list(files)
    runs = _runs([name for name, _ in files])
    images, skipped = list[str](), list[tuple[str, str]]()
    for name, reason in files:
        parts = PurePosixPath(name).parts
        if reason is None and "__MACOSX" in parts:
            reason = "in __MACOSX"
        elif reason is None and ".." in parts:
            reason = "of a path with .. in it"
        elif reason is None and any(part.startswith(".") for part in parts):
            reason = "hidden"
        elif reason is None and name[: name.rfind("/") + 1] in runs:
            reason = "of a run of this program"
        elif reason is None and suffix(name) not in SUFFIXES:
            reason = "of another kind"
        if reason is None:
            images.append(name)
        else:
            skipped.append((name, reason))
    return images, skipped


def _runs(names: Sequence[str]) -> set[str]:
    """The folders, each with a / unless it is the root, that hold what a run has from its first step on."""
    tables = ("metrics.csv", "steps.csv", "settings.json")
    return set.intersection(
        *({name[: -len(file)] for name in names if f"/{name}".endswith(f"/{file}")} for file in tables)
    )


def _wrapper(images: Sequence[str]) -> str:
    """The one folder that holds the folders of all classes: a zip often has one that is named as it is."""
    parts = [PurePosixPath(name).parts for name in images]
    tops = {part[0] for part in parts}
    return tops.pop() if len(tops) == 1 and all(len(part) > 2 for part in parts) else ""


def _within_limit(file: IO[bytes], stated: int) -> io.BytesIO:
    """All of a file, as long as neither what it states nor what comes exceeds the limit."""
    if stated > MAX_BYTES:
        raise ValueError(f"{stated / MIB:,.0f} MiB: more than the {MAX_BYTES / MIB:.0f} MiB that are read of a file")
    read = io.BytesIO()
    while chunk := file.read(_CHUNK):
        read.write(chunk)
        if read.tell() > MAX_BYTES:
            raise ValueError(f"more than the {MAX_BYTES / MIB:.0f} MiB that are read of a file")
    read.seek(0)
    return read


def _is_other(path: str | Path) -> bool:
    """Whether it is there and no file, such as a pipe, which would be waited for; a broken link is not there."""
    return os.path.exists(path) and not os.path.isfile(path)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
