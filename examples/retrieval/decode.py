"""One picture: from a file's bytes, within limits, to what is known of it and to pixels of the network's size."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from .sources import ONE_AT_A_TIME, SUFFIXES

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 27  # Pillow's own limit, beyond which it warns of bombs
LARGE_PIXELS = 1 << 25
FORMATS = sorted({kind for end, kind in Image.registered_extensions().items() if end in SUFFIXES})
"""What Pillow may take a file for, whatever its suffix: some other formats it hands to other programs."""
GRAY = ("1", "L", "LA", "I")  # and what begins with I;16
_ORIENTATION = 0x0112  # of EXIF

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such pictures are refused below


@dataclass(frozen=True)
class Facts:
    """What is known of a picture.

    Attributes:
        mode: Pillow's, with ";16" where Pillow keeps 8 of 16 bits a channel.
        width, height: in pixels, upright.
        gray: it has no colour.
        deep: its values have more than 8 bits, and nothing but other pictures says which of them is white.
        low, high: the least and the largest value of any channel.
        spread: the most by which the values of a channel differ.
        turned: it is not stored upright.
        frames: it has several, of which the first counts.
        digest: of all its pixels as they are shown.
    """

    mode: str
    width: int
    height: int
    gray: bool
    deep: bool
    low: int
    high: int
    spread: int
    turned: bool
    frames: bool
    digest: bytes


def look(file: io.BytesIO, channels: int | None, size: int | None) -> tuple[Facts, np.ndarray | None]:
    """What a picture is, and its square as square() makes it; None without a size.

    Raises:
        ValueError: it has more than MAX_PIXELS, or values without bounds.
        Exception: whatever Pillow makes of a file that is no picture, or is damaged.
    """
    with _opened(file) as opened:
        mode, frames = opened.mode, bool(getattr(opened, "is_animated", False))
        gray, deep = mode in GRAY or mode.startswith("I;16"), mode.startswith("I")
        if not deep and ";16" in str(opened.tile):
            mode += ";16"
        turned = _turned(opened)
        image = _shown(opened, channels)
    bands = image.getextrema() if image.mode == "RGB" else [image.getextrema()]
    low, high = min(least for least, _ in bands), max(most for _, most in bands)
    spread = max(most - least for least, most in bands)
    digest = hashlib.blake2b(f"{image.size} {deep}".encode(), digest_size=16)
    digest.update(np.asarray(image if deep else _of_mode(image, "RGB")))
    facts = Facts(mode, *image.size, gray, deep, int(low), int(high), int(spread), turned, frames, digest.digest())
    return facts, None if size is None else _square(image, size)


def square(file: io.BytesIO, channels: int, size: int) -> np.ndarray:
    """The middle square of a picture, resized to ``size`` pixels a side.

    It is turned upright, laid on white where it is transparent, and made gray where ``channels`` is 1.

    Returns:
        [S, S] uint8 of a gray picture; [S, S, 3] uint8 of one in colour; [S, S] float32, not yet scaled, of a deep one.
    """
    with _opened(file) as opened:
        return _square(_shown(opened, channels), size)


def pixels(square: np.ndarray, channels: int, values: tuple[int, int] | None) -> np.ndarray:
    """[C, S, S] uint8 of a square as square() makes it; of deep ones, ``values`` are black and white."""
    if square.dtype == np.float32:
        black, white = values or (0, 1)
        square = np.rint((square - black) * (255 / max(1, white - black))).clip(0, 255).astype(np.uint8)
    if square.ndim == 2:
        return np.repeat(square[None], channels, 0)
    return np.ascontiguousarray(square.transpose(2, 0, 1))


@contextmanager
def _opened(file: io.BytesIO) -> Iterator[Image.Image]:
    with Image.open(file, formats=FORMATS) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width:,} x {height:,} pixels: more than the {MAX_PIXELS:,} that are decoded")
        with ONE_AT_A_TIME if width * height > LARGE_PIXELS else nullcontext():
            yield opened


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) != 1


def _shown(opened: Image.Image, channels: int | None) -> Image.Image:
    """Upright and on white; of mode L, RGB, or F for a deep one."""
    if opened.mode == "F":
        raise ValueError("floating-point numbers, of which nothing says what is white: save it with 8 or 16 bits")
    opened.load()  # while the file is open
    image = ImageOps.exif_transpose(opened) if _turned(opened) else opened
    if image.mode.startswith("I"):
        return Image.fromarray(np.asarray(image).astype(np.float32))
    gray = channels == 1 or image.mode in GRAY
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _of_mode(image, "L" if gray else "RGB")


def _of_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _square(image: Image.Image, size: int) -> np.ndarray:
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
