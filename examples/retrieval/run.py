"""The folder of a run: its settings, checkpoint and tables; what it takes to go on to the same bits.

A run's state at a step is its checkpoint and the rows of its tables up to that step. A checkpoint is replaced in one
move, and rows beyond it are dropped when a run goes on, so it may be killed at any moment.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import FileError, InputError

WRITTEN = ("metrics.csv", "steps.csv", "checkpoint.pt", "best.pt", "settings.json", "curves.png", "neighbours.png")
STEPS = ("step", "loss", "learning_rate", "step_ms", "loss_ms", "loss_mib")
METRICS = (
    "step", "epoch", "loss", "mAP", "mAP@R", "R-precision", "step_ms", "loss_ms", "loss_mib", "evaluation_s",
)  # fmt: skip
_OF_STEPS = ("loss", "step_ms", "loss_ms")  # a row of the metrics has none of these before the first step
_HOLDS = {
    "step": int, "settings": dict, "about": dict, "network": dict, "optimizer": dict, "scaler": dict,
    "memory": (dict, type(None)),
}  # fmt: skip
_BEGIN_AGAIN = "restore it, or remove checkpoint.pt and the run begins again"


class Table:
    """Rows of numbers with a step each, in memory and, with a path, in a CSV.

    Args:
        columns: what a table that is loaded has to have, at least.
    """

    def __init__(self, path: Path | None, columns: Sequence[str] = ("step",)) -> None:
        self.path, self.rows, self._columns = path, [], columns
        self.rows: list[dict[str, Any]]

    def load(self, keep: Callable[[int], bool]) -> None:
        """The rows of the steps to keep; others, and one that was cut off, are dropped.

        Raises:
            FileError: it is not as this program writes it.
        """
        try:
            text = self.path.read_bytes().decode() if self.path.exists() else ""
            lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise self._damaged(f"cannot be read ({error})") from error
        self.rows = self._parse(lines[0], lines[1:]) if lines else []
        self.replace([row for row in self.rows if keep(row["step"])])

    def _parse(self, heading: list[str], lines: list[list[str]]) -> list[dict[str, Any]]:
        lacking = [name for name in self._columns if name not in heading]
        if lacking or len(set(heading)) < len(heading):
            raise self._damaged(f"lacks the column {lacking[0]!r}" if lacking else "has a column twice")
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 2):
            if len(line) != len(heading):
                raise self._damaged(f"has {len(line)} values under {len(heading)} names in line {number}")
            row = dict(zip(heading, line, strict=True))
            step = row["step"]
            if not (step.isascii() and step.isdecimal()):
                raise self._damaged(f"has the step {step!r} in line {number}")
            if rows and int(step) <= rows[-1]["step"]:
                raise self._damaged(f"has the step {step} after {rows[-1]['step']} in line {number}")
            rows.append({name: int(text) if name == "step" else _number(text) for name, text in row.items()})
            for name, value in rows[-1].items():
                blank = row[name] == "" and (name == "loss_mib" or (name in _OF_STEPS and int(step) == 0))
                if value is None and not blank:
                    raise self._damaged(f"has {row[name]!r} as {name} in line {number}")
        return rows

    def _damaged(self, wrong: str) -> FileError:
        return FileError(self.path, wrong, _BEGIN_AGAIN)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """These rows in place of all that it has."""
        self.rows, written = rows, io.StringIO()
        if rows:
            writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        checkpoint.replace(self.path, written.getvalue().encode())

    def sync(self) -> None:
        """Sees to it that all rows outlast a stop of the machine."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())

    def add(self, row: dict[str, Any]) -> None:
        """One row more, with the columns of the first."""
        if self.path is not None and self.rows and row.keys() != self.rows[0].keys():
            raise self._damaged(f"has the columns {', '.join(self.rows[0])}, and the run's are {', '.join(row)}")
        self.rows.append(row)
        if self.path is None:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(row)

    def column(self, name: str, after: int = -1) -> list[Any]:
        """A column's values of the steps after one, those that are there."""
        return [row[name] for row in self.rows if row["step"] > after and row[name] is not None]


class Run:
    """A run in its folder.

    Attributes:
        metrics, steps: the tables, a row an evaluation and a row a step.
        state: what the checkpoint holds, or None where there is none.
        best: the row of the evaluation that best.pt is of, or None where there is none.
        notes: differences in what the bits may depend on.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder = folder
        self.metrics, self.steps = Table(folder / "metrics.csv", METRICS), Table(folder / "steps.csv", STEPS)
        self.state: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.notes: list[str] = []
        self._checkpoint, self._best = folder / "checkpoint.pt", folder / "best.pt"
        self._lock: int | None = None
        try:
            self._look(resume)
        except BaseException:
            self.close()
            raise

    def _look(self, resume: bool) -> None:
        """What is in the folder already."""
        for path in (self.folder / (name + end) for name in WRITTEN for end in ("", ".partial")):
            if os.path.lexists(path) and not path.is_file():
                dangling = path.is_symlink() and not path.exists()
                what = "links to nothing" if dangling else "is a folder" if path.is_dir() else "is not a plain file"
                remedy = "put the file in its place, or remove it, or name another --out"
                raise FileError(path, f"{what}, where the run writes a file", remedy)
        if resume and self.folder.is_dir():
            self._take()
        begun = [name for name in WRITTEN if (self.folder / name).exists()]
        if begun and not resume:
            raise InputError(
                f"{self.folder} holds a run already ({', '.join(begun)}): go on with it by --resume, or name another "
                "--out"
            )
        if begun and not {"checkpoint.pt", "settings.json"} & {*begun}:
            raise InputError(
                f"{self.folder} holds {', '.join(begun)}, and not of a run, which has checkpoint.pt or settings.json: "
                "name another --out"
            )
        if self._checkpoint.exists():
            self.state = checkpoint.read(self._checkpoint, _HOLDS, _BEGIN_AGAIN)
            if self.state["step"] < 0 or not _plain([self.state["settings"], self.state["about"]]):
                raise self.damaged("holds a step or settings that no run has")
            if self._best.exists():
                remedy = "restore it, or remove it: another is written of the evaluations to come, or of the last step"
                self.best = checkpoint.read(self._best, {"evaluation": dict}, remedy)["evaluation"]
                checkpoint.check_fields(self._best, self.best, {"step": int, "mAP@R": float}, remedy)

    def damaged(self, wrong: str) -> FileError:
        """An error about the checkpoint."""
        return FileError(self._checkpoint, wrong, _BEGIN_AGAIN)

    def check(self, settings: dict[str, Any], about: dict[str, Any]) -> None:
        """Raises InputError if the checkpoint is not of such a run.

        Args:
            settings: all that the bits of the run depend on; what a checkpoint was made with has to be the same.
            about: what they may depend on (machine, versions); a difference is told, not refused.
        """
        self._settings, self._about = settings, about
        if self.state is None:
            return
        changed = _differences(self.state["settings"], settings)
        if changed:
            raise InputError(
                f"{self._checkpoint} was made with other settings: {'; '.join(changed)}: give those it was made with, "
                "or name another --out"
            )
        before = self.state["about"]
        self.notes = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in about.items()
            if before.get(name) != value
        ]

    def begin(self, keep: Callable[[int], bool]) -> None:
        """Makes the folder, or brings its tables to the step of the checkpoint; takes the folder for this process.

        Of the metrics the rows of the steps stay that are to be kept.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(self.folder, f"cannot be made ({error.strerror})", "name another --out") from error
        self._take()
        written = json.dumps({"settings": self._settings, "about": self._about}, indent=2, default=str)
        checkpoint.replace(self.folder / "settings.json", written.encode())
        if self.state is None:
            self.metrics.replace([])
            self.steps.replace([])
            return
        last = self.state["step"]
        self.metrics.load(lambda step: step <= last and keep(step))
        self.steps.load(lambda step: step <= last)
        # Of the last step the metrics may not have been measured yet.
        evaluated = {step for step in range(last) if keep(step)}
        for table, there in ((self.steps, set(range(1, last + 1))), (self.metrics, evaluated)):
            if not there <= set(table.column("step")):
                wrong = f"lacks rows of steps up to {last:,}, where the checkpoint is"
                raise FileError(table.path, wrong, _BEGIN_AGAIN)

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
        checkpoint.write(self._checkpoint, {"settings": self._settings, "about": self._about, **state})

    def save_best(self, evaluation: dict[str, Any], trained: dict[str, Any]) -> None:
        """Replaces best.pt by the network of this row of the metrics, which is the best so far."""
        self.best = evaluation
        checkpoint.write(self._best, {"evaluation": evaluation, **trained})


class Onlooker:
    """The run on a rank that does not write: what the first one's Run holds, and what is added to it."""

    def __init__(self, folder: Path, state: dict[str, Any] | None, best: dict[str, Any] | None) -> None:
        self.folder, self.state, self.best, self.notes = folder, state, best, []
        self.metrics, self.steps = Table(None), Table(None)

    def damaged(self, wrong: str) -> FileError:
        """An error about the checkpoint."""
        return FileError(self.folder / "checkpoint.pt", wrong, _BEGIN_AGAIN)

    def save(self, **state: Any) -> None:
        """The first rank does."""

    def save_best(self, evaluation: dict[str, Any], trained: dict[str, Any]) -> None:
        """The first rank does."""
        self.best = evaluation


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


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    if before.get("loss") == now.get("loss"):  # else its settings are others anyway
        before, now = ({**settings, **settings.get("loss settings", {})} for settings in (before, now))
    names = [name for name in {**before, **now} if name != "loss settings"]
    changed = [name for name in names if before.get(name) != now.get(name)]
    return [
        f"the {name} differ" if name.endswith("images") else f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in changed
    ]


def _plain(value: object) -> bool:
    """Whether it is made of what settings are made of."""
    if isinstance(value, dict):
        loss = value.get("loss settings", {})
        return isinstance(loss, dict) and all(isinstance(key, str) and _plain(of) for key, of in value.items())
    return all(map(_plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int | float | None)


def _number(text: str) -> float | None:
    """None for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
