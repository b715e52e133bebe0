"""Which runs a comparison is made of, and in which order: what matters most comes first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.images import Images
from retrieval.options import parse

from .losses import LOSSES
from .runs import Results, Run

# Raise it with every change that alters the outcome of a run.
VERSION = 1
MAIN = ("smooth-ap", "sup-ap", "roadmap", "contrastive")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HELD_OUT = 0.3  # of the training classes, where a learning rate is chosen
FIRST_CHOICE_SEED = 1000  # above those of the tests


@dataclass(frozen=True)
class Comparison:
    """One network, one schedule, one amount of images for all losses.

    Attributes:
        stages: (batch size, losses), one after the other.
        rates: the learning rates that each loss, at each batch size, chooses from.
        choices: runs of each rate for that, each with other held-out classes.
        seeds: test runs.
        images: that a run trains on, whatever its batch size, which divides it.
        data, network: options of the training program.
    """

    name: str
    stages: tuple[tuple[int, tuple[str, ...]], ...]
    rates: tuple[float, ...]
    choices: int
    seeds: int
    images: int
    data: tuple[str, ...]
    network: tuple[str, ...]

    def __len__(self) -> int:
        """How many runs it takes."""
        losses = sum(len(losses) for _, losses in self.stages)
        return losses * (len(self.rates) * self.choices + self.seeds)

    def runs(self, results: Results) -> Iterator[Run]:
        """All of them. The test's, seed by seed, take the learning rate that those before them chose."""
        for batch_size, losses in self.stages:
            for loss in losses:
                for rate in self.rates:
                    yield from (Run("choice", loss, batch_size, rate, seed) for seed in self.choice_seeds)
            for seed in range(self.seeds):
                for loss in losses:
                    yield Run("test", loss, batch_size, self.rate(loss, batch_size, results), seed)

    def rate(self, loss: str, batch_size: int, results: Results) -> float | None:
        """The learning rate of a loss; None as long as it is not chosen."""
        return results.best_rate(loss, batch_size, self.rates, self.choice_seeds)

    @property
    def choice_seeds(self) -> range:
        """Of the runs that choose a learning rate."""
        return range(FIRST_CHOICE_SEED, FIRST_CHOICE_SEED + self.choices)

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
    others = tuple(loss for loss in LOSSES if loss not in MAIN)
    stages = ((128, MAIN), (128, others), (32, MAIN), (512, MAIN))
    return Comparison("omniglot", stages, RATES, 1, seeds, 24_576, data, ("--width", "32"))


def held_out(images: Images, seed: int) -> tuple[Images, Images]:
    """Classes to train on and classes to choose by, of the images to train on, for a run of one seed."""
    count = len(images.classes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed - FIRST_CHOICE_SEED))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: max(2, round(HELD_OUT * count))]] = True
    by = chosen[images.labels]
    return images.take((~by).nonzero().flatten()), images.take(by.nonzero().flatten())
