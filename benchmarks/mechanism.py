"""What ROADMAP's two ideas do, each by itself: python -m benchmarks.mechanism (make mechanism), about a minute.

Nothing is downloaded and no network is trained: the embeddings themselves are the parameters, so that a loss alone
decides what becomes of them.

  tail         A crowd of negatives outranks the positives of every query by a distance. How strong is the gradient,
               and after how many steps is the ranking mended? Over distances, with two temperatures, two optimisers,
               several learning rates, and once with a linear map that all embeddings share.
  calibration  Batches are trained to the end. How far does the AP within them exceed the AP of the whole set? Over
               batch sizes; with the same batches in every epoch, and with batches drawn anew.

Writes mechanism_*.csv, a row a run, and mechanism_*.png, and mechanism.md, the tables with 95 % intervals over seeds.
docs/paper.md says what they show.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import roadmap_ext
from roadmap_ext.metrics import average_precision, retrieval_metrics

from . import report
from .intervals import Interval
from .plots import BLUE, GREEN, GREY, ORANGE, RED, pyplot, save, tidy

LOSSES: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "Smooth-AP": (roadmap_ext.SmoothAPLoss, ORANGE),
    "SupAP": (roadmap_ext.SupAPLoss, BLUE),
    "ROADMAP": (roadmap_ext.RoadmapLoss, GREEN),
    "calibration": (roadmap_ext.CalibrationLoss, RED),
}
OPTIMIZERS = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}

# --- the tail --------------------------------------------------------------------------------------------------------

CLASSES, OF_A_CLASS, CROWDS = 48, 4, 6
NEAR = 0.1  # similarity of two items of a class, at the beginning
DISTANCES = (0.1, 0.2, 0.4, 0.7)
MENDED, MOST_STEPS = 0.9, 100


class Recovery(NamedTuple):
    """One run of the first experiment."""

    loss: str
    optimizer: str
    rate: float
    tau: float
    shared: bool  # a linear map of all embeddings is trained, in place of each of them
    distance: float
    seed: int


class Setting(NamedTuple):
    """What a panel and a row of the table have in common."""

    title: str
    optimizer: str
    tau: float
    shared: bool
    rates: tuple[float, ...]
    rate: float  # that of the panel over distances


SETTINGS = (
    Setting("Adam", "Adam", 0.01, False, (1e-3, 3e-3, 1e-2), 3e-3),
    Setting("SGD", "SGD", 0.01, False, (3.0, 30.0, 300.0), 30.0),
    Setting("Adam, tau 0.1", "Adam", 0.1, False, (3e-3,), 3e-3),
    Setting("SGD, tau 0.1", "SGD", 0.1, False, (30.0,), 30.0),
    Setting("Adam, a shared map", "Adam", 0.01, True, (1e-3, 3e-3, 1e-2), 3e-3),
)
BY_RATE, AT_DISTANCE = SETTINGS[0], 0.4


def recoveries(seeds: int) -> Iterator[Recovery]:
    """All runs of the first experiment."""
    for setting in SETTINGS:
        for rate in setting.rates:
            for distance in DISTANCES:
                for loss in ("Smooth-AP", "SupAP", "ROADMAP"):
                    for seed in range(seeds):
                        yield Recovery(loss, setting.optimizer, rate, setting.tau, setting.shared, distance, seed)


def crowded(distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [192, 246] and their labels: 48 classes of 4, each item of a class in another of 6 crowds.

    Two items of a class are NEAR, those of a crowd are nearer by ``distance``, all others are orthogonal; up to some
    noise. So every query ranks the 31 others of its crowd first.
    """
    random = torch.Generator().manual_seed(seed)
    items = CLASSES * OF_A_CLASS
    labels = torch.arange(CLASSES).repeat_interleave(OF_A_CLASS)
    crowd = torch.arange(items) % CROWDS
    dimensions = CLASSES + CROWDS + items
    basis = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=random))[0]
    of_class, of_crowd, own = basis.split([CLASSES, CROWDS, items])
    vectors = math.sqrt(NEAR) * of_class[labels] + math.sqrt(NEAR + distance) * of_crowd[crowd]
    vectors += math.sqrt(1 - 2 * NEAR - distance) * own
    noise = normalize(torch.randn(items, dimensions, generator=random), dim=1)
    return normalize(vectors + 0.1 * noise, dim=1), labels


def recover(run: Recovery) -> dict[str, Any]:
    """How many steps a run takes to a mAP of MENDED: MOST_STEPS, and ``recovered`` 0, if it does not come there."""
    vectors, labels = crowded(run.distance, run.seed)
    weights = (torch.eye(vectors.shape[1]) if run.shared else vectors.clone()).requires_grad_()
    optimizer = OPTIMIZERS[run.optimizer]([weights], run.rate)
    loss = LOSSES[run.loss][0](tau=run.tau)
    values = []
    for step in range(MOST_STEPS + 1):
        embeddings = vectors @ weights if run.shared else weights
        values.append(retrieval_metrics(embeddings.detach(), labels, k=())["mAP"])
        if values[-1] >= MENDED or step == MOST_STEPS:
            break
        optimizer.zero_grad()
        loss(embeddings, labels).backward()
        optimizer.step()
    return {"mAP before": values[0], "mAP": values[-1], "recovered": int(values[-1] >= MENDED), "steps": step}


def pull(loss: str, distance: Tensor, tau: float) -> Tensor:
    """What draws each of 3 positives of similarity NEAR up, if 32 negatives are nearer by these distances, [n].

    It is minus the gradient of the loss by the positive's similarity.
    """
    similarity = torch.full((len(distance), 35), NEAR, dtype=torch.float64)
    similarity[:, 3:] += distance[:, None]
    similarity.requires_grad_()
    relevant = torch.arange(35).lt(3).expand_as(similarity)
    surrogate = "smooth" if loss == "Smooth-AP" else "sup"
    value = roadmap_ext.ap_loss(similarity, relevant, surrogate=surrogate, tau=tau, reduction="none")
    if loss == "ROADMAP":
        value = 0.5 * value + 0.5 * torch.relu(0.9 - similarity[:, :3]).mean(1)
    value.sum().backward()
    assert similarity.grad is not None
    return -similarity.grad[:, 0]


# --- calibration -----------------------------------------------------------------------------------------------------

MANY, DIMENSIONS = 512, 32  # classes of OF_A_CLASS
STEPS = 1000
SIZES, RATE = (16, 32, 64, 128), 1e-2
RATES = (3e-3, 3e-2)  # others, at OF_RATES
OF_RATES = 32
FRESH_SIZES = (16, 64)
SOLVED = 0.99


class Trained(NamedTuple):
    """One run of the second experiment."""

    loss: str
    batch_size: int
    rate: float
    fresh: bool  # batches are drawn anew in every epoch
    seed: int


def trainings(seeds: int) -> Iterator[Trained]:
    """All runs of the second experiment."""
    for loss in ("SupAP", "ROADMAP", "calibration"):
        for seed in range(seeds):
            yield from (Trained(loss, size, RATE, False, seed) for size in SIZES)
            yield from (Trained(loss, OF_RATES, rate, False, seed) for rate in RATES)
            yield from (Trained(loss, size, RATE, True, seed) for size in FRESH_SIZES)


def train(run: Trained) -> list[dict[str, Any]]:
    """Batch AP and the AP of all, by images seen: at the end, or all along where batches are fresh.

    The batch AP is that of the batches of this epoch, as they are trained on; if they are fresh, of others.
    """
    random = torch.Generator().manual_seed(run.seed)
    labels = torch.arange(MANY).repeat_interleave(OF_A_CLASS)
    weights = normalize(torch.randn(len(labels), DIMENSIONS, generator=random), dim=1).requires_grad_()
    optimizer = torch.optim.Adam([weights], run.rate, fused=True)
    loss = LOSSES[run.loss][0]()
    epoch = len(labels) // run.batch_size
    rows = []
    for step in range(STEPS):
        if step == 0 or (run.fresh and step % epoch == 0):
            batches = draw(run.batch_size, random)
        batch = batches[step % epoch]
        optimizer.zero_grad()
        loss(weights[batch], labels[batch]).backward()
        optimizer.step()
        if step + 1 == STEPS or (run.fresh and (step + 1) % max(1, epoch // 4) == 0):
            judged = draw(run.batch_size, random) if run.fresh else batches
            within, of_all = aps(weights.detach(), labels, judged)
            rows.append({"epochs": (step + 1) / epoch, "batch AP": within, "AP": of_all})
            if run.fresh and within > 0.995:
                break
    return rows


def draw(batch_size: int, random: torch.Generator) -> Tensor:
    """A partition of the items: [batches, batch_size], whole classes."""
    classes = torch.randperm(MANY, generator=random).view(-1, batch_size // OF_A_CLASS, 1)
    return (classes * OF_A_CLASS + torch.arange(OF_A_CLASS)).flatten(1)


def aps(embeddings: Tensor, labels: Tensor, batches: Tensor) -> tuple[float, float]:
    """The mean AP within batches [K, B]; and that of an item of each class among all."""
    vectors, of = normalize(embeddings, dim=1)[batches], labels[batches]
    relevant, itself = of[:, :, None] == of[:, None], torch.eye(batches.shape[1], dtype=torch.bool)
    scores = vectors @ vectors.transpose(1, 2)
    within = average_precision(*(x.expand_as(scores).flatten(0, 1) for x in (scores, relevant, itself)))
    query, every = torch.arange(0, len(labels), OF_A_CLASS), torch.arange(len(labels))
    queries = embeddings[query], labels[query]
    return within.mean().item(), retrieval_metrics(*queries, embeddings, labels, ids=query, ref_ids=every, k=())["mAP"]


# --- what was found --------------------------------------------------------------------------------------------------

Recovered = dict[Recovery, dict[str, Any]]
Trainings = dict[Trained, list[dict[str, Any]]]


def steps_of(done: Recovered, setting: Setting, rate: float, distance: float, loss: str) -> list[dict[str, Any]]:
    """By seed."""
    wanted = (loss, setting.optimizer, rate, setting.tau, setting.shared, distance)
    return [row for run, row in done.items() if run[:-1] == wanted]


def at_batch_ap(rows: Sequence[dict[str, Any]], level: float, name: str) -> float:
    """A column where the batch AP first comes to a level, by linear interpolation; NaN if it never does."""
    for before, after in itertools.pairwise(rows):
        if before["batch AP"] < level <= after["batch AP"]:
            share = (level - before["batch AP"]) / (after["batch AP"] - before["batch AP"])
            return before[name] + share * (after[name] - before[name])
    return math.nan


def paired(ours: Sequence[float], theirs: Sequence[float], scale: float = 100) -> str:
    """The difference, seed by seed, with its sign."""
    return Interval.of([one - other for one, other in zip(ours, theirs, strict=True)]).show(True, scale)


def tables(done: Recovered, trained: Trainings) -> str:
    """Markdown."""
    text = [
        f"Steps to mAP {MENDED}, of at most {MOST_STEPS}, which count where it is not reached: mean ± half of the 95 % "
        "interval (Student's t over seeds); in brackets how many of the seeds reach it.",
        "",
        report.markdown_head(
            ["", "rate", "distance", "Smooth-AP", "SupAP", "ROADMAP", "SupAP - Smooth-AP", "ROADMAP - SupAP"]
        ),
    ]
    for setting in SETTINGS:
        for rate in setting.rates:
            for distance in DISTANCES:
                found = {
                    loss: steps_of(done, setting, rate, distance, loss) for loss in ("Smooth-AP", "SupAP", "ROADMAP")
                }
                steps = {loss: [row["steps"] for row in rows] for loss, rows in found.items()}
                cells = [
                    f"{Interval.of(steps[loss]).show(scale=1)} ({sum(row['recovered'] for row in rows)}/{len(rows)})"
                    for loss, rows in found.items()
                ]
                cells += [paired(steps[a], steps[b], 1) for a, b in (("SupAP", "Smooth-AP"), ("ROADMAP", "SupAP"))]
                text.append(report.markdown_row([setting.title, f"{rate:g}", distance, *cells]))
    text += [
        "",
        f"The same batches in every epoch, after {STEPS:,} steps, in points of 100. ROADMAP - SupAP: paired by seed.",
        "",
        report.markdown_head(["batch", "rate", "loss", "batch AP", "AP of all", "gap", "gap: difference to SupAP"]),
    ]
    for size, rate in [*((size, RATE) for size in SIZES), *((OF_RATES, rate) for rate in RATES)]:
        gaps: dict[str, list[float]] = {}
        for loss in ("SupAP", "ROADMAP", "calibration"):
            ends = [rows[-1] for run, rows in trained.items() if run[:-1] == (loss, size, rate, False)]
            gaps[loss] = [row["batch AP"] - row["AP"] for row in ends]
            values = [[row[name] for row in ends] for name in ("batch AP", "AP")]
            cells = [Interval.of(column).show() for column in (*values, gaps[loss])]
            difference = "" if loss == "SupAP" else paired(gaps[loss], gaps["SupAP"])
            text.append(report.markdown_row([size, f"{rate:g}", loss, *cells, difference]))
    text += [
        "",
        f"Batches drawn anew in every epoch, when the batch AP comes to {SOLVED}: epochs until then, and the gap.",
        "",
        report.markdown_head(["batch", "loss", "epochs", "gap", "gap: difference to SupAP"]),
    ]
    for size in FRESH_SIZES:
        gaps = {}
        for loss in ("SupAP", "ROADMAP", "calibration"):
            runs = [rows for run, rows in trained.items() if run.fresh and (run.loss, run.batch_size) == (loss, size)]
            gaps[loss] = [SOLVED - at_batch_ap(rows, SOLVED, "AP") for rows in runs]
            epochs = Interval.of([at_batch_ap(rows, SOLVED, "epochs") for rows in runs]).show(scale=1)
            difference = "" if loss == "SupAP" else paired(gaps[loss], gaps["SupAP"])
            text.append(report.markdown_row([size, loss, epochs, Interval.of(gaps[loss]).show(), difference]))
    return "\n".join(text) + "\n"


def plot_tail(done: Recovered, about: dict[str, str], path: Path) -> None:
    """The gradient; steps by distance in each setting; steps by learning rate."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.6))
    distance = torch.linspace(0, 0.8, 161, dtype=torch.float64)
    for loss in ("Smooth-AP", "SupAP", "ROADMAP"):
        for tau, style in ((0.01, "-"), (0.1, ":")):
            axes[0, 0].plot(distance, pull(loss, distance, tau), style, color=LOSSES[loss][1])
    axes[0, 0].plot([], [], ":", color=GREY, label="tau 0.1")
    axes[0, 0].legend(frameon=False, fontsize=8)
    title = "The pull on a positive that 32 negatives outrank"
    tidy(axes[0, 0], yscale="log", ylim=(1e-12, 30), title=title, xlabel="distance", ylabel="- gradient of similarity")
    titles = (
        "each embedding free, Adam",
        "each embedding free, SGD",
        "tau 0.1, Adam",
        None,
        "a shared map, Adam",
    )
    places = (axes[0, 1], axes[0, 2], axes[1, 0], None, axes[1, 1])
    for setting, axis, title in zip(SETTINGS, places, titles, strict=True):
        if axis is not None:
            _steps(axis, {x: (setting, setting.rate, x) for x in DISTANCES}, done, f"Recovery: {title}", "distance")
    rates = {rate: (BY_RATE, rate, AT_DISTANCE) for rate in BY_RATE.rates}
    _steps(axes[1, 2], rates, done, f"Recovery: each free, Adam, distance {AT_DISTANCE}", "learning rate")
    axes[1, 2].set_xscale("log")
    save(figure, axes[0, 1], about, path, "; bars: 95 % intervals over seeds")


def _steps(axis: Any, places: dict[float, tuple[Setting, float, float]], done: Recovered, title: str, x: str) -> None:
    for number, loss in enumerate(("Smooth-AP", "SupAP", "ROADMAP")):
        values = [Interval.of([row["steps"] for row in steps_of(done, *place, loss)]) for place in places.values()]
        aside = [place * (1 + 0.03 * (number - 1)) for place in places]
        look = {"fmt": "o-", "ms": 5, "capsize": 2, "color": LOSSES[loss][1], "label": loss}
        axis.errorbar(aside, [each.mean for each in values], [each.half for each in values], **look)
    axis.axhline(MOST_STEPS, color=GREY, lw=0.8, ls="--")
    axis.text(min(places), MOST_STEPS, "not in these steps", color=GREY, fontsize=7, va="bottom")
    tidy(axis, title=title, xlabel=x, ylabel=f"steps to mAP {MENDED}", ylim=(0, 1.12 * MOST_STEPS))


def plot_calibration(trained: Trainings, about: dict[str, str], path: Path) -> None:
    """Gap and AP by batch size; the gap against the batch AP where batches are fresh."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4))
    for number, loss in enumerate(("SupAP", "ROADMAP", "calibration")):
        look: dict[str, Any] = {"fmt": "o-", "ms": 5, "capsize": 2, "color": LOSSES[loss][1], "label": loss}
        for axis, shown in ((axes[0], lambda row: row["batch AP"] - row["AP"]), (axes[1], lambda row: row["AP"])):
            values = []
            for size in SIZES:
                ends = [rows[-1] for run, rows in trained.items() if run[:-1] == (loss, size, RATE, False)]
                values.append(Interval.of([100 * shown(row) for row in ends]))
            aside = [size * (1 + 0.04 * (number - 1)) for size in SIZES]
            axis.errorbar(aside, [each.mean for each in values], [each.half for each in values], **look)
        for run, rows in trained.items():
            if run.fresh and run.loss == loss:
                x, y = zip(*((100 * row["batch AP"], 100 * (row["batch AP"] - row["AP"])) for row in rows), strict=True)
                axes[2].plot(x, y, "-" if run.batch_size == min(FRESH_SIZES) else ":", color=LOSSES[loss][1], lw=0.9)
    for axis, title in ((axes[0], "Same batches each epoch: gap"), (axes[1], "Same batches each epoch: AP of all")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        tidy(axis, title=title, xlabel="batch size", ylabel="points of 100")
    axes[2].plot([], [], "-", color=GREY, label=f"batches of {min(FRESH_SIZES)}")
    axes[2].plot([], [], ":", color=GREY, label=f"batches of {max(FRESH_SIZES)}")
    axes[2].legend(*[x[-2:] for x in axes[2].get_legend_handles_labels()], frameon=False, fontsize=8)
    tidy(axes[2], title="Batches drawn anew: gap along the training", xlabel="batch AP, points", ylabel="points of 100")
    save(figure, axes[0], about, path, "; bars: 95 % intervals, lines: each seed")


# --- the whole of it -------------------------------------------------------------------------------------------------


def _begin() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # where a loss is 0, Adam's means fade into numbers that slow a processor down


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of each run (default 5)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time; they change no figure")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of what is written (default: results)")
    options = parser.parse_args(arguments)
    about = report.provenance() | {"threads": "1"}
    recovering, training = [*recoveries(options.seeds)], [*trainings(options.seeds)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn, initializer=_begin) as pool:
        # The long runs first, so that no process is left with one at the end.
        later = pool.map(train, training, chunksize=2)
        done = dict(zip(recovering, pool.map(recover, recovering, chunksize=8), strict=True))
        trained = dict(zip(training, later, strict=True))
    lines: list[tuple[str, Iterable[dict[str, Any]]]] = [
        ("tail", ({**run._asdict(), **row} for run, row in done.items())),
        ("calibration", ({**run._asdict(), **row} for run, rows in trained.items() for row in rows)),
    ]
    for name, rows in lines:
        report.write_csv(options.out / f"mechanism_{name}.csv", rows, about)
    text = tables(done, trained)
    (options.out / "mechanism.md").write_text(f"{report.in_words(about)}; {options.seeds} seeds.\n\n{text}")
    plot_tail(done, about, options.out / "mechanism_tail.png")
    plot_calibration(trained, about, options.out / "mechanism_calibration.png")
    gradients = {loss: pull(loss, torch.tensor([0.2], dtype=torch.float64), 0.01).item() for loss in [*LOSSES][:3]}
    print(f"{text}\nThe pull on a positive that 32 negatives outrank by 0.2, tau 0.01: ", end="")
    print(", ".join(f"{loss} {value:.1e}" for loss, value in gradients.items()))
    print(f"Wrote {options.out}: mechanism_tail and mechanism_calibration, each .csv and .png, and mechanism.md")


if __name__ == "__main__":
    main()
