"""The folder of a run: its settings, checkpoint and tables; what it takes to go on to the same bits.

A run's state at a step is its checkpoint and the rows of its tables up to that step. A checkpoint is replaced in one
move, and rows beyond it are dropped when a run goes on, so it may be killed at any moment.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, reason

FORMAT = 3
WRITTEN = ("metrics.csv", "steps.csv", "checkpoint.pt", "best.pt", "settings.json", "curves.png", "neighbours.png")


class Table:
    """Rows of numbers with a step each, in memory and, with a path, in a CSV."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, []
        self.rows: list[dict[str, Any]]

    def load(self, keep: Callable[[int], bool]) -> None:
        """The rows of the steps to keep; others, and one that was cut off, are dropped."""
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        try:
            rows = [_numbers(row) for row in csv.DictReader(io.StringIO(whole))]
            self.rows = [row for row in rows if keep(row["step"])]
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path} is no table of a run ({reason(error)}): restore it") from error
        kept = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(kept, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        replace(self.path, kept.getvalue().encode())

    def sync(self) -> None:
        """Sees to it that all rows outlast a stop of the machine."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())

    def add(self, row: dict[str, Any]) -> None:
        """One row more, with the columns of the first."""
        self.rows.append(row)
        if self.path is None:
            return
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(row)

    def column(self, name: str, after: int = -1) -> list[Any]:
        """A column's values of the steps after one, those that are there."""
        return [row[name] for row in self.rows if row["step"] > after and row[name] is not None]


class Run:
    """A run in its folder.

    Args:
        settings: all that the bits of the run depend on; what a checkpoint was made with has to be the same.
        about: what they may depend on (machine, versions); a difference is told, not refused.

    Attributes:
        metrics, steps: the tables, a row an evaluation and a row a step.
        state: what the checkpoint holds, or None where there is none.
        notes: differences in ``about``.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], about: dict[str, Any], *, resume: bool) -> None:
        self.folder, self._settings, self._about = folder, settings, about
        self.metrics, self.steps = Table(folder / "metrics.csv"), Table(folder / "steps.csv")
        self.state, self.notes = None, []
        self.state: dict[str, Any] | None
        self._checkpoint = folder / "checkpoint.pt"
        self._lock: int | None = None
        try:
            self._look(resume)
        except BaseException:
            self.close()
            raise

    def _look(self, resume: bool) -> None:
        """What is in the folder already."""
        if resume and self.folder.is_dir():
            self._take()
        begun = [name for name in WRITTEN if (self.folder / name).exists()]
        if begun and not resume:
            raise InputError(
                f"{self.folder} holds a run already ({', '.join(begun)}): go on with it by --resume, or name another "
                "--out"
            )
        if begun and not (self.folder / "settings.json").exists():
            raise InputError(f"{self.folder} holds {', '.join(begun)}, and not of a run: name another --out")
        if self._checkpoint.exists():
            self.state = self._load()

    def begin(self, keep: Callable[[int], bool]) -> None:
        """Makes the folder, or brings its tables to the step of the checkpoint; takes the folder for this process.

        Of the metrics the rows of the steps stay that are to be kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        settings = json.dumps({"settings": self._settings, "about": self._about}, indent=2, default=str)
        replace(self.folder / "settings.json", settings.encode())
        last = self.state["step"] if self.state else 0
        self.metrics.load(lambda step: self.state is not None and step <= last and keep(step))
        self.steps.load(lambda step: step <= last)
        if self.steps.column("step") != list(range(1, last + 1)):
            raise InputError(f"{self.steps.path} lacks rows of steps up to {last}, where the checkpoint is: restore it")

    def close(self) -> None:
        """Leaves the folder to others."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self) -> None:
        if self._lock is not None:
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process works in {self.folder}: wait for it, or name another --out") from error
        except OSError:  # there are file systems without locks
            pass

    def save(self, **state: Any) -> None:
        """Replaces the checkpoint, when the rows up to it are on the disk."""
        self.steps.sync()
        self.metrics.sync()
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "settings": self._settings, "about": self._about, **state}, buffer)
        replace(self._checkpoint, buffer.getbuffer())

    def save_best(self, network: dict[str, Any]) -> None:
        """Replaces the network of the best evaluation so far."""
        buffer = io.BytesIO()
        torch.save({"network": network}, buffer)
        replace(self.folder / "best.pt", buffer.getbuffer())

    def _load(self) -> dict[str, Any]:
        try:
            state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            made_with, about = state["settings"], state["about"]
        except Exception as error:  # whatever unpickling a foreign file leads to
            raise InputError(
                f"{self._checkpoint} cannot be read ({reason(error)}): remove it to begin again"
            ) from error
        if state["format"] != FORMAT:
            raise InputError(f"{self._checkpoint} is of format {state['format']}, and this program's is {FORMAT}")
        changed = _differences(made_with, self._settings)
        if changed:
            raise InputError(
                f"{self._checkpoint} was made with other settings: {'; '.join(changed)}: give those it was made with, "
                "or name another --out"
            )
        self.notes = [
            f"{name} was {about.get(name)} and is {value}"
            for name, value in self._about.items()
            if about.get(name) != value
        ]
        return state


class Onlooker:
    """The run on a rank that does not write: what the first one's Run holds, and what is added to it."""

    def __init__(
        self, folder: Path, state: dict[str, Any] | None, metrics: list[dict[str, Any]], steps: list[dict[str, Any]]
    ) -> None:
        self.folder, self.state, self.notes = folder, state, []
        self.metrics, self.steps = Table(None), Table(None)
        self.metrics.rows, self.steps.rows = metrics, steps

    def save(self, **state: Any) -> None:
        """The first rank does."""

    def save_best(self, network: dict[str, Any]) -> None:
        """The first rank does."""


class Board:
    """TensorBoard's log, if it was asked for; when a run goes on, it drops what came after the checkpoint."""

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self._writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(
                    f"--tensorboard takes the package: {sys.executable} -m pip install tensorboard ({error})"
                ) from error
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, row: dict[str, Any], group: str) -> None:
        """A row's values under their names."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def replace(path: Path, data: bytes | memoryview) -> None:
    """Writes a file whole or not at all, whenever the process or the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    if before.get("loss") == now.get("loss"):  # else its settings are others anyway
        before, now = ({**settings, **settings.get("loss settings", {})} for settings in (before, now))
    names = [name for name in before | now if name != "loss settings"]
    changed = [name for name in names if before.get(name) != now.get(name)]
    return [
        f"the {name} differ" if name.endswith("images") else f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in changed
    ]


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    return {
        name: None if value == "" else int(value) if name == "step" else float(value) for name, value in row.items()
    }
