"""roadmap_ext.integrations.sentence_transformers inside the installed library: its losses, wrappers and trainer.

Expected values come from the losses of embeddings that the model's own encode() gives, or from pairs marked by hand.
"""

import csv
import functools
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import begin, start, statuses
from torch.nn.functional import normalize

import roadmap_ext
from roadmap_ext import reference
from roadmap_ext.metrics import retrieval_metrics

pytestmark = pytest.mark.deep

NAMES = ["SupAPLoss", "SmoothAPLoss", "RoadmapLoss", "CalibrationLoss"]


def features(model, *columns):
    return [{key: x for key, x in model.preprocess(list(column)).items() if torch.is_tensor(x)} for column in columns]


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def columns(texts):
    """Anchors, positives and negatives: rows 0 and 1 are of one class, rows 2 and 3 of another."""
    every, _ = texts
    return every[0:2] + every[8:10], every[2:4] + every[10:12], every[20:24]


class TestLoss:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_labels(self, library, tiny, texts, name):
        """Its settings for texts, and every text against all others."""
        loss = getattr(library.ours, name)(tiny)
        every, labels = texts[0], torch.tensor(texts[1])
        embeddings = tiny(features(tiny, every)[0])["sentence_embedding"]
        plain = getattr(roadmap_ext, name)(**loss._for_texts)
        assert {"tau": 0.05, "negative_margin": 0.2}.items() & loss._for_texts.items()
        expected = plain(embeddings, labels)
        whole = gradients(expected, tiny)
        ours = loss(features(tiny, every), labels)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradients(ours, tiny), whole)

    @pytest.mark.parametrize("labels", [None, [5, 5, 9, 9]])
    def test_of_columns(self, library, tiny, columns, labels):
        """An anchor ranks the positives and negatives of all rows; its own positive counts, or all of its label."""
        anchors, *candidates = (normalize(tiny.encode(column, convert_to_tensor=True)) for column in columns)
        target = torch.zeros(4, 8, dtype=torch.bool)
        for i in range(4):
            for j in range(4):
                target[i, j] = i == j if labels is None else labels[i] == labels[j]
        expected = reference.ap_loss(anchors @ torch.cat(candidates).T, target, tau=0.05)
        given = labels and torch.tensor(labels)
        loss = library.ours.SupAPLoss(tiny)(features(tiny, *columns), given)
        torch.testing.assert_close(loss, expected)
        # Without a negative the columns are pairs.
        expected = reference.ap_loss(anchors @ candidates[0].T, target[:, :4], tau=0.05)
        torch.testing.assert_close(library.ours.SupAPLoss(tiny)(features(tiny, *columns[:2]), given), expected)

    @pytest.mark.parametrize("by", ["labels", "columns"])
    @pytest.mark.parametrize("size", [{"mini_batch_size": 3}, {"mini_batch_size": 3, "mini_batch_num_tokens": 20}])
    def test_mini_batches(self, library, tiny, texts, columns, by, size):
        given = (
            (features(tiny, texts[0]), torch.tensor(texts[1])) if by == "labels" else (features(tiny, *columns), None)
        )
        expected = library.ours.RoadmapLoss(tiny)(*given)
        whole = gradients(expected / 3, tiny)
        loss = library.ours.RoadmapLoss(tiny, **size)(*given)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss / 3, tiny), whole, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            assert not library.ours.RoadmapLoss(tiny, **size)(*given).requires_grad

    @pytest.mark.parametrize("size", [None, 5])
    def test_matryoshka(self, library, tiny, texts, size):
        every, labels = texts[0], torch.tensor(texts[1])
        loss = library.ours.SupAPLoss(tiny, mini_batch_size=size)
        wrapped = library.losses.MatryoshkaLoss(tiny, loss, [32, 8], [1.0, 0.5])
        embeddings = tiny(features(tiny, every)[0])["sentence_embedding"]
        plain = roadmap_ext.SupAPLoss(tau=0.05)
        expected = plain(embeddings, labels) + 0.5 * plain(embeddings[:, :8], labels)
        whole = gradients(expected, tiny)
        ours = wrapped(features(tiny, every), labels)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradients(ours, tiny), whole, rtol=1e-4, atol=1e-6)

    def test_model_card(self, library, tiny, tmp_path, texts):
        data = library.Dataset.from_dict({"text": texts[0], "label": texts[1]})
        trainer = make_trainer(library, tiny, data, library.ours.SmoothAPLoss(tiny, mini_batch_size=8), tmp_path)
        trainer.train()
        tiny.save(str(tmp_path / "saved"))
        card = (tmp_path / "saved" / "README.md").read_text()
        assert "roadmap_ext.integrations.sentence_transformers.SmoothAPLoss" in card
        assert "brown2020smooth" in card
        assert "gao2021scaling" in card
        assert '"tau": 0.05' in card
        config = library.ours.RoadmapLoss(tiny).get_config_dict()
        assert json.loads(json.dumps(config)) == config
        assert config["positive_margin"] == 0.6
        assert config["mini_batch_size"] is None
        assert "ramzi2021robust" in library.ours.RoadmapLoss(tiny).citation

    def test_errors(self, library, tiny, columns):
        loss = library.ours.SupAPLoss(tiny)
        rows = features(tiny, *columns)
        with pytest.raises(ValueError, match="a single column of texts needs a column of labels"):
            loss(rows[:1], None)
        with pytest.raises(TypeError, match="labels must have an integer dtype"):
            loss(rows[:1], torch.tensor([0.5, 1.0, 0.3, 0.1]))
        with pytest.raises(TypeError, match="holds scores, and here it says which rows"):
            loss(rows[:2], torch.tensor([0.5, 1.0, 0.3, 0.1]))
        with pytest.warns(UserWarning, match="holds only 0 and 1. Here it says which rows are of one class"):
            loss(rows[:2], torch.tensor([0, 1, 1, 1]))
        for kind, match, change in (
            (ValueError, "the trainer takes a loss that is one number", {"reduction": "none"}),
            (ValueError, "mini_batch_size must be at least 1", {"mini_batch_size": 0}),
            (ValueError, "it needs a mini_batch_size, too", {"mini_batch_num_tokens": 30}),
            (TypeError, "unexpected keyword argument 'scale'", {"scale": 20.0}),
        ):
            with pytest.raises(kind, match=match):
                library.ours.SupAPLoss(tiny, **change)

    def test_static_embeddings(self, library, tiny):
        static = library.SentenceTransformer(modules=[library.modules.StaticEmbedding(tiny.tokenizer, embedding_dim=8)])
        with pytest.raises(ValueError, match="inputs have no batch dimension: leave it out"):
            library.ours.SupAPLoss(static, mini_batch_size=4)
        (each,) = features(static, ["a dog", "the old dog", "a king", "the old king"])
        assert library.ours.SupAPLoss(static)([each], torch.tensor([0, 0, 1, 1])).isfinite()

    def test_versions(self, library):
        code = "import sys, roadmap_ext, roadmap_ext.integrations; sys.exit('sentence_transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
        for found in ("5.6.1", "7.0.0", None):
            with pytest.raises(ImportError, match=r"needs sentence-transformers>=5.7,<7, but"):
                library.ours._check_version(found)
        library.ours._check_version("5.7.0")


def make_trainer(library, model, data, loss, folder, evaluator=None, **changed):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 12,
        "batch_sampler": functools.partial(library.ours.PerClassBatchSampler, per_class=3),
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = library.Arguments(str(folder), **(settings | changed))
    return library.Trainer(model, arguments, train_dataset=data, loss=loss, evaluator=evaluator)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestTrainer:
    def test_checkpoint_and_resume(self, library, tiny, tiny_path, texts, tmp_path):
        """To the bits of a run that never stopped, and in an epoch that is not the first."""
        data = library.Dataset.from_dict({"text": texts[0], "label": texts[1]})
        trainer = make_trainer(
            library,
            tiny,
            data,
            library.ours.SupAPLoss(tiny),
            tmp_path,
            max_steps=8,
            save_strategy="steps",
            save_steps=6,
        )
        trainer.train()
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert sum(map(float, logged[-3:])) < sum(map(float, logged[:3]))
        again = library.SentenceTransformer(tiny_path, device="cpu")
        loss = library.ours.SupAPLoss(again)
        make_trainer(library, again, data, loss, tmp_path, max_steps=8).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-6")
        )
        assert torch.equal(weights(again), weights(tiny))

    def test_batches_have_several_of_a_class(self, library, tiny, texts, tmp_path):
        data = library.Dataset.from_dict({"text": texts[0], "label": texts[1]})
        loader = make_trainer(library, tiny, data, library.ours.SupAPLoss(tiny), tmp_path).get_train_dataloader()
        seen = []
        for _ in range(2):
            epoch = [batch["label"].tolist() for batch in loader]
            assert len(epoch) == 4
            assert all(sorted(map(labels.count, set(labels))) == [3] * 4 for labels in epoch)
            seen.append(epoch)
        assert seen[0] != seen[1]
        with pytest.raises(ValueError, match="needs a column of labels"):
            library.ours.PerClassBatchSampler(data.remove_columns("label"), 12)

    def test_several_data_sets_with_prompts(self, library, tiny, texts, tmp_path):
        """Labels in one, columns in the other, with the loss and the prompts of each."""
        every, labels = texts
        data = library.DatasetDict(
            classes=library.Dataset.from_dict({"text": every, "label": labels}),
            pairs=library.Dataset.from_dict({"question": every[::2], "answer": every[1::2]}),
        )
        losses = {"classes": library.ours.RoadmapLoss(tiny), "pairs": library.ours.SupAPLoss(tiny, mini_batch_size=5)}
        seen = []
        for name, loss in losses.items():
            loss.register_forward_hook(
                lambda _, given, __, name=name: seen.append((name, [f["input_ids"][0].tolist() for f in given[0]]))
            )
        prompts = {"classes": {"text": "class: "}, "pairs": {"question": "query: ", "answer": "document: "}}

        def sampler(dataset, **options):
            if "label" in dataset.column_names:
                return library.ours.PerClassBatchSampler(dataset, **options)
            from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

            return NoDuplicatesBatchSampler(dataset, **options)

        before = weights(tiny)
        make_trainer(library, tiny, data, losses, tmp_path, prompts=prompts, batch_sampler=sampler).train()
        assert {name for name, _ in seen} == {"classes", "pairs"}
        for name, columns in seen:
            begins = [tiny.tokenizer.decode(ids, skip_special_tokens=True).split(" ")[0] for ids in columns]
            assert begins == (["class"] if name == "classes" else ["query", "document"])
        assert not torch.equal(weights(tiny), before)

    def test_a_pretrained_model_learns(self, library, tmp_path):
        """all-MiniLM tells three senses of words apart better after a few steps."""
        model = library.SentenceTransformer(library.pretrained, device="cpu")
        subjects = {"plant": "oak moss fern rose", "bank": "loan teller vault coin", "music": "flute opera drum choir"}
        every = [f"{thing} number {n}" for things in subjects.values() for thing in things.split() for n in range(3)]
        labels = [n for n in range(3) for _ in range(12)]
        data = library.Dataset.from_dict({"text": every, "label": labels})
        evaluator = library.ours.RetrievalEvaluator(every, labels)
        before = evaluator(model)
        loss, sampler = library.ours.SupAPLoss(model), library.ours.PerClassBatchSampler
        make_trainer(library, model, data, loss, tmp_path, learning_rate=5e-5, batch_sampler=sampler).train()
        assert evaluator(model)["mAP@R"] > before["mAP@R"] + 0.05


class TestEvaluator:
    def test_figures(self, library, tiny, texts, tmp_path):
        every, labels = texts
        evaluator = library.ours.RetrievalEvaluator(every, labels, k=(1, 5), name="test")
        measured = evaluator(tiny, str(tmp_path), epoch=0.5, steps=7)
        expected = retrieval_metrics(tiny.encode(every, convert_to_tensor=True), torch.tensor(labels), k=(1, 5))
        assert measured == {f"test_{name}": value for name, value in expected.items()}
        assert evaluator.primary_metric == "test_mAP@R"
        evaluator(tiny, str(tmp_path), epoch=1.0, steps=14)
        with (tmp_path / "retrieval_evaluation_test_results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["steps"] for row in rows] == ["7", "14"]
        assert float(rows[1]["mAP@R"]) == measured["test_mAP@R"]

    def test_corpus_and_dimensions(self, library, tiny, texts):
        every, labels = texts
        evaluator = library.ours.RetrievalEvaluator(
            every[::3], labels[::3], every[1::3], labels[1::3], k=1, truncate_dim=8
        )
        queries, corpus = (tiny.encode(part, convert_to_tensor=True)[:, :8] for part in (every[::3], every[1::3]))
        expected = retrieval_metrics(queries, torch.tensor(labels[::3]), corpus, torch.tensor(labels[1::3]), k=1)
        assert evaluator(tiny) == pytest.approx(expected)
        assert evaluator.get_config_dict() == {"k": [1], "truncate_dim": 8}

    def test_the_best_checkpoint(self, library, tiny, texts, tmp_path):
        every, labels = texts
        data = library.Dataset.from_dict({"text": every, "label": labels})
        trainer = make_trainer(
            library, tiny, data, library.ours.SupAPLoss(tiny), tmp_path,
            evaluator=library.ours.RetrievalEvaluator(every, labels), eval_strategy="steps", eval_steps=2,
            save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="mAP@R",
        )  # fmt: skip
        trainer.train()
        found = [row["eval_mAP@R"] for row in trainer.state.log_history if "eval_mAP@R" in row]
        assert trainer.state.best_metric == max(found)
        assert len(found) == 2

    def test_errors(self, library):
        with pytest.raises(ValueError, match="corpus and corpus_labels belong together"):
            library.ours.RetrievalEvaluator(["a"], [0], corpus=["b"])
        with pytest.raises(ValueError, match="labels must have one class for each of 2 texts, got 1"):
            library.ours.RetrievalEvaluator(["a", "b"], [0])


def ranked(rank, world, folder, path, size, by):
    """One of several ranks."""
    begin(rank, world, folder, 60)
    torch.save(trained(rank, folder, path, size, by), folder / f"{rank}.pt")
    gc.collect()  # DistributedDataParallel must be gone before its group
    torch.distributed.destroy_process_group()


def trained(rank, folder, path, size, by):
    """Loss and gradients of a rank with its share of the batch, in DistributedDataParallel."""
    from sentence_transformers import SentenceTransformer

    from roadmap_ext.integrations.sentence_transformers import SupAPLoss

    batch = torch.load(folder / "batch.pt")
    mine = slice(0, 7) if rank == 0 else slice(7, None)
    model = SentenceTransformer(path, device="cpu")
    loss = SupAPLoss(model, gather_across_devices=True, mini_batch_size=size)
    # The pooler takes no part in an embedding.
    loss.model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    given = [{key: x[mine] for key, x in column.items()} for column in batch["columns"]]
    value = loss(given, batch["labels"][mine] if by == "labels" else None)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("by", ["labels", "columns"])
@pytest.mark.parametrize("size", [None, 4])
def test_gather_across_devices(library, tiny, tiny_path, texts, tmp_path, size, by):
    """Two processes have the loss and the gradients of one with the whole batch."""
    if size and library.version < (6, 2):
        pytest.skip("the library's cached backward exchanges gradients with every mini-batch before 6.2")
    every, labels = texts
    columns = features(tiny, every[:18]) if by == "labels" else features(tiny, every[:18], every[18:36])
    batch = {"columns": columns, "labels": torch.tensor(labels[:18])}
    torch.save(batch, tmp_path / "batch.pt")
    expected = library.ours.SupAPLoss(tiny)(columns, batch["labels"] if by == "labels" else None)
    whole = gradients(expected, tiny)
    assert statuses(start(2, ranked, tmp_path, tiny_path, size, by)) == [0, 0]
    for rank in range(2):
        value, grads = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(grads, whole, rtol=1e-3, atol=1e-5)


def test_every_block_of_the_page_runs(library, tiny_path, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/sentence-transformers.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for block in blocks:
        for there, here in {"sentence-transformers/all-MiniLM-L6-v2": tiny_path, "[384, 128, 64]": "[32, 8]"}.items():
            block = block.replace(there, here)
        exec(block, scope)
    assert len(blocks) == 3
    assert scope["trainer"].state.global_step == 2
    assert re.findall(r"^pip install (.*)$", page, re.MULTILINE) == ['"sentence-transformers[train]>=5.7,<7"']
