"""Images with a class each: from a folder, a zip, or scikit-learn's digits. Everything is read, and checked, once."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import InputError, reason

SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MIB = 1 << 20
_AT_A_TIME = 256  # images that are decoded ahead of where they are wanted


class Images:
    """Square images of one size, with a class each.

    Attributes:
        names: [n] the path of each image within its root.
        classes: the names of the classes.
        labels: [n] int64, into ``classes``.
        channels, size: of an image.
        contents: [n] a digest of each image's pixels.
        digest: of all that the bits of a run depend on.
        skipped: how many files beside the images were left aside.
    """

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[str],
        labels: Tensor,
        pixels: Tensor | Callable[[int], np.ndarray],  # [m, C, S, S] uint8, or how to get one, [C, S, S]
        channels: int,
        size: int,
        contents: Sequence[bytes],
        skipped: int = 0,
        places: Tensor | None = None,  # [n] where in ``pixels`` each image is; None: in their order
    ) -> None:
        self.names, self.classes, self.labels = list(names), list(classes), labels
        self.channels, self.size, self.contents, self.skipped = channels, size, list(contents), skipped
        self.digest = digest_of([*names, *classes, *self.contents, f"{channels} x {size}", str(labels.tolist())]).hex()
        self._pixels = pixels
        self._places = torch.arange(len(self.names)) if places is None else places

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: Tensor) -> Tensor:
        """[b, C, S, S] uint8 for image numbers [b]."""
        places = self._places[index]
        if isinstance(self._pixels, Tensor):
            return self._pixels[places]
        out = torch.empty(len(index), self.channels, self.size, self.size, dtype=torch.uint8)
        for row, image in zip(out, in_threads(self._pixels, places.tolist()), strict=True):
            row.copy_(torch.from_numpy(image))
        return out

    def to_train_on(self, index: Tensor, share: slice, random: torch.Generator) -> Tensor:
        """The pixels of a share of a batch of image numbers."""
        return self.pixels(index[share])

    def take(self, index: Tensor) -> Images:
        """These images alone, of the same memory, and the classes that are left, in their order."""
        labels = self.labels[index]
        left = labels.unique()
        numbers = index.tolist()
        return Images(
            [self.names[i] for i in numbers],
            [self.classes[c] for c in left.tolist()],
            torch.searchsorted(left, labels),
            self._pixels,
            self.channels,
            self.size,
            [self.contents[i] for i in numbers],
            self.skipped,
            self._places[index],
        )


def digits() -> Images:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels: they come with it."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target).long()
    names = [f"{label}/{number}" for number, label in enumerate(labels.tolist())]
    contents = [digest_of([image.numpy().tobytes()]) for image in pixels]
    return Images(names, [str(d) for d in range(10)], labels, pixels, 1, 8, contents)


def read(root: Path, size: int, channels: int | None = None, hold_mib: int = 4096) -> Images:
    """The images of a folder or zip in which each folder that holds images is a class.

    Images are turned upright, laid on white where they are transparent, cut to their middle square and resized. Up to
    ``hold_mib`` of them stay in memory; more are decoded again whenever they are wanted.

    Args:
        size: of the images' sides, in pixels.
        channels: 1 or 3; None for 1 if all are gray and else 3.

    Raises:
        InputError: there are no images, some lie in no class's folder, or are damaged (each is named).
    """
    source = _Zip(root) if root.is_file() else _Folder(root)
    there = list(source.names())
    names = sorted(name for name in there if _is_image(name))
    if not names:
        zips = [name for name in there if name.lower().endswith(".zip")]
        raise InputError(
            f"{root} holds no images ({', '.join(sorted(SUFFIXES))}): it has to be a folder or a zip with a folder of "
            "images for each class" + (f"; there are zips in it, name one of them: {some(zips)}" if zips else "")
        )
    top = source.top(names)
    names_within = [str(PurePosixPath(name).relative_to(top)) for name in names]
    folders = [str(PurePosixPath(name).parent) for name in names_within]
    if "." in folders:
        astray = [name for name, folder in zip(names, folders, strict=True) if folder == "."]
        raise InputError(
            f"{root}: {some(astray)} {'lies' if len(astray) == 1 else 'lie'} in no class's folder: give each class a "
            "folder of its own"
        )
    classes = sorted(set(folders))
    place = {name: number for number, name in enumerate(classes)}

    if channels is None:
        channels = 1 if all(in_threads(lambda name: _is_gray(source.read, name), names)) else 3
    held = None
    if len(names) * channels * size * size <= hold_mib * MIB:
        held = torch.empty(len(names), channels, size, size, dtype=torch.uint8)

    numbers = {name: number for number, name in enumerate(names)}

    def look_at(name: str) -> bytes:
        pixels = _decode(source.read(name), channels, size)
        if held is not None:
            held[numbers[name]] = torch.from_numpy(pixels)
        return digest_of([pixels.tobytes()])

    contents = _checked(root.name, look_at, names)
    return Images(
        names_within,
        classes,
        torch.tensor([place[folder] for folder in folders]),
        held if held is not None else lambda number: _decode(source.read(names[number]), channels, size),
        channels,
        size,
        contents,
        len(there) - len(names),
    )


def some(names: Sequence[str], shown: int = 10) -> str:
    """The first few of some names, and how many more there are."""
    first = ", ".join(names[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown:,} more"


# --- where files are -------------------------------------------------------------------------------------------------


class _Folder:
    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: there is no such folder or zip")
        self._root = root

    def names(self) -> Iterator[str]:
        seen = set()  # links may lead in circles
        for folder, folders, files in os.walk(self._root, onerror=_unreadable, followlinks=True):
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen)
            for file in files:
                path = os.path.join(folder, file)
                if os.path.isfile(path) or os.path.islink(path):  # a pipe would be waited for
                    yield Path(path).relative_to(self._root).as_posix()

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def top(self, names: Sequence[str]) -> PurePosixPath:
        return PurePosixPath()


class _Zip:
    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no folder, and cannot be read as a zip: {error}") from error
        # By names as they should be; of several entries of one name the last counts, as for other programs.
        self._entries = {
            str(PurePosixPath(entry.filename.replace("\\", "/").lstrip("/"))): entry
            for entry in self._zip.infolist()
            if not entry.is_dir()
        }

    def names(self) -> Iterator[str]:
        return iter(self._entries)

    def read(self, name: str) -> bytes:
        return self._zip.read(self._entries[name])

    def top(self, names: Sequence[str]) -> PurePosixPath:
        """The folder that holds the folders of all classes: a zip often has one that is named as it is."""
        folders = [PurePosixPath("/", name).parent for name in names]
        common = PurePosixPath(os.path.commonpath(folders))
        if common in folders:  # is a class itself
            common = common.parent
        return common.relative_to("/")


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


# --- decoding --------------------------------------------------------------------------------------------------------


def _is_gray(read: Callable[[str], bytes], name: str) -> bool:
    """Whether it has no colour; so has what is no image, which is told of when all are decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(name))) as image:
            return image.mode in ("1", "L", "LA", "I", "F", "I;16", "I;16B")
    except Exception:  # Pillow raises whatever a file's format leads it into
        return True


def _decode(data: bytes, channels: int, size: int) -> np.ndarray:
    """[C, S, S] uint8."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("F", "I"):
            raise ValueError("32 bits a pixel, of which nothing says what is white: save it with 8 or 16")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def in_threads(work: Callable, items: Sequence) -> Iterator:
    """work(item) for each, in order, a bounded number ahead: decoding releases the interpreter's lock."""
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)) as pool:
        for begin in range(0, len(items), _AT_A_TIME):
            yield from pool.map(work, items[begin : begin + _AT_A_TIME])


def _checked(title: str, work: Callable[[str], bytes], names: Sequence[str]) -> list[bytes]:
    """work(name) of each image; one error names all those that failed."""
    from PIL import UnidentifiedImageError

    def attempt(name: str) -> bytes | Exception:
        try:
            return work(name)
        except Exception as error:  # Pillow raises whatever a file's format leads it into
            return error

    done, damaged = [], []
    with tqdm(total=len(names), desc=f"reading {title}", unit="image", disable=None, leave=False) as progress:
        for name, result in zip(names, in_threads(attempt, names), strict=True):
            progress.update()
            if isinstance(result, ImportError | MemoryError):
                raise result
            if isinstance(result, UnidentifiedImageError):
                damaged.append(f"{name} (no image of a kind that Pillow knows)")
            elif isinstance(result, Exception):
                damaged.append(f"{name} ({reason(result)})")
            else:
                done.append(result)
    if damaged:
        many = f"{len(damaged):,} images are" if len(damaged) > 1 else "an image is"
        raise InputError(f"{title}: {many} damaged or unreadable: {some(damaged)}: replace or delete what is named")
    return done


def digest_of(parts: Sequence[str | bytes]) -> bytes:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.digest()
