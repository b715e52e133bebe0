"""The command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import losses

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(about: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options; what is wrong with one alone ends the program."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", type=Path, help="folder or zip; digits without it")
    data.add_argument("--test-root", type=Path, help="test on the classes of this one that --data-root has not")
    data.add_argument(
        "--split",
        choices=("classes", "images"),
        help="what is held out for the test; default classes, images for digits",
    )
    data.add_argument("--test-fraction", type=_fraction, help="of what is split; default 1/2 of classes, 1/3 of images")
    data.add_argument("--image-size", type=_positive, help="pixels a side that images are resized to; default 64")
    data.add_argument("--channels", type=int, choices=(1, 3), help="default 1 if all images are gray, else 3")
    data.add_argument("--hold-mib", type=int, default=4096, help="images up to this size in all stay in memory")
    data.add_argument("--skip-small-classes", action="store_true", help="leave out classes of a single image")

    network = parser.add_argument_group("network")
    network.add_argument("--backbone", default="small", help="small (default), or the name of a model of timm's")
    network.add_argument("--pretrained", action="store_true", help="timm: begin with the weights of the hub")
    network.add_argument("--weights", type=Path, help="timm: begin with these weights")
    network.add_argument("--dim", type=_positive, default=64, help="of the embeddings; default 64")
    network.add_argument("--blocks", type=_positive, default=3, help="of the small net; default 3")
    network.add_argument("--width", type=_positive, default=64, help="channels of the small net; default 64")

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=_positive, default=128, help="default 128")
    training.add_argument(
        "--per-class", type=_at_least_two, help="images a class in a batch; default 4, or what fills it"
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=_positive, help="times as many steps as the training images fill batches; default 15"
    )
    length.add_argument("--steps", type=_positive, help="instead of --epochs")
    training.add_argument("--lr", type=float, default=3e-3, help="of AdamW; default 3e-3")
    training.add_argument("--weight-decay", type=float, default=1e-4, help="default 1e-4")
    training.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="default cosine")
    training.add_argument("--warmup", type=int, default=20, help="steps on which the learning rate rises; default 20")
    training.add_argument("--amp", choices=AMP, default="none", help="autocast of the network; fp16 with a GradScaler")
    training.add_argument("--rotate", type=float, default=10, help="degrees images are turned by, at most; default 10")
    training.add_argument("--resize", type=float, default=0.1, help="share they are resized by; default 0.1")
    training.add_argument(
        "--shift", type=float, default=0.05, help="share of the size they are shifted by; default 0.05"
    )
    training.add_argument("--flip", action="store_true", help="mirror half of them")

    losses.add_options(parser)

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, help="the folder of the run; default runs/DATA-LOSS")
    run.add_argument(
        "--resume", action="store_true", help="go on from the folder's checkpoint, or begin if it has none"
    )
    run.add_argument("--seed", type=int, default=0, help="of all chance; default 0")
    run.add_argument("--device", type=torch.device, help="default cuda where it is there, else cpu")
    run.add_argument("--evaluate-every", type=_positive, help="steps; default an epoch")
    run.add_argument("--checkpoint-every", type=_positive, help="steps; default an epoch")
    run.add_argument("--k", type=_positive, nargs="+", default=[1, 10, 100], help="of R@k; default 1 10 100")
    run.add_argument("--tensorboard", action="store_true", help="log for TensorBoard, too")
    options = parser.parse_args(arguments)
    if options.backbone == "small" and (options.pretrained or options.weights):
        parser.error("--pretrained and --weights are for --backbone with a model of timm's")
    if options.weights and not options.weights.is_file():
        parser.error(f"--weights: there is no file {options.weights}")
    return options


def complete(options: argparse.Namespace, images_to_train_on: int) -> None:
    """Puts numbers where the defaults depend on the data."""
    options.epoch = max(1, round(images_to_train_on / options.batch_size))
    options.steps = options.steps or (options.epochs or 15) * options.epoch
    options.evaluate_every = options.evaluate_every or options.epoch
    options.checkpoint_every = options.checkpoint_every or options.epoch


def _positive(text: str) -> int:
    return _number(text, 1)


def _at_least_two(text: str) -> int:
    return _number(text, 2)


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"has to be a whole number of at least {least}, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"has to lie between 0 and 1, got {text}")
    return value
