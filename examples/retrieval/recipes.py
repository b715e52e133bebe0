"""Recipes: options of the program in a TOML file, each key an option's name with _ for -."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import InputError

FOLDER = Path(__file__).parents[1] / "recipes"
_LENGTHS = ("steps", "epochs")  # one takes the place of the other


def combine(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options: those of the command line, for want of these the recipe's, else the defaults.

    ``notes`` of the result says which ones of the recipe the command line replaced.

    Raises:
        InputError: there is no such recipe, or a key of it is no option, or has a value that the option does not take.
    """
    defaults = vars(parser.parse_args([]))
    given = _given(parser, defaults, arguments)
    if given.get("recipe") is None:
        return argparse.Namespace(**(defaults | given), notes=[])
    path = _find(given["recipe"])
    recipe = _read(path, parser, defaults)
    replaced = [name for name in given if name in recipe or (name in _LENGTHS and set(_LENGTHS) & recipe.keys())]
    for one, other in (_LENGTHS, _LENGTHS[::-1]):
        if one in given:
            recipe.pop(other, None)
    note = f"Recipe: {path.stem}"
    if replaced:
        note += ", but for " + ", ".join(" ".join(_arguments(name, given[name])) for name in replaced)
    return argparse.Namespace(**(defaults | recipe | given | {"recipe": path.stem}), notes=[note])


def _given(
    parser: argparse.ArgumentParser, defaults: dict[str, Any], arguments: Sequence[str] | None
) -> dict[str, Any]:
    """What the arguments say, without what they leave to defaults."""
    blank = object()
    found = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, blank)))
    return {name: value for name, value in vars(found).items() if value is not blank}


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise InputError(f"--recipe: there is no file {path}")
        return path
    known = sorted(each.stem for each in FOLDER.glob("*.toml"))
    if name not in known:
        raise InputError(
            f"--recipe: there is no {name!r}: choose {', '.join(known)}, or name a file that ends in .toml"
        )
    return FOLDER / f"{name}.toml"


def _read(path: Path, parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> dict[str, Any]:
    toml = _toml()
    try:
        written = toml.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML, or of UTF-8
        raise InputError(f"{path} is not TOML: {error}") from error
    found: dict[str, Any] = {}
    for key, value in written.items():
        if key not in defaults or key == "recipe":
            near = difflib.get_close_matches(key, defaults, 3)
            raise InputError(
                f"{path}: there is no option {key!r}" + (f"; near to it are {', '.join(near)}" if near else "")
            )
        try:
            found |= _given(parser, defaults, _arguments(key, value))
        except InputError as error:
            raise InputError(f"{path}: {key} = {_text(value)}: {error}") from error
        if not _same(found.get(key), value):
            raise InputError(f"{path}: {key} = {value!r} is of the wrong type: write {_toml_like(found.get(key))}")
    if all(name in found for name in _LENGTHS):
        raise InputError(f"{path}: steps and epochs exclude each other: leave one out")
    return found


def _arguments(key: str, value: object) -> list[str]:
    """A key as the command line would have it."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _same(parsed: object, value: object) -> bool:
    """Whether a value means what it was read as: text is no number, and a number no list."""
    if isinstance(parsed, list | tuple) and isinstance(value, list):
        return len(parsed) == len(value) and all(map(_same, parsed, value))
    if isinstance(parsed, Path):
        return isinstance(value, str)
    return isinstance(parsed, bool) == isinstance(value, bool) and parsed == value


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _toml_like(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_like, value))}]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value).lower()


def _toml() -> Any:
    """The reader of TOML that Python has from 3.11 on, or its twin."""
    for name in ("tomllib", "tomli"):
        try:
            return import_module(name)
        except ImportError:
            pass
    raise InputError("--recipe takes Python 3.11 or newer, or the package tomli: python -m pip install tomli")
