"""roadmap_ext.integrations.pytorch_metric_learning against the installed library.

Expected values come from masks that are filled pair by pair here, and the plain PyTorch reference on these.
"""

import contextlib
import copy
import doctest
import importlib
import io
import itertools
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers, trainers
from pytorch_metric_learning.utils import distributed
from ranks import begin, start, statuses
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import roadmap_ext
from roadmap_ext import notices, reference
from roadmap_ext.integrations import pytorch_metric_learning as integration
from roadmap_ext.integrations.pytorch_metric_learning import (
    CalibrationLoss,
    CrossBatchMemory,
    RoadmapLoss,
    SmoothAPLoss,
    SupAPLoss,
)

LOSSES = [RoadmapLoss, SupAPLoss, SmoothAPLoss, CalibrationLoss]
PAGE = Path(__file__).parents[2] / "docs/pytorch-metric-learning.md"


def make_batch(items=12, classes=4, dimension=6):
    """Classes of unequal sizes in random order, one of a single item, and embeddings that leave no hinge flat."""
    labels = torch.randint(classes, (items,))
    labels[labels == classes - 1] = 0
    if items > 1:
        labels[items // 2] = classes - 1
    embeddings = torch.randn(items, dimension, dtype=torch.float64) + torch.randn(classes, dimension).double()[labels]
    return embeddings.requires_grad_(), labels


def pairs_of_labels(labels, ref_labels, without=()):
    """Every pair of a query and a reference as positive or negative, but those in ``without``."""
    positive, negative = [], []
    for i, label in enumerate(labels.tolist()):
        for j, other in enumerate(ref_labels.tolist()):
            if (i, j) not in without:
                (positive if label == other else negative).append((i, j))
    return positive, negative


def pairs_of_tuple(indices_tuple):
    lists = [part.tolist() for part in indices_tuple]
    anchor, positive, *other, negative = lists
    return list(zip(anchor, positive, strict=True)), list(zip(*(other or [anchor]), negative, strict=True))


def by_hand(kind, queries, references, positive, negative, reduction="mean", unit=True):
    """The loss of these pairs alone, by the plain reference."""
    target = torch.zeros(len(queries), len(references), dtype=torch.bool)
    against = torch.zeros_like(target)
    for i, j in positive:
        target[i, j] = True
    for i, j in negative:
        against[i, j] = True
    against &= ~target
    if unit:
        queries, references = normalize(queries), normalize(references)
    scores = queries @ references.T
    surrogate = "smooth" if kind is SmoothAPLoss else "sup"
    ap = reference.ap_loss(scores, target, ignore=~(target | against), surrogate=surrogate, reduction=reduction)
    low = ((0.9 - scores).relu() * target).sum(1) / target.sum(1).clamp(min=1)
    high = ((scores - 0.6).relu() * against).sum(1) / against.sum(1).clamp(min=1)
    calibration = (low + high) if reduction == "none" else (low + high).mean()
    weight = {RoadmapLoss: 0.5, CalibrationLoss: 1.0}.get(kind, 0.0)
    return (1 - weight) * ap + weight * calibration


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


def assert_same(ours, expected, *leaves):
    """Equal losses, and equal gradients at the leaves."""
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=1e-8, atol=1e-10)
    for a, b in zip(gradients(ours, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def own(n):
    return {(i, i) for i in range(n)}


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def references():
    embeddings, labels = make_batch(17)
    return embeddings, labels


@pytest.mark.parametrize("kind", LOSSES)
class TestLabels:
    def test_batch_ranks_itself_but_for_the_query(self, kind, batch):
        embeddings, labels = batch
        expected = by_hand(kind, embeddings, embeddings, *pairs_of_labels(labels, labels, own(12)))
        assert_same(kind()(embeddings, labels), expected, embeddings)
        assert_same(kind()(embeddings, labels, ref_emb=embeddings, ref_labels=labels), expected, embeddings)

    def test_include_self(self, kind, batch):
        embeddings, labels = batch
        expected = by_hand(kind, embeddings, embeddings, *pairs_of_labels(labels, labels))
        assert_same(kind(include_self=True)(embeddings, labels), expected, embeddings)

    def test_other_references_are_all_ranked(self, kind, batch, references):
        embeddings, labels = batch
        ref_emb, ref_labels = references
        expected = by_hand(kind, embeddings, ref_emb, *pairs_of_labels(labels, ref_labels))
        ours = kind()(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
        assert_same(ours, expected, embeddings, ref_emb)
        twin = embeddings.detach().clone()  # equal numbers are no reason to leave anything out
        expected = by_hand(kind, embeddings, twin, *pairs_of_labels(labels, labels))
        assert_same(kind()(embeddings, labels, ref_emb=twin, ref_labels=labels), expected, embeddings)

    def test_the_batch_under_other_labels(self, kind, batch):
        embeddings, labels = batch
        others = labels.flip(0)
        expected = by_hand(kind, embeddings, embeddings, *pairs_of_labels(labels, others, own(12)))
        assert_same(kind()(embeddings, labels, ref_emb=embeddings, ref_labels=others), expected, embeddings)

    def test_reference_method(self, kind, batch):
        embeddings, labels = batch
        for reducer in (None, reducers.SumReducer()):
            ours, plain = (kind(method=method, reducer=reducer)(embeddings, labels) for method in ("auto", "reference"))
            assert_same(ours, plain, embeddings)

    def test_chunks(self, kind, batch, references):
        everything = kind()(*batch, None, *references)
        assert_same(kind(chunk_size=5)(*batch, None, *references), everything, batch[0], references[0])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("parts", [3, 4])
class TestIndicesTuple:
    def mined(self, parts, labels, ref_labels, count=40):
        """Some of the pairs, several of them more than once."""
        positive, negative = (torch.tensor(pairs) for pairs in pairs_of_labels(labels, ref_labels, own(12)))
        if parts == 3:
            triplets = [(a, p, n) for a, p in positive.tolist() for b, n in negative.tolist() if a == b]
            return tuple(torch.tensor(triplets)[torch.randint(len(triplets), (count,))].T)
        some = positive[torch.randint(len(positive), (count // 2,))], negative[torch.randint(len(negative), (count,))]
        return (*some[0].T, *some[1].T)

    def test_pairs_of_the_batch(self, kind, parts, batch):
        embeddings, labels = batch
        mined = self.mined(parts, labels, labels)
        expected = by_hand(kind, embeddings, embeddings, *pairs_of_tuple(mined))
        assert_same(kind()(embeddings, labels, mined), expected, embeddings)
        assert_same(kind()(embeddings, indices_tuple=mined), expected, embeddings)

    def test_pairs_with_references(self, kind, parts, batch, references):
        (embeddings, labels), (ref_emb, ref_labels) = batch, references
        mined = self.mined(parts, labels, ref_labels)
        expected = by_hand(kind, embeddings, ref_emb, *pairs_of_tuple(mined))
        assert_same(kind()(embeddings, labels, mined, ref_emb, ref_labels), expected, embeddings, ref_emb)
        assert_same(kind()(embeddings, None, mined, ref_emb), expected, embeddings, ref_emb)

    def test_a_pair_that_is_not_listed_is_ignored(self, kind, parts, batch, references):
        (embeddings, labels), (ref_emb, ref_labels) = batch, references
        mined = self.mined(parts, labels, ref_labels[:9])
        loss = kind()(embeddings, labels, mined, ref_emb, ref_labels)
        moved = ref_emb.detach().clone()
        moved[9:] = torch.randn(8, 6)
        torch.testing.assert_close(kind()(embeddings, labels, mined, moved, ref_labels), loss)
        assert (gradients(loss, ref_emb)[0][9:] == 0).all()
        assert (gradients(loss, ref_emb)[0][:9] != 0).any()

    def test_pairs_may_come_twice_and_in_any_order(self, kind, parts, batch):
        embeddings, labels = batch
        mined = self.mined(parts, labels, labels)
        once = kind()(embeddings, labels, mined)
        assert_same(
            kind()(embeddings, labels, tuple(torch.cat([part, part.flip(0)]) for part in mined)), once, embeddings
        )

    def test_int32_and_lists_of_tensors(self, kind, parts, batch):
        embeddings, labels = batch
        mined = self.mined(parts, labels, labels)
        once = kind()(embeddings, labels, mined)
        assert_same(kind()(embeddings, labels, [part.int() for part in mined]), once, embeddings)


class TestPairs:
    def test_a_query_is_never_its_own_answer(self, batch):
        embeddings, labels = batch
        a, p, n = torch.tensor([0, 0, 3, 5]), torch.tensor([0, 1, 3, 2]), torch.tensor([7, 7, 8, 5])
        left = by_hand(RoadmapLoss, embeddings, embeddings, [(0, 1), (5, 2)], [(0, 7), (3, 8)])
        assert_same(RoadmapLoss()(embeddings, labels, (a, p, n)), left, embeddings)
        every = by_hand(RoadmapLoss, embeddings, embeddings, *pairs_of_tuple((a, p, n)))
        assert_same(RoadmapLoss(include_self=True)(embeddings, labels, (a, p, n)), every, embeddings)

    def test_listed_as_both_is_positive(self, batch):
        embeddings, _ = batch
        tuples = (torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([2, 3]))
        expected = by_hand(RoadmapLoss, embeddings, embeddings, [(0, 1), (0, 2)], [(0, 3)])
        assert_same(RoadmapLoss()(embeddings, None, tuples), expected, embeddings)

    @pytest.mark.parametrize("parts", [3, 4])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
    @pytest.mark.parametrize("reducer", [None, reducers.ClassWeightedReducer(torch.ones(4))])
    def test_a_miner_found_nothing(self, batch, parts, dtype, reducer):
        embeddings, labels = batch
        for kind in LOSSES:
            loss = kind(reducer=reducer)(embeddings, labels, (torch.tensor([], dtype=dtype),) * parts)
            assert loss == 0
            assert (gradients(loss, embeddings)[0] == 0).all()

    @pytest.mark.parametrize(
        ("parts", "error", "words"),
        [
            (([0, 12], [1, 2], [3, 4]), ValueError, "query indices must be at least 0 and below 12, got 12"),
            (([0, 1], [1, 17], [3, 4]), ValueError, "positives: reference indices .* below 17, got 17"),
            (([0, 1], [1, 2], [3, 17]), ValueError, "negatives: reference indices .* below 17, got 17"),
            (([0, 1], [1, 2], [0, 12], [3, 4]), ValueError, "negatives: query indices .* below 12, got 12"),
            (([0, -1], [1, 2], [3, 4]), ValueError, "at least 0 .* got -1"),
            (([0, 1], [1, 2], [3, -17]), ValueError, "at least 0 .* got -17"),
            (([0, 1], [1], [3, 4]), ValueError, "2 query and 1 reference"),
            (([0, 1], [1, 2], [3]), ValueError, "2 query and 1 reference"),
            (([0.0, 1.0], [1, 2], [3, 4]), TypeError, "integer dtype, got torch.float32"),
            (([0, 1], [True, False], [3, 4]), TypeError, "integer dtype, got torch.bool"),
            (([[0], [1]], [1, 2], [3, 4]), ValueError, "1-D"),
            (([0, 1], [1, 2]), ValueError, "got 2 parts"),
        ],
    )
    def test_wrong_tuples_meet_an_error_and_no_kernel(self, batch, references, parts, error, words, monkeypatch):
        monkeypatch.setattr(integration, "embedding_loss", lambda *_: pytest.fail("a kernel would have run"))
        with pytest.raises(error, match=words):
            RoadmapLoss()(*batch, tuple(map(torch.tensor, parts)), *references)

    def test_not_tensors(self, batch):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor of integers, got list"):
            RoadmapLoss()(*batch, ([0], [1], [2]))
        with pytest.raises(ValueError, match=r"must be \(anchor, positive, negative\)"):
            RoadmapLoss()(*batch, torch.zeros(3, 5, dtype=torch.long))

    def test_wrong_embeddings_and_labels(self, batch, references):
        embeddings, labels = batch
        ref_emb, ref_labels = references
        triplet = (torch.tensor([0]),) * 3
        loss = RoadmapLoss()
        for arguments, error, words in [
            ((embeddings,), ValueError, "labels and indices_tuple are both None"),
            ((embeddings, labels.double()), TypeError, r"use labels.long\(\)"),
            ((embeddings, labels[:, None].expand(-1, 3)), ValueError, "labels must be 1-D"),
            ((embeddings, labels, None, ref_emb), ValueError, "ref_emb was given without ref_labels"),
            ((embeddings, labels, None, None, ref_labels), ValueError, "ref_labels was given without ref_emb"),
            (
                (embeddings, labels, None, roadmap_ext.EmbeddingMemory(3, 4)),
                TypeError,
                r"ref_emb is an EmbeddingMemory, .* use roadmap_ext\.\w+Loss, or the CrossBatchMemory",
            ),
            ((embeddings, labels, None, ref_emb, ref_labels.double()), TypeError, r"use ref_labels.long\(\)"),
            ((embeddings, labels, None, ref_emb[:, :3], ref_labels), ValueError, "dimension of embeddings, 6, got 3"),
            ((embeddings, None, triplet, ref_emb[:, :3]), ValueError, "dimension of embeddings, 6, got 3"),
            ((embeddings.long(), None, triplet), TypeError, "embeddings must be float16"),
            ((embeddings[:, 0], None, triplet), ValueError, "embeddings must be 2-D"),
        ]:
            with pytest.raises(error, match=words):
                loss(*arguments)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "miner",
    [
        miners.BatchHardMiner(),
        miners.BatchEasyHardMiner("all", "hard"),
        miners.MultiSimilarityMiner(),
        miners.TripletMarginMiner(margin=0.5),
        miners.PairMarginMiner(pos_margin=0.2, neg_margin=0.8),
        miners.DistanceWeightedMiner(),
        miners.UniformHistogramMiner(num_bins=5, pos_per_bin=3, neg_per_bin=3, distance=distances.LpDistance()),
    ],
    ids=lambda miner: type(miner).__name__,
)
def test_miners(kind, miner, batch, references):
    (embeddings, labels), (ref_emb, ref_labels) = batch, references
    mined = miner(embeddings, labels)
    assert len(mined[0])
    expected = by_hand(kind, embeddings, embeddings, *pairs_of_tuple(mined))
    assert_same(kind()(embeddings, labels, mined), expected, embeddings)
    mined = miner(embeddings, labels, ref_emb, ref_labels)
    expected = by_hand(kind, embeddings, ref_emb, *pairs_of_tuple(mined))
    assert_same(kind()(embeddings, labels, mined, ref_emb, ref_labels), expected, embeddings, ref_emb)


class TestDistances:
    def test_honoured(self, batch):
        embeddings, labels = batch
        pairs = pairs_of_labels(labels, labels, own(12))
        for unit, losses_ in [
            (True, [RoadmapLoss(distance=distances.CosineSimilarity()), RoadmapLoss(normalize=True)]),
            (True, [RoadmapLoss(distance=distances.DotProductSimilarity())]),
            (False, [RoadmapLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))]),
            (False, [RoadmapLoss(normalize=False)]),
        ]:
            expected = by_hand(RoadmapLoss, embeddings, embeddings, *pairs, unit=unit)
            for loss in losses_:
                assert_same(loss(embeddings, labels), expected, embeddings)
                assert loss.distance.normalize_embeddings is unit
                torch.testing.assert_close(
                    loss.distance(embeddings)[0, 1], (normalize(embeddings) if unit else embeddings)[:2].prod(0).sum()
                )

    class Own(distances.CosineSimilarity):
        """It may compute anything."""

    @pytest.mark.parametrize(
        "distance",
        [
            distances.LpDistance(),
            distances.SNRDistance(),
            distances.CosineSimilarity(power=2),
            distances.CosineSimilarity(p=1),
            Own(),
            "cosine",
        ],
    )
    def test_refused(self, distance):
        for kind in LOSSES:
            with pytest.raises(ValueError, match="the losses rank by dot products"):
                kind(distance=distance)

    def test_contradiction(self):
        with pytest.raises(ValueError, match="normalize=False contradicts the distance"):
            RoadmapLoss(distance=distances.CosineSimilarity(), normalize=False)
        with pytest.raises(ValueError, match="normalize=True contradicts the distance"):
            RoadmapLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False), normalize=True)


class TestReducers:
    @pytest.fixture
    def asked(self, monkeypatch):
        """The reductions that were asked of embedding_loss."""
        asked = []
        original = integration.embedding_loss

        def note(embeddings, references, pairs, settings):
            asked.append(settings.objective.reduction)
            return original(embeddings, references, pairs, settings)

        monkeypatch.setattr(integration, "embedding_loss", note)
        return asked

    def test_the_mean_is_asked_for_as_such(self, batch, asked):
        embeddings, labels = batch
        reducer = reducers.MultipleReducers({"other": reducers.SumReducer()})
        given = [
            RoadmapLoss(),
            RoadmapLoss(reducer=reducers.MeanReducer()),
            RoadmapLoss(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0),
            RoadmapLoss(reducer=reducer),
        ]
        for loss in given:
            assert_same(loss(embeddings, labels), given[0](embeddings, labels), embeddings)
        assert set(asked) == {"mean"}

    @pytest.mark.parametrize("kind", LOSSES)
    def test_others_get_the_loss_of_each_query(self, kind, batch, asked):
        labels = batch[1]
        embeddings = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)  # no ranking is perfect
        each = by_hand(kind, embeddings, embeddings, *pairs_of_labels(labels, labels, own(12)), reduction="none")
        partners = (labels[:, None] == labels).sum(1) - 1
        assert (partners == 0).any()
        ranked = [i for i in range(12) if partners[i] or kind in (RoadmapLoss, CalibrationLoss)]
        counted = each[ranked]
        weight = torch.tensor([1.0, 5.0, 0.5, 3.0], dtype=torch.float64)
        middle = counted.median().item() - 1e-6
        for reducer, expected in [
            (reducers.SumReducer(), each.sum()),
            (reducers.AvgNonZeroReducer(), each[each > 0].mean()),
            (reducers.ThresholdReducer(low=middle), counted[counted > middle].mean()),
            (reducers.ThresholdReducer(high=middle), counted[counted < middle].mean()),
            (reducers.ClassWeightedReducer(weight), (counted * weight[labels[ranked]]).mean()),
            (reducers.PerAnchorReducer(), counted.mean()),
            (reducers.MultipleReducers({"loss": reducers.SumReducer()}), each.sum()),
            (reducers.MultipleReducers({}, default_reducer=reducers.SumReducer()), each.sum()),
        ]:
            assert_same(kind(reducer=reducer)(embeddings, labels), expected, embeddings)
        part = kind(reducer=reducers.DoNothingReducer())(embeddings, labels)["loss"]
        assert part["indices"].tolist() == ranked
        assert part["reduction_type"] == "element"
        assert_same(part["losses"].sum(), counted.sum(), embeddings)
        assert set(asked) == {"none"}

    @pytest.mark.parametrize("method", ["auto", "reference"])
    def test_which_queries_have_a_positive(self, batch, references, method):
        loss = SupAPLoss(reducer=reducers.DoNothingReducer(), method=method)
        embeddings = batch[0]
        a, p, n = torch.tensor([3, 1, 5, 1]), torch.tensor([0, 1, 2, 1]), torch.tensor([7, 7, 8, 4])
        assert loss(embeddings, None, (a, p, n))["loss"]["indices"].tolist() == [3, 5]  # 1 has itself alone
        assert loss(embeddings, None, (a, p, n), references[0])["loss"]["indices"].tolist() == [1, 3, 5]
        assert loss(embeddings, torch.arange(12))["loss"]["losses"] == 0

    def test_set_later(self, batch, asked):
        embeddings, labels = batch
        loss = RoadmapLoss()
        loss.set_reducer(reducers.SumReducer())
        pairs = pairs_of_labels(labels, labels, own(12))
        expected = by_hand(RoadmapLoss, embeddings, embeddings, *pairs, reduction="none").sum()
        assert_same(loss(embeddings, labels), expected, embeddings)
        assert asked == ["none"]

    def test_divisor_is_refused(self):
        for reducer in (
            reducers.DivisorReducer(),
            reducers.PerAnchorReducer(reducers.DivisorReducer()),
            reducers.MultipleReducers({"loss": reducers.DivisorReducer()}),
        ):
            with pytest.raises(ValueError, match="RoadmapLoss has no divisor for a DivisorReducer"):
                RoadmapLoss(reducer=reducer)


class TestSettings:
    def test_embedding_regularizer(self, batch):
        embeddings, labels = batch
        for reducer in (None, reducers.SumReducer()):
            loss = RoadmapLoss(
                embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.25, reducer=reducer
            )
            norms = embeddings.norm(dim=1).mean()
            expected = RoadmapLoss(reducer=reducer)(embeddings, labels) + 0.25 * norms
            assert_same(loss(embeddings, labels), expected, embeddings)
        assert loss.sub_loss_names() == ["loss", "embedding_reg_loss"]

    def test_every_setting_arrives(self, batch):
        embeddings, labels = batch
        settings = {
            RoadmapLoss: {"calibration_weight": 0.3, "surrogate": "smooth", "positive_margin": 0.7},
            SupAPLoss: {"tau": 0.1, "rho": 3.0, "delta": 0.3, "start": 0.1, "offset": 0.7},
            SmoothAPLoss: {"tau": 0.2},
            CalibrationLoss: {"negative_margin": 0.1, "calibration_reduction": "violating_pairs"},
        }
        for kind, given in settings.items():
            ours = kind(**given)(embeddings, labels)
            module = getattr(roadmap_ext, kind.__name__)
            assert_same(ours, module(**given)(embeddings, labels), embeddings)
            for name in given:
                rest = {key: value for key, value in given.items() if key != name}
                assert kind(**rest)(embeddings, labels) != ours, name

    def test_what_is_refused(self):
        for settings, error, words in [
            ({"temperature": 0.1}, TypeError, "unexpected keyword argument 'temperature'"),
            ({"tau": 0}, ValueError, "tau must be positive"),
            ({"reduction": "sum"}, ValueError, r"reducer=SumReducer\(\)"),
            ({"reduction": "none"}, ValueError, r"DoNothingReducer\(\)"),
            ({"gather_across_devices": True}, NotImplementedError, "DistributedLossWrapper"),
        ]:
            with pytest.raises(error, match=words):
                SmoothAPLoss(**settings)
        SmoothAPLoss(reduction="mean", gather_across_devices=False)

    def test_collect_stats(self, batch):
        loss = SupAPLoss(collect_stats=True, reducer=reducers.SumReducer(collect_stats=True))
        loss(batch[0], torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3]))
        assert loss.collect_stats
        assert loss.reducer.losses_size == 11


class TestModule:
    def test_kind(self):
        for kind in LOSSES:
            assert issubclass(kind, losses.BaseMetricLossFunction)

    def test_copies(self, batch):
        for kind in LOSSES:
            loss = kind(tau=0.03) if kind is not CalibrationLoss else kind(positive_margin=0.8)
            for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
                assert twin(*batch) == loss(*batch)
                assert repr(twin) == repr(loss)
            assert not loss.state_dict()
            assert not list(loss.parameters())

    def test_repr(self):
        text = repr(SupAPLoss(tau=0.03, reducer=reducers.SumReducer()))
        for words in ("SupAPLoss(", "tau=0.03", "(distance): CosineSimilarity()", "(reducer): SumReducer()"):
            assert words in text
        assert "reduction" not in text

    def test_compile(self, batch):
        embeddings, labels = batch
        mined = miners.MultiSimilarityMiner()(embeddings, labels)
        for arguments in [(embeddings, labels), (embeddings, labels, mined)]:
            loss = RoadmapLoss()
            assert_same(torch.compile(loss, backend="aot_eager")(*arguments), loss(*arguments), embeddings)

    def test_half(self, batch):
        embeddings, labels = batch
        for dtype in (torch.float16, torch.bfloat16):
            memory = CrossBatchMemory(RoadmapLoss(), 6, 30)
            half = embeddings.detach().to(dtype).requires_grad_()
            for loss in (RoadmapLoss()(half, labels), memory(half, labels)):
                assert loss.dtype == torch.float32
                assert gradients(loss, half)[0].isfinite().all()

    def test_multiple_losses(self, batch):
        both = losses.MultipleLosses([RoadmapLoss(), losses.ContrastiveLoss()], weights=[2, 1])
        torch.testing.assert_close(both(*batch), 2 * RoadmapLoss()(*batch) + losses.ContrastiveLoss()(*batch))

    def test_the_library_own_smooth_ap_where_it_is_right(self):
        """It ranks the query, too, and forms groups of as many items as there are classes: here, four of four."""
        embeddings = torch.randn(16, 6, dtype=torch.float64, requires_grad=True)
        labels = torch.arange(4).repeat_interleave(4)
        theirs = losses.SmoothAPLoss(temperature=0.05)(embeddings, labels)
        ours = SmoothAPLoss(tau=0.05, include_self=True)(embeddings, labels)
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-7)  # it sums up in float32
        torch.testing.assert_close(*(gradients(loss, embeddings)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-6)

    def test_examples(self):
        results = doctest.testmod(integration, globs={"torch": torch, **vars(integration)})
        assert results.attempted
        assert not results.failed


class EachQuery(reducers.MeanReducer):
    """Gets the loss of each query, as all but the MeanReducer itself do."""


class TestIgnoredLabel:
    """Items of it are in no ranking, as if they had been removed."""

    @pytest.fixture
    def parts(self):
        """Embeddings of which every third is nothing and of label -1; labels; which ones are something."""
        embeddings, labels = make_batch(18)
        kept = torch.arange(18) % 3 > 0
        return torch.where(kept[:, None], embeddings.detach(), torch.nan), labels.where(kept, -1), kept

    @pytest.mark.parametrize("mined", [False, True])
    @pytest.mark.parametrize("gallery", [False, True])
    def test_as_if_removed(self, mined, gallery, parts):
        x, labels, kept = parts
        further, ref_labels = ((x + 0.1), labels) if gallery else (None, None)
        removed, removed_labels = (further[kept], labels[kept]) if gallery else (None, None)
        pairs = removed_pairs = None
        if mined:  # what a miner makes of the labels, among them that of no class
            of = torch.nan_to_num(x), labels, torch.nan_to_num(further) if gallery else None, ref_labels
            pairs = miners.BatchEasyHardMiner("all", "all")(*of)
            place = kept.cumsum(0) - 1
            sides = (pairs[:2], pairs[2:])
            both = [kept[i] & kept[j] for i, j in sides]
            removed_pairs = [place[x[these]] for side, these in zip(sides, both, strict=True) for x in side]
        for kind, reducer in itertools.product(LOSSES, (None, reducers.SumReducer(), EachQuery())):
            ours, others = x.clone().requires_grad_(), x[kept].clone().requires_grad_()
            loss = kind(reducer=reducer, ignore_label=-1)(ours, labels, pairs, further, ref_labels)
            expected = kind(reducer=reducer)(others, labels[kept], removed_pairs, removed, removed_labels)
            assert expected > 0
            torch.testing.assert_close(loss, expected)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(ours.grad[kept], others.grad)
            assert (ours.grad[~kept] == 0).all()

    def test_in_a_memory(self, parts):
        x, labels, kept = parts
        ours = CrossBatchMemory(RoadmapLoss(ignore_label=-1), 6, memory_size=90)
        others = CrossBatchMemory(RoadmapLoss(), 6, memory_size=90)
        for shift in (0.0, 0.3, 0.6):
            torch.testing.assert_close(ours(x + shift, labels), others(x[kept] + shift, labels[kept]))


def test_the_sampler_that_is_named(monkeypatch):
    """Of 2,000 classes a shuffled loader draws hardly a pair; the sampler of the warning always does."""
    labels = torch.arange(2000).repeat(5)
    x = torch.randn(len(labels), 4)
    for sampler, warns in ((None, True), (samplers.MPerClassSampler(labels, m=4, batch_size=32), False)):
        monkeypatch.setattr(notices, "_said", set())
        dataset = torch.utils.data.TensorDataset(x, labels)
        loader = torch.utils.data.DataLoader(dataset, batch_size=32, sampler=sampler, shuffle=sampler is None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for (embeddings, classes), _ in zip(loader, range(40), strict=False):
                RoadmapLoss()(embeddings, classes)
        assert ["MPerClassSampler(labels, m=4, batch_size=...)" in str(each.message) for each in caught] == [
            True
        ] * warns


REMEDIES = {
    "gather": (
        lambda: RoadmapLoss(gather_across_devices=True),
        "leave it out and wrap the loss in pytorch_metric_learning.utils.distributed.DistributedLossWrapper",
        lambda: distributed.DistributedLossWrapper(RoadmapLoss()),
    ),
    "reduction": (
        lambda: RoadmapLoss(reduction="none"),
        "leave it out and pass reducer=SumReducer(), or DoNothingReducer()",
        lambda: RoadmapLoss(reducer=reducers.DoNothingReducer()),
    ),
    "distance": (
        lambda: RoadmapLoss(distance=distances.CosineSimilarity(), normalize=False),
        "leave normalize out",
        lambda: RoadmapLoss(distance=distances.CosineSimilarity()),
    ),
    "divisor": (
        lambda: RoadmapLoss(reducer=reducers.DivisorReducer()),
        "use MeanReducer, the default",
        lambda: RoadmapLoss(reducer=reducers.MeanReducer()),
    ),
    "memory of ours": (
        lambda: RoadmapLoss()(torch.eye(4), torch.arange(4) // 2, ref_emb=roadmap_ext.EmbeddingMemory(9, 4)),
        "use roadmap_ext.RoadmapLoss, or the CrossBatchMemory of roadmap_ext.integrations.pytorch_metric_learning",
        lambda: CrossBatchMemory(RoadmapLoss(), 4)(torch.eye(4), torch.arange(4) // 2),
    ),
    "small memory": (
        lambda: CrossBatchMemory(RoadmapLoss(), 4, memory_size=2)(torch.eye(4), torch.arange(4) // 2),
        "choose memory_size=4 or more",
        lambda: CrossBatchMemory(RoadmapLoss(), 4, memory_size=4)(torch.eye(4), torch.arange(4) // 2),
    ),
    "one-hot labels": (
        lambda: RoadmapLoss()(torch.eye(4), torch.eye(2)[[0, 0, 1, 1]]),
        "labels.argmax(1)",
        lambda: RoadmapLoss()(torch.eye(4), torch.eye(2)[[0, 0, 1, 1]].argmax(1)),
    ),
    "a list of labels": (
        lambda: RoadmapLoss()(torch.eye(4), [0, 0, 1, 1]),
        "use torch.as_tensor(labels)",
        lambda: RoadmapLoss()(torch.eye(4), torch.as_tensor([0, 0, 1, 1])),
    ),
    "an output": (
        lambda: RoadmapLoss()({"pooler_output": torch.eye(4)}, torch.arange(4) // 2),
        "embeddings['pooler_output']",
        lambda: RoadmapLoss()({"pooler_output": torch.eye(4)}["pooler_output"], torch.arange(4) // 2),
    ),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_what_an_error_suggests_is_taken(name):
    wrong, words, right = REMEDIES[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(words)):
        wrong()
    right()


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


class TestNoPairsAreListed:
    def test_of_a_batch(self):
        embeddings, labels = torch.randn(2048, 4, requires_grad=True), torch.randint(200, (2048,))
        with LargestTensor() as largest:
            RoadmapLoss(chunk_size=64)(embeddings, labels).backward()
        assert embeddings.grad.any()
        assert 0 < largest.bytes < 2048 * 2048 / 16  # not even as bits

    def test_of_a_memory(self):
        embeddings, labels = torch.randn(512, 4, requires_grad=True), torch.randint(200, (512,))
        memory = CrossBatchMemory(RoadmapLoss(chunk_size=64), 4, 8192)
        memory.add_to_memory(torch.randn(8192, 4), torch.randint(200, (8192,)), 8192)
        with LargestTensor() as largest:
            memory(embeddings, labels).backward()
        assert embeddings.grad.any()
        assert 0 < largest.bytes < 512 * 8192 / 16


class Ring:
    """What a CrossBatchMemory holds, kept by hand: a list of items in places."""

    def __init__(self, size):
        self.size, self.next, self.items = size, 0, {}

    def add(self, embeddings, labels):
        """The places that the items get."""
        places = []
        for embedding, label in zip(embeddings.detach().clone(), labels, strict=True):
            self.items[self.next] = embedding, label
            places.append(self.next)
            self.next = (self.next + 1) % self.size
        return places

    def tensors(self):
        assert sorted(self.items) == list(range(len(self.items)))
        pairs = [self.items[place] for place in range(len(self.items))]
        return torch.stack([embedding for embedding, _ in pairs]), torch.stack([label for _, label in pairs])


@pytest.mark.parametrize("kind", LOSSES)
class TestCrossBatchMemory:
    @pytest.mark.parametrize("size", [1, 3, 5, 11])
    def test_a_query_own_copy_is_never_ranked(self, kind, size):
        """Memory of 11: it wraps around inside a batch of 3 or 5, and is refilled by one of 11."""
        memory, ring = CrossBatchMemory(kind(), 6, 11), Ring(11)
        for _ in range(9 if size < 11 else 3):
            embeddings, labels = make_batch(size)
            places = ring.add(embeddings, labels)
            known, known_labels = ring.tensors()
            copies = set(enumerate(places))
            expected = by_hand(kind, embeddings, known, *pairs_of_labels(labels, known_labels, copies))
            assert_same(memory(embeddings, labels), expected, embeddings)
        assert len(ring.items) == min(11, size * 9)

    @pytest.mark.parametrize(
        "miner", [miners.BatchHardMiner(), miners.MultiSimilarityMiner(), miners.TripletMarginMiner(1)]
    )
    @pytest.mark.parametrize("size", [1, 5])
    def test_nor_with_a_miner(self, kind, miner, size):
        memory, ring = CrossBatchMemory(kind(), 6, 11, miner=miner), Ring(11)
        ranked = 0
        for _ in range(9):
            embeddings, labels = make_batch(size)
            places = ring.add(embeddings, labels)
            known, known_labels = ring.tensors()
            mined = miner(embeddings, labels, known, known_labels)
            positive, negative = pairs_of_tuple(mined)
            if len(mined) == 3:  # a triplet goes whole, as in the library
                negative = [
                    pair for other, pair in zip(positive, negative, strict=True) if other[1] != places[other[0]]
                ]
            positive = [(i, j) for i, j in positive if j != places[i]]
            ranked += len(positive)
            expected = by_hand(kind, embeddings, known, positive, negative)
            assert_same(memory(embeddings, labels), expected, embeddings)
        assert ranked

    def test_as_the_library_own_pairs(self, kind):
        """What the library's class would hand to the loss, were it to take it."""

        class Library(losses.CrossBatchMemory):
            def check_loss_support(self, name):
                pass

        for miner in (None, miners.BatchHardMiner(), miners.MultiSimilarityMiner()):
            ours, theirs = (cls(kind(), 6, 11, miner=miner) for cls in (CrossBatchMemory, Library))
            for _ in range(6):
                embeddings, labels = make_batch(5)
                assert_same(ours(embeddings, labels), theirs(embeddings, labels), embeddings)
                assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
                assert torch.equal(ours.label_memory, theirs.label_memory)

    def test_enqueue_mask(self, kind):
        """MoCo's way: what is enqueued is no query, and all of the memory is ranked."""
        for miner in (None, miners.MultiSimilarityMiner()):
            memory, ring = CrossBatchMemory(kind(), 6, 11, miner=miner), Ring(11)
            for mask in (torch.arange(8) % 2 == 0, torch.arange(8) > 0, torch.arange(8) < 3, torch.arange(8) > 8):
                embeddings, labels = make_batch(8)
                ring.add(embeddings[mask], labels[mask])
                known, known_labels = ring.tensors()
                queries, query_labels = embeddings[~mask], labels[~mask]
                pairs = pairs_of_labels(query_labels, known_labels)
                if miner:
                    pairs = pairs_of_tuple(miner(queries, query_labels, known, known_labels))
                expected = by_hand(kind, queries, known, *pairs)
                assert_same(memory(embeddings, labels, enqueue_mask=mask), expected, embeddings)

    def test_places_that_were_never_filled_are_not_ranked(self, kind):
        memory = CrossBatchMemory(kind(), 6, 11)
        embeddings, labels = make_batch(5)
        assert memory(embeddings, labels * 0, enqueue_mask=torch.zeros(5, dtype=torch.bool)) == 0
        assert memory.queue_idx == 0
        expected = by_hand(kind, embeddings, embeddings.detach(), *pairs_of_labels(labels, labels, own(5)))
        assert_same(memory(embeddings, labels), expected, embeddings)


class TestMemory:
    def test_an_item_of_an_earlier_call_is_a_positive(self):
        """It cannot be known; the page says so."""
        memory = CrossBatchMemory(SupAPLoss(), 6, 20)
        embeddings, labels = make_batch(5)
        memory(embeddings, labels)
        places = {(i, 5 + i) for i in range(5)}
        known = torch.cat([embeddings, embeddings]).detach()
        expected = by_hand(SupAPLoss, embeddings, known, *pairs_of_labels(labels, labels.repeat(2), places))
        assert_same(memory(embeddings, labels), expected, embeddings)

    def test_include_self_does_not_count_copies(self):
        embeddings, labels = make_batch(5)
        memory, plain = (CrossBatchMemory(RoadmapLoss(include_self=flag), 6, 20) for flag in (True, False))
        assert_same(memory(embeddings, labels), plain(embeddings, labels), embeddings)

    def test_indices_tuple_holds_places_in_the_memory(self):
        """As in the library: what the miner found and what was given count, and a query's own copy does not."""
        labels = torch.tensor([0, 0, 1, 1, 2])
        anchor, positive, negative = torch.tensor([[0, 1, 4], [1, 0, 4], [2, 4, 3]])  # 4 is its own positive
        for miner in (None, miners.PairMarginMiner(pos_margin=9, neg_margin=-9), miners.MultiSimilarityMiner(-0.5)):
            memory, ring = CrossBatchMemory(SupAPLoss(), 6, 11, miner=miner), Ring(11)
            for _ in range(4):
                embeddings = make_batch(5)[0]
                places = ring.add(embeddings, labels)
                known, known_labels = ring.tensors()
                at = torch.tensor(places)
                given = anchor, at[positive], anchor, at[negative]
                pairs = pairs_of_labels(labels, known_labels)
                if miner:
                    mined = pairs_of_tuple(miner(embeddings, labels, known, known_labels))
                    pairs = [found + named for found, named in zip(mined, pairs_of_tuple(given), strict=True)]
                pairs[0][:] = [(i, j) for i, j in pairs[0] if j != places[i]]
                expected = by_hand(SupAPLoss, embeddings, known, *pairs)
                assert_same(memory(embeddings, labels, given), expected, embeddings)

    @pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner()])
    def test_indices_tuple_of_a_miner_of_the_batch(self, miner):
        """Its indices are none of the memory, and labels give that away."""
        memory = CrossBatchMemory(RoadmapLoss(), 6, 11, miner=miner)
        embeddings = make_batch(5)[0]
        memory(embeddings, torch.tensor([0, 0, 1, 1, 1]), (torch.tensor([0]), torch.tensor([1]), torch.tensor([2])))
        for given in [(0, 4, 1), (2, 3, 4), (0, 0, 1)]:
            triplet = tuple(torch.tensor([i]) for i in given)
            with pytest.raises(ValueError, match=r"\d pairs of indices_tuple contradict the labels in the memory"):
                copy.deepcopy(memory)(embeddings, torch.tensor([0, 5, 7, 7, 0]), triplet)

    def test_indices_tuple_out_of_range(self):
        embeddings, labels = make_batch(5)
        for triplet, words in [((5, 1, 2), "below 5, got 5"), ((0, 5, 2), "below 5, got 5"), ((0, 1, -1), "got -1")]:
            for miner in (None, miners.BatchHardMiner()):
                memory = CrossBatchMemory(RoadmapLoss(), 6, 11, miner=miner)
                with pytest.raises(ValueError, match=words):
                    memory(embeddings, labels, tuple(torch.tensor([i]) for i in triplet))

    def test_indices_tuple_and_enqueue_mask(self):
        embeddings, labels = make_batch(5)
        with pytest.raises(ValueError, match="mutually exclusive"):
            CrossBatchMemory(RoadmapLoss(), 6, 11)(embeddings, labels, (torch.tensor([0]),) * 3, labels > 0)

    def test_the_losses_that_the_library_takes_are_as_there(self):
        names = losses.CrossBatchMemory.supported_losses()
        ours = CrossBatchMemory.supported_losses()
        assert ours == [*names, "RoadmapLoss", "SupAPLoss", "SmoothAPLoss", "CalibrationLoss"]
        assert issubclass(CrossBatchMemory, losses.CrossBatchMemory)
        for miner in (None, miners.MultiSimilarityMiner()):
            memories = [
                cls(losses.ContrastiveLoss(), 6, 11, miner=miner) for cls in (CrossBatchMemory, losses.CrossBatchMemory)
            ]
            for _ in range(4):
                embeddings, labels = make_batch(5)
                mined = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
                assert_same(*(memory(embeddings, labels, mined) for memory in memories), embeddings)

    def test_losses_of_the_same_name(self):
        for loss in (losses.SmoothAPLoss(), roadmap_ext.SmoothAPLoss(), roadmap_ext.RoadmapLoss()):
            with pytest.raises(TypeError, match=f"of {integration.__name__}, got that of {type(loss).__module__}"):
                CrossBatchMemory(loss, 6, 11)
        with pytest.raises(Exception, match="CrossBatchMemory not supported for FastAPLoss"):
            CrossBatchMemory(losses.FastAPLoss(), 6, 11)

    def test_copies_and_queue(self):
        memory = CrossBatchMemory(RoadmapLoss(tau=0.03), 6, memory_size=11)
        memory(*make_batch(7))
        embeddings, labels = make_batch(7)
        twins = copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))
        loss = memory(embeddings, labels)
        for twin in twins:
            assert twin(embeddings, labels) == loss
        assert set(memory.state_dict()) == {"embedding_memory", "label_memory", "_extra_state"}
        memory.reset_queue()
        fresh = CrossBatchMemory(RoadmapLoss(tau=0.03), 6, 11)
        assert memory(embeddings, labels) == fresh(embeddings, labels)

    @pytest.mark.parametrize("batches", [(), (3,), (7, 4), (7, 7), (11, 2)])
    def test_it_goes_on_from_a_state(self, batches):
        """To the same losses as one that never stopped: empty, partly filled, just full, and gone all the way round."""
        memory = CrossBatchMemory(RoadmapLoss(), 6, 11)
        for rows in batches:
            memory(*(x.float() if x.is_floating_point() else x for x in make_batch(rows)))
        state = memory.state_dict()
        assert all(isinstance(x, torch.Tensor) for x in state.values())
        assert len({x.untyped_storage().data_ptr() for x in state.values()}) == 3
        other = nn.ModuleDict({"loss": CrossBatchMemory(RoadmapLoss(), 6, 11)})
        other["loss"].add_to_memory(torch.ones(2, 6), torch.ones(2).long(), 2)
        other.load_state_dict({f"loss.{name}": x.clone() for name, x in state.items()})
        for rows in (4, 5, 6):
            embeddings, labels = make_batch(rows)
            embeddings = embeddings.detach().float().requires_grad_()
            assert_same(other["loss"](embeddings, labels), memory(embeddings, labels), embeddings)
        assert other["loss"].queue_idx == memory.queue_idx
        assert torch.equal(other["loss"].label_memory, memory.label_memory)

    def test_states_of_other_memories(self):
        """That of the library's class says nothing of its place; that of another size is refused."""
        theirs, ours = losses.CrossBatchMemory(losses.ContrastiveLoss(), 6, 11), CrossBatchMemory(RoadmapLoss(), 6, 11)
        ours(*make_batch(7))
        ours.load_state_dict({}, strict=False)
        assert (ours.queue_idx, ours.has_been_filled) == (7, False)
        ours.load_state_dict(theirs.state_dict())
        assert (ours.queue_idx, ours.has_been_filled) == (0, False)
        ours(*make_batch(7))
        for size, dim in ((12, 6), (11, 5)):
            other = CrossBatchMemory(RoadmapLoss(), dim, size)
            with pytest.raises(RuntimeError, match="size mismatch"):
                other.load_state_dict(ours.state_dict())
            assert other.queue_idx == 0

    @pytest.mark.parametrize("way", ["built", "copied", "used"])
    def test_made_under_inference_mode(self, way):
        """It can be written, loaded and ranked outside; "used": with embeddings of a dtype that it took there."""
        expected = CrossBatchMemory(RoadmapLoss(), 6, 11)
        (first, first_labels), (embeddings, labels) = make_batch(4), make_batch(5)
        expected(first, first_labels)
        with torch.inference_mode():
            memory = CrossBatchMemory(RoadmapLoss(), 6, 11) if way == "built" else copy.deepcopy(expected)
            if way == "used":
                memory = CrossBatchMemory(RoadmapLoss(), 6, 11)
                memory(first, first_labels)
        if way == "built":
            memory.load_state_dict(expected.state_dict())
            expected.embedding_memory = expected.embedding_memory.float().double()  # as it is stored in the other
        assert_same(memory(embeddings, labels), expected(embeddings, labels), embeddings)

    @pytest.mark.parametrize(
        ("kind", "match", "change"),
        [
            (ValueError, "12 embeddings do not fit in a memory of 11: choose memory_size=12", {}),
            (ValueError, "12 embeddings do not fit", {"enqueue_mask": torch.ones(12, dtype=torch.bool)}),
            (ValueError, r"enqueue_mask .* 12, got shape \(11,\)", {"enqueue_mask": torch.ones(11, dtype=torch.bool)}),
            (TypeError, r"enqueue_mask .* got torch\.int64", {"enqueue_mask": torch.ones(12, dtype=torch.int64)}),
            (TypeError, "enqueue_mask .* got list", {"enqueue_mask": [True] * 12}),
            (ValueError, "embedding_size=6, got 5", {"embeddings": torch.randn(4, 5), "labels": torch.arange(4)}),
            (ValueError, "embeddings must be 2-D", {"embeddings": torch.randn(6)}),
            (TypeError, "embeddings must be a torch.Tensor", {"embeddings": [[1.0] * 6]}),
            (ValueError, "labels must be 1-D with one entry a row of embeddings, 12", {"labels": torch.ones(1).long()}),
            (TypeError, "labels must have an integer dtype", {"labels": torch.ones(12)}),
        ],
    )
    def test_batches_that_do_not_fit(self, kind, match, change):
        """Whatever loss is in it, and before anything is written."""
        for loss in (RoadmapLoss(), losses.ContrastiveLoss()):
            memory = CrossBatchMemory(loss, 6, 11)
            given = {"embeddings": torch.randn(12, 6), "labels": torch.arange(12) % 3}
            with pytest.raises(kind, match=match):
                memory(**(given | change))
            assert memory.queue_idx == 0
            assert not memory.embedding_memory.any()
        mask = torch.arange(20) < 11  # a batch may be larger than the memory, if what is enqueued is not
        memory(torch.randn(20, 6), torch.arange(20) % 3, enqueue_mask=mask)


class TestTraining:
    def data(self):
        torch.manual_seed(0)
        labels = torch.arange(8).repeat_interleave(8)
        return torch.randn(8, 10)[labels] + 0.8 * torch.randn(64, 10), labels

    def ranked(self, model):
        data, labels = self.data()
        unit = normalize(model(data))
        same = labels[:, None] == labels
        ap = roadmap_ext.metrics.average_precision(unit @ unit.T, same, ignore=torch.eye(64, dtype=torch.bool))
        return ap.mean().item()

    @pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # its progress bar
    @pytest.mark.parametrize("miner", [None, miners.BatchHardMiner(), miners.MultiSimilarityMiner()])
    @pytest.mark.parametrize("memory", [False, True])
    def test_sampler_miner_and_trainer(self, miner, memory):
        data, labels = self.data()
        model = torch.nn.Linear(10, 4)
        before = self.ranked(model)
        loss = RoadmapLoss(tau=0.05, rho=10.0)
        if memory:
            loss = CrossBatchMemory(loss, 4, 48, miner=miner)
        trainer = trainers.MetricLossOnly(
            models={"trunk": model},
            optimizers={"trunk_optimizer": torch.optim.Adam(model.parameters(), 0.05)},
            batch_size=16,
            loss_funcs={"metric_loss": loss},
            dataset=torch.utils.data.TensorDataset(data, labels),
            mining_funcs={"tuple_miner": miner} if miner and not memory else {},
            sampler=samplers.MPerClassSampler(labels, m=4, batch_size=16, length_before_new_iter=160),
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
        )
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.train(num_epochs=3)
        assert self.ranked(model) > before + 0.1


WORLD, SHARE = 2, 6


def shares(calls_before_the_last=0):
    """The embeddings and labels of both ranks, [2, 6, 4] and [2, 6]: every item has a partner on each.

    Embeddings differ from call to call. Were they equal, those in the memory would tie with those of the batch, but for
    an ulp that depends on which path a BLAS library takes for which row.
    """
    generator = torch.Generator().manual_seed(1 + calls_before_the_last)
    embeddings = torch.randn(WORLD, SHARE, 4, dtype=torch.float64, generator=generator)
    return embeddings, torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 2, 1, 0]])


def cases():
    """Losses to wrap, by name, their miner, and how often they are called."""
    for kind in LOSSES:
        wrap = distributed.DistributedLossWrapper
        for efficient in (False, True):
            yield f"{kind.__name__}, efficient={efficient}", wrap(kind(), efficient), None, 1
        yield f"{kind.__name__}, memory", wrap(CrossBatchMemory(kind(), 4, 16)), None, 3
        yield f"{kind.__name__}, miner", wrap(kind()), distributed.DistributedMinerWrapper(miners.BatchHardMiner()), 1


def work(rank, world, folder):
    """One rank: the loss of its share, and the gradient there, of every case."""
    begin(rank, world, folder, 30)
    results = {}
    for name, wrapper, miner, calls in cases():
        for call in reversed(range(calls)):
            embeddings, labels = (x[rank] for x in shares(call))
            leaf = embeddings.requires_grad_()
            loss = wrapper(leaf, labels, miner and miner(leaf, labels))
        results[name] = loss.detach(), *gradients(loss, leaf)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    assert statuses(start(WORLD, work, folder)) == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", LOSSES)
class TestTwoProcesses:
    """The wrapper multiplies the loss by the number of ranks, whose gradients DistributedDataParallel averages."""

    def whole(self):
        embeddings, labels = shares()
        return embeddings.flatten(0, 1).requires_grad_(), labels.flatten()

    def check(self, ranks, name, loss, gradient):
        for rank in range(WORLD):
            ours, ours_gradient = ranks[rank][name]
            torch.testing.assert_close(ours, WORLD * loss, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours_gradient, WORLD * gradient[rank * SHARE :][:SHARE], rtol=1e-7, atol=1e-9)

    def test_gathered_batch(self, kind, ranks):
        leaf, labels = self.whole()
        loss = by_hand(kind, leaf, leaf, *pairs_of_labels(labels, labels, own(WORLD * SHARE)))
        self.check(ranks, f"{kind.__name__}, efficient=False", loss.detach(), *gradients(loss, leaf))

    def test_efficient(self, kind, ranks):
        """Each rank has the loss of its own queries among all references; no gradient leaves a rank."""
        leaf, labels = self.whole()
        whole = by_hand(kind, leaf, leaf, *pairs_of_labels(labels, labels, own(WORLD * SHARE)))
        total = 0
        for rank, (embeddings, own_labels) in enumerate(zip(*shares(), strict=True)):
            mine = embeddings.requires_grad_()
            others, other_labels = (x[1 - rank] for x in shares())
            gathered, gathered_labels = torch.cat([mine, others]), torch.cat([own_labels, other_labels])
            loss = by_hand(kind, mine, gathered, *pairs_of_labels(own_labels, gathered_labels, own(SHARE)))
            ours, ours_gradient = ranks[rank][f"{kind.__name__}, efficient=True"]
            torch.testing.assert_close(ours, WORLD * loss.detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours_gradient, WORLD * gradients(loss, mine)[0], rtol=1e-7, atol=1e-9)
            total += ours
        torch.testing.assert_close(total / WORLD**2, whole.detach(), rtol=1e-9, atol=1e-12)

    def test_memory(self, kind, ranks):
        leaf, labels = self.whole()
        before = shares(1)[0].flatten(0, 1)
        copies = {(i, 4 + i) for i in range(12)}  # of 36 items the memory of 16 holds the last: 4 older ones, 12 copies
        for rank in range(WORLD):
            items, own_labels, older = (torch.roll(x, rank * SHARE, 0) for x in (leaf, labels, before))  # its own first
            known, known_labels = torch.cat([older, items.detach()])[-16:], torch.cat([own_labels] * 2)[-16:]
            expected = by_hand(kind, items, known, *pairs_of_labels(own_labels, known_labels, copies))
            ours, ours_gradient = ranks[rank][f"{kind.__name__}, memory"]
            torch.testing.assert_close(ours, WORLD * expected.detach(), rtol=1e-9, atol=1e-12)
            gradient = gradients(expected, leaf)[0][rank * SHARE :][:SHARE]
            torch.testing.assert_close(ours_gradient, WORLD * gradient, rtol=1e-7, atol=1e-9)

    def test_miner(self, kind, ranks):
        leaf, labels = self.whole()
        mined = miners.BatchHardMiner()(leaf, labels)
        loss = by_hand(kind, leaf, leaf, *pairs_of_tuple(mined))
        self.check(ranks, f"{kind.__name__}, miner", loss.detach(), *gradients(loss, leaf))


class TestInstalled:
    def reimport(self, monkeypatch):
        monkeypatch.delitem(sys.modules, integration.__name__)
        importlib.import_module(integration.__name__)

    @pytest.mark.parametrize("version", ["3.0.0", "1.7.3", "2.8.1", "0.9.99", "unknown"])
    def test_another_version(self, monkeypatch, version):
        monkeypatch.setattr("pytorch_metric_learning.__version__", version)
        with pytest.raises(ImportError) as error:
            self.reimport(monkeypatch)
        assert f"but {version} is installed" in str(error.value)
        assert 'pip install "pytorch-metric-learning>=2.9,<3"' in str(error.value)

    def test_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
        with pytest.raises(ImportError) as error:
            self.reimport(monkeypatch)
        assert 'it is not installed: pip install "pytorch-metric-learning>=2.9,<3"' in str(error.value)

    def test_what_it_needs_itself_is_missing(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "pytorch_metric_learning")
        monkeypatch.setattr("builtins.__import__", self.without_scipy(__import__))
        with pytest.raises(ModuleNotFoundError, match="No module named 'scipy'"):
            self.reimport(monkeypatch)

    @staticmethod
    def without_scipy(original):
        def import_(name, *rest):
            if name == "pytorch_metric_learning":
                raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
            return original(name, *rest)

        return import_

    @pytest.mark.parametrize("version", ["2.9.0", "2.9.1.dev2", "2.10.0", "2.99"])
    def test_versions_that_do(self, version):
        integration._check_version(version)

    def test_the_package_alone_does_not_import_it(self):
        code = "import sys, roadmap_ext, roadmap_ext.integrations; sys.exit('pytorch_metric_learning' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


class TestPage:
    def blocks(self, language):
        return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)

    @pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting")
    def test_every_block_runs(self):
        (diff,) = self.blocks("diff")
        scripts = [
            "".join(line[1:] + "\n" for line in diff.splitlines() if not line.startswith(dropped)) for dropped in "+-"
        ]
        assert scripts[0] != scripts[1]
        for script in scripts:
            scope = {}
            exec(script, scope)
            assert scope["loss"].isfinite()
        for block in self.blocks("python"):  # they go on where the script ends
            exec(block, scope)
            assert scope["loss"].isfinite()
        assert self.blocks("sh") == [f'pip install "{integration._NEEDED}"\n']
        assert set(re.findall(r"^```(\S+)$", PAGE.read_text(), re.MULTILINE)) == {"sh", "diff", "python"}

    def test_every_name_in_its_tables_exists(self):
        names = set(re.findall(r"`(\w+(?:Loss|Reducer|Similarity|Memory|Wrapper))(?=[`(])", PAGE.read_text()))
        known = {**vars(losses), **vars(reducers), **vars(distances), **vars(distributed), **vars(integration)}
        assert names
        assert names <= set(known)
