"""Train a network for retrieval with the losses of roadmap_ext, and measure how well it retrieves.

Without --data-root it takes scikit-learn's handwritten digits. With it, any folder or zip of images in which each
folder that holds images is a class; the classes are split, so that those retrieved are classes never trained on.
--check reads every image once, says what is there and what would spoil a training, and ends.
Writes into --out, all along: metrics.csv (a row an evaluation), steps.csv (a row a step), checkpoint.pt, best.pt and
settings.json; and at the end curves.png and neighbours.png. Ctrl-C leaves a checkpoint; --resume goes on from it, and
from a run that was killed, to the same bits. Under torchrun all its processes train as one. docs/training.md goes
through it all.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import PIL
import torch
from retrieval import losses, pictures, trained
from retrieval.data import check, load
from retrieval.errors import InputError, out_of_memory, reason
from retrieval.images import Images
from retrieval.options import complete, folder_of, parse
from retrieval.photos import Photos
from retrieval.progress import Progress
from retrieval.ranks import Ranks
from retrieval.run import WRITTEN, Board, Onlooker, Run
from retrieval.training import Training, make_sampler
from torch import Tensor

import roadmap_ext
from roadmap_ext.metrics import retrieval_metrics, training_gap


class StopRequest(BaseException):
    """A signal asked to stop. Not an Exception: no handler of errors may take it for one."""


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish that is looked at between steps; the second stops the process at once.

    A thread takes note: Python's own handlers wait for the call into a library that is under way, which may be long.
    """

    def __enter__(self) -> Interrupt:
        self.signal: int | None = None
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._before = {number: signal.signal(number, _noted) for number in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in self._before:
                continue
            if self.signal is not None:
                print("\nStopped at once: --resume goes on from the last checkpoint.", file=sys.stderr, flush=True)
                os._exit(128 + number[0])
            self.signal = number[0]
            print("\nStopping when this step is done; once more stops at once.", file=sys.stderr, flush=True)
        os.close(reader)

    def check(self, anywhere: Callable[[bool], bool] = bool) -> None:
        """Raises StopRequest if a signal has come; ``anywhere`` says whether one has to any of several ranks."""
        if anywhere(self.signal is not None):
            raise StopRequest


def _noted(number: int, frame: FrameType | None) -> None:
    """The handler: what there is to do the thread does."""


def evaluate(
    training: Training, test: Images | Photos, run: Run | Onlooker, step: int, check: Callable[[], None]
) -> None:
    """Adds a row to the metrics: those of the test images, and what the steps since the last row took."""
    begin = time.perf_counter()
    embeddings, options = training.embed(test, check), training.options
    of_training = training.embed(training.images, check) if options.gap else None

    def both() -> dict[str, float]:
        measured = measure(embeddings, test.labels, options, check)
        return measured if of_training is None else measured | measure_gap(of_training, training, step, check)

    measured = training.ranks.from_first(both)
    if not all(map(math.isfinite, measured.values())):
        raise InputError(f"the embeddings of step {step} are not finite: lower --lr, or train with --amp none")
    since = run.metrics.rows[-1]["step"] if run.metrics.rows else 0
    recent = {name: run.steps.column(name, since) for name in ("loss", "step_ms", "loss_ms")}
    row = {
        "step": step,
        "epoch": step / options.epoch,
        "loss": statistics.fmean(recent["loss"]) if recent["loss"] else None,
        **measured,
        "step_ms": statistics.median(recent["step_ms"]) if recent["step_ms"] else None,
        "loss_ms": statistics.median(recent["loss_ms"]) if recent["loss_ms"] else None,
        # Of all steps: memory that later ones use again does not rise.
        "loss_mib": max(run.steps.column("loss_mib"), default=None),
        "evaluation_s": time.perf_counter() - begin,
    }
    if run.best is None or row["mAP@R"] > run.best["mAP@R"]:
        run.save_best(row, trained.contents(training))
    run.metrics.add(row)


def measure(
    embeddings: Tensor, labels: Tensor, options: argparse.Namespace, check: Callable[[], None]
) -> dict[str, float]:
    """How well embeddings retrieve each other."""
    labels, normalize = labels.to(embeddings.device), options.normalize is not False
    return retrieval_metrics(embeddings, labels, k=options.k, normalize=normalize, progress=lambda queries: check())


def measure_gap(embeddings: Tensor, training: Training, step: int, check: Callable[[], None]) -> dict[str, float]:
    """How far the AP of the last epoch's batches is above that of all training images, and would be by chance."""
    batches = [batch.to(embeddings.device) for batch in training.batches(step)]
    labels, normalize = training.images.labels.to(embeddings.device), training.options.normalize is not False
    gap = training_gap(embeddings, labels, batches, normalize=normalize, progress=lambda queries: check())
    return {"train_AP": gap.ap, "batch_AP": gap.batch_ap, "gap": gap.gap, "gap_null": gap.null}


def due(options: argparse.Namespace, step: int) -> bool:
    """Whether a step is evaluated."""
    return step % options.evaluate_every == 0 or step == options.steps


def train(training: Training, test: Images | Photos, run: Run | Onlooker, interrupt: Interrupt, board: Board) -> None:
    """From where the run stands to its last step, with a checkpoint whenever it stops."""
    options, ranks = training.options, training.ranks
    # Ranks have to stop at the same place, which between steps they agree on.
    within = interrupt.check if ranks.world == 1 else lambda: None
    step = run.state["step"] if run.state else 0
    if step:
        print(finished(options) if step == options.steps else f"Going on from step {step:,} of {options.steps:,}.")
    print(heading(options.k))
    for row in run.metrics.rows:
        print(line(row))
    try:
        with Progress("training", options.steps, "steps", initial=step, silent=not ranks.first) as progress:
            while True:
                if due(options, step) and step not in run.metrics.column("step"):
                    evaluate(training, test, run, step, within)
                    board.add(run.metrics.rows[-1], "retrieval")
                    progress.write(line(run.metrics.rows[-1]))
                if step >= options.steps:
                    if run.best is None:  # it was removed when nothing was left to evaluate
                        run.save_best(run.metrics.rows[-1], trained.contents(training))
                    break
                if step and step % options.checkpoint_every == 0:
                    run.save(step=step, **training.state())
                interrupt.check(ranks.any)
                run.steps.add(training.step(step))
                step += 1
                if step == 1:
                    progress.write(first_batch(training.diagnose()))
                row = run.steps.rows[-1]
                board.add(row, "training")
                progress.set_postfix_str(
                    f"loss {row['loss']:.4f}, {row['loss_ms']:.1f} of {row['step_ms']:.0f} ms", False
                )
                progress.update()
    finally:
        # A step that was cut short, by a second Ctrl-C or an error, is no state to go on from.
        if sys.exc_info()[0] in (None, StopRequest):
            run.save(step=step, **training.state())


def first_batch(found: roadmap_ext.Diagnosis) -> str:
    """What the loss has to do at the beginning, and a warning if a part of it has nothing."""
    lines = ["The first batch (docs/training.md):", *(f"  {each}" for each in str(found).splitlines())]
    return "\n".join([*lines, *(f"Warning: {part} has nothing to do in the first batch" for part in found.idle)])


def finished(options: argparse.Namespace) -> str:
    """What there is to say of a run that has nothing left to do."""
    if options.schedule == "cosine":
        return f"Finished already; --schedule cosine ends at its {options.steps:,} steps."
    return "Finished already: --resume with more --steps or --epochs goes on."


def heading(k: list[int]) -> str:
    """The names above line()."""
    names = ["step", "epoch", "loss", "mAP", "mAP@R", "R-prec", *(f"R@{count}" for count in k)]
    return "".join(f"{name:>9}" for name in names) + f"{'step':>11}{'its loss took':>24}"


def line(row: dict[str, Any]) -> str:
    """A row of the metrics for the screen."""
    loss = row["loss"]
    text = f"{row['step']:>9,}{row['epoch']:>9.1f}"
    text += " " * 9 if loss is None else f"{loss:>9.4f}" if loss >= 1e-3 else f"{loss:>9.1e}"
    text += "".join(
        f"{v:>9.4f}" for name, v in row.items() if name in ("mAP", "mAP@R", "R-precision") or name.startswith("R@")
    )
    if row["step_ms"] is None:
        return text
    mib = row["loss_mib"]
    memory = "" if mib is None else f"{mib:.0f} MiB" if mib >= 1 else "< 1 MiB"
    return text + f"{row['step_ms']:>8.0f} ms{row['loss_ms']:>11.1f} ms{memory:>10}"


def draw_curves(training: Training, run: Run | Onlooker) -> None:
    """How the run went, as far as it did."""
    if run.steps.rows and training.ranks.first:
        shown = ["mAP", "mAP@R", "R-precision", *(f"R@{count}" for count in training.options.k[:1])]
        title = f"{training.options.loss}, batches of {training.options.batch_size:,}"
        pictures.curves(run.steps, run.metrics, shown, title, run.folder / "curves.png")


def draw_neighbours(training: Training, test: Images | Photos, run: Run | Onlooker, check: Callable[[], None]) -> None:
    """What the network of a run that is over retrieves."""
    title = f"test images and their nearest others after {training.options.steps:,} steps"
    embeddings = training.embed(test, check)
    if training.ranks.first:
        pictures.neighbours(embeddings, test, run.folder / "neighbours.png", title)


def usable(name: str | None, ranks: Ranks) -> torch.device:
    """The device, if it is there; of several, where none is named by its number, one for each process."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used: {reason(error)}") from error
    return device


def settings(
    options: argparse.Namespace, training: Training, train_on: Images | Photos, test: Images | Photos
) -> dict[str, Any]:
    """All that the bits of a run depend on."""
    of_the_data = {"data_root", "test_root", "split", "test_fraction", "image_size", "channels", "check", "class_by"}
    of_the_data |= {"value_range", "duplicates", "skip_small_classes", "skip_damaged", "skip_astray", "keep_blank"}
    of_the_data |= {"keep_alike", "ignore_label"}
    free = {"hold_mib", "out", "resume", "epochs", "epoch", "checkpoint_every", "tensorboard", "notes"}
    given = {
        name: value for name, value in vars(options).items() if name not in of_the_data | free | losses.setting_names()
    }
    if options.schedule != "cosine":
        del given["steps"]  # such a run may be made longer
    chosen = {
        "loss settings": dict(training.loss.settings),
        "per_class": training.per_class,
        "training images": train_on.digest,  # which hold all that the options of the data say
        "test images": test.digest,
        "--ignore-label": options.ignore_label,
        "value range": train_on.values and list(train_on.values),
        "device": training.device.type,
        "weights": options.weights and options.weights.name,
    }
    return given | chosen


def check_length(options: argparse.Namespace, step: int, made_with: dict[str, Any], folder: Path) -> None:
    """Raises InputError if a run that has come to ``step`` cannot have the length that is asked for."""
    before = made_with.get("steps")
    if options.schedule == made_with.get("schedule") == "cosine" and before != options.steps:
        raise InputError(
            f"{folder}: steps was {before} and is {options.steps}, and with --schedule cosine the learning rate of "
            f"every step depends on their number, so that such a run keeps its length: give --steps {before}, or name "
            "another --out; a run of --schedule constant or milestones can be made longer"
        )
    if step > options.steps:
        raise InputError(
            f"{folder} has come to step {step:,}: --steps {options.steps:,} is less: give as many at least, or name "
            "another --out"
        )


def about(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What the bits may depend on, too."""
    cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "roadmap_ext": roadmap_ext.__version__,
        "instruction set": roadmap_ext.build_info()["cpu"],
        "numpy": np.__version__,
        "Pillow": PIL.__version__,
        "machine": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": ranks.world,
    }


def prepare(
    options: argparse.Namespace, ranks: Ranks, stack: ExitStack
) -> tuple[Training, Images | Photos, Run | Onlooker, Board]:
    """All that can go wrong before training starts."""
    device = usable(options.device, ranks)
    folder = folder_of(options)
    train_on, test = load(options, folder)
    ranks.check(options.batch_size)
    epoch = make_sampler(options, train_on).epoch
    ranks.join(device)
    stack.callback(ranks.leave)
    opened: list[Run] = []

    def open_run() -> tuple[Any, ...]:
        opened.append(stack.enter_context(closing(Run(folder, resume=options.resume))))
        return opened[0].state, opened[0].best

    state, best = ranks.from_first(open_run)
    run = opened[0] if ranks.first else Onlooker(folder, state, best)
    complete(options, len(train_on), epoch, state["settings"] if state else {})
    training = Training(options, train_on, device, ranks)
    stack.callback(training.close)
    training.probe()

    def compare() -> None:
        if state:
            check_length(options, state["step"], state["settings"], folder)
        opened[0].check(settings(options, training, train_on, test), about(device, ranks))

    ranks.from_first(compare)
    if state:
        try:
            training.load(state)
        except (ValueError, RuntimeError) as error:
            raise run.damaged(f"does not hold the state of such a run: {reason(error)}") from error
    boards: list[Board] = []

    def begin() -> tuple[Any, ...]:
        log = folder / "tensorboard" if options.tensorboard else None
        boards.append(stack.enter_context(closing(Board(log, state["step"] if state else 0))))
        opened[0].begin(lambda step: due(options, step))
        return run.metrics.rows, run.steps.rows

    run.metrics.rows, run.steps.rows = ranks.from_first(begin)
    board = boards[0] if ranks.first else Board(None, 0)

    for note in options.notes:
        print(note)
    for name, what in (("Train", train_on), ("Test", test)):
        shape = f"{what.channels} x {what.size} x {what.size}"
        print(f"{name}: {len(what):,} images of {len(what.classes):,} classes, {shape}")
    parameters = sum(p.numel() for p in training.network.parameters())
    many = f", {ranks.world} processes as one" if ranks.world > 1 else ""
    print(f"Network: {options.backbone}, {parameters:,} parameters, on {device}{many}")
    print(f"Loss: {losses.describe(training.loss)}")
    print(f"Batches: {options.batch_size:,} images, {training.per_class} a class; {options.epoch:,} an epoch")
    if training.repeating:
        few = f"{training.repeating:,} of the {len(train_on.classes):,} classes to train on have less"
        print(f"  {few} than {training.per_class} images: theirs come more than once in a batch")
    for note in run.notes:
        print(f"Since the checkpoint, {note}: the bits may differ")
    return training, test, run, board


def carry_out(training: Training, test: Images | Photos, run: Run | Onlooker, board: Board) -> int:
    """Trains and draws. Returns the exit status."""
    with Interrupt() as interrupt:
        within = interrupt.check if training.ranks.world == 1 else lambda: None
        try:
            train(training, test, run, interrupt, board)
            draw_curves(training, run)
            draw_neighbours(training, test, run, within)
        except StopRequest:
            print(f"\nStopped. {run.folder} has a checkpoint: the same command with --resume goes on from it.")
            draw_curves(training, run)
            return 128 + (interrupt.signal or 0)
    last, kept = run.metrics.rows[-1], run.best
    best = max(kept, *run.metrics.rows, key=lambda row: row["mAP@R"])  # a longer run has no row of its earlier end
    print(f"\nmAP@R {last['mAP@R']:.4f} at the end; the best was {best['mAP@R']:.4f}, after {best['step']:,} steps.")
    if best is not kept:
        print(f"best.pt was removed since; it is now of step {kept['step']:,}, of mAP@R {kept['mAP@R']:.4f}.")
    print(f"Wrote {run.folder}: {', '.join(name for name in WRITTEN if (run.folder / name).exists())}")
    print("To embed images with the best network, in Python (docs/training.md):")
    print(f"    import sys; sys.path.append({str(Path(__file__).resolve().parent)!r})")
    print("    from retrieval.trained import load")
    print(f"    embeddings = load({str(run.folder)!r}).embed(['image.png'])")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(__doc__, arguments)
    # A resumed run has to come to the same bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would add to the time of all that is measured
    torch.backends.cudnn.benchmark = False
    status = 2  # of an error before training starts
    name = "train_retrieval.py"
    try:
        with ExitStack() as stack:
            ranks = Ranks()
            if ranks.world > 1:
                name += f", rank {ranks.rank}"
            if not ranks.first:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if options.check:
                return check(options, folder_of(options))
            ready = prepare(options, ranks, stack)
            status = 1
            return carry_out(*ready)
    except (InputError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return status
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        remedy = "end other programs, raise the limit (ulimit -v, ulimit -u), or lower --hold-mib or --batch-size"
        print(f"{name}: error: the system gives no more memory or threads ({reason(error)}): {remedy}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("\nStopped before training began.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold anything
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
