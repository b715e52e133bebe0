"""Which runs a comparison is made of, and in which order: what matters most comes first."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.images import Images
from retrieval.options import parse
from torch import Tensor

from . import free, runs, wordnet
from .losses import LOSSES, NINE, RULES
from .runs import CURVE, MEASURED, TRAINING_GAP, Results, Run

# Raise it with every change that alters the outcome of a run.
VERSION = 1
MAIN = ("smooth-ap", "sup-ap", "roadmap", "contrastive")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HELD_OUT = 0.3  # of the training classes, where a learning rate is chosen
FIRST_CHOICE_SEED = 1000  # above those of the tests
TRAINED, UNSEEN = 600, 700  # classes of glosses
BEYOND = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST = ("sup-ap", "sup-ap-0.05", "roadmap", "equal-errors", "equal-errors-0.05")  # of those that try margins
OTHER_RULES = ("medians", "fifths", "first-medians", "medians-0.05")
UNSEEN_AND_TRAINED = ("mAP@R", "R@1", "training AP", "training gap")
# The paper's claims: the linear part against the sigmoid, calibration against none; and both against pairs.
DIFFERENCES = (("sup-ap", "smooth-ap"), ("roadmap", "sup-ap"), ("roadmap", "smooth-ap"), ("roadmap", "contrastive"))
MARGIN_DIFFERENCES = (
    ("roadmap", "sup-ap"),
    *((rule, "sup-ap") for rule in RULES),
    ("sup-ap-0.05", "sup-ap"),
    ("equal-errors", "sup-ap-0.05"),
    ("equal-errors-0.05", "sup-ap-0.05"),
    ("medians-0.05", "sup-ap-0.05"),
)


@dataclass(frozen=True)
class Comparison:
    """One network, one schedule, one amount of images for all losses.

    Attributes:
        stages: (batch size, losses), one after the other.
        rates: the learning rates that each loss, at each batch size, chooses from; beyond: those that join them one
            by one, as long as the best is the smallest or the largest of all.
        choices: runs of each rate for that, each with other held-out classes.
        seeds: test runs.
        images: that a run trains on, whatever its batch size, which divides it.
        data, network: options of the training program.
        measured: what a run comes to, by name; shown, compared: what tables say of a loss, and of two.
        differences: pairs of losses to compare.
    """

    name: str
    stages: tuple[tuple[int, tuple[str, ...]], ...]
    rates: tuple[float, ...]
    choices: int
    seeds: int
    images: int
    data: tuple[str, ...]
    network: tuple[str, ...]
    beyond: tuple[float, ...] = ()
    measured: tuple[str, ...] = (*CURVE, *MEASURED)
    shown: tuple[str, ...] = ("mAP@R", "R@1", "mAP", "gap")
    compared: tuple[str, ...] = (CURVE[0], "mAP@R", "R@1", "gap")
    differences: tuple[tuple[str, str], ...] = DIFFERENCES

    def __len__(self) -> int:
        """How many runs it takes, at the least."""
        losses = sum(len(losses) for _, losses in self.stages)
        return losses * (len(self.rates) * self.choices + self.seeds)

    def runs(self, results: Results) -> Iterator[Run]:
        """All of them. The test's, seed by seed, take the learning rate that those before them chose."""
        for batch_size, losses in self.stages:
            for loss in losses:
                tried: list[float] = []
                while more := [rate for rate in self.grid(loss, batch_size, results) if rate not in tried]:
                    for rate in more:
                        yield from (Run("choice", loss, batch_size, rate, seed) for seed in self.choice_seeds)
                    tried += more
            for seed in range(self.seeds):
                for loss in losses:
                    yield Run("test", loss, batch_size, self.rate(loss, batch_size, results), seed)

    def rate(self, loss: str, batch_size: int, results: Results) -> float | None:
        """The learning rate of a loss; None as long as it is not chosen."""
        return results.best_rate(loss, batch_size, self.grid(loss, batch_size, results), self.choice_seeds)

    def grid(self, loss: str, batch_size: int, results: Results) -> list[float]:
        """The learning rates to try, as far as is known now."""
        rates = sorted(self.rates)
        while (best := results.best_rate(loss, batch_size, rates, self.choice_seeds)) is not None:
            below, above = ([x for x in self.beyond if x < rates[0]], [x for x in self.beyond if x > rates[-1]])
            if best == rates[0] and below:
                rates.insert(0, max(below))
            elif best == rates[-1] and above:
                rates.append(min(above))
            else:
                break
        return rates

    @property
    def choice_seeds(self) -> range:
        """Of the runs that choose a learning rate."""
        return range(FIRST_CHOICE_SEED, FIRST_CHOICE_SEED + self.choices)

    def train(self, run: Run, data: tuple[Any, ...], report: Callable[[int], object]) -> dict[str, Any]:
        """The values of a run on what was loaded."""
        images = data if run.role == "test" else held_out(data[0], run.seed)
        return runs.train(run, [*self.data, *self.network], self.images, *images, report)

    def key(self, train: Images, test: Images) -> str:
        """Of all that the bits of a run depend on, but for what the run says itself and for machine and versions."""
        said = (VERSION, self.images, self.network, HELD_OUT, train.digest, test.digest)
        return hashlib.blake2b(repr(said).encode(), digest_size=6).hexdigest()

    def load(self) -> tuple[Images, Images]:
        """The images to train on, and those of the test."""
        return load(parse(None, [*self.data]))


def digits(seeds: int) -> Comparison:
    """scikit-learn's digits: images are held out for the test."""
    network = ("--blocks", "2", "--width", "16", "--dim", "32")
    return Comparison("digits", ((128, MAIN), (32, MAIN)), RATES, 3, seeds, 12_288, (), network)


def omniglot(data_root: Path, seeds: int) -> Comparison:
    """Omniglot's two small splits, as they are, in one folder: characters of unseen alphabets are the test."""
    roots = [data_root / f"images_background_small{split}.zip" for split in (1, 2)]
    missing = [root.name for root in roots if not root.is_file()]
    if missing:
        raise InputError(
            f"{data_root} has no {' and no '.join(missing)}: --data-root has to be the folder of both zips of "
            "github.com/brendenlake/omniglot (python/images_background_small1.zip and ...small2.zip)"
        )
    data = ("--data-root", str(roots[0]), "--test-root", str(roots[1]), "--class-by", "path", "--image-size", "24")
    others = tuple(loss for loss in NINE if loss not in MAIN)
    stages = ((128, MAIN), (128, others), (32, MAIN), (512, MAIN))
    return Comparison("omniglot", stages, RATES, 1, seeds, 24_576, data, ("--width", "32"))


class WordNet(Comparison):
    """Glosses in place of images; ``data`` is their folder. A seed draws the classes that it trains on."""

    def load(self) -> tuple[Any, ...]:
        """All glosses."""
        return (wordnet.load(Path(*self.data)),)

    def key(self, glosses: wordnet.Glosses) -> str:
        """Of all that the bits of a run depend on, but for what the run says itself and for machine and versions."""
        said = (VERSION, self.images, TRAINED, UNSEEN, glosses.digest)
        return hashlib.blake2b(repr(said).encode(), digest_size=6).hexdigest()

    def train(self, run: Run, data: tuple[Any, ...], report: Callable[[int], object]) -> dict[str, Any]:
        """The values of a run; a learning rate is chosen by other unseen classes than the test's."""
        (glosses,) = data
        test, choice, train = classes(int(glosses.labels.max()) + 1, run.seed)
        seen, unseen = glosses.of_classes(train), glosses.of_classes(test if run.role == "test" else choice)
        return wordnet.train(run, self.images, seen, unseen, report)


def words(folder: Path, seeds: int) -> WordNet:
    """WordNet's glosses: a fine-tuning of pretrained word vectors; classes that no one trained on are the test."""
    warm, rules = tuple(loss for loss in LOSSES if loss.endswith("-0.05")), tuple(RULES)
    first = (*NINE, *(loss for loss in warm if loss.removesuffix("-0.05") in NINE))
    rules = (*rules, *(loss for loss in warm if loss not in first))
    stages = ((32, first), (128, first), (32, rules), (128, rules))
    differences = (
        *DIFFERENCES,
        *((loss, loss.removesuffix("-0.05")) for loss in warm),
        ("sup-ap-0.05", "smooth-ap-0.05"),
    )
    differences = tuple(dict.fromkeys((*differences, *MARGIN_DIFFERENCES)))
    return WordNet(
        "wordnet",
        stages,
        (1e-3, 3e-3, 1e-2),
        3,
        seeds,
        19_200,
        (str(folder),),
        (),
        BEYOND,
        wordnet.MEASURED,
        (*UNSEEN_AND_TRAINED,),
        (*UNSEEN_AND_TRAINED,),
        differences,
    )


class Free(Comparison):
    """Free embeddings in place of images; ``data`` is the similarity of negatives to begin with."""

    def load(self) -> tuple[Any, ...]:
        """Nothing: a seed draws its space."""
        return ()

    def key(self) -> str:
        """Of all that the bits of a run depend on, but for what the run says itself and for machine and versions."""
        said = (VERSION, self.images, self.data, free.CLASSES, free.PER_CLASS, free.DIM, free.SPREAD)
        return hashlib.blake2b(repr(said).encode(), digest_size=6).hexdigest()

    def train(self, run: Run, data: tuple[Any, ...], report: Callable[[int], object]) -> dict[str, Any]:
        """The values of a run; a learning rate is chosen on other spaces than the test's."""
        return free.train(run, self.images, float(*self.data), report)


def free_embeddings(similarity: str, seeds: int) -> Free:
    """Margins in a space whose negatives have this similarity to begin with."""
    return Free(
        f"free_{similarity}",
        ((16, FIRST), (16, OTHER_RULES), (128, FIRST), (128, OTHER_RULES)),
        (1e-2, 3e-2, 1e-1),
        3,
        seeds,
        16_384,
        (similarity,),
        (),
        BEYOND,
        free.MEASURED,
        (*UNSEEN_AND_TRAINED,),
        (*UNSEEN_AND_TRAINED,),
        MARGIN_DIFFERENCES,
    )


def omniglot_margins(data_root: Path, seeds: int) -> Comparison:
    """Margins on Omniglot, by a smaller network than omniglot()'s on smaller images."""
    whole = omniglot(data_root, seeds)
    return dataclasses.replace(
        whole,
        name="omniglot_margins",
        stages=((32, FIRST), (32, OTHER_RULES), (128, FIRST), (128, OTHER_RULES)),
        rates=(3e-3, 1e-2, 3e-2),
        choices=3,
        images=24_576,
        data=(*whole.data[:-1], "16"),
        network=("--width", "16", "--blocks", "3"),
        beyond=BEYOND,
        measured=(*MEASURED, *TRAINING_GAP),
        shown=UNSEEN_AND_TRAINED,
        compared=UNSEEN_AND_TRAINED,
        differences=MARGIN_DIFFERENCES,
    )


def classes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which classes are the test, which choose, the same for every seed; and which of the others this one trains on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    test, choice, others = order.split([UNSEEN, UNSEEN, count - 2 * UNSEEN])
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(1 + seed))[:TRAINED]
    return test, choice, others[drawn]


def held_out(images: Images, seed: int) -> tuple[Images, Images]:
    """Classes to train on and classes to choose by, of the images to train on, for a run of one seed."""
    count = len(images.classes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed - FIRST_CHOICE_SEED))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: max(2, round(HELD_OUT * count))]] = True
    by = chosen[images.labels]
    return images.take((~by).nonzero().flatten()), images.take(by.nonzero().flatten())
