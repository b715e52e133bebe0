"""What was found in the images: a table for each folder or zip, what stops training, and lists of files."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .errors import counted, some
from .images import Images
from .sources import kinds
from .survey import Survey

LISTS = ("damaged.txt", "astray.txt", "blank.txt", "duplicates.txt", "small-classes.txt", "skipped.txt")
Row = tuple[str, str]
_IN_A_LINE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # names of files may hold them


class Findings:
    """All that a look at the images brings up.

    Args:
        folder: of the run, whose folder "report" takes the lists; None to write none.

    Attributes:
        stops: what stops training, each with what to do about it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.stops: list[str] = []
        self._folder = folder and folder / "report"
        self._text: list[str] = []
        self._lists: dict[str, list[Row]] = {name: [] for name in LISTS}

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Adds rows under a title."""
        self._text.append(title)
        self._text += [f"  {name:<12}{text}" for name, text in rows]

    def note(self, text: str) -> None:
        """Adds a line."""
        self._text.append(text)

    def list(self, name: str, rows: Sequence[tuple[Path, str]]) -> str:
        """Adds lines, a path and a remark each, to one of the LISTS; says where they are, in brackets."""
        self._lists[name] += [(str(path), remark) for path, remark in rows]
        return f" (all in {self._folder / name})" if rows and self._folder else ""

    def write(self) -> None:
        """Writes the lists, and removes those of an earlier look that are empty now."""
        if self._folder is None:
            return
        for name, rows in self._lists.items():
            if rows:
                self._folder.mkdir(parents=True, exist_ok=True)
                lines = ["\t".join(part.translate(_IN_A_LINE) for part in row) + "\n" for row in rows]
                (self._folder / name).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
            else:
                (self._folder / name).unlink(missing_ok=True)

    def __str__(self) -> str:
        return "\n".join(self._text)


def rows(found: Survey, images: Images, named_by: str) -> list[Row]:
    """What a folder or zip holds; ``named_by`` says how classes were formed."""
    counts = images.labels.bincount(minlength=len(images.classes)).tolist()
    order = sorted(range(len(counts)), key=lambda label: (-counts[label], images.classes[label]))
    said: list[Row] = [("classes", f"{len(counts):,}, named by {named_by}")]
    if counts:
        said.append(("", f"such as {images.classes[int(images.labels[0])]} of {images.names[0]}"))
        fewest, most = min(counts), max(counts)
        each = f"{fewest:,} to {most:,} a class, median {statistics.median(counts):g}"
        each = f"{fewest:,} a class" if fewest == most else each
        ends = [f"{images.classes[label]} {counts[label]:,}" for label in order]
        said.append(("images", f"{len(images):,}; {each}"))
        said.append(("", ", ".join(ends) if len(ends) <= 6 else ", ".join([*ends[:3], "...", *ends[-3:]])))
        said.append(("sizes", _sizes(found)))
    said += [("modes", text) for text in _modes(found, images.values)]
    turned, frames = (sum(getattr(facts, name) for facts in found.facts) for name in ("turned", "frames"))
    blank = sum(facts.spread == 0 for facts in found.facts)
    said += [("turned", f"{turned:,} upright, as their EXIF orientation says")] if turned else []
    said += [("frames", f"{counted(frames, 'image')} with several: the first is taken")] if frames else []
    said.append(("blank", f"{counted(blank, 'image')} of a single value" if blank else "none"))
    said.append(("damaged", f"{len(found.damaged):,}" if found.damaged else "none"))
    if found.astray:
        said.append(("astray", f"{counted(len(found.astray), 'image')} in no class's folder"))
    said.append(("skipped", kinds(found.source.skipped)))
    lacking = _without_images(found)
    said += [("", f"no image is left in {some(lacking, 5)}")] if lacking else []
    return said


def _sizes(found: Survey) -> str:
    """The most frequent sizes, or the range of all."""
    sizes = Counter((facts.width, facts.height) for facts in found.facts).most_common()
    if len(sizes) <= 4:
        return ", ".join(f"{width:,} x {height:,} ({count:,})" for (width, height), count in sizes)
    widths, heights = ([size[axis] for size, _ in sizes] for axis in (0, 1))
    most = f"{sizes[0][0][0]:,} x {sizes[0][0][1]:,} ({sizes[0][1]:,})"
    return (
        f"{len(sizes):,}, {min(widths):,} to {max(widths):,} wide and {min(heights):,} to {max(heights):,} high; "
        f"most often {most}"
    )


def _modes(found: Survey, values: tuple[int, int] | None) -> list[str]:
    """Each mode, how many images have it, and their range of values."""
    said = []
    for mode, count in Counter(facts.mode for facts in found.facts).most_common():
        those = [facts for facts in found.facts if facts.mode == mode]
        low, high = min(facts.low for facts in those), max(facts.high for facts in those)
        text = f"{mode}: {counted(count, 'image')}, values {low:,} to {high:,}"
        if those[0].deep and values is not None:
            text += f", of which {values[0]:,} becomes black and {values[1]:,} white"
            text += " (those beyond are cut)" if low < values[0] or high > values[1] else ""
        if mode.endswith(";16") and not those[0].deep:
            text += ", the upper 8 of 16 bits a channel: Pillow reads no more in colour"
        said.append(text)
    return said


def _without_images(found: Survey) -> list[str]:
    """The folders all of whose files were skipped for their kind, or are damaged."""
    lost = [name for name, reason in found.source.skipped if reason == "of another kind"]
    lost += [name for name, _ in found.damaged]
    whole = {part for name in found.names for part in _above(name)}
    return sorted({name.rpartition("/")[0] for name in lost} - whole - {""})


def _above(name: str) -> list[str]:
    """The folders that a file lies in, at any depth."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]
