"""One run: a network trained with a loss, and what it retrieves; and the table that keeps what every run came to."""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from retrieval.batches import generator
from retrieval.errors import InputError
from retrieval.images import Images
from retrieval.options import complete, parse
from retrieval.ranks import Ranks
from retrieval.training import Training, make_sampler
from torch import Tensor
from torch.nn.functional import normalize

from roadmap_ext.metrics import average_precision, decomposability_gap, retrieval_metrics

from .losses import LOSSES, WithoutIds

EVALUATIONS = 5  # of a test run, at equal distances, the last at its end
CURVE = [f"mAP@R after {place}/{EVALUATIONS}" for place in range(1, EVALUATIONS)]
TRAINING_GAP = ("training batch AP", "training AP", "training gap")
MEASURED = ["mAP@R", "mAP", "R-precision", "R@1", "batch AP", "gap", "gap's bound", "bound exact"]


class Run(NamedTuple):
    """What one run differs in from the others."""

    role: str  # "choice" of a learning rate on held-out training classes, or "test"
    loss: str
    batch_size: int
    rate: float
    seed: int


def train(
    run: Run, options: list[str], images: int, train: Images, test: Images, report: Callable[[int], object]
) -> dict[str, Any]:
    """Trains the network of a run on ``images`` in all, and measures it.

    Of one seed, initialisation, batches and distortions are the same whatever the loss is.

    Args:
        options: of the training program, all but those that the run says.
        report: is called after each step with the number of its images.

    Returns:
        The measured values by name; empty if the loss was not finite.
    """
    steps = images // run.batch_size
    own = ["--batch-size", run.batch_size, "--steps", steps, "--lr", run.rate, "--seed", run.seed]
    settings = parse(None, [*options, *map(str, own)])
    sampler = make_sampler(settings, train)
    complete(settings, len(train), sampler.epoch)
    training = Training(settings, train, torch.device("cpu"), Ranks())
    training.loss = WithoutIds(LOSSES[run.loss].make())
    training.network.to(memory_format=torch.channels_last)  # faster on a CPU
    begin, curve, milliseconds = time.perf_counter(), {}, []
    stops = {steps * place // EVALUATIONS: CURVE[place - 1] for place in range(1, EVALUATIONS)}
    for step in range(steps):
        try:
            milliseconds.append(training.step(step)["loss_ms"])
        except InputError:  # of a loss that is not finite; all else was checked before
            report(images - step * run.batch_size)
            return {}
        report(run.batch_size)
        if run.role == "test" and step + 1 in stops:
            embeddings = training.embed(test, lambda: None)
            curve[stops[step + 1]] = retrieval_metrics(embeddings, test.labels, k=())["mAP@R"]
    embeddings = training.embed(test, lambda: None)
    return curve | {
        **measure(embeddings, test.labels, run.batch_size),
        **training_gap(training.embed(train, lambda: None), train.labels, sampler),
        "seconds": time.perf_counter() - begin,
        "loss ms": sorted(milliseconds)[steps // 2],
    }


def measure(embeddings: Tensor, labels: Tensor, batch_size: int) -> dict[str, float]:
    """Retrieval among all, and what batches of the training's size would make of it."""
    order = torch.randperm(len(labels), generator=generator("gap", 0, 0))  # the same split for every run
    gap = decomposability_gap(embeddings, labels, order.split(batch_size))
    metrics = retrieval_metrics(embeddings, labels, k=(1,))
    return metrics | {
        "batch AP": gap.batch_ap,
        "gap": gap.gap,
        "gap's bound": gap.bound,
        "bound exact": float(gap.exact),
    }


def training_gap(embeddings: Tensor, labels: Tensor, batches: Callable[[int], Tensor]) -> dict[str, float]:
    """The exact AP of batches as training makes them, that of the training set, and their difference."""
    vectors, found = normalize(embeddings, dim=1), []
    for number in range(-(-8192 // len(batches(0)))):
        index = batches(number)
        own = torch.eye(len(index), dtype=torch.bool)
        found.append(average_precision(vectors[index] @ vectors[index].T, labels[index][:, None] == labels[index], own))
    batch_ap, ap = torch.cat(found).double().mean().item(), retrieval_metrics(embeddings, labels, k=())["mAP"]
    return dict(zip(TRAINING_GAP, (batch_ap, ap, batch_ap - ap), strict=True))


class Results:
    """The table of finished runs: a CSV to which each is added when it is done, so that any may be the last.

    Args:
        key: of all that runs have in common; rows of another key are kept, and do not count.
        measured: the names of what a run comes to.
    """

    def __init__(self, path: Path, key: str, measured: Sequence[str] = (*CURVE, *MEASURED)) -> None:
        self.path, self._key, self._measured = path, key, measured
        self._columns = ("key", *Run._fields, *measured, "seconds", "loss ms")
        self._rows: dict[Run, dict[str, float]] = {}
        self.foreign = 0
        self._header: list[str] | None = None  # of the file; None if it is new
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            self._whole = text[: text.rfind("\n") + 1]  # without a row that was cut off
            reader = csv.DictReader(io.StringIO(self._whole))
            if reader.fieldnames and not {*self._columns} <= {*reader.fieldnames}:
                raise KeyError(", ".join(sorted({*self._columns} - {*reader.fieldnames})) + " missing")
            self._header = None if reader.fieldnames is None else [*reader.fieldnames]
            for row in reader:
                if row["key"] != key:
                    self.foreign += 1
                    continue
                run = Run(row["role"], row["loss"], int(row["batch_size"]), float(row["rate"]), int(row["seed"]))
                self._rows[run] = {name: float(row[name]) for name in measured if row[name] != ""}
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no table of runs ({error}): move it away, or name another --out") from error

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Holds the table for this process alone, and drops a row that was cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another process adds to {self.path}: wait for it, or name another --out") from error
            file.truncate(len(self._whole.encode()))
            yield

    def __contains__(self, run: Run) -> bool:
        return run in self._rows

    def __getitem__(self, run: Run) -> dict[str, float]:
        return self._rows[run]

    def add(self, run: Run, values: dict[str, Any], about: dict[str, str]) -> None:
        """A run that is done, with where and when it was."""
        self._rows[run] = {name: values[name] for name in self._measured if name in values}
        with self.path.open("a", newline="") as file:
            header = self._header or [*self._columns, *about]
            writer = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
            if self._header is None:
                writer.writeheader()
                self._header = header
            writer.writerow({"key": self._key, **run._asdict(), **values, **about})
            file.flush()
            os.fsync(file.fileno())

    def best_rate(self, loss: str, batch_size: int, rates: Sequence[float], seeds: Sequence[int]) -> float | None:
        """The learning rate of the highest mean mAP@R among those to choose from; None as long as a run is missing.

        One that diverged with any seed is the last to be taken; of equals it is the smallest.
        """
        by_rate = {rate: [Run("choice", loss, batch_size, rate, seed) for seed in seeds] for rate in sorted(rates)}
        if not all(run in self for choices in by_rate.values() for run in choices):
            return None
        return max(by_rate, key=lambda rate: math.fsum(self[run].get("mAP@R", -math.inf) for run in by_rate[rate]))
