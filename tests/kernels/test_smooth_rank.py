"""smooth_rank against the float64 reference, with any gradient arriving at the ranks."""

import pytest
import torch
from cases import BACKENDS
from oracle import PUBLISHED, ULPS, ULPS_FLOAT64, grid_scores

import roadmap_ext
from roadmap_ext import ap_loss, reference, smooth_rank

pytestmark = pytest.mark.ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def ranks_and_gradient(function, scores, target, weights, **options):
    leaf = scores.detach().clone().requires_grad_()
    ranks = function(leaf, target, **options)
    value = (ranks.negative_rank * weights[0].to(ranks.negative_rank.dtype)).sum()
    if ranks.positive_rank.requires_grad:
        value = value + (ranks.positive_rank * weights[1].to(ranks.positive_rank.dtype)).sum()
    value.backward()
    return ranks, leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("shape", [(4, 1), (5, 33), (6, 300), (2, 9000)])
def test_ranks_and_gradients(dtype, surrogate, shape):
    scores, ignore = grid_scores(*shape, dtype), torch.rand(shape) < 0.1
    target = torch.rand(shape) < min(0.2, 200 / shape[1])
    target[0] = False
    count = int((target & ~ignore).sum())
    weights = torch.randn(2, count).mul(8).round() / 8
    options = {"ignore": ignore, "surrogate": surrogate}
    ours, gradient = ranks_and_gradient(smooth_rank, scores, target, weights, method="pairwise", **options)
    truth, exact = ranks_and_gradient(reference.smooth_rank, scores.double(), target, weights, **options)
    plain, rough = ranks_and_gradient(reference.smooth_rank, scores, target, weights, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(ours.query, truth.query)
    assert torch.equal(ours.reference, truth.reference)
    eps = (ULPS_FLOAT64 if dtype == torch.float64 else ULPS) * torch.finfo(wide).eps
    for name in ("positive_rank", "negative_rank"):
        mine, right, other = (getattr(r, name).detach() for r in (ours, truth, plain))
        assert mine.dtype == wide
        assert (mine - right).norm() <= 2 * (other - right).norm() + eps * right.norm(), name
    assert gradient.dtype == dtype
    ulp = torch.finfo(dtype).eps * (ULPS_FLOAT64 if dtype == torch.float64 else 1)
    error = (gradient.double() - exact).norm(dim=1)
    slope = weights.abs().max() / 0.01 if count else 0.0
    allowed = 2 * (rough.double() - exact).norm(dim=1) + ULPS * torch.finfo(wide).eps * slope + ulp * exact.norm(dim=1)
    assert (error <= allowed).all(), (error / allowed).max()


def test_order_is_row_major():
    target = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    ranks = smooth_rank(torch.tensor([[0.1, 0.9, 0.2, 0.5]] * 3), target)
    assert ranks.query.tolist() == [0, 0, 2, 2]
    assert ranks.reference.tolist() == [1, 2, 0, 3]
    assert ranks.positive_rank.tolist() == [1.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_ap_loss_is_made_of_it(name):
    scores = grid_scores(6, 80).double().requires_grad_()
    target = torch.rand(6, 80) < 0.2
    ranks = smooth_rank(scores, target, **PUBLISHED[name])
    ap = ranks.positive_rank / (ranks.positive_rank + ranks.negative_rank)
    count = torch.bincount(ranks.query, minlength=6)
    loss = (1 - ap).div(count[ranks.query]).sum() / (count > 0).sum()
    other = ap_loss(scores, target, **PUBLISHED[name])
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(
        torch.autograd.grad(loss, scores)[0], torch.autograd.grad(other, scores)[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_gradcheck(surrogate):
    scores = (torch.randn(3, 11, dtype=torch.float64) * 0.1).requires_grad_()
    target, ignore = torch.rand(3, 11) < 0.4, torch.rand(3, 11) < 0.2

    def ranks(s):
        result = smooth_rank(s, target, ignore=ignore, surrogate=surrogate, tau=0.05, rho=5.0, method="pairwise")
        return result.negative_rank if surrogate == "sup" else (result.positive_rank, result.negative_rank)

    assert torch.autograd.gradcheck(ranks, scores, eps=1e-7, atol=1e-5)


def test_sup_positive_rank_carries_no_gradient():
    scores, target = torch.randn(2, 9, requires_grad=True), torch.rand(2, 9) < 0.5
    for function in (smooth_rank, reference.smooth_rank):
        ranks = function(scores, target)
        assert not ranks.positive_rank.requires_grad
        assert ranks.negative_rank.requires_grad


@pytest.mark.parametrize("method", ["pairwise", "reference"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_no_positives(method, shape, surrogate):
    scores = torch.randn(shape, requires_grad=True)
    ranks = smooth_rank(scores, torch.zeros(shape, dtype=torch.bool), method=method, surrogate=surrogate)
    assert all(part.shape == (0,) for part in ranks)
    ranks.negative_rank.sum().backward()
    assert (scores.grad == 0).all()


def test_nan_stays_in_its_row():
    scores, target = grid_scores(4, 60), torch.rand(4, 60) < 0.3
    target[:, 0], target[:, 1] = True, False
    dirty = scores.clone()
    dirty[1, 1], dirty[2, 0] = float("nan"), float("nan")
    clean, _ = ranks_and_gradient(smooth_rank, scores, target, torch.ones(2, 1))
    ranks, gradient = ranks_and_gradient(smooth_rank, dirty, target, torch.ones(2, 1))
    sick = (ranks.query == 1) | (ranks.query == 2)
    assert ranks.negative_rank[sick].isnan().all()
    assert torch.equal(ranks.negative_rank[~sick], clean.negative_rank[~sick])
    assert gradient[1:3].isnan().all()
    assert gradient[[0, 3]].isfinite().all()


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.host
def test_opcheck(surrogate):
    scores, target, ignore = torch.randn(3, 20), torch.rand(3, 20) < 0.3, torch.rand(3, 20) < 0.1
    settings = [float(surrogate == "smooth"), 0.01, 100.0, 0.05, 0.5, 1.49]
    ops = torch.ops.roadmap_ext
    for mask, want in ((ignore, True), (None, False)):
        torch.library.opcheck(ops.smooth_rank.default, (scores, target, mask, settings, want))
    slope = ops.smooth_rank(scores, target, ignore, settings, True)[-1]
    for positive in (None, torch.randn_like(slope)):
        arguments = (scores, target, ignore, slope, positive, torch.randn_like(slope), settings)
        torch.library.opcheck(ops.smooth_rank_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile_fullgraph_with_a_dynamic_number_of_positives(backend):
    def recall(scores, target):
        ranks = smooth_rank(scores, target, surrogate="smooth")
        return torch.sigmoid(4 - ranks.positive_rank - ranks.negative_rank).sum()

    compiled = torch.compile(recall, fullgraph=True, backend=backend)
    for density in (0.2, 0.5):
        scores, target = grid_scores(4, 30).requires_grad_(), torch.rand(4, 30) < density
        mine, right = compiled(scores, target), recall(scores, target)
        torch.testing.assert_close(mine, right)
        torch.testing.assert_close(torch.autograd.grad(mine, scores), torch.autograd.grad(right, scores))


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_second_derivatives_raise(surrogate):
    scores, target = torch.randn(2, 9, requires_grad=True), torch.rand(2, 9) < 0.5
    ranks = smooth_rank(scores, target, surrogate=surrogate)
    (gradient,) = torch.autograd.grad(ranks.negative_rank.sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        gradient.sum().backward()


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.long
def test_bitwise_equal_for_any_number_of_threads(surrogate):
    for shape in ((1, 80_000), (40, 300)):
        scores, target = torch.randn(shape) * 0.2, torch.rand(shape) < min(0.1, 500 / shape[1])
        weights = torch.randn(2, int(target.sum()))
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ranks_and_gradient(smooth_rank, scores, target, weights, surrogate=surrogate))
        (one, gradient), (other, other_gradient) = results
        assert torch.equal(one.negative_rank, other.negative_rank)
        assert torch.equal(one.positive_rank, other.positive_rank)
        assert torch.equal(gradient, other_gradient)


def test_strides_and_no_grad():
    scores, target = grid_scores(6, 50), torch.rand(6, 50) < 0.3
    expected = smooth_rank(scores, target)
    view = smooth_rank(scores.T.contiguous().T, target.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(expected, view, strict=True))
    with torch.no_grad():
        assert smooth_rank(scores.requires_grad_(), target).negative_rank.grad_fn is None


@pytest.mark.host
def test_named_tuple_is_exported():
    assert isinstance(smooth_rank(torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool)), roadmap_ext.SmoothRank)


@pytest.mark.long
def test_exponents_carry_their_rounding_errors():
    """One negative among positives that share a centre far away: the relative error of a rank is that of an exponent.

    Plain float32 divides a rounded gap by tau, and so would the kernels without their compensation: 2e-6.
    """
    positives = 0.3 + 0.19 * torch.rand(500, 64)
    scores = torch.cat([positives, 0.2 + 0.25 * torch.rand(500, 1)], 1)
    target = torch.ones(500, 65, dtype=torch.bool)
    target[:, 64] = False
    ours = smooth_rank(scores, target, surrogate="smooth").negative_rank.double()
    truth = reference.smooth_rank(scores.double(), target, surrogate="smooth").negative_rank
    assert ((ours - truth) / truth).abs().max() < 4e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_above_a_distant_knee(dtype):
    """Hundreds of temperatures above a positive and still below the knee: sigma is 1, whatever its exponential is."""
    scores = torch.arange(-40, 64, dtype=dtype)[None] / 16
    target = torch.zeros(1, 104, dtype=torch.bool)
    target[:, :6] = True
    options = {"tau": 1e-3, "delta": 100.03}
    ranks = smooth_rank(scores, target, **options)
    truth = reference.smooth_rank(scores.double(), target, **options)
    torch.testing.assert_close(ranks.negative_rank.double(), truth.negative_rank, rtol=1e-6, atol=0)
