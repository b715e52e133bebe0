"""ap_loss against the float64 reference: every dtype, surrogate and published setting, over awkward sizes."""

import pytest
import torch
from cases import deep
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PUBLISHED, allowed_gradient_error, assert_accurate, grid_scores, ragged_target, row_error, run

import roadmap_ext
from roadmap_ext import reference

pytestmark = pytest.mark.ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [1, 31, 33, 129, 4096 + 32]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_settings(name, dtype):
    scores, target = grid_scores(6, 300, dtype), ragged_target(6, 300)
    assert_accurate(scores, target, ignore=torch.rand(6, 300) < 0.1, **PUBLISHED[name])


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(columns, surrogate, dtype):
    scores, target = grid_scores(5, columns, dtype), ragged_target(5, columns)
    target[1] &= torch.rand(columns) < 300 / columns  # the reference takes |P| x N
    assert_accurate(scores, target, surrogate=surrogate)
    assert_accurate(scores, target, surrogate=surrogate, ignore=torch.rand(5, columns) < 0.3)


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float32, *deep(torch.float16, torch.float64)], ids=str)
@pytest.mark.long
def test_rows_split_over_threads(surrogate, dtype):
    """Few long rows: spans of columns, and pieces of positives, on different threads."""
    scores = grid_scores(2, 150_000, dtype)
    target = torch.rand(2, 150_000) < 1e-4
    target[1] = torch.rand(150_000) < 1e-3
    assert_accurate(scores, target, surrogate=surrogate, ignore=torch.rand(2, 150_000) < 0.1)


@pytest.mark.long
@pytest.mark.deep
def test_many_positives():
    """Several pieces of positives, and tails of whole groups."""
    scores = grid_scores(2, 9000, scale=20.0)
    target = torch.rand(2, 9000) < 0.15
    assert_accurate(scores, target)
    assert_accurate(scores, target, surrogate="smooth")


@pytest.mark.parametrize("noise", [1.0, 2.0])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_clustered(noise, surrogate):
    """The scores that training has: off the grid, so redrawn until no pair lies on the knee."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(20, 64, generator=generator)
        labels = torch.arange(600) % 20
        noisy = centres[labels] + noise * torch.randn(600, 64, generator=generator)
        embeddings = torch.nn.functional.normalize(noisy, dim=1)
        scores = embeddings[:8] @ embeddings.T
        target = labels[:8, None] == labels[None]
        rows = zip(scores, target, strict=True)
        if min((row[None] - row[own][:, None] - 0.05).abs().min() for row, own in rows) > 1e-6:
            break
    else:
        pytest.fail("no draw without a pair on the knee")
    assert_accurate(scores, target, surrogate=surrogate)
    assert_accurate(scores, target, surrogate=surrogate, ignore=torch.eye(8, 600, dtype=torch.bool))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, -40.0, 1e4])
def test_far_from_unit_scores(scale, offset):
    """Scores need not lie in [-1, 1]: far-apart clusters, large offsets, all but constant rows."""
    generator = torch.Generator().manual_seed(1)
    scores = (torch.randn(4, 500, generator=generator) * scale * 64).round() / 64 + offset
    target = torch.rand(4, 500, generator=generator) < 0.1
    assert_accurate(scores, target)
    assert_accurate(scores, target, surrogate="smooth")


LARGE_SETTINGS = {
    "rho": lambda large: {"rho": large, "tau": 1e-3},
    "tau": lambda large: {"rho": 0.0, "tau": large},
    "rho * tau": lambda large: {"rho": 290.0, "tau": large / 290},
    "tau * rho": lambda large: {"rho": large, "tau": 1.0},
    "delta": lambda large: {"rho": 3.0, "delta": large},
    "start": lambda large: {"start": large, "rho": 0.0},
    "offset": lambda large: {"offset": large},
    "all": lambda large: {"rho": large, "tau": 1.0, "delta": large, "start": large, "offset": large},
}


@pytest.mark.parametrize("setting", LARGE_SETTINGS)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("method", ["pairwise", "sorted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_settings_are_refused_or_give_finite_results(setting, surrogate, method, dtype):
    """Wherever those of the reference are: sums over a row must not overflow, nor settings times one another."""
    scores, target = grid_scores(4, 400, dtype), ragged_target(4, 400, 0.4)
    for large in (1e20, 1e28, 1e35, 2.8e38):
        options = {"surrogate": surrogate, "delta": 0.01, **LARGE_SETTINGS[setting](large)}
        try:
            roadmap_ext.APLoss(**options)
        except ValueError:
            assert large > 1e28
            continue
        for scale in (1.0, 1e20) if dtype in (torch.float32, torch.float64) else (1.0,):
            ours = run(roadmap_ext.ap_loss, scores * scale, target, torch.ones(4), method=method, **options)
            plain = run(reference.ap_loss, scores * scale, target, torch.ones(4), **options)
            assert (ours.loss.isfinite() >= plain.loss.isfinite()).all()
            assert (ours.gradient.isfinite() >= plain.gradient.isfinite()).all()


def test_large_values_in_float16_and_constant_rows():
    scores = torch.tensor([[6e4, -6e4, 3e4, 1.0, 0.0, -1.0], [0.25] * 6], dtype=torch.float16)
    target = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    assert_accurate(scores, target)
    assert_accurate(scores.float(), target, surrogate="smooth")


@pytest.mark.long
@pytest.mark.deep
def test_cluster_of_thousands():
    """Sums of thousands of nearly equal shares: what drifts in float32 shows here."""
    scores = 0.5 + torch.randint(0, 8, (2, 20_000)) / 2**16
    target = torch.rand(2, 20_000) < 0.02
    assert_accurate(scores, target)
    assert_accurate(scores, target, surrogate="smooth")


# The same examples in every run: where plain PyTorch is exact by luck, one in thousands exceeds its share by a
# fraction, and a test that fails one run in a hundred is no test. To explore, drop derandomize.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_settings(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    levels = data.draw(st.sampled_from([2, 16, 64, 512]))
    scores = torch.randint(-levels, levels + 1, (rows, columns), generator=generator) / 64
    scores = scores.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    target = torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    ignore = torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    # Knees lie between the grid's multiples of 1/64, or at 0.
    delta = data.draw(st.sampled_from([0.0, 0.05, 0.3, 2.3]))
    start = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    assert_accurate(
        scores,
        target,
        ignore=ignore,
        surrogate=data.draw(st.sampled_from(["sup", "smooth"])),
        tau=data.draw(st.sampled_from([1e-3, 0.01, 0.05, 1.0])),
        rho=data.draw(st.sampled_from([0.0, 1.0, 100.0])),
        delta=delta,
        start=start,
        offset=data.draw(st.sampled_from([None, 1.0, 1.44, 3.0])),
    )


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_gradcheck(surrogate):
    scores = torch.randn(3, 12, dtype=torch.float64).mul(0.1).requires_grad_()
    target, ignore = torch.rand(3, 12) < 0.4, torch.rand(3, 12) < 0.2
    # The true step of rank+ in sup has no derivative, but finite differences would see it where scores are near.
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: roadmap_ext.ap_loss(
                s, target, ignore=ignore, surrogate=surrogate, tau=0.05, rho=5.0, reduction=r, method="pairwise"
            ),
            scores,
            eps=1e-7,
            atol=1e-5,
        )


@pytest.mark.long
def test_upper_bound_of_one_minus_ap():
    """1 - AP_sup >= 1 - AP at start >= 1/2 and offset >= 1, ties included: thousands of queries."""
    for rows, columns, levels in ((1000, 20, 6), (1000, 60, 30), (500, 200, 40)):
        scores = torch.randint(0, levels, (rows, columns)) / 64
        target = torch.rand(rows, columns) < 0.2
        exact = 1 - roadmap_ext.metrics.average_precision(scores, target).nan_to_num(1.0)
        for options in ({}, {"offset": 1.0}, {"offset": 1.44}, {"delta": 0.0}, {"start": 0.9}):
            bound = roadmap_ext.ap_loss(scores, target, reduction="none", **options)
            assert (bound >= exact - 1e-6).all()
    # The released iNaturalist setting is no bound, which shows that this test can fail: at a tie it counts one half.
    tied, one = torch.full((1, 2), 0.5), torch.tensor([[True, False]])
    assert roadmap_ext.ap_loss(tied, one, start=0.0, offset=1.0) < 1 - roadmap_ext.metrics.average_precision(tied, one)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["sup", "smooth"]))
def test_permuting_references_permutes_the_gradient(seed, surrogate):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-64, 65, (2, 77), generator=generator) / 64
    target = torch.rand(2, 77, generator=generator) < 0.2
    order = torch.randperm(77, generator=generator)
    weight = torch.ones(2)
    one = run(roadmap_ext.ap_loss, scores, target, weight, surrogate=surrogate)
    other = run(roadmap_ext.ap_loss, scores[:, order], target[:, order], weight, surrogate=surrogate)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.gradient[:, order], other.gradient, rtol=1e-5, atol=1e-6)


def test_shifting_all_scores_changes_nothing():
    scores, target = grid_scores(4, 200), torch.rand(4, 200) < 0.1
    one = run(roadmap_ext.ap_loss, scores, target, torch.ones(4))
    other = run(roadmap_ext.ap_loss, scores + 2.0, target, torch.ones(4))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-5, atol=1e-6)


def test_known_values():
    """By hand: one positive 0.02 above, one negative tied, one in the tail."""
    scores = torch.tensor([[0.5, 0.48, 0.5, 0.7]], dtype=torch.float64)
    target = torch.tensor([[True, False, False, False]])
    sigma = torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64))
    offset = 0.5 + torch.sigmoid(torch.tensor(5.0, dtype=torch.float64))
    rank = 1 + sigma + 1 + (100 * (0.2 - 0.05) + offset)
    loss = roadmap_ext.ap_loss(scores, target)
    torch.testing.assert_close(loss, 1 - 1 / rank, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["pairwise", "sorted"])
def test_far_below_carries_exactly_nothing(method):
    scores = torch.tensor([[0.9, 0.1, -0.5]], requires_grad=True)
    roadmap_ext.ap_loss(scores, torch.tensor([[True, False, False]]), method=method).backward()
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_tolerance_notices_an_error():
    """The tolerance itself: a gradient off by a thousandth, and one negative's sign, are both refused."""
    scores, target = grid_scores(4, 300), torch.rand(4, 300) < 0.1
    weight = torch.ones(4)
    truth = run(reference.ap_loss, scores.double(), target, weight)
    plain = run(reference.ap_loss, scores, target, weight)
    allowed = allowed_gradient_error(plain.gradient, truth.gradient, torch.full((4,), 0.05), 0.01)
    assert (row_error(plain.gradient, truth.gradient) <= allowed).all()
    assert (row_error(plain.gradient * 1.001, truth.gradient) > allowed).all()
    flipped = plain.gradient.clone()
    at = flipped.abs().argmax(1, keepdim=True)
    flipped.scatter_(1, at, -flipped.gather(1, at))
    assert (row_error(flipped, truth.gradient) > allowed).all()
