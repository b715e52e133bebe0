"""Folders and zips of small images, for tests."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


def png(seed, size=(12, 10), mode="L"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return encoded(Image.fromarray(pixels, mode))


def png16(seed, low, high, size=(12, 10)):
    """A gray PNG of 16 bits whose values go from ``low`` to ``high``."""
    pixels = np.random.default_rng(seed).integers(low, high + 1, (size[1], size[0])).astype(np.uint16)
    pixels[0, 0], pixels[-1, -1] = low, high
    return encoded(Image.fromarray(pixels))


def png16_in_colour(seed, high, size=(12, 10)):
    """A PNG of 16 bits a channel, which Pillow does not write; values 0 to ``high``."""
    pixels = np.random.default_rng(seed).integers(0, high + 1, (size[1], 3 * size[0])).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *size, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    whole = [struct.pack(">I", len(data)) + kind + data + _crc(kind + data) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def encoded(image, kind="PNG", **settings):
    """An image in the bytes of its file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def some_classes(classes=6, each=4, mode="L"):
    return {f"kind{c % 2}/class{c}/{i}.png": png(100 * c + i, mode=mode) for c in range(classes) for i in range(each)}


def entry(size, stated, method=8, name="cat0/huge.png"):
    """A zip's entry of ``size`` zeros that states another size: (name, data, crc, stated size, method)."""
    if method == 8:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        block = deflate.compress(bytes(1 << 24)) + deflate.flush(zlib.Z_FULL_FLUSH)
        data = block * (size >> 24) + deflate.flush()
    else:
        import bz2

        data = bz2.compress(bytes(size))
    return name, data, 0, stated, method


def write_zip(path, *entries):
    """A zip of entries as entry() makes them, whatever they state."""
    local, central = b"", b""
    for name, data, crc, stated, method in entries:
        about = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, crc, len(data), stated, len(name), 0)
        central += struct.pack("<IH", 0x02014B50, 20) + about + struct.pack("<HHHII", 0, 0, 0, 0, len(local))
        central += name.encode()
        local += struct.pack("<I", 0x04034B50) + about + name.encode() + data
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(entries), len(entries), len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


def _crc(data):
    return struct.pack(">I", zlib.crc32(data))
