"""The command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from . import losses, recipes
from .classes import BY
from .datasets import LAYOUTS
from .errors import InputError

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EPOCHS = 15
LEAST_STEPS = 300  # unless it is said how many: an epoch of few images is a step or two
EVALUATIONS = 50  # at the most, unless it is said how often
_OF_FILES = (  # which the digits have none of
    "class_by", "value_range", "skip_damaged", "skip_astray", "keep_blank", "keep_alike", "duplicates", "ignore_label",
)  # fmt: skip
_OF_FOLDERS = ("test_root", "split", "test_fraction", "channels", "skip_small_classes", *_OF_FILES)  # data sets say it
_OF_DATA_SETS = ("train_resize", "crop_scale", "crop_ratio", "test_resize")


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong, so that it can be told where it stands."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(about: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options; what is wrong with these alone ends the program."""
    parser = _Parser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [options]",
    )
    try:
        _add_options(parser)
        options = recipes.combine(parser, arguments)
        _check(parser, options)
    except InputError as error:
        argparse.ArgumentParser.error(parser, str(error))
    return options


def _add_options(parser: argparse.ArgumentParser) -> None:
    count, at_least_2, share = _whole(1), _whole(2), _number(0, 1)
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="take the options of a file (docs/recipes.md); those given beside it take the place of the file's",
    )
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data-root", type=Path, metavar="PATH", help="folder or zip, a folder a class; without it digits")
    add("--data-set", choices=LAYOUTS, help="--data-root is this data set, as it lies on disk (docs/recipes.md)")
    add(
        "--check",
        action="store_true",
        help="read everything once, print what is there and what would stop training, and end",
    )
    add(
        "--class-by",
        choices=BY,
        help="what names a class: the path of its folder (default, unless it can be meant in several ways), the path's "
        "first folder, or its last",
    )
    add("--test-root", type=Path, metavar="PATH", help="test on the classes of this one that --data-root has not")
    add(
        "--split",
        choices=("classes", "images"),
        help="what is held out for the test; default classes, of digits images; images with --test-root: test on all "
        "of it, though its classes are trained on",
    )
    add("--test-fraction", type=share, metavar="X", help="how much is held out; default 1/2 of classes, 1/3 of images")
    size = _whole(1, 4096)
    add(
        "--image-size",
        type=size,
        metavar="N",
        help="pixels a side that images are resized or cut to; default 64, of a data set 224",
    )
    add("--channels", type=int, choices=(1, 3), help="default 1 if all images are gray, else 3")
    add(
        "--hold-mib",
        type=_whole(0),
        metavar="N",
        default=4096,
        help="keep images in memory up to this size; default 4096",
    )
    add(
        "--value-range",
        type=_integer,
        nargs=2,
        metavar="N",
        help="of images of more than 8 bits: the values that become black and white; default the least and largest of "
        "--data-root",
    )
    add("--skip-small-classes", action="store_true", help="leave out classes of a single image")
    add("--skip-damaged", action="store_true", help="leave out images that cannot be decoded")
    add("--skip-astray", action="store_true", help="leave out images that lie in no class's folder")
    add("--keep-blank", action="store_true", help="train though most images are blank, or nearly")
    add(
        "--keep-alike",
        action="store_true",
        help="take classes as different whose names differ only in case, in space or in Unicode form",
    )
    add(
        "--duplicates",
        choices=("skip", "keep"),
        help="leave out pictures that are in several classes, and those of the test that are trained on; or keep them",
    )
    add("--train-resize", type=size, metavar="N", help="data sets: pixels of the shorter side before a random crop")
    add(
        "--crop-scale",
        type=_number(0, 1, most_too=True),
        nargs=2,
        metavar="X",
        help="data sets: least and largest share of the area in a random crop; default 0.16 1",
    )
    add(
        "--crop-ratio",
        type=_number(0, math.inf),
        nargs=2,
        metavar="X",
        help="data sets: least and largest width by height of a random crop; default 0.75 1.33",
    )
    add(
        "--test-resize",
        type=size,
        nargs="+",
        metavar="N",
        help="data sets: pixels of the shorter side, or width and height, before the middle is cut out of a test "
        "image; default 8/7 of --image-size",
    )
    add(
        "--ignore-label",
        metavar="NAME",
        help="a class whose images, and those in folders below it, are in no ranking, such as a folder of unlabelled "
        "ones",
    )

    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--backbone", metavar="NAME", default="small", help="small (default), or the name of a model of timm's")
    switch = argparse.BooleanOptionalAction
    add("--pretrained", action=switch, default=False, help="timm: begin with the weights that it downloads")
    add("--weights", type=Path, metavar="FILE", help="timm: begin with these weights, of torch.save or safetensors")
    add(
        "--distilled",
        action=switch,
        default=False,
        help="timm's DeiT: begin with the weights of its distilled twin, but for the distillation token",
    )
    add("--pool", choices=("avg", "max"), help="timm: over places; default what the model has")
    add(
        "--head",
        choices=("linear", "norm-linear", "none"),
        default="linear",
        help="timm: what comes after it; norm-linear has a layer norm first; default linear",
    )
    add(
        "--freeze-batch-norm",
        action=switch,
        default=False,
        help="timm: normalise by the running means and variances in training, too, and leave them as they are",
    )
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
    add(
        "--sampler",
        choices=("per-class", "hierarchical"),
        default="per-class",
        help="what a batch is of: any classes (default), or those of two super-classes",
    )
    add(
        "--batches-per-pair",
        type=count,
        metavar="N",
        default=10,
        help="hierarchical: of super-classes in an epoch; default 10",
    )
    length = training.add_mutually_exclusive_group()
    about_epochs = f"passes over the training images; default {EPOCHS}, or what makes {LEAST_STEPS} steps"
    length.add_argument("--epochs", type=count, metavar="N", help=about_epochs)
    length.add_argument("--steps", type=count, metavar="N", help="batches, instead of --epochs")
    add("--lr", type=_number(0, math.inf), metavar="X", default=3e-3, help="learning rate; default 3e-3")
    add("--head-lr", type=_number(0, math.inf), metavar="X", help="timm: of the layer after it; default --lr")
    add("--optimizer", choices=("adamw", "adam"), default="adamw", help="default adamw")
    add("--weight-decay", type=_number(0, math.inf, True), metavar="X", default=1e-4, help="of it; default 1e-4")
    add(
        "--schedule",
        choices=("cosine", "constant", "milestones"),
        default="cosine",
        help="of the learning rate; default cosine",
    )
    add("--milestones", type=count, metavar="N", nargs="+", help="epochs after which the rate is multiplied")
    add("--lr-factor", type=share, metavar="X", default=0.3, help="by this; default 0.3")
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
    add("--flip", action=switch, default=False, help="mirror half of them")

    losses.add_options(parser)
    parser.add_argument(
        "--loss-weight", type=_number(0, math.inf), metavar="X", default=1.0, help="what it is multiplied by; default 1"
    )

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
    add("--gap", action="store_true", help="measure the decomposability gap of the training batches, too")
    add("--tensorboard", action="store_true", help="log for TensorBoard, too")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options that do not go together."""
    if options.backbone == "small":
        of_timm = ("pretrained", "weights", "distilled", "pool", "freeze_batch_norm", "head_lr")
        named = [name for name in of_timm if getattr(options, name)] + ["head"] * (options.head != "linear")
        if named:
            parser.error(f"{_option(named[0])} is for --backbone with a model of timm's")
    if options.head == "none" and options.head_lr is not None:
        parser.error("--head-lr is for a --head of linear or norm-linear")
    if options.memory_warmup is not None and options.memory_size is None:
        parser.error("--memory-warmup is for --memory-size")
    if options.weights and not options.weights.is_file():
        parser.error(f"--weights: there is no file {options.weights}")
    if (options.schedule == "milestones") != (options.milestones is not None):
        parser.error("--milestones and --schedule milestones take each other")
    if options.data_set is None:
        named = [name for name in _OF_DATA_SETS if getattr(options, name) is not None]
        if named:
            parser.error(f"{_option(named[0])} is for --data-set")
        if options.sampler == "hierarchical":
            parser.error("--sampler hierarchical takes a --data-set that has super-classes")
        if options.value_range is not None and options.value_range[0] >= options.value_range[1]:
            parser.error("--value-range takes the least first, got {} {}".format(*options.value_range))
        named = [name for name in ("check", *_OF_FILES) if getattr(options, name)]
        if named and options.data_root is None:
            parser.error(f"{_option(named[0])} is for --data-root")
        return
    named = [name for name in _OF_FOLDERS if getattr(options, name)]
    if named:
        parser.error(f"{_option(named[0])} does not go with --data-set")
    if options.data_root is None:
        parser.error(
            f"--data-set {options.data_set} takes --data-root: the folder of {LAYOUTS[options.data_set].title}"
        )
    for name in ("crop_scale", "crop_ratio"):
        bounds = getattr(options, name)
        if bounds is not None and bounds[0] > bounds[1]:
            parser.error(f"{_option(name)} takes the least first, got {bounds[0]} {bounds[1]}")
    if options.image_size is None:
        options.image_size = 224
    if options.test_resize is None:
        options.test_resize = [options.image_size * 8 // 7]
    if len(options.test_resize) > 2 or min(options.test_resize) < options.image_size:
        wanted = f"one or two numbers of at least --image-size, which is {options.image_size}"
        parser.error(f"--test-resize takes {wanted}, got {' '.join(map(str, options.test_resize))}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def folder_of(options: argparse.Namespace) -> Path:
    """The folder of the run."""
    name = "digits" if options.data_root is None else options.data_root.resolve().stem
    return options.out or Path("runs") / (options.recipe or f"{name}-{options.loss}")


def complete(
    options: argparse.Namespace,
    images_to_train_on: int,
    epoch: int | None = None,
    earlier: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Puts numbers where the defaults depend on the data.

    Args:
        epoch: in steps; None for as many as images fill.
        earlier: settings of the run that goes on. It may be longer now, and keeps what its length then chose.
    """

    def kept(name: str, default: int) -> int:
        value = earlier.get(name)
        return value if isinstance(value, int) and value >= 0 else default

    options.epoch = epoch or max(1, round(images_to_train_on / options.batch_size))
    if options.steps is None:
        few = options.epochs is None
        options.steps = max(EPOCHS * options.epoch, LEAST_STEPS) if few else options.epochs * options.epoch
    if options.warmup is None:
        options.warmup = kept("warmup", min(20, options.steps // 10))
    if options.memory_size is not None and options.memory_warmup is None:
        options.memory_warmup = options.warmup
    if options.evaluate_every is None:
        every = options.epoch * -(-options.steps // (EVALUATIONS * options.epoch))
        options.evaluate_every = kept("evaluate_every", every) or every
    if options.checkpoint_every is None:
        options.checkpoint_every = options.evaluate_every


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def of(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            bound = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"has to be a whole number {bound}, got {text!r}")
        return int(text)

    return of


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"has to be a whole number, got {text!r}") from None


def _number(least: float, most: float, including_least: bool = False, most_too: bool = False) -> Callable[[str], float]:
    def of(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value < most or (including_least and value == least) or (most_too and value == most)):
            above = f"{'at least' if including_least else 'above'} {least}"
            below = f"{'at most' if most_too else 'below'} {most}"
            raise argparse.ArgumentTypeError(f"has to be a number {above} and {below}, got {text!r}")
        return value

    return of
