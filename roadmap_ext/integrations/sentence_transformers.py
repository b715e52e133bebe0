"""The losses for sentence-transformers' trainer, with a batch sampler and an evaluator that suit them.

A batch of that trainer is one tensor of token numbers a column. A column of texts with labels becomes a batch that
ranks itself; columns (anchor, positive, negative, ...) become queries and references. Everything else, prompts, cached
mini-batches and the wrappers for Matryoshka embeddings included, is the library's own: it calls the model, the loss
gets embeddings.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import data, distributed, modules
from ..advice import for_labels
from ..metrics import retrieval_metrics
from ..validation import check_count, check_plain

_NEEDED = "sentence-transformers>=5.7,<7"


def _check_version(found: str | None) -> None:
    """Raise ImportError unless ``found`` is 5.7 or later, and before 7: what this has been tested with."""
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers is None or not (5, 7) <= (int(numbers[1]), int(numbers[2])) < (7, 0):
        raise ImportError(
            f"{__name__} needs {_NEEDED}, but "
            + (f"{found} is installed" if found else "it is not installed")
            + ': pip install "sentence-transformers[train]>=5.7,<7"'
        )


try:
    import sentence_transformers
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    _check_version(None)
else:
    _check_version(sentence_transformers.__version__)
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
    from sentence_transformers.base.sampler import DefaultBatchSampler

__all__ = [
    "CalibrationLoss",
    "PerClassBatchSampler",
    "RetrievalEvaluator",
    "RoadmapLoss",
    "SmoothAPLoss",
    "SupAPLoss",
]

_ROADMAP = """
@inproceedings{ramzi2021robust,
    title={Robust and Decomposable Average Precision for Image Retrieval},
    author={Elias Ramzi and Nicolas Thome and Cl{\\'e}ment Rambour and Nicolas Audebert and Xavier Bitot},
    booktitle={Advances in Neural Information Processing Systems},
    year={2021}
}
"""
_SMOOTH_AP = """
@inproceedings{brown2020smooth,
    title={Smooth-{AP}: Smoothing the Path Towards Large-Scale Image Retrieval},
    author={Andrew Brown and Weidi Xie and Vicky Kalogeiton and Andrew Zisserman},
    booktitle={European Conference on Computer Vision},
    year={2020}
}
"""
_GRADIENT_CACHE = """
@inproceedings{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    booktitle={Proceedings of the 6th Workshop on Representation Learning for NLP},
    year={2021}
}
"""

_NO_QUERY = torch.iinfo(torch.int64).min  # the label of explicit negatives: no query has it


class _SentenceLoss(CachedLossMixin, nn.Module):
    """What the losses share. A subclass names the module whose settings it takes, and its defaults for texts."""

    _module: ClassVar[type[modules._EmbeddingLoss]]
    _for_texts: ClassVar[Mapping[str, Any]] = {}
    _citation: ClassVar[str] = _ROADMAP
    model: Any
    loss: Any

    def __init__(
        self,
        model: Any,
        *,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        loss = self._module(**{**self._for_texts, **settings})  # checks them all
        if loss.settings["reduction"] == "none":
            raise ValueError('the trainer takes a loss that is one number: leave reduction out, or choose "sum"')
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None:
                check_count(name, value, 1)
        if mini_batch_num_tokens is not None and mini_batch_size is None:
            raise ValueError("mini_batch_num_tokens packs mini-batches by tokens: it needs a mini_batch_size, too")
        if mini_batch_size is not None and has_static_embedding_input(model):
            raise ValueError(
                "mini_batch_size does not go with a model that begins with a StaticEmbedding, whose inputs have no "
                "batch dimension: leave it out"
            )
        self.model = model
        self.loss = loss
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self._labels_seen = False

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether the library's wrappers have to treat it as one of their Cached losses."""
        return self.mini_batch_size is not None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss of tokenised columns, [B] texts each, as the trainer calls it."""
        features = list(sentence_features)
        if self.uses_gradient_cache:
            cached: Tensor = CachedLossMixin.forward_cached(self, features, labels)
            return cached
        return self.compute_loss_from_embeddings([self.model(each)["sentence_embedding"] for each in features], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of columns of mini-batches, which the library's cached forward calls."""
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of columns of embeddings, [B, D] each.

        Args:
            embeddings: one column, of texts with labels; or anchors, positives and any number of negatives.
            labels: [B] any integer dtype: the class of each row. None: each row of several columns is a class.

        Raises:
            TypeError: labels are no integers, such as the scores of pairs.
            ValueError: a single column without labels; shapes differ.
        """
        anchors, *candidates = embeddings
        rows = len(anchors)
        if labels is not None:
            check_plain("labels", "a torch.Tensor of integers", labels, partial(for_labels, "labels", labels, rows))
        if not candidates:
            if labels is None:
                raise ValueError(
                    "a single column of texts needs a column of labels, integers, named label: which texts are of one "
                    "class; without labels give two columns or more: anchor, positive, negative, ..."
                )
            loss: Tensor = self.loss(anchors, labels)
            return loss
        if labels is None:  # numbers that no other rank has
            rank, ranks = (torch.distributed.get_rank(), distributed.world_size()) if distributed.several() else (0, 1)
            labels = torch.arange(rows, device=anchors.device) * ranks + rank
        else:
            self._look_at(labels)
        negatives = labels.new_full((rows * (len(candidates) - 1),), _NO_QUERY, dtype=torch.int64)
        loss = self.loss(
            anchors, labels, ref_emb=torch.cat(candidates), ref_labels=torch.cat([labels.long(), negatives])
        )
        return loss

    def _look_at(self, labels: Tensor) -> None:
        """Raises for scores of pairs, and warns, once, of what looks like 1 where two texts are similar and 0 else."""
        if labels.is_floating_point():
            raise TypeError(
                "the label column beside the columns of texts holds scores, and here it says which rows are of one "
                "class: keep the rows whose texts are similar and remove the column"
            )
        if not self._labels_seen and ((labels == 0) | (labels == 1)).all():
            warnings.warn(
                "the label column beside the columns of texts holds only 0 and 1. Here it says which rows are of one "
                "class and share their positives. If it says whether the texts of a row are similar, keep the rows of "
                "label 1 and remove the column: dataset.filter(lambda row: row['label']).remove_columns('label')",
                UserWarning,
                stacklevel=2,
            )
        self._labels_seen = True

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        settings = {name: value for name, value in self.loss.settings.items() if name in self.loss._names}
        cached = {name: getattr(self, name) for name in ("mini_batch_size", "mini_batch_num_tokens")}
        return settings | cached

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return self._citation + (_GRADIENT_CACHE if self.uses_gradient_cache else "")


class SupAPLoss(_SentenceLoss):
    """:class:`roadmap_ext.SupAPLoss` for sentence-transformers' trainer: the first loss to try on texts.

    Data is either a column of texts and a column ``label`` of integers, in batches of several texts of each label
    (``batch_sampler=PerClassBatchSampler``): each text ranks all others of its batch. Or columns (anchor, positive,
    negative, ...), any number of negatives, none included: each anchor ranks the positives and negatives of all rows,
    and finds its row's positive. Rows that share a positive, such as several positives of one question, are told so by
    a ``label``, equal in these rows; without it ``BatchSamplers.NO_DUPLICATES`` keeps them apart.

    Args:
        model: the SentenceTransformer that is trained.
        mini_batch_size: texts at a time in the memory for activations, for batches that are larger (GradCache; the
            model then runs twice). None: the whole batch.
        mini_batch_num_tokens: packs mini-batches by their number of tokens instead; as in the library.
        show_progress_bar: of the mini-batches.
        settings: those of :class:`roadmap_ext.SupAPLoss`. ``tau`` is 0.05 here, not 0.01: it suits sentence encoders.
            ``gather_across_devices=True`` ranks against the texts of all processes, with exact gradients.

    Raises:
        TypeError: an unknown setting, or one of the wrong type.
        ValueError: a setting out of range; ``reduction="none"``; ``mini_batch_size`` with a static embedding.

    Example:
        >>> from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # doctest: +SKIP
        >>> model = SentenceTransformer("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> trainer = SentenceTransformerTrainer(
        ...     model, train_dataset=dataset, loss=SupAPLoss(model)
        ... )  # doctest: +SKIP
    """

    _module = modules.SupAPLoss
    _for_texts: ClassVar[Mapping[str, Any]] = {"tau": 0.05}


class SmoothAPLoss(_SentenceLoss):
    """:class:`roadmap_ext.SmoothAPLoss` for sentence-transformers' trainer, with ``tau=0.05``; see
    :class:`SupAPLoss` for data and arguments.
    """

    _module = modules.SmoothAPLoss
    _for_texts: ClassVar[Mapping[str, Any]] = {"tau": 0.05}
    _citation = _SMOOTH_AP


class RoadmapLoss(_SentenceLoss):
    """:class:`roadmap_ext.RoadmapLoss` for sentence-transformers' trainer; see :class:`SupAPLoss` for data and
    arguments.

    With ``tau=0.05``, ``positive_margin=0.6`` and ``negative_margin=0.2``. The package's own margins, 0.9 and 0.6, are
    those of image networks, whose negatives lie near 0.6. In a sentence encoder they lie near 0.1: hardly one passes
    0.6, so that the calibration loss only pulls positives together, which harms.
    """

    _module = modules.RoadmapLoss
    _for_texts: ClassVar[Mapping[str, Any]] = {"tau": 0.05, "positive_margin": 0.6, "negative_margin": 0.2}


class CalibrationLoss(_SentenceLoss):
    """:class:`roadmap_ext.CalibrationLoss` for sentence-transformers' trainer, with the margins of
    :class:`RoadmapLoss`; see :class:`SupAPLoss` for data and arguments.
    """

    _module = modules.CalibrationLoss
    _for_texts: ClassVar[Mapping[str, Any]] = {"positive_margin": 0.6, "negative_margin": 0.2}


class PerClassBatchSampler(DefaultBatchSampler):
    """:class:`roadmap_ext.data.PerClassBatchSampler` as the trainer's ``batch_sampler``: four texts of each label.

        SentenceTransformerTrainingArguments(..., batch_sampler=PerClassBatchSampler)
        SentenceTransformerTrainingArguments(..., batch_sampler=functools.partial(PerClassBatchSampler, per_class=8))

    The arguments but ``per_class`` are the trainer's. All batches are full, whatever ``drop_last`` says, and
    ``generator`` is not used: what an epoch holds depends on its number and on ``seed`` alone. With several processes
    the trainer gives each its own batches.

    Raises:
        ValueError: the data set has no column of labels, or too few texts to fill a batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool = True,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        per_class: int = 4,
    ) -> None:
        super().__init__(dataset, batch_size, True, valid_label_columns, generator, seed)
        names = [name for name in valid_label_columns or ["label"] if name in dataset.column_names]
        if not names:
            raise ValueError(
                f"PerClassBatchSampler needs a column of labels, named one of {valid_label_columns or ['label']}, and "
                f"the data set has {dataset.column_names}"
            )
        self._batches = data.PerClassBatchSampler(dataset[names[0]], per_class, batch_size, seed)
        self.sampler = self._batches  # where accelerate looks for set_epoch() when it shares batches out

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of ``epoch``."""
        self._batches.set_epoch(epoch)


class RetrievalEvaluator(BaseEvaluator):
    """Exact retrieval metrics of texts with labels, for the trainer's ``evaluator``: mAP, mAP@R, R-precision and R@k.

    Each text ranks all others, or the ``corpus``, by cosine similarity; those of its label are relevant
    (:func:`roadmap_ext.metrics.retrieval_metrics`). For classes that were not trained on it says how well the model
    retrieves. ``primary_metric`` is mAP@R, so ``metric_for_best_model="eval_mAP@R"`` keeps the best checkpoint.

    Args:
        texts: the queries.
        labels: the class of each, integers.
        corpus, corpus_labels: what to rank; None: the texts themselves, each but for the query.
        k: the k of R@k.
        name: put before the names of the metrics.
        batch_size: texts that are embedded at a time.
        truncate_dim: uses as many dimensions of an embedding alone, as for Matryoshka embeddings.
        write_csv: adds a row to ``retrieval_evaluation_NAME_results.csv`` in the trainer's folder.
        show_progress_bar: of the texts that are embedded.

    Raises:
        ValueError: texts and labels differ in length; only one of ``corpus`` and ``corpus_labels`` was given.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Any,
        corpus: Sequence[str] | None = None,
        corpus_labels: Any = None,
        *,
        k: int | Iterable[int] = (1, 10),
        name: str = "",
        batch_size: int = 32,
        truncate_dim: int | None = None,
        write_csv: bool = True,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__()
        if (corpus is None) != (corpus_labels is None):
            raise ValueError("corpus and corpus_labels belong together: give both, or neither")
        pairs = [("texts", texts, "labels", labels), ("corpus", corpus, "corpus_labels", corpus_labels)]
        for what, given, of, numbers in pairs:
            if given is not None and len(given) != len(numbers):
                raise ValueError(f"{of} must have one class for each of {len(given)} {what}, got {len(numbers)}")
        self.texts, self.labels = list(texts), torch.as_tensor(labels)
        self.corpus = None if corpus is None else list(corpus)
        self.corpus_labels = None if corpus_labels is None else torch.as_tensor(corpus_labels)
        self.k = (k,) if isinstance(k, int) else tuple(k)
        self.name, self.batch_size, self.truncate_dim = name, batch_size, truncate_dim
        self.write_csv, self.show_progress_bar = write_csv, show_progress_bar
        self.primary_metric = "mAP@R"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of a model by name, as the library's evaluators return them."""
        options = {
            "batch_size": self.batch_size,
            "convert_to_tensor": True,
            "truncate_dim": self.truncate_dim,
            "show_progress_bar": self.show_progress_bar,
        }
        if self.corpus is None:
            embeddings, references = model.encode(self.texts, **options), None
        else:
            embeddings, references = (
                model.encode_query(self.texts, **options),
                model.encode_document(self.corpus, **options),
            )
        labels = self.labels.to(embeddings.device)
        ref_labels = None if self.corpus_labels is None else self.corpus_labels.to(embeddings.device)
        measured = retrieval_metrics(embeddings, labels, references, ref_labels, k=self.k)
        if output_path is not None and self.write_csv:
            self._write(Path(output_path), {"epoch": epoch, "steps": steps, **measured})
        metrics: dict[str, float] = self.prefix_name_to_metrics(measured, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _write(self, folder: Path, row: Mapping[str, float]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"retrieval_evaluation{'_' + self.name if self.name else ''}_results.csv"
        begun = path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not begun:
                writer.writerow(row)
            writer.writerow(row.values())

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return {"k": list(self.k)} | ({} if self.truncate_dim is None else {"truncate_dim": self.truncate_dim})
