"""The losses of ranks beside AP: their references against the definitions, and bounds."""

import pytest
import torch
from definitions import loss as by_definition
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import grid_scores
from torch.autograd import gradcheck

from roadmap_ext import reference

pytestmark = pytest.mark.host

LOSSES = ["ap", "recall", "ndcg", "mrr", "hap"]


def reference_of(name, scores, relevance, **options):
    """The reference of a loss by relevance of 0, 1, 2, ..."""
    if name in ("ap", "recall", "mrr"):
        return getattr(reference, f"{name}_loss")(scores, relevance > 0, **options)
    return getattr(reference, f"{name}_loss")(scores, relevance, **options)


def worth(name, relevance):
    """What items of some relevance are worth by default."""
    return torch.exp2(relevance.double()) - 1 if name == "ndcg" else relevance.double()


def expected(name, scores, relevance, exact=False):
    of = worth(name, relevance)
    rows = zip(scores.double().tolist(), relevance.tolist(), of.tolist(), strict=True)
    return torch.tensor([by_definition(name, *row, exact) for row in rows], dtype=torch.float64)


def graded(rows=5, columns=60, levels=3):
    """Grades of which many are 0, in a row without and a row of one level."""
    relevance = torch.randint(-levels, levels + 1, (rows, columns)).clamp(min=0)
    relevance[0] = 0
    relevance[1] = relevance[1].clamp(max=1)
    return grid_scores(rows, columns, torch.float64), relevance


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("levels", [1, 3])
def test_references_are_the_definitions(name, levels):
    scores, relevance = graded(levels=levels)
    ours = reference_of(name, scores, relevance, reduction="none")
    torch.testing.assert_close(ours, expected(name, scores, relevance), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference_of(name, scores, relevance), ours.sum() / 4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_upper_bounds(data):
    """Of the true loss, whatever scores and relevance are; Recall@k is none."""
    columns = data.draw(st.integers(1, 20))
    scores = torch.tensor([data.draw(st.lists(st.integers(-64, 64), min_size=columns, max_size=columns))]).double() / 64
    relevance = torch.tensor([data.draw(st.lists(st.integers(0, 3), min_size=columns, max_size=columns))])
    for name in ("ap", "ndcg", "mrr", "hap"):
        assert reference_of(name, scores, relevance) >= expected(name, scores, relevance, exact=True) - 1e-12, name
    rising = reference.hap_loss(scores, relevance, leak=0.2, beta=0.5, gamma=0.3)
    assert rising >= reference.hap_loss(scores, relevance) - 1e-12


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_references_have_the_gradients_of_their_values(name, surrogate):
    relevance = torch.tensor([[0, 0, 1, 2, 3, 0, 2, 1], [0, 0, 0, 0, 1, 0, 0, 1]])
    scores = (torch.randn(2, 8, dtype=torch.float64) * 0.2).requires_grad_()
    options = {"tau": 0.05, "rho": 3.0, "reduction": "none", "surrogate": surrogate}
    if name == "hap":
        options |= {"leak": 0.3, "beta": 0.7, "gamma": 0.2}
    assert gradcheck(lambda s: reference_of(name, s, relevance, **options), scores, eps=1e-7, atol=1e-5)


def test_relevance_of_any_dtype():
    scores, relevance = graded()
    expected = reference.ndcg_loss(scores, relevance)
    for dtype in (torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(reference.ndcg_loss(scores, relevance.to(dtype)), expected)
    halves = reference.ndcg_loss(scores, relevance / 2, gain="linear")
    assert torch.equal(halves, reference.ndcg_loss(scores, relevance, gain="linear"))
    assert not torch.equal(expected, halves)
    one = relevance.clamp(max=1)
    assert torch.equal(reference.ndcg_loss(scores, one), reference.ndcg_loss(scores, one > 0))
    assert torch.equal(reference.hap_loss(scores, one), reference.hap_loss(scores, one > 0))
    torch.testing.assert_close(reference.hap_loss(scores, one), reference.ap_loss(scores, one > 0))
    torch.testing.assert_close(
        reference.hap_loss(scores, relevance, relevance=relevance * 7.0), reference.hap_loss(scores, relevance)
    )


def test_ignored_pairs_are_as_good_as_absent():
    scores, relevance = graded()
    ignore = torch.zeros_like(relevance, dtype=torch.bool)
    ignore[:, 20:40] = True
    kept = ~ignore[0]
    relevance = relevance.double()
    dirty = relevance.masked_fill(ignore, -1.0)
    torch.testing.assert_close(
        reference.ndcg_loss(scores, dirty, ignore=ignore), reference.ndcg_loss(scores[:, kept], relevance[:, kept])
    )
    for name in ("recall", "mrr"):
        torch.testing.assert_close(
            reference_of(name, scores, relevance, ignore=ignore),
            reference_of(name, scores[:, kept], relevance[:, kept]),
        )
    torch.testing.assert_close(
        reference.hap_loss(scores, relevance.long(), ignore=ignore),
        reference.hap_loss(scores[:, kept], relevance[:, kept].long()),
    )


class TestBadInput:
    scores = torch.randn(2, 20)
    level = torch.tensor([[0, 1] * 10, [2, 1] * 10])

    @pytest.mark.parametrize(
        ("relevance", "error", "words"),
        [
            (torch.full((2, 20), -1), ValueError, "relevance must lie between 0.*got values from -1"),
            (torch.full((2, 20), float("nan")), ValueError, "relevance must lie between 0.*nan"),
            (torch.full((2, 20), float("inf")), ValueError, "relevance must lie between 0.*inf"),
            (torch.full((2, 20), 65), ValueError, "relevance must lie between 0.* and 64, got values from 65 to 65"),
            (torch.rand(2, 19), ValueError, r"relevance must have the shape of scores, \(2, 20\), got \(2, 19\)"),
            (
                torch.arange(40).view(2, 20),
                ValueError,
                "at most 16 distinct positive values in a row, got more in row 0",
            ),
            (torch.rand(2, 20, dtype=torch.complex64), TypeError, "bool or real numbers, got torch.complex64"),
            ([[1.0]], TypeError, "relevance must be a torch.Tensor, got list"),
        ],
    )
    def test_relevance(self, relevance, error, words):
        with pytest.raises(error, match=words):
            reference.ndcg_loss(self.scores, relevance)

    @pytest.mark.parametrize(
        ("level", "relevance", "error", "words"),
        [
            (level.float(), None, TypeError, "level must have an integer dtype, got torch.float32"),
            (level - 1, None, ValueError, "level must lie between 0.*16, got values from -1 to 1"),
            (level + 15, None, ValueError, "level must lie between 0.*16, got values from 15 to 17"),
            (level[:1], None, ValueError, "level must have the shape of scores"),
            (level, torch.arange(40.0).view(2, 20), ValueError, "the same for all of a level in a row, got 1 and 19"),
            (level, torch.zeros(2, 20), ValueError, "relevance must be positive for items of a level above 0"),
            (level, level[:, :3], ValueError, "relevance must have the shape of scores"),
        ],
    )
    def test_levels(self, level, relevance, error, words):
        with pytest.raises(error, match=words):
            reference.hap_loss(self.scores, level, relevance=relevance)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"k": ()}, ValueError, "k must hold an integer at least"),
            ({"k": 0}, ValueError, "k must be at least 1"),
            ({"k": (1, 0)}, ValueError, "k must be at least 1"),
            ({"k": 1.5}, TypeError, "k must be an integer"),
            ({"rank_temperature": 0.0}, ValueError, "rank_temperature must be positive"),
            ({"gain": "linear"}, TypeError, "unexpected keyword argument 'gain'"),
        ],
    )
    def test_recall_settings(self, options, error, words):
        with pytest.raises(error, match=words):
            reference.recall_loss(self.scores, self.level > 0, **options)

    @pytest.mark.parametrize("options", [{"leak": -1.0}, {"beta": -1.0}, {"gamma": 1.5}, {"gamma": -0.1}])
    def test_hap_settings(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
            reference.hap_loss(self.scores, self.level, **options)
        with pytest.raises(ValueError, match="'exponential', 'linear', got 'log'"):
            reference.ndcg_loss(self.scores, self.level, gain="log")
