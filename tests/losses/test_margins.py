"""margins="auto": 0.1 on either side of the threshold of equal errors; the loss is that of these margins."""

import numpy as np
import pytest
import torch
from cases import BACKENDS
from torch.nn.functional import normalize

from roadmap_ext import CalibrationLoss, EmbeddingMemory, RoadmapLoss, SupAPLoss, reference, roadmap_loss

pytestmark = pytest.mark.host


def items(count=40, classes=6):
    """Embeddings around a common direction, so that no margin is near a default; labels and ids."""
    x = torch.randn(count, 8, dtype=torch.float64) + 0.4
    return x.requires_grad_(), torch.arange(count) % classes, torch.arange(count) % (count // 2)


def fitted(queries, references, positive, left_out, every=1):
    """Of every so many queries, by NumPy."""
    scores = (normalize(queries.detach(), dim=1) @ normalize(references.detach(), dim=1).T).numpy()[::every]
    positive, left_out = positive.numpy()[::every], left_out.numpy()[::every]
    kinds = scores[positive & ~left_out], scores[~positive & ~left_out]
    levels = np.arange(101) / 100
    low, high = np.quantile(kinds[0], levels), np.quantile(kinds[1], 1 - levels)
    met = next((place for place in range(101) if low[place] >= high[place]), 100)
    threshold = (low[met] + high[met]) / 2
    errors = (kinds[0] < threshold).mean(), (kinds[1] > threshold).mean()
    assert abs(errors[0] - errors[1]) < 0.01 + 1 / len(kinds[0])
    return {"positive_margin": threshold + 0.1, "negative_margin": threshold - 0.1}


def assert_same(one, other, x, exactly=True):
    assert one.ne(0).any()
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (one, other)]
    for ours, expected in ((one, other), gradients):
        torch.testing.assert_close(ours, expected, **({"rtol": 0, "atol": 0} if exactly else {}))


@pytest.mark.parametrize("method", ["pairwise", "sorted", "reference"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"calibration_reduction": "violating_pairs"}, {"reduction": "none"}, {"calibration_weight": 1.0}],
    ids=str,
)
def test_they_are_the_fitted(method, settings):
    x, labels, _ = items()
    expected = fitted(x, x, labels[:, None] == labels, torch.eye(40, dtype=torch.bool))
    settings |= {"method": method}
    auto, given = (roadmap_loss(x, labels, **settings, **margins) for margins in ({"margins": "auto"}, expected))
    # A product of some rows may round otherwise than that of all.
    assert_same(auto, given, x, exactly=False)
    default = roadmap_loss(x, labels, **settings)
    assert not torch.allclose(auto, default)


def test_references_of_a_memory_and_those_left_out():
    x, labels, ids = items()
    memory = EmbeddingMemory(60, 8, dtype=torch.float64)
    for _ in range(2):
        memory.enqueue(x + torch.randn_like(x), labels, ids)
    known = labels != 3
    left_out = (ids[:, None] == memory.ids) | ~known[:, None] | (memory.labels == 3)
    expected = fitted(x, memory.embeddings, labels[:, None] == memory.labels, left_out)
    auto, given = (
        RoadmapLoss(ignore_label=3, **margins)(x, labels, ref_emb=memory, ids=ids)
        for margins in ({"margins": "auto"}, expected)
    )
    assert_same(auto, given, x, exactly=False)


@pytest.mark.parametrize("method", ["pairwise", "sorted", "reference"])
def test_of_a_large_batch_some_queries_from_all_over(method):
    x, labels, _ = items(300, 10)
    labels = labels.sort().values  # those of the first queries alone would be of a few classes
    own = torch.eye(300, dtype=torch.bool)
    expected = fitted(x, x, labels[:, None] == labels, own, every=3)
    auto, given = (roadmap_loss(x, labels, method=method, **margins) for margins in ({"margins": "auto"}, expected))
    assert_same(auto, given, x, exactly=False)


@pytest.mark.parametrize("labels", [range(6), [0] * 6])
def test_of_one_kind_alone_there_is_no_threshold(labels):
    x, labels = items(6)[0], torch.tensor(labels)
    assert_same(CalibrationLoss(margins="auto")(x, labels), CalibrationLoss()(x, labels), x)


def test_kinds_that_are_apart_have_it_in_the_middle():
    """Positives at 1, negatives at 0: margins of 0.6 and 0.4 that all keep."""
    x = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    x[0] += 0.01 * torch.arange(4)  # so that positives are not all at 1
    labels, own = torch.arange(4).repeat(2), torch.eye(8, dtype=torch.bool)
    margins = fitted(x, x, labels[:, None] == labels, own)
    assert margins["positive_margin"] == pytest.approx(0.6, abs=0.05)
    assert CalibrationLoss(margins="auto")(x, labels) == 0


def test_nan_stays_in_its_row():
    x, labels, _ = items()
    with torch.no_grad():
        x[5] = torch.nan
    loss = roadmap_loss(x, labels, x.detach().nan_to_num(), labels, margins="auto", reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [5]


def test_no_state_and_no_defaults_beside_it(tmp_path):
    loss = RoadmapLoss(margins="auto")
    assert not loss.state_dict()
    assert not {"positive_margin", "negative_margin"} & {*loss.settings}
    torch.save(loss, tmp_path / "loss.pt")
    x, labels, _ = items()
    again = torch.load(tmp_path / "loss.pt", weights_only=False)  # with defaults that are other objects
    assert_same(again(x, labels), loss(x, labels), x)
    assert_same(reference.roadmap_loss(x, labels, margins="auto"), loss(x, labels), x, exactly=False)


def test_a_margin_beside_it_is_an_error():
    x, labels, _ = items()
    for name in ("positive_margin", "negative_margin"):
        for value in (0.9, 0.6, 0.1):
            for call in (RoadmapLoss, CalibrationLoss, lambda **settings: roadmap_loss(x, labels, **settings)):
                with pytest.raises(ValueError, match=f'margins="auto" reads both .*: leave {name} out'):
                    call(margins="auto", **{name: value})
    loss = RoadmapLoss(margins="auto")
    loss.negative_margin = 0.1
    with pytest.raises(ValueError, match="leave negative_margin out"):
        loss(x, labels)
    loss.margins = None
    assert_same(loss(x, labels), RoadmapLoss(negative_margin=0.1)(x, labels), x)


def test_what_it_may_be():
    for wrong in ("medians", 3, True):
        with pytest.raises(ValueError, match="margins must be one of 'auto', got"):
            RoadmapLoss(margins=wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'margins'"):
        SupAPLoss(margins="auto")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """The numbers change from batch to batch, and the graphs do not take the first for constants."""
    torch.compiler.reset()
    loss = RoadmapLoss(margins="auto")
    compiled = torch.compile(loss, backend=backend)
    for _ in range(3):
        x, labels, _ = items()
        assert_same(compiled(x, labels), loss(x, labels), x, exactly=False)
