"""Checkpoints: files of tensors and plain values, written whole or not at all and read only if they are as written.

A file is what torch.save writes, which torch.load(weights_only=True) reads; after it stand the number of the format and
a digest of everything before the digest. Nothing of a file is unpickled before the digest is right, and never more
than tensors and plain values.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import FileError, reason

FORMAT = 4  # the first with a digest
_END = "\nretrieval checkpoint, format {}, sha256 "
_DIGEST = 65  # characters: a digest and the end of its line
_END_OF_ZIP = slice(-22, -18)  # where torch.save ends a file
_ELSEWHERE = ("state_dict_ema", "model_ema", "state_dict", "model")  # where other programs' files have the weights


def write(path: Path, contents: dict[str, Any]) -> None:
    """Replaces a checkpoint in one move."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    buffer.seek(0, io.SEEK_END)
    buffer.write(_END.format(FORMAT).encode())
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + b"\n")
    replace(path, buffer.getbuffer())


def read(path: Path, fields: Mapping[str, type | tuple[type, ...]], remedy: str) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        fields: what it has to hold, and of which types.
        remedy: what to do about a file that cannot be used, for its error.

    Raises:
        FileError: it is not there, cut, damaged, of another format, or not one that holds these fields.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror})", remedy) from error
    body = memoryview(data)[:-_DIGEST]
    if data[-_DIGEST:] != hashlib.sha256(body).hexdigest().encode() + b"\n":
        if data[_END_OF_ZIP] == b"PK\5\6":
            old = "has no digest: an earlier version of this program wrote it"
            raise FileError(path, old, f"go on with that version, or {remedy}")
        raise FileError(path, "is damaged or cut: its contents do not match its digest", remedy)
    found = re.search(_END.format(r"(\d+)").encode() + rb"\Z", body[-100:])
    if found is None or int(found[1]) != FORMAT:
        number = "unknown" if found is None else found[1].decode()
        other = f"is of format {number}, and this version of the program reads format {FORMAT}"
        raise FileError(path, other, f"go on with the version that wrote it, or {remedy}")
    contents = _unpickle(path, io.BytesIO(data), remedy)
    check_fields(path, contents, fields, remedy)
    return contents


def check_fields(path: Path, found: object, fields: Mapping[str, type | tuple[type, ...]], remedy: str) -> None:
    """Raises FileError unless what was found in a file is a dict that has these fields, of these types."""
    if not isinstance(found, dict):
        raise FileError(path, f"holds a {type(found).__name__} in place of named fields", remedy)
    for name, kinds in fields.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if name not in found:
            raise FileError(path, f"lacks {name!r}", remedy)
        value = found[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise FileError(path, f"holds a {type(value).__name__} as {name!r} in place of {wanted}", remedy)


def difference(found: object, expected: object, name: str) -> str | None:
    """Where two nested states differ in their keys, types, or dtypes and shapes of tensors; None if nowhere."""
    if isinstance(found, dict) and isinstance(expected, dict):
        lacking, more = (
            [key for key in one if key not in other] for one, other in ((expected, found), (found, expected))
        )
        if lacking or more:
            return f"{name} lacks {lacking[0]!r}" if lacking else f"{name} holds {more[0]!r}, which is unknown"
        pairs = [(found[key], expected[key], f"{name}.{key}") for key in expected]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(*pair, f"{name}.{place}") for place, pair in enumerate(zip(found, expected, strict=True))]
    else:
        forms = [_form(value) for value in (found, expected)]
        return None if forms[0] == forms[1] else f"{name} is {forms[0]} in place of {forms[1]}"
    return next((differs for pair in pairs if (differs := difference(*pair))), None)


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a file of weights: of torch.save, or a .safetensors. Nothing else is unpickled.

    Raises:
        FileError: it cannot be read, or holds no tensors by name.
    """
    remedy = "name a file of tensors by name, that torch.save or safetensors wrote"
    if path.suffix.lower() == ".safetensors":
        try:
            from safetensors.torch import load_file

            found = load_file(path)
        except Exception as error:  # whatever a foreign file leads to; the package may be missing
            raise FileError(path, f"cannot be read ({reason(error)})", remedy) from error
    else:
        # timm's own checkpoints hold the options of their run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = _unpickle(path, path, remedy)
    if isinstance(found, dict):
        found = next((found[name] for name in _ELSEWHERE if isinstance(found.get(name), dict)), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise FileError(path, "does not hold tensors by name", remedy)
    named: dict[str, Tensor] = {}
    for given, value in found.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", str(given))
        if name in named:
            raise FileError(path, f"holds {name!r} twice, with and without a wrapper's name before it", remedy)
        named[name] = value
    return named


def _unpickle(path: Path, source: Path | io.BytesIO, remedy: str) -> Any:
    """What torch.save wrote, where it is no more than tensors and plain values."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to read the file all the same
        wrong = "is damaged, or holds more than tensors and plain values, which might run code and is not read"
        raise FileError(path, wrong, remedy) from error
    except Exception as error:  # whatever a foreign file leads to
        raise FileError(path, f"cannot be read ({reason(error)})", remedy) from error


def replace(path: Path, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all, whenever the process or the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
