"""Reads every image of a folder or zip once: what each is, which are damaged, and their pixels as far as they fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from . import decode, sources
from .classes import folder_of
from .decode import Facts
from .errors import InputError, reason, some
from .sources import MIB, SUFFIXES, Folder, Zip

IGNORED = "of the class that is ignored"
_AT_A_TIME = 256  # images that are decoded ahead of where they are wanted


@dataclass
class Survey:
    """What a folder or zip holds.

    Attributes:
        root: as it was given.
        source: its files; ``source.skipped`` are those that are no images, and why.
        names: [n] the whole images, by their path within the root.
        facts: [n] what each is.
        squares: [n] each, resized, as decode.square() makes it; None where they are not held.
        damaged: (path, reason) of images that cannot be decoded.
        astray: images that lie in no class's folder.
    """

    root: Path
    source: Folder | Zip
    names: list[str]
    facts: list[Facts]
    squares: list[np.ndarray] | None
    damaged: list[tuple[str, str]]
    astray: list[str]

    @property
    def gray(self) -> bool:
        """Whether no image has colour."""
        return all(facts.gray for facts in self.facts)

    @property
    def values(self) -> tuple[int, int] | None:
        """The least and the largest value of the deep images; None where there are none."""
        deep = [facts for facts in self.facts if facts.deep]
        return (min(f.low for f in deep), max(f.high for f in deep)) if deep else None


def read(
    root: Path,
    channels: int | None,
    size: int | None,
    hold_mib: int,
    ignored: Callable[[str], bool] = lambda folder: False,
) -> Survey:
    """A folder or zip that has a folder of images for each class.

    Args:
        ignored: says of a folder whether its images are to be left alone.
        channels: 1 to make all images gray.
        size: of the squares, in pixels a side; None for no squares.
        hold_mib: how many MiB the squares may take; if they take more, none is held.

    Raises:
        InputError: there is no such root, or no image in it.
    """
    source = sources.find(root)
    source.skipped += [(name, IGNORED) for name in source.images if ignored(folder_of(name))]
    source.images = [name for name in source.images if not ignored(folder_of(name))]
    if not source.images:
        zips = [name for name, _ in source.skipped if name.lower().endswith(".zip")]
        use = "which have to be unpacked" if isinstance(source, Zip) else "name one of them"
        raise InputError(
            f"{root} holds no images ({', '.join(sorted(SUFFIXES))}): it has to be a folder or a zip with a folder of "
            "images for each class"
            + (f"; skipped: {sources.kinds(source.skipped)}" if source.skipped else "")
            + (f"; there are zips in it, {use}: {some(zips)}" if zips else "")
        )
    return look_at_all(root, source, channels, size, hold_mib)


def look_at_all(root: Path, source: Folder | Zip, channels: int | None, size: int | None, hold_mib: int) -> Survey:
    """The same of files that are known."""
    astray = sorted(name for name in source.images if not folder_of(name))
    names = sorted(name for name in source.images if folder_of(name))
    found = Survey(root, source, [], [], None if size is None else [], [], astray)
    held = 0

    def attempt(name: str) -> tuple[Facts, np.ndarray | None] | str:
        """What a picture is, or why it cannot be decoded: an error would keep what was read of it in memory."""
        try:
            with source.whole(name):
                return decode.look(source.read(name), channels, size)
        except (ImportError, MemoryError):
            raise
        except UnidentifiedImageError:
            return "no image of a kind that is read"
        except Exception as error:  # Pillow raises whatever a file's format leads it into
            return reason(error)

    with tqdm(total=len(names), desc=f"reading {root.name}", unit="image", disable=None, leave=False) as progress:
        for name, result in zip(names, in_threads(attempt, names), strict=True):
            progress.update()
            if isinstance(result, str):
                found.damaged.append((name, result))
            else:
                found.names.append(name)
                found.facts.append(result[0])
                if found.squares is not None and result[1] is not None:
                    found.squares.append(result[1])
                    held += result[1].nbytes
                    found.squares = found.squares if held <= hold_mib * MIB else None
    return found


def in_threads(work: Callable, items: Sequence) -> Iterator:
    """work(item) for each, in order, a bounded number ahead: decoding releases the interpreter's lock."""
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)) as pool:
        for begin in range(0, len(items), _AT_A_TIME):
            yield from pool.map(work, items[begin : begin + _AT_A_TIME])
