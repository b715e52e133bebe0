"""The command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from . import losses

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EPOCHS = 15
LEAST_STEPS = 300  # unless it is said how many: an epoch of few images is a step or two
EVALUATIONS = 50  # at the most, unless it is said how often


def parse(about: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options; what is wrong with one alone ends the program."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [options]",
    )
    count, at_least_2, share = _whole(1), _whole(2), _number(0, 1)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data-root", type=Path, metavar="PATH", help="folder or zip, a folder a class; without it digits")
    add("--test-root", type=Path, metavar="PATH", help="test on the classes of this one that --data-root has not")
    add(
        "--split",
        choices=("classes", "images"),
        help="what is held out for the test; default classes, of digits images",
    )
    add("--test-fraction", type=share, metavar="X", help="how much is held out; default 1/2 of classes, 1/3 of images")
    add("--image-size", type=_whole(1, 4096), metavar="N", help="pixels a side that images are resized to; default 64")
    add("--channels", type=int, choices=(1, 3), help="default 1 if all images are gray, else 3")
    add(
        "--hold-mib",
        type=_whole(0),
        metavar="N",
        default=4096,
        help="keep images in memory up to this size; default 4096",
    )
    add("--skip-small-classes", action="store_true", help="leave out classes of a single image")

    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--backbone", metavar="NAME", default="small", help="small (default), or the name of a model of timm's")
    add("--pretrained", action="store_true", help="timm: begin with the weights that it downloads")
    add("--weights", type=Path, metavar="FILE", help="timm: begin with these weights")
    add("--dim", type=_whole(1, 1 << 16), metavar="N", default=64, help="dimensions of an embedding; default 64")
    add(
        "--blocks",
        type=_whole(1, 12),
        metavar="N",
        default=3,
        help="of the small net; each halves the image; default 3",
    )
    add("--width", type=_whole(1, 1 << 16), metavar="N", default=64, help="channels of the small net; default 64")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--batch-size", type=_whole(2, 1 << 20), metavar="N", default=128, help="images a step; default 128")
    add(
        "--mini-batch-size",
        type=count,
        metavar="N",
        help="images that the network takes at a time, twice; the loss is of the whole batch all the same",
    )
    add("--memory-size", type=count, metavar="N", help="rank this many past embeddings, too")
    add("--memory-warmup", type=_whole(0), metavar="N", help="steps before that; default --warmup")
    add("--per-class", type=at_least_2, metavar="N", help="images a class in a batch; default 4, or what fills it")
    length = training.add_mutually_exclusive_group()
    about_epochs = f"passes over the training images; default {EPOCHS}, or what makes {LEAST_STEPS} steps"
    length.add_argument("--epochs", type=count, metavar="N", help=about_epochs)
    length.add_argument("--steps", type=count, metavar="N", help="batches, instead of --epochs")
    add("--lr", type=_number(0, math.inf), metavar="X", default=3e-3, help="learning rate of AdamW; default 3e-3")
    add("--weight-decay", type=_number(0, math.inf, True), metavar="X", default=1e-4, help="of AdamW; default 1e-4")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="of the learning rate; default cosine")
    add("--warmup", type=_whole(0), metavar="N", help="steps over which it rises; default 20, a tenth of all at most")
    add("--amp", choices=AMP, default="none", help="autocast of the network; fp16 with a GradScaler; default none")
    add(
        "--rotate",
        type=_number(0, 180, True),
        metavar="X",
        default=10,
        help="turn images by up to X degrees; default 10",
    )
    add(
        "--resize",
        type=_number(0, 1, True),
        metavar="X",
        default=0.1,
        help="resize them by up to a share X; default 0.1",
    )
    add(
        "--shift",
        type=_number(0, 1, True),
        metavar="X",
        default=0.05,
        help="shift them by up to a share X; default 0.05",
    )
    add("--flip", action="store_true", help="mirror half of them")

    losses.add_options(parser)

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--out", type=Path, metavar="PATH", help="folder of the run; default runs/DATA-LOSS")
    add("--resume", action="store_true", help="go on from the folder's checkpoint, or begin if it has none")
    add("--seed", type=_whole(0, 2**32 - 1), metavar="N", default=0, help="of all chance; default 0")
    add("--device", metavar="NAME", help="default cuda where it is there, else cpu")
    add(
        "--evaluate-every", type=count, metavar="N", help=f"steps; default an epoch, {EVALUATIONS} times in all at most"
    )
    add("--checkpoint-every", type=count, metavar="N", help="steps; default as often as it evaluates")
    add("--k", type=count, metavar="N", nargs="+", default=[1, 10, 100], help="of R@k; default 1 10 100")
    add("--gap", action="store_true", help="measure the decomposability gap of random batches of --batch-size, too")
    add("--tensorboard", action="store_true", help="log for TensorBoard, too")

    options = parser.parse_args(arguments)
    if options.backbone == "small" and (options.pretrained or options.weights):
        parser.error("--pretrained and --weights are for --backbone with a model of timm's")
    if options.memory_warmup is not None and options.memory_size is None:
        parser.error("--memory-warmup is for --memory-size")
    if options.weights and not options.weights.is_file():
        parser.error(f"--weights: there is no file {options.weights}")
    return options


def complete(options: argparse.Namespace, images_to_train_on: int) -> None:
    """Puts numbers where the defaults depend on the data."""
    options.epoch = max(1, round(images_to_train_on / options.batch_size))
    if options.steps is None:
        few = options.epochs is None
        options.steps = max(EPOCHS * options.epoch, LEAST_STEPS) if few else options.epochs * options.epoch
    if options.warmup is None:
        options.warmup = min(20, options.steps // 10)
    if options.memory_size is not None and options.memory_warmup is None:
        options.memory_warmup = options.warmup
    if options.evaluate_every is None:
        options.evaluate_every = options.epoch * -(-options.steps // (EVALUATIONS * options.epoch))
    if options.checkpoint_every is None:
        options.checkpoint_every = options.evaluate_every


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def of(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            bound = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"has to be a whole number {bound}, got {text!r}")
        return int(text)

    return of


def _number(least: float, most: float, including_least: bool = False) -> Callable[[str], float]:
    def of(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value < most or (including_least and value == least)):
            above = f"{'at least' if including_least else 'above'} {least}"
            raise argparse.ArgumentTypeError(f"has to be a number {above} and below {most}, got {text!r}")
        return value

    return of
