"""The losses of ranks from embeddings, and every way to say what is relevant: the kernels against the reference."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize

import roadmap_ext
from roadmap_ext import (
    EmbeddingMemory,
    HierarchicalAPLoss,
    MRRLoss,
    NDCGLoss,
    RecallAtKLoss,
    SupAPLoss,
    reference,
    roadmap_loss,
)

pytestmark = pytest.mark.cpu_kernels

MODULES = {"ap": SupAPLoss, "recall": RecallAtKLoss, "ndcg": NDCGLoss, "mrr": MRRLoss, "hap": HierarchicalAPLoss}
LEVELS = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 1, 3], [1, 2, 4], [1, 2, 5], [2, 3, 6]])


def batch(n=40, dtype=torch.float64):
    return torch.randn(n, 8, dtype=dtype, requires_grad=True)


def relations(rows, columns, alone):
    """Keywords of a loss by what they say: of references that are the batch, or others."""
    levels, ref_levels = (LEVELS[torch.randint(len(LEVELS), (n,))] for n in (rows, columns))
    classes, ref_classes = (torch.rand(n, 12) < 0.15 for n in (rows, columns))
    made = {
        "labels": {"labels": levels[:, 1]} | ({} if alone else {"ref_labels": ref_levels[:, 1]}),
        "levels": {"labels": levels} | ({} if alone else {"ref_labels": ref_levels}),
        "levels, some unknown": {"labels": levels, "ignore_label": 3} | ({} if alone else {"ref_labels": ref_levels}),
        "classes": {"labels": classes} | ({} if alone else {"ref_labels": ref_classes}),
        "mask": {"positives": torch.rand(rows, columns) < 0.1},
        "pairs": {"positives": (torch.randint(rows, (60,)), torch.randint(columns, (60,), dtype=torch.int32))},
        "relevance": {"relevance": torch.randint(-6, 4, (rows, columns)).clamp(min=0) / 2},
    }
    return made


def evaluate(function, x, others, **options):
    inputs = [x] if others is None else [x, others]
    if others is not None:
        options["ref_emb"] = others
    loss = function(x, **options)
    return loss.detach(), torch.autograd.grad(loss, inputs, torch.ones_like(loss))


@pytest.mark.parametrize("relation", relations(1, 1, True))
@pytest.mark.parametrize("loss", MODULES)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_losses_by_every_relation(loss, relation, alone, chunk_size):
    x, others = batch(), None if alone else batch(55)
    given = relations(40, 40 if alone else 55, alone)[relation]
    for options in ({"reduction": "none"}, {"calibration_weight": 0.25, "surrogate": "smooth"}):
        ours = evaluate(roadmap_loss, x, others, loss=loss, chunk_size=chunk_size, **given, **options)
        truth = evaluate(reference.roadmap_loss, x, others, loss=loss, **given, **options)
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relation", relations(1, 1, True))
def test_relations_by_explicit_levels(relation):
    """Each as the levels of pairs, written out: [B, N], for a loss of scores."""
    x, ids = batch(20).detach(), torch.arange(20) % 15
    given = relations(20, 20, True)[relation]
    level = torch.zeros(20, 20, dtype=torch.int64)
    labels, ignore = given.get("labels"), (ids[:, None] == ids) | torch.eye(20, dtype=torch.bool)
    for i in range(20):
        for j in range(20):
            if relation == "labels":
                level[i, j] = labels[i] == labels[j]
            elif relation == "classes":
                level[i, j] = bool((labels[i] & labels[j]).any())
            elif relation == "mask":
                level[i, j] = given["positives"][i, j]
            elif relation == "pairs":
                level[i, j] = (i, j) in list(zip(*(each.tolist() for each in given["positives"]), strict=True))
            elif relation == "relevance":
                level[i, j] = int(2 * given["relevance"][i, j])
            else:
                shared = [bool(same) for same in labels[i] == labels[j]]
                level[i, j] = [*shared, False].index(False)
                ignore[i, j] |= bool(((labels[i] == 3) | (labels[j] == 3)).any()) and relation != "levels"
    scores = normalize(x) @ normalize(x).T
    options = {"calibration_weight": 0.0, "ids": ids, "ref_ids": ids}
    for gain in ("exponential", "linear"):
        relevance = level / 2 if relation == "relevance" else level
        expected = roadmap_ext.ndcg_loss(scores, relevance, ignore=ignore, gain=gain, reduction="none")
        ours = roadmap_loss(x, loss="ndcg", gain=gain, reduction="none", **options, **given)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    expected = roadmap_ext.ap_loss(scores, level > 0, ignore=ignore)
    torch.testing.assert_close(roadmap_loss(x, **options, **given), expected)


def test_hierarchical_relevance_of_labels():
    """HAPPIER's: (l / L)^alpha over the number of items that share as many levels."""
    x, labels = batch(30).detach(), LEVELS[torch.randint(len(LEVELS), (30,))]
    scores, itself = normalize(x) @ normalize(x).T, torch.eye(30, dtype=torch.bool)
    level = (labels[:, None] == labels).long().cumprod(2).sum(2)
    number = torch.stack([((level == each) & ~itself).sum(1) for each in range(1, 4)], dim=1).clamp(min=1)
    for alpha in (1.0, 0.0, 3.0):
        worth = (torch.arange(1.0, 4).double() / 3) ** alpha / number
        relevance = torch.cat([torch.zeros(30, 1), worth], dim=1).gather(1, level)
        expected = roadmap_ext.hap_loss(scores, level, relevance=relevance, ignore=itself)
        torch.testing.assert_close(HierarchicalAPLoss(alpha=alpha)(x, labels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", ["ndcg", "hap"])
def test_one_level_is_binary_to_the_bit(loss):
    x, labels = batch(dtype=torch.float32), torch.randint(6, (40,))
    one = evaluate(roadmap_loss, x, None, labels=labels, loss=loss)
    for given in (
        {"labels": torch.stack([labels, labels], dim=1)},
        {"relevance": 3.0 * (labels[:, None] == labels)},
        {"positives": labels[:, None] == labels},
    ):
        other = evaluate(roadmap_loss, x, None, loss=loss, **given)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1][0], other[1][0])


@pytest.mark.parametrize("loss", MODULES)
def test_modules(loss):
    """Their call is RoadmapLoss's, with references, ids, a memory, compiled; by default without calibration."""
    x, labels, ids = batch(), torch.randint(6, (40,)), torch.arange(40)
    module = MODULES[loss]()
    assert torch.equal(module(x, labels), roadmap_loss(x, labels, loss=loss, calibration_weight=0))
    memory = EmbeddingMemory(60, 8, dtype=torch.float64)
    memory.enqueue(batch(30), torch.randint(6, (30,)), torch.arange(30) + 100)
    memory.enqueue(x, labels, ids)
    expected = module(x, labels, ref_emb=memory.embeddings, ref_labels=memory.labels, ids=ids, ref_ids=memory.ids)
    assert torch.equal(module(x, labels, ref_emb=memory, ids=ids), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, labels), x), torch.autograd.grad(module(x, labels), x))
    if loss != "ap":
        assert module.calibration_weight == 0
        both = MODULES[loss](calibration_weight=0.5)(x, labels)
        parts = 0.5 * module(x, labels) + 0.5 * roadmap_ext.CalibrationLoss()(x, labels)
        torch.testing.assert_close(both, parts)
    small = batch(7)
    classes = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    assert gradcheck(lambda e: MODULES[loss](tau=0.1, rho=3.0)(e, classes), small, eps=1e-6, atol=1e-5)


class TestBadInput:
    x, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    levels = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 2], [2, 3], [2, 4]])

    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ({}, TypeError, "labels must be .*or pass positives or relevance"),
            ({"labels": levels.flip(1)}, ValueError, r"must nest from coarse to fine.*class 0 of column 1.*flip\(1\)"),
            ({"labels": (levels > 0).long()}, ValueError, r"labels of 0 and 1 .*labels\.bool\(\)"),
            ({"labels": torch.arange(102).view(6, 17)}, ValueError, "at most 16 levels"),
            ({"labels": levels, "ref_emb": x + 1, "ref_labels": labels}, ValueError, "ref_labels must be of the kind"),
            ({"labels": labels, "positives": torch.eye(6).bool()}, ValueError, "labels was given beside positives"),
            ({"labels": labels, "relevance": torch.eye(6)}, ValueError, "labels was given beside relevance"),
            ({"positives": torch.eye(6).bool(), "relevance": torch.eye(6)}, ValueError, "given beside positives"),
            ({"positives": torch.eye(6)}, TypeError, "positives must have dtype torch.bool"),
            ({"positives": torch.eye(5).bool()}, ValueError, r"positives must be .* \(6, 6\), got \(5, 5\)"),
            ({"positives": (labels, labels, labels)}, ValueError, r"two tensors \(query, reference\), got 3"),
            ({"positives": (labels, labels + 9)}, ValueError, "at least 0 and below 6"),
            ({"relevance": -torch.eye(6)}, ValueError, "relevance must lie between 0"),
            ({"relevance": torch.eye(6) * float("nan")}, ValueError, "relevance must lie between 0"),
            ({"relevance": torch.eye(6), "gather_across_devices": True}, ValueError, "with gather_across_devices"),
            ({"relevance": torch.eye(6), "ref_emb": EmbeddingMemory(3, 4)}, ValueError, "with an EmbeddingMemory"),
            ({"labels": levels, "ref_emb": EmbeddingMemory(3, 4), "ids": labels}, ValueError, "labels must be 1-D"),
            ({"labels": labels, "loss": "auc"}, ValueError, "loss must be one of 'ap', 'recall'"),
        ],
    )
    def test_relations(self, given, error, words):
        with pytest.raises(error, match=words):
            roadmap_loss(self.x, **given)
