"""A batch without any positive says so: once, to whom it concerns, and only where looking costs nothing."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from roadmap_ext import APLoss, CalibrationLoss, EmbeddingMemory, RoadmapLoss, SmoothAPLoss, SupAPLoss, notices

pytestmark = pytest.mark.host

X = torch.randn(8, 4)
NO_PAIR = torch.arange(8)
WORDS = "no query of this batch has a positive"


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())


def said(call, *arguments, **options):
    """What of it is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments, **options)
    return [warning for warning in caught if WORDS in str(warning.message)]


def memory():
    made = EmbeddingMemory(20, 4)
    made.enqueue(X, NO_PAIR, NO_PAIR)
    return made


CALLS = {
    **{
        f"{kind.__name__}, {method}": lambda kind=kind, method=method: kind(method=method)(X.requires_grad_(), NO_PAIR)
        for kind in (RoadmapLoss, SupAPLoss, SmoothAPLoss)
        for method in ("auto", "reference")
    },
    "without a gradient": lambda: RoadmapLoss()(X.detach(), NO_PAIR),
    "violating pairs": lambda: RoadmapLoss(calibration_reduction="violating_pairs")(X.requires_grad_(), NO_PAIR),
    "each query's": lambda: SupAPLoss(reduction="none")(X, NO_PAIR),
    "a gallery of other classes": lambda: RoadmapLoss()(
        X, NO_PAIR, ref_emb=torch.ones(5, 4), ref_labels=9 + NO_PAIR[:5]
    ),
    "a memory of the batch": lambda: RoadmapLoss()(X, NO_PAIR, ref_emb=memory(), ids=NO_PAIR),
    "one labelled item a class": lambda: SupAPLoss(ignore_label=-1)(X, NO_PAIR.clone().masked_fill_(NO_PAIR > 3, -1)),
    "scores": lambda: APLoss()(X.requires_grad_(), torch.zeros(8, 4, dtype=torch.bool)),
    "scores, all ignored": lambda: APLoss()(X, X > 0, torch.ones(8, 4, dtype=torch.bool)),
    "scores, reference": lambda: APLoss(method="reference")(X, torch.zeros(8, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", CALLS)
def test_once(name):
    first, second = said(CALLS[name]), said(CALLS[name])
    assert [warning.category for warning in first] == [UserWarning]
    assert first[0].filename == __file__
    assert not second


def test_code_without_a_name_may_call():
    assert len(said(lambda: eval("loss(x, labels)", {"loss": RoadmapLoss(), "x": X, "labels": NO_PAIR}))) == 1


def compiled():
    torch.compile(RoadmapLoss(), fullgraph=True, backend="aot_eager")(X, NO_PAIR)


def faked():
    with FakeTensorMode():
        RoadmapLoss()(torch.empty(8, 4), torch.empty(8, dtype=torch.int64))


def transformed():
    torch.func.grad(lambda x: RoadmapLoss(method="reference")(x, NO_PAIR))(X.detach())


QUIET = {
    "a pair": lambda: RoadmapLoss()(X, NO_PAIR // 7),
    "perfect": lambda: SupAPLoss()(torch.eye(2).repeat_interleave(4, 0), NO_PAIR // 4),
    "perfect scores": lambda: APLoss()(torch.tensor([[9.0, 0.0]]), torch.tensor([[True, False]])),
    "no query": lambda: RoadmapLoss()(X[:0], NO_PAIR[:0]),
    "no labelled query": lambda: RoadmapLoss(ignore_label=3)(X, torch.full((8,), 3)),
    "calibration alone": lambda: CalibrationLoss()(X, NO_PAIR),
    "on another device": lambda: RoadmapLoss()(X.to("meta"), NO_PAIR.to("meta")),
    "in a graph": compiled,
    "of fake tensors": faked,
    "in a transform": transformed,
}


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_said(name):
    assert not said(QUIET[name])
