"""ignore_label: items of this label are in no ranking, as if they had been removed before the reference was called."""

import pytest
import torch
from cases import BACKENDS

from roadmap_ext import CalibrationLoss, EmbeddingMemory, RoadmapLoss, SmoothAPLoss, SupAPLoss, reference, roadmap_loss

pytestmark = [pytest.mark.ops, pytest.mark.host]

NONE = -1
KINDS = {
    "roadmap": {},
    "released": {"calibration_reduction": "violating_pairs"},
    "sup": {"calibration_weight": 0.0},
    "smooth": {"calibration_weight": 0.0, "surrogate": "smooth"},
    "calibration": {"calibration_weight": 1.0},
    "every negative costs": {"calibration_weight": 1.0, "negative_margin": -0.5},
    "violating pairs": {"calibration_weight": 1.0, "calibration_reduction": "violating_pairs"},
}


class Items:
    """Embeddings, labels and ids, and which of them have a label."""

    def __init__(self, count, label=NONE):
        self.kept = torch.rand(count) < 0.7
        self.labels = torch.where(self.kept, torch.arange(count) % 7 + 2, label)
        self.labels[self.kept.nonzero()[0]] = 99  # a query without a positive, which the means of calibration count
        # What stands in the place of the others is anything.
        self.x = torch.where(self.kept[:, None], torch.randn(count, 6, dtype=torch.float64), torch.nan).requires_grad_()
        self.ids = torch.randint(count // 2, (count,))

    def without(self):
        """The embeddings that are left, as a leaf; their labels and ids."""
        return self.x.detach()[self.kept].requires_grad_(), self.labels[self.kept], self.ids[self.kept]


def assert_as_if_removed(loss, items, expected, removed, reduction="mean"):
    if reduction == "none":
        assert (loss[~items.kept] == 0).all()
        loss, weight = loss[items.kept], torch.rand(len(expected), dtype=torch.float64)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        loss, expected = (loss * weight).sum(), (expected * weight).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(items.x.grad[items.kept], removed.grad, rtol=1e-8, atol=1e-10)
    assert (items.x.grad[~items.kept] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("references", ["batch", "batch with ids", "gallery", "gallery with ids"])
def test_as_if_removed(kind, reduction, references):
    for method in ("auto", "sorted", "reference"):
        as_if_removed(kind, reduction, references, method)


def as_if_removed(kind, reduction, references, method):
    items, gallery = Items(40), Items(60)
    removed, labels, ids = items.without()
    others, ref_labels, ref_ids = gallery.without()
    ours, expected = (items.x, items.labels), (removed, labels)
    options = KINDS[kind] | {"reduction": reduction}
    given, kept = {}, {}
    if "gallery" in references:
        ours, expected = (*ours, gallery.x, gallery.labels), (*expected, others, ref_labels)
    if "ids" in references:
        given = {"ids": items.ids, "ref_ids": gallery.ids if "gallery" in references else items.ids}
        kept = {"ids": ids, "ref_ids": ref_ids if "gallery" in references else ids}
    loss = roadmap_loss(*ours, **given, ignore_label=NONE, method=method, chunk_size=9, **options)
    truth = reference.roadmap_loss(*expected, **kept, **options)
    assert_as_if_removed(loss, items, truth, removed, reduction)
    if "gallery" in references:
        torch.testing.assert_close(gallery.x.grad[gallery.kept], others.grad, rtol=1e-8, atol=1e-10)
        assert (gallery.x.grad[~gallery.kept] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_does_so(kind):
    items = Items(30)
    removed, labels, _ = items.without()
    loss = reference.roadmap_loss(items.x, items.labels, ignore_label=NONE, **KINDS[kind])
    assert_as_if_removed(loss, items, reference.roadmap_loss(removed, labels, **KINDS[kind]), removed)


@pytest.mark.parametrize("kind", [RoadmapLoss, SupAPLoss, SmoothAPLoss, CalibrationLoss])
@pytest.mark.parametrize(
    ("label", "dtype"), [(-1, torch.int8), (255, torch.uint8), (2**40, torch.int64), (0, torch.int32)]
)
def test_modules_and_labels_of_any_dtype(kind, label, dtype):
    items = Items(30, label)
    removed, labels, _ = items.without()
    loss = kind(ignore_label=label)
    assert f"ignore_label={label}" in repr(loss)
    assert_as_if_removed(loss(items.x, items.labels.to(dtype)), items, kind()(removed, labels), removed)


def test_include_self():
    items = Items(30)
    removed, labels, _ = items.without()
    loss = roadmap_loss(items.x, items.labels, include_self=True, ignore_label=NONE)
    assert_as_if_removed(loss, items, roadmap_loss(removed, labels, include_self=True), removed)


def test_a_memory_may_hold_some():
    ours, others = EmbeddingMemory(80, 6, dtype=torch.float64), EmbeddingMemory(80, 6, dtype=torch.float64)
    loss = RoadmapLoss(ignore_label=NONE)
    for _ in range(3):
        items = Items(20)
        removed, labels, ids = items.without()
        ours.enqueue(items.x, items.labels, items.ids)
        others.enqueue(removed, labels, ids)
        value = loss(items.x, items.labels, ref_emb=ours, ids=items.ids)
        assert_as_if_removed(value, items, RoadmapLoss()(removed, labels, ref_emb=others, ids=ids), removed)


@pytest.mark.parametrize("labels", [torch.full((8,), NONE), torch.tensor([NONE] * 7 + [3])])
@pytest.mark.parametrize("options", KINDS.values(), ids=str)
@pytest.mark.parametrize("method", ["auto", "reference"])
def test_hardly_any_has_a_label(labels, options, method):
    x = torch.randn(8, 4, requires_grad=True)
    loss = roadmap_loss(x, labels, ignore_label=NONE, method=method, **options)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


def test_without_it_such_a_label_is_a_class():
    items = Items(30)
    x = torch.randn(30, 6)
    assert roadmap_loss(x, items.labels) != roadmap_loss(x, items.labels, ignore_label=NONE)
    assert roadmap_loss(x, items.labels) == roadmap_loss(x, items.labels, ignore_label=-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile(backend):
    items = Items(30)
    loss = RoadmapLoss(ignore_label=NONE)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    expected, measured = (torch.autograd.grad(each(items.x, items.labels), items.x)[0] for each in (loss, compiled))
    torch.testing.assert_close(measured, expected)


@pytest.mark.parametrize("value", ["none", 1.5, True, torch.tensor(-1)])
@pytest.mark.host
def test_what_it_is_not(value):
    with pytest.raises(TypeError, match="ignore_label must be None or an integer"):
        RoadmapLoss(ignore_label=value)
    with pytest.raises(ValueError, match="ignore_label must be an int64"):
        RoadmapLoss(ignore_label=2**63)
