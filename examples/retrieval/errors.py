"""The errors that are the user's to mend, and words for them and for what is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class InputError(Exception):
    """What is wrong with what was given, and what to do about it."""


class FileError(InputError):
    """A file that cannot be used: which, what is wrong with it, and what to do about it."""

    def __init__(self, path: Path, wrong: str, remedy: str) -> None:
        super().__init__(f"{path} {wrong}: {remedy}")


def reason(error: BaseException) -> str:
    """What an error of another library's says, in a line."""
    lines = str(error).splitlines()
    said = lines[0][:200] if lines else ""
    return said if " " in said else f"{type(error).__name__} {said}".strip()


def out_of_memory(error: BaseException) -> bool:
    """Whether the system gave no more memory, or no thread, for which it takes some."""
    return isinstance(error, MemoryError) or any(
        said in str(error) for said in ("can't start new thread", "can't allocate memory", "not enough memory")
    )


def some(names: Sequence[str], shown: int = 10) -> str:
    """The first few of some names, and how many more there are."""
    first = ", ".join(names[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown:,} more"


def counted(count: int, thing: str, plural: str = "s") -> str:
    """How many of a thing there are; ``plural`` is what its name takes."""
    return f"{count:,} {thing}" + ("" if count == 1 else plural)
