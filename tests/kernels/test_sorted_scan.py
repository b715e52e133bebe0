"""method="sorted": the sorted scan against float64 at every size, against the pairwise kernels at every oddity.

Steps, ties and thresholds are counted exactly; what no oracle could go through pair by pair, up to 1,000,000 references
and 100,000 positives, is checked on a sample. Rows of float64 go the pairwise way.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from cases import deep
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PUBLISHED, ULPS, assert_accurate, grid_scores, ragged_target, run, settings_of

from roadmap_ext import ap_loss, reference, roadmap_loss, smooth_rank

pytestmark = pytest.mark.cpu_kernels

EPS = torch.finfo(torch.float32).eps
INF, NAN = float("inf"), float("nan")
SURROGATES = ["sup", "smooth"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


# --- what results are held against -----------------------------------------------------------------------------------


def curve(references, positives, dtype, scores, **options):
    """H- and its derivative of each reference above each positive, [references, positives], summed up in `dtype`.

    Differences are decided on in the type of the scores, as every method does, and only then taken in `dtype`.
    """
    s = settings_of(options)
    decided = references[:, None].to(scores) - positives[None].to(scores)
    gap = references[:, None].to(dtype) - positives[None].to(dtype)
    value = torch.sigmoid(gap / s["tau"])
    slope = value * torch.sigmoid(-gap / s["tau"]) / s["tau"]
    if s["surrogate"] == "smooth":
        return value, slope
    offset = s["start"] + 1 / (1 + math.exp(-s["delta"] / s["tau"])) if s["offset"] is None else s["offset"]
    tail = decided > torch.tensor(s["delta"], dtype=scores)
    value = torch.where(tail, s["rho"] * (gap - s["delta"]) + offset, value + s["start"] * (decided >= 0))
    return value, torch.where(tail, s["rho"], slope)


def read(points, others, weight, dtype, scores, points_are_positives, **options):
    """sum_j w_j H- and sum_j w_j H-' of each point, with all others on the other side of the difference."""
    values, slopes = [], []
    for part in points.split(max(1, (1 << 22) // max(1, len(others)))):
        if points_are_positives:
            value, slope = (x.T for x in curve(others, part, dtype, scores, **options))
        else:
            value, slope = curve(part, others, dtype, scores, **options)
        if weight is not None:
            value, slope = value * weight.to(dtype), slope * weight.to(dtype)
        values.append(value.sum(1))
        slopes.append(slope.sum(1))
    return torch.cat(values), torch.cat(slopes)


def ranks_and_gradient(scores, target, weights, method, function=smooth_rank, **options):
    """The ranks, and the gradient of their sum with weights [2, nnz]: of rank-, and of rank+ where that has one."""
    leaf = scores.detach().clone().requires_grad_()
    arguments = {} if function is reference.smooth_rank else {"method": method}
    ranks = function(leaf, target, **arguments, **options)
    outputs, arriving = [ranks.negative_rank], [weights[0].to(ranks.negative_rank)]
    if ranks.positive_rank.requires_grad:
        outputs.append(ranks.positive_rank)
        arriving.append(weights[1].to(ranks.positive_rank))
    torch.autograd.backward(outputs, arriving)
    return ranks, leaf.grad


def assert_close(ours, theirs, rtol, atol=0.0, what=""):
    """Element by element, infinities included; NaN nowhere."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    error = torch.where(ours == theirs, 0.0, (ours - theirs).abs())
    allowed = rtol * torch.where(theirs.isinf(), 0.0, theirs.abs()) + atol
    worst = (error / allowed.clamp(min=1e-300)).nan_to_num(INF).max() if len(ours) else 0.0
    assert (error <= allowed).all(), f"{what}: {worst:.3g} of what is allowed"


def assert_as_pairwise(scores, target, weights=None, **options):
    """Ranks and gradients of the scan are those of the pairwise kernels, every element, but for rounding.

    What a pair below the cut would add to a rank, or to a gradient, one method may leave out and the other not.
    """
    rtol = 2e-6
    kept = target if options.get("ignore") is None else target & ~options["ignore"]
    if weights is None:
        weights = torch.rand(2, int(kept.sum())) + 0.5
    ours, gradient = ranks_and_gradient(scores, target, weights, "sorted", **options)
    theirs, other = ranks_and_gradient(scores, target, weights, "pairwise", **options)
    assert torch.equal(ours.query, theirs.query)
    assert torch.equal(ours.reference, theirs.reference)
    assert_close(ours.positive_rank, theirs.positive_rank, rtol, what="rank+")
    assert_close(ours.negative_rank, theirs.negative_rank, rtol, EPS, "rank-")
    largest = other.abs().amax(1, keepdim=True).double() if other.numel() else 0.0
    unit = float(weights.abs().max()) / options.get("tau", 0.01) if weights.numel() else 0.0
    assert_close(gradient, other, rtol, rtol * largest + ULPS * EPS * unit, "gradient")
    return ours, gradient


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_settings(name, dtype):
    scores, target = grid_scores(6, 700, dtype), ragged_target(6, 700)
    assert_accurate(scores, target, method="sorted", ignore=torch.rand(6, 700) < 0.1, **PUBLISHED[name])


@pytest.mark.parametrize("columns", [1, 31, 33, 129, 4096 + 32, 8192 + 8, 65536 + 3])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(columns, surrogate, dtype):
    """From one column to several spans, whose entries are scattered to buckets before they are sorted."""
    scores, target = grid_scores(5, columns, dtype), ragged_target(5, columns)
    target[1:] &= torch.rand(4, columns) < (150 if columns < 8000 else 30) / columns  # the reference takes |P| x N
    assert_accurate(scores, target, method="sorted", surrogate=surrogate)
    assert_accurate(scores, target, method="sorted", surrogate=surrogate, ignore=torch.rand(5, columns) < 0.3)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_settings(data):
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 500))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    levels = data.draw(st.sampled_from([2, 16, 64, 512]))
    scores = torch.randint(-levels, levels + 1, (rows, columns), generator=generator) / 64
    target = torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    # Thresholds lie between the grid's multiples of 1/64, or at 0.
    assert_accurate(
        scores,
        target,
        method="sorted",
        ignore=torch.rand(rows, columns, generator=generator) < data.draw(st.sampled_from([0.0, 0.2, 1.0])),
        surrogate=data.draw(st.sampled_from(SURROGATES)),
        tau=data.draw(st.sampled_from([1e-3, 0.01, 0.05, 1.0])),
        rho=data.draw(st.sampled_from([0.0, 1.0, 100.0])),
        delta=data.draw(st.sampled_from([0.0, 0.05, 0.3, 2.3])),
        start=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        offset=data.draw(st.sampled_from([None, 1.0, 1.44, 3.0])),
    )


def unclustered(columns, positives, scale=0.2):
    """One row on a grid of 2^-20: differences are exact in float32, none is on a threshold, and few scores are tied."""
    scores = (torch.randn(1, columns) * scale).clamp(-1, 1).mul(2**20).round().div(2**20)
    target = torch.zeros(1, columns, dtype=torch.bool)
    target[0, torch.randperm(columns)[:positives]] = True
    return scores, target


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(
    ("columns", "positives", "tau"),
    [(60_000, 6_000, 0.01), *deep((300_000, 200_000, 0.003), (1_000_000, 100_000, 0.01))],
)
@pytest.mark.long
def test_at_scale(columns, positives, tau, surrogate):
    """Ranks, and gradients under weights that are given: a sample of both goes pair by pair, in float64."""
    scores, target = unclustered(columns, positives)
    weights = torch.rand(2, positives) + 0.5
    options = {"surrogate": surrogate, "tau": tau}
    ranks, gradient = ranks_and_gradient(scores, target, weights, "sorted", **options)

    u, v = scores[target], scores[~target]
    i, j = torch.randperm(positives)[:40], torch.randperm(len(v))[:300]
    results = {}
    for dtype in (torch.float64, torch.float32):
        rank, slope = read(u[i], v, None, dtype, torch.float32, True, **options)
        of_positives = -weights[0, i] * slope
        _, of_negatives = read(v[j], u, weights[0], dtype, torch.float32, False, **options)
        rank_positive = (u[None] >= u[i][:, None]).sum(1).to(dtype)
        if surrogate == "smooth":
            rank_positive, own = read(u[i], u, None, dtype, torch.float32, True, **options)
            _, weighted = read(u[i], u, weights[1], dtype, torch.float32, False, **options)
            rank_positive += 0.5
            of_positives += weighted - weights[1, i] * own
        results[dtype] = {"-": rank, "+": rank_positive, "positives": of_positives, "negatives": of_negatives}
    mine = {
        "-": ranks.negative_rank[i],
        "+": ranks.positive_rank[i],
        "positives": gradient[target][i],
        "negatives": gradient[~target][j],
    }
    for name, truth in results[torch.float64].items():
        plain = (results[torch.float32][name].double() - truth).norm()
        error = (mine[name].double() - truth).norm()
        assert error <= 2 * plain + ULPS * EPS * truth.norm(), name
        # Plain PyTorch may be off by 1e-5: this is what the method promises.
        assert error <= 6e-7 * truth.norm(), name
        assert_close(mine[name], truth, 2e-6, 4e-6 * truth.abs().max() if "tives" in name else 1e-6, name)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("columns", "positives"), [(200_000, 20_000), *deep((1_000_000, 100_000))])
@pytest.mark.long
def test_loss_at_scale(columns, positives, surrogate):
    """The loss and its gradient beside float64, from the ranks that test_at_scale has checked pair by pair."""
    scores, target = unclustered(columns, positives)
    ours = run(ap_loss, scores, target, torch.ones(1), method="sorted", surrogate=surrogate)
    ranks = smooth_rank(scores, target, surrogate=surrogate, method="sorted")
    above, below = ranks.positive_rank.double(), ranks.negative_rank.double()
    rank = above + below
    c, other = above / rank**2 / positives, below / rank**2 / positives
    assert_close(ours.loss, (below / rank).mean()[None], ULPS * EPS)
    u, v = scores[target], scores[~target]
    i, j = torch.randperm(positives)[:40], torch.randperm(len(v))[:300]
    options = {"dtype": torch.float64, "scores": torch.float32, "surrogate": surrogate}
    _, of_negatives = read(v[j], u, c, points_are_positives=False, **options)
    _, slope = read(u[i], v, None, points_are_positives=True, **options)
    of_positives = -c[i] * slope
    if surrogate == "smooth":
        _, own = read(u[i], u, None, points_are_positives=True, **options)
        _, weighted = read(u[i], u, other, points_are_positives=False, **options)
        of_positives += other[i] * own - weighted
    for mine, truth in ((ours.gradient[~target][j], of_negatives), (ours.gradient[target][i], of_positives)):
        assert (mine.double() - truth).norm() <= ULPS * EPS * c.max() / 0.01 + 6e-7 * truth.norm()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("density", [0.01, 0.9])
@pytest.mark.long
@pytest.mark.deep
def test_cluster(surrogate, density):
    """100,000 scores within 1e-4: by the tolerance, against plain float32 PyTorch on the same input.

    There are 1,677 floats in so small a range: the oracle meets each pair of different ones once, with their numbers.
    """
    n = 100_000
    scores = (0.5 + torch.randint(0, 1677, (1, n)) / 2**24).float()
    target = torch.rand(1, n) < density
    u, v = scores[target], scores[~target]
    positives = len(u)
    ours = run(ap_loss, scores, target, torch.ones(1), method="sorted", surrogate=surrogate)

    (up, where, many), (un, _, many_negatives) = (x.unique(return_inverse=True, return_counts=True) for x in (u, v))

    def composed(dtype):
        """The gradient of every positive and every negative; in float32 each pair is added, as PyTorch would."""
        exact = dtype == torch.float64
        negative = (un, many_negatives) if exact else (v, None)
        positive = (up, many) if exact else (u, None)
        rank_negative, slope = read(up, *negative, dtype, torch.float32, True, surrogate=surrogate)
        if surrogate == "smooth":
            rank_positive, own = read(up, *positive, dtype, torch.float32, True, surrogate=surrogate)
            rank_positive += 0.5
        else:
            rank_positive = many.flip(0).cumsum(0).flip(0).to(dtype)
        rank = rank_positive + rank_negative
        c = rank_positive / rank**2 / positives
        weight = c * many.to(dtype) if exact else c[where]
        _, of_negatives = read(un, up if exact else u, weight, dtype, torch.float32, False, surrogate=surrogate)
        of_positives = -c * slope
        if surrogate == "smooth":
            g = -rank_negative / rank**2 / positives
            weight = g * many.to(dtype) if exact else g[where]
            _, weighted = read(up, up if exact else u, weight, dtype, torch.float32, False, surrogate=surrogate)
            of_positives += weighted - g * own
        gradient = torch.zeros(n, dtype=dtype)
        gradient[target[0]] = of_positives[where]
        gradient[~target[0]] = of_negatives[torch.searchsorted(un, v)]
        return (rank_negative / rank)[where].mean(), gradient, c.max()

    loss, truth, largest = composed(torch.float64)
    _, plain, _ = composed(torch.float32)
    assert_close(ours.loss, loss[None], ULPS * EPS)
    error = (ours.gradient[0].double() - truth).norm()
    assert error <= 2 * (plain.double() - truth).norm() + ULPS * EPS * largest / 0.01
    assert error <= 2e-6 * truth.norm()  # whatever PyTorch makes of it; the first cut had 2.9e-4


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("columns", [2, 17, 40, 400, 3000, 9000])
@pytest.mark.parametrize("tau", [0.003, 0.05, 1.0])
def test_every_share(columns, surrogate, tau):
    """Settings at which start, slope and offset all weigh something, from 2 % positives to 90."""
    scores = torch.randn(3, columns) * 0.3
    target = torch.rand(3, columns) < torch.tensor([[0.02], [0.3], [0.9]]) * min(1.0, 1500 / columns)
    weights = torch.randn(2, int(target.sum()))
    options = {"surrogate": surrogate, "tau": tau, "rho": 3.0, "delta": 0.07, "offset": 2.5, "start": 0.25}
    ours, gradient = ranks_and_gradient(scores, target, weights, "sorted", **options)
    truth, exact = ranks_and_gradient(scores.double(), target, weights, None, reference.smooth_rank, **options)
    assert_close(ours.positive_rank, truth.positive_rank, EPS)
    assert_close(ours.negative_rank, truth.negative_rank, EPS, 1e-9)
    assert_close(gradient, exact, 4e-7, 2e-7 * exact.abs().max() + 1e-12 / tau)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_float64_is_done_pairwise(surrogate):
    """To the bit: the series would need twice the terms."""
    scores, target = torch.randn(3, 3000, dtype=torch.float64) * 0.2, torch.rand(3, 3000) < 0.3
    weights = torch.randn(2, int(target.sum()))
    ours, pairwise = (
        run(ap_loss, scores, target, torch.ones(3), method=m, surrogate=surrogate) for m in ("sorted", "pairwise")
    )
    assert torch.equal(ours.loss, pairwise.loss)
    assert torch.equal(ours.gradient, pairwise.gradient)
    (ranks, gradient), (others, other) = (
        ranks_and_gradient(scores, target, weights, m, surrogate=surrogate) for m in ("sorted", "pairwise")
    )
    assert torch.equal(ranks.negative_rank, others.negative_rank)
    assert torch.equal(gradient, other)


# --- steps, ties and thresholds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 8, 100, 3000, 8193, 70_000])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.97])
def test_counts_are_exact(columns, density, dtype):
    """A temperature so low that every pair is a step, a half or a count: each rank is a whole number of quarters."""
    levels = 1 << 20 if dtype == torch.float32 else 200
    scores = torch.randint(-levels, levels + 1, (1, columns)).to(dtype)
    if columns > 100:
        scores[0, : columns // 3] = scores[0, columns // 2].clone()  # many at once, in one box
    target, ignore = torch.rand(1, columns) < density, torch.rand(1, columns) < 0.1
    options = {"tau": 1e-3, "rho": 0.0, "delta": 3.0, "start": 0.25, "offset": 8.0}
    ranks = smooth_rank(scores, target, ignore=ignore, method="sorted", **options)
    u = scores[target & ~ignore].double()
    v = scores[~target & ~ignore].double().sort().values
    at, above, past = (torch.searchsorted(v, x, right=right) for x, right in ((u, False), (u, True), (u + 3, True)))
    expected = 0.75 * (above - at) + 1.25 * (past - above) + 8.0 * (len(v) - past)
    assert_close(ranks.negative_rank, expected, 0.0, 1e-15)
    own = u.sort().values
    assert torch.equal(ranks.positive_rank.double(), len(u) - torch.searchsorted(own, u).double())


@pytest.mark.parametrize(("columns", "positives"), [(50, 20), (9000, 300), (9000, 8500), (1_000_000, 100_000)])
def test_linear_parts(columns, positives):
    """The same, and a slope: sums over all that lies past the threshold, of ranks and gradients, at any size."""
    scores = torch.randint(-(1 << 20), 1 << 20, (1, columns)).float()
    target = torch.zeros(1, columns, dtype=torch.bool)
    target[0, torch.randperm(columns)[:positives]] = True
    scores = torch.where(target, scores, scores + 0.5)  # no ties, whose slope is 250
    weights = (torch.rand(2, positives) + 0.5).double()
    options = {"tau": 1e-3, "rho": 2.0, "delta": 1000.25, "start": 0.5, "offset": 3.0}
    ranks, gradient = ranks_and_gradient(scores, target, weights, "sorted", **options)
    u, (v, order) = scores[target].double(), scores[~target].double().sort()
    past, at = torch.searchsorted(v, u + 1000.25, right=True), torch.searchsorted(v, u)
    above, tails = torch.cat([v.flip(0).cumsum(0).flip(0), torch.zeros(1)])[past], len(v) - past
    expected = 1.5 * (past - at) + 2 * (above - tails * (u + 1000.25)) + 3.0 * tails
    rtol = 4e-7
    assert_close(ranks.negative_rank, expected, rtol, 1e-15)
    assert_close(gradient[target], -weights[0] * 2 * tails, rtol, 1e-15)
    u, by = u.sort()
    below = torch.cat([torch.zeros(1, dtype=torch.float64), weights[0][by].cumsum(0)])
    negatives = torch.empty(len(v), dtype=torch.float64)
    negatives[order] = 2 * below[torch.searchsorted(u, v - 1000.25)]
    assert_close(gradient[~target], negatives, rtol, 1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.05, 0.3, 1.7])
def test_thresholds_to_the_ulp(delta):
    """Scores whose difference rounds to the threshold itself, and the neighbours of these: as fl(t) > delta decides."""
    u = torch.randn(100) * 0.3
    threshold = torch.tensor(delta)
    v = [u + threshold]
    for towards in (INF, -INF):
        at = v[0]
        for _ in range(3):
            at = torch.nextafter(at, torch.tensor(towards))
            v.append(at)
    v += [torch.nextafter(u, torch.tensor(towards)) for towards in (INF, -INF)]
    v = torch.cat([*v, u])
    gap = v[None] - u[:, None]
    assert (gap == threshold).any()
    scores = torch.cat([u, v])[torch.randperm(len(u) + len(v))][None]
    target = torch.zeros_like(scores, dtype=torch.bool)
    target[0, torch.isin(scores[0], u).nonzero()[::2, 0]] = True  # a positive, or a tie of one
    u, v = scores[target], scores[~target]
    gap = v[None] - u[:, None]
    # Almost every pair below 0 has no weight, one at 0 has 100, one up to the threshold 200, above it there are 10,000.
    options = {"tau": 1e-4, "rho": 0.0, "delta": delta, "start": 100.0, "offset": 10_000.0}
    ranks = smooth_rank(scores, target, method="sorted", **options)
    steps, tails = ((gap >= 0) & (gap <= threshold)).sum(1), (gap > threshold).sum(1)
    curve_sum = torch.where(gap > threshold, 0.0, torch.sigmoid((gap.double()) / 1e-4)).sum(1)
    assert_close(ranks.negative_rank, 100.0 * steps + 10_000.0 * tails + curve_sum, 1e-6)
    options |= {"rho": 7e4, "offset": None}
    assert_as_pairwise(scores, target, **options)
    assert_as_pairwise(scores, target, surrogate="smooth", tau=1e-4)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("n", [2, 9, 17, 33, 65, 300, 1000, 20_000])
def test_constant_rows_and_few_values(n, surrogate):
    """All scores tied, or all on one of two or three values: boxes without any width."""
    generator = torch.Generator().manual_seed(n)
    for values in ([0.25], [0.25, 0.26], [-1.0, 0.0, 1.0], [0.1, 0.15]):
        scores = torch.tensor(values)[torch.randint(len(values), (2, n), generator=generator)]
        target = torch.rand(2, n, generator=generator) < torch.tensor([[0.5], [300 / n if n > 1000 else 0.1]])
        assert_as_pairwise(scores, target, surrogate=surrogate)


def assert_as_exact(scores, target, **options):
    """Ranks and gradients beside float64's, the gradient's error beside that of the pairwise kernels."""
    weights = torch.rand(2, int(target.sum())) + 0.5
    ranks, gradient = ranks_and_gradient(scores, target, weights, "sorted", **options)
    truth, exact = ranks_and_gradient(scores.double(), target, weights, "pairwise", **options)
    _, pairwise = ranks_and_gradient(scores, target, weights, "pairwise", **options)
    assert_close(ranks.negative_rank, truth.negative_rank, 3e-7, 1e-9, "rank-")
    error, other = ((g.double() - exact).norm() for g in (gradient, pairwise))
    assert error <= 2 * other + ULPS * EPS * weights.max() / options["tau"], "gradient"


def with_one_far_above(scores, target):
    """The same and a positive far above all, which adds nothing, a million times the range away."""
    above = scores.amax(1, keepdim=True) + 1e6 * (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True) + 1e-3)
    return torch.cat([scores, above], 1), torch.cat([target, torch.ones(above.shape, dtype=torch.bool)], 1)


@pytest.mark.parametrize("far", [False, True], ids=["together", "one far above"])
@pytest.mark.parametrize("delta", [0.0, 0.3, 2.0, 4.0, 12.0])
@pytest.mark.parametrize(("rho", "offset"), [(0.0, 0.0), (0.0, 1.44), (100.0, None)])
def test_dense_thresholds(delta, rho, offset, far):
    """Targets within tau / 10 around the thresholds of others, and around others, in boxes narrow and wide.

    What lies past a threshold has a sigma that the polynomials of all must not show: it may weigh nothing at all. Ties
    show rounding. Gaps are multiples of tau / 128, thresholds half of one beside these.
    """
    tau, threshold = 1 / 128, round(delta * 128)
    options = {"tau": tau, "rho": rho, "delta": (threshold + 0.5) * tau / 128, "offset": offset}
    cases = []
    for negatives, low, high in ((200, -2, 15), (250, -6, 60), (60, -300, 300), (3000, -900, 128)):
        for positives, span in ((32, 10), (500, 12), (100, 90)):
            u, v = torch.randint(span + 1, (positives,)), threshold + torch.randint(low, high, (negatives,))
            u[::3] += threshold
            v[::3] -= threshold
            cases.append((u, v))
    # Ties of eight, with negatives around them.
    cases.append(((torch.arange(64) + 4) // 8 * 40, torch.randint(9, (200,)) * 40 + torch.randint(-6, 7, (200,))))
    for u, v in cases:
        scores = torch.cat([u, v])[None].float() * (tau / 128)
        target = (torch.arange(len(u) + len(v)) < len(u))[None]
        if far:
            scores, target = with_one_far_above(scores, target)
        assert_as_exact(scores, target, **options)


@pytest.mark.parametrize("shape", ["even", "normal", "two scales"])
@pytest.mark.parametrize(("columns", "positives"), [(300, 150), (2000, 8), (2000, 1900), (9000, 900)])
def test_boxes(columns, positives, shape):
    """Boxes full and nearly empty, thresholds low and high: in the own box, in the next, and far beyond."""
    tau, order = 0.02, torch.randperm(columns)
    spread = {
        "even": torch.rand(columns),
        "normal": torch.randn(columns) * 0.1,
        "two scales": torch.where(torch.rand(columns) < 0.5, torch.rand(columns), 0.3 + 0.01 * torch.rand(columns)),
    }[shape]
    # Some scores a threshold apart, and some tied.
    spread[: columns // 4] = spread[columns // 4 : columns // 2][: columns // 4] + 0.1
    spread[-columns // 10 :] = spread[: columns - columns * 9 // 10]
    scores, target = spread[order][None], (torch.arange(columns) < positives)[None]
    for delta in (0.0, 1e-6, 0.001, 0.0125, 0.079, 0.081, 0.1, 0.5, 10.0):
        assert_as_exact(scores, target, tau=tau, delta=delta, rho=100.0, start=0.5)
        assert_as_exact(scores + 3, target, tau=tau, delta=delta, rho=0.0, offset=0.0)
        assert_as_exact(scores - 5, target, tau=tau, delta=delta, rho=20.0, offset=0.2)
    assert_as_exact(scores, target, tau=tau, surrogate="smooth")


@pytest.mark.parametrize("ulps", [0.4, 1.0, 2.0, 2.2, 3.0, 20.0])
def test_scores_coarser_than_boxes(ulps):
    """Near 1,000: neighbouring floats further apart than a box is wide, or a little less, or many in a box."""
    ulp = 2.0**-14
    scores, target = 1000 + torch.randint(60, (1, 3000)) * ulp, torch.rand(1, 3000) < 0.3
    assert_as_exact(scores, target, tau=ulps * ulp, delta=5.5 * ulp, rho=0.5 / ulp)
    assert_as_exact(scores, target, tau=ulps * ulp, surrogate="smooth")


@pytest.mark.parametrize(("rho", "offset"), [(0.0, None), (0.0, 0.0), (0.5, 0.3), (100.0, 0.0), (10.0, 0.1)])
@pytest.mark.parametrize("delta", [0.04, 0.05, 0.0649])
def test_many_just_past_their_thresholds(delta, rho, offset):
    """Pairs that weigh little or nothing: no sigma must be left of what lies past it, however much that is."""
    for negatives, positives in ((300, 50), (1000, 300), (3900, 2000)):
        u = 0.013 + torch.rand(positives, dtype=torch.float64) * 2e-4
        v = 0.013 + delta + 2.1e-4 + torch.rand(negatives, dtype=torch.float64) * 5e-4
        scores = torch.cat([u, v]).float()[None]
        target = (torch.arange(negatives + positives) < positives)[None]
        assert_accurate(scores, target, method="sorted", delta=delta, rho=rho, offset=offset)


@pytest.mark.parametrize("many", ["negatives", "positives"])
def test_more_around_the_thresholds_than_a_block_holds(many):
    """Few targets, whose thresholds lie among 10,000 sources, and many whose lie among few."""
    tau, delta = 0.02, 0.05
    few, crowd, others = torch.rand(7) * 0.004, torch.rand(10_000) * 0.004, torch.rand(3000)
    at = 0.2 if many == "negatives" else 0.3
    scores = torch.cat([few + at, crowd + 0.25, others])[None]
    positive = torch.cat(
        [torch.full((7,), many == "negatives"), torch.full((10_000,), many == "positives"), others < 0.01]
    )
    assert_as_exact(scores, positive[None], tau=tau, delta=delta, rho=100.0)


# --- anything that scores and settings may be -------------------------------------------------------------------------


def awkward(kind, shape, generator):
    """Scores of one kind that breaks assumptions."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    near = torch.rand(shape, generator=generator, dtype=torch.float64)
    which = torch.randint(3, shape, generator=generator)
    scores = {
        "normal": x * 0.2,
        "ties": (x * 8).round() / 64,
        "constant": torch.full(shape, 0.3, dtype=torch.float64),
        "cluster": 0.5 + near * 1e-4,
        "clusters": which * 0.5 + near * 1e-3,
        "far apart": which.double() * 1e4 + near,
        "one outlier": torch.where(near == near.max(), 1e6, x * 0.01),
        "outside": x * 50 + 300,
        "denormal": x * 1e-42,
        "signed zeros": torch.where(which == 0, -0.0, torch.where(which == 1, 0.0, x * 1e-3)),
        "huge": x * 1e30,
        "largest": torch.where(which == 0, 1.5e38, torch.where(which == 1, -1.5e38, x)),
        "skewed": x.exp() ** 6,
    }[kind]
    return scores.float()


KINDS = [
    *("normal", "ties", "constant", "cluster", "clusters", "far apart", "one outlier", "outside", "denormal"),
    *("signed zeros", "huge", "largest", "skewed"),
]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_as_pairwise_whatever_comes(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(st.integers(1, 3)), data.draw(st.one_of(st.integers(1, 70), st.integers(70, 2500)))
    scores = awkward(data.draw(st.sampled_from(KINDS)), shape, generator)
    target = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.01, 0.1, 0.5, 0.95, 1.0]))
    ignore = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.2]))
    assert_as_pairwise(
        scores,
        target,
        torch.rand(2, int((target & ~ignore).sum()), generator=generator) + 0.5,
        ignore=ignore,
        surrogate=data.draw(st.sampled_from(SURROGATES)),
        tau=data.draw(st.sampled_from([1e-4, 0.01, 0.3, 10.0])),
        rho=data.draw(st.sampled_from([0.0, 1.0, 100.0])),
        delta=data.draw(st.sampled_from([0.0, 1e-3, 0.05, 2.5, 1e5])),
        start=data.draw(st.sampled_from([0.0, 0.5])),
        offset=data.draw(st.sampled_from([None, 0.0, 1.44])),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1e-20, 1e-3, 1e3, 1e8])
def test_as_pairwise_at_extremes(kind, tau):
    """Loss and gradient of whole rows, where temperatures are far from those of training, and scores, too."""
    scores = awkward(kind, (4, 12_000), torch.Generator().manual_seed(7))
    target = torch.rand(4, 12_000) < torch.tensor([[0.001], [0.01], [0.03], [0.001]])
    for surrogate in SURROGATES:
        options = {"surrogate": surrogate, "tau": tau}
        ours, pairwise = (
            run(ap_loss, scores, target, torch.ones(4), method=m, **options) for m in ("sorted", "pairwise")
        )
        ranks = smooth_rank(scores, target, method="pairwise", **options)
        rank = (ranks.positive_rank + ranks.negative_rank).double()
        weight = torch.maximum(ranks.positive_rank, ranks.negative_rank).double() / rank / rank
        weight = torch.zeros(4, dtype=torch.float64).scatter_reduce(0, ranks.query, weight, "amax") / target.sum(1)
        assert_close(ours.loss, pairwise.loss, 1e-6, 1e-7)
        atol = ULPS * EPS * weight.nan_to_num(0) / tau + 4e-6 * pairwise.gradient.abs().amax(1).double()
        assert_close(ours.gradient, pairwise.gradient, 4e-6, atol[:, None], "gradient")


@pytest.mark.parametrize("low", [-1e2, -1e6, -1e10, -1e20, -1e30])
def test_sums_do_not_cancel(low):
    """A positive and a negative far below all others: distances in the linear part are not taken from there."""
    for columns in (30, 600, 9000):
        scores, target = torch.randn(1, columns) * 0.2, torch.rand(1, columns) < 0.3
        scores[0, target[0].nonzero()[0]] = low
        scores[0, (~target[0]).nonzero()[0]] = low
        assert_as_pairwise(scores, target)
        assert_as_pairwise(-scores, target)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("shape", [(5, 200), (1, 20_000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan(value, surrogate, shape, dtype):
    """What is not finite goes the pairwise way, and to the bit; its neighbours do not, nor what is ignored."""
    scores = (torch.randn(shape) * 0.2).to(dtype)
    target = torch.rand(shape) < 0.1
    weight = torch.ones(len(scores))
    for is_positive in (True, False):
        dirty = scores.clone()
        at = (target[0] == is_positive).nonzero()[3, 0]
        dirty[0, at] = value
        options = {"surrogate": surrogate}
        ours = run(ap_loss, dirty, target, weight, method="sorted", **options)
        pairwise = run(ap_loss, dirty, target, weight, method="pairwise", **options)
        clean = run(ap_loss, scores, target, weight, method="sorted", **options)
        if value == -INF and not is_positive:  # it reaches nobody, and is left out before anything is sorted
            assert_close(ours.loss, pairwise.loss, 4 * EPS)
            assert ours.gradient[0, at] == 0
        else:
            assert torch.equal(ours.loss[0].nan_to_num(-1), pairwise.loss[0].nan_to_num(-1))
            assert torch.equal(ours.gradient[0].nan_to_num(-1), pairwise.gradient[0].nan_to_num(-1))
            assert torch.equal(ours.gradient[0].isnan(), pairwise.gradient[0].isnan())
        assert ours.loss[0].isnan() == math.isnan(value)
        assert torch.equal(ours.loss[1:], clean.loss[1:])
        assert torch.equal(ours.gradient[1:], clean.gradient[1:])
        ranks = [smooth_rank(dirty, target, method=m, **options) for m in ("sorted", "pairwise")]
        for name in ("positive_rank", "negative_rank"):
            one, other = (getattr(r, name).nan_to_num(-1) for r in ranks)
            assert_close(one, other, 2e-6, 2e-6, name)
        ignore = torch.zeros(shape, dtype=torch.bool)
        ignore[0, at] = True
        left_out = run(ap_loss, dirty, target, weight, method="sorted", ignore=ignore, **options)
        same = run(ap_loss, scores, target, weight, method="sorted", ignore=ignore, **options)
        assert torch.equal(left_out.loss, same.loss)
        assert torch.equal(left_out.gradient, same.gradient)


def test_no_slope_is_exactly_none():
    """Every negative past the threshold, at rho = 0: what arrives at such ranks, were it infinite, moves nothing."""
    scores, target = torch.rand(1, 6000) * 0.5 + 0.2, torch.arange(6000)[None] < 600
    scores[0, :300] = torch.rand(300) * 0.02
    weights = torch.ones(2, 600)
    weights[1, :300] = INF
    _, gradient = ranks_and_gradient(scores, target, weights, "sorted", rho=0.0, delta=0.05)
    assert (gradient[0, :300] == 0).all()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("columns", [600, 9000])
def test_upstream_gradients_that_are_not_finite(value, surrogate, columns):
    """One rank's gradient is infinite, or NaN: its row shows it, its positives as ever, and no other row does."""
    scores, target = torch.randn(3, columns) * 0.2, torch.rand(3, columns) < 0.2
    weights = torch.randn(2, int(target.sum()))
    row = (target.nonzero()[:, 0] == 1).nonzero()[:, 0]
    _, healthy = ranks_and_gradient(scores, target, weights, "sorted", surrogate=surrogate)
    for which in (0, 1):
        sick = weights.clone()
        sick[which, row[5]] = value
        _, ours = ranks_and_gradient(scores, target, sick, "sorted", surrogate=surrogate)
        _, pairwise = ranks_and_gradient(scores, target, sick, "pairwise", surrogate=surrogate)
        assert torch.equal(ours[[0, 2]], healthy[[0, 2]])
        assert (ours.isfinite() <= pairwise.isfinite()).all()
        assert ours[1].isfinite().all() == (which == 1 and surrogate == "sup")  # which rank+ of sup ignores
        own, other = ours[1, target[1]], pairwise[1, target[1]]
        if surrogate == "sup":
            assert_close(own[own.isfinite()], other[other.isfinite()], 2e-6)
            assert torch.equal(own[~own.isfinite()].nan_to_num(0.5), other[~other.isfinite()].nan_to_num(0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_upstream_gradients_of_any_sign_and_size(dtype, surrogate):
    scores, target = (torch.randn(4, 3000) * 0.2).to(dtype), ragged_target(4, 3000)
    some = torch.randn(2, int(target.sum()))
    for weights in (some / 1024, some * 0, torch.ones_like(some) * 1e-12 * some[:, :1], some * 2.0**-100):
        _, ours = ranks_and_gradient(scores, target, weights, "sorted", surrogate=surrogate)
        _, pairwise = ranks_and_gradient(scores, target, weights, "pairwise", surrogate=surrogate)
        assert ours.dtype == dtype
        error = (ours.double() - pairwise.double()).norm(dim=1)
        eps = torch.finfo(dtype).eps
        floor = ULPS * max(eps, 1e-14) * weights.abs().max() / 0.01
        assert (error <= max(2e-6, eps) * pairwise.double().norm(dim=1) + floor).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5), (1, 9000)])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_nothing_to_rank(shape, surrogate):
    """No rows, no columns, no positives; no negatives; nothing but what is ignored."""
    scores = torch.randn(shape)
    for target, ignore in ((False, False), (True, False), (True, True), (False, True)):
        masks = torch.full(shape, target), torch.full(shape, ignore)
        options = {"ignore": masks[1], "method": "sorted", "surrogate": surrogate}
        ours = run(ap_loss, scores, masks[0], torch.ones(shape[0]), **options)
        assert (ours.loss == 0).all()
        assert (ours.gradient.abs() <= 1e-6).all()
        ranks = smooth_rank(scores, masks[0], **options)
        assert len(ranks.query) == (scores.numel() if target and not ignore else 0)
        assert (ranks.negative_rank == 0).all()


# --- from embeddings -------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "paper": {},
    "ap alone": {"calibration_weight": 0.0},
    "smooth": {"surrogate": "smooth", "calibration_weight": 0.3},
    "hinges everywhere": {"positive_margin": 2.0, "negative_margin": -2.0},
    "no hinge": {"positive_margin": -1.0, "negative_margin": 1.0},
    "violating pairs": {"calibration_reduction": "violating_pairs", "negative_margin": 0.1},
    "with itself": {"include_self": True, "negative_margin": 0.2},
    "as they are": {"normalize": False, "tau": 0.3, "delta": 1.0},
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_roadmap_loss(name, memory, reduction):
    """Lists of positives, hinges, scales: beside the pairwise kernels."""
    labels = torch.arange(90) % 3
    x = torch.randn(90, 12) + torch.randn(3, 12)[labels]
    references = torch.cat([x[40:], torch.randn(500, 12)]) if memory else None
    more = {}
    if memory:
        more = {"ref_labels": torch.cat([labels[40:], torch.arange(500) % 5])}
        more |= {"ids": torch.arange(90), "ref_ids": torch.cat([torch.arange(40, 90), torch.arange(500) + 1000])}

    def result(method, chunk_size):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, references) if leaf is not None]
        options = {"method": method, "chunk_size": chunk_size, "reduction": reduction, **more, **OBJECTIVES[name]}
        loss = roadmap_loss(leaves[0], labels, leaves[1] if memory else None, **options)
        weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        return loss, torch.autograd.grad((loss * weight).sum(), leaves)

    for chunk_size in (None, 37):
        loss, gradients = result("sorted", chunk_size)
        other, pairwise = result("pairwise", chunk_size)
        assert_close(loss.flatten(), other.flatten(), 1e-6, EPS)
        for ours, theirs in zip(gradients, pairwise, strict=True):
            assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["paper", "smooth", "hinges everywhere", "no hinge"])
def test_from_embeddings(name, dtype):
    """Hinges, scales and half types find each score at its column."""
    labels, references = torch.arange(3), torch.arange(6000) % 4
    centres = torch.randn(4, 16)
    x, y = (centres[of] + torch.randn(len(of), 16) for of in (labels, references))

    def result(method):
        leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in (x, y)]
        loss = roadmap_loss(leaves[0], labels, leaves[1], ref_labels=references, method=method, **OBJECTIVES[name])
        return loss.detach(), torch.autograd.grad(loss, leaves)

    (loss, gradients), (other, pairwise) = result("sorted"), result("pairwise")
    assert_close(loss[None], other[None], 1e-6, EPS)
    for ours, theirs in zip(gradients, pairwise, strict=True):
        assert (ours.double() - theirs.double()).norm() <= max(2e-6, torch.finfo(dtype).eps) * theirs.double().norm()


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 40_000), (3, 20_000), (40, 700), (2, 140_000), (7, 9_000), (1, 400_000)])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_bitwise_equal_for_any_number_of_threads(shape, surrogate, dtype):
    """Many rows, one a thread, and few that are long and shared; the memory that rows leave behind, and run to run."""
    scores = (torch.randn(shape) * 0.2).to(dtype)
    target = torch.rand(shape) < torch.rand(shape[0], 1) * 0.3
    weights = torch.randn(2, int(target.sum()))
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        loss, gradient = vars(
            run(ap_loss, scores, target, torch.ones(shape[0]), method="sorted", surrogate=surrogate)
        ).values()
        ranks, other = ranks_and_gradient(scores, target, weights, "sorted", surrogate=surrogate)
        results.append((loss, gradient, *(part.detach() for part in ranks), other))
        smooth_rank(torch.randn(2, 5000), torch.rand(2, 5000) < 0.5, method="sorted")
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_row_does_not_depend_on_its_neighbours(surrogate):
    """Rows of very different sizes share buffers: each has the bits that it has alone, shared by threads or not."""
    scores, target = torch.randn(9, 30_000) * 0.2, torch.rand(9, 30_000) < torch.rand(9, 1) ** 4
    target[4] = False
    ignore = torch.rand(9, 30_000) < torch.tensor([0.0, 0.9, 0.1] * 3)[:, None]
    options = {"method": "sorted", "surrogate": surrogate}
    together = run(ap_loss, scores, target, torch.ones(9), ignore=ignore, **options)
    for i in (8, 0, 4, 1, 7):
        row = slice(i, i + 1)
        alone = run(ap_loss, scores[row], target[row], torch.ones(1), ignore=ignore[row], **options)
        assert torch.equal(alone.loss, together.loss[row])
        assert torch.equal(alone.gradient, together.gradient[row])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nothing says what the process holds")
def test_a_very_long_row_gives_its_workspace_back():
    """A thread keeps its workspace for the next call, but not that of 6,000,000 columns; without a gradient, too."""

    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    torch.set_num_threads(1)
    scores, target = torch.rand(1, 6_000_000), torch.rand(1, 6_000_000) < 0.1
    before = held()
    assert not ap_loss(scores, target, method="sorted").requires_grad
    assert held() - before < 64 << 20


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("levels", [40, 4000, 1 << 22])
def test_results_do_not_depend_on_the_order_of_references(levels, surrogate):
    """To the bit, ties included, of which a box has hundreds at 40 levels: what is sorted has forgotten its order."""
    scores = torch.randint(levels, (1, 20_000)) / levels
    target, order = torch.rand(1, 20_000) < 0.2, torch.randperm(20_000)
    for delta in (0.05, 0.0, 0.001):
        options = {"method": "sorted", "surrogate": surrogate, "delta": delta}
        one = run(ap_loss, scores, target, torch.ones(1), **options)
        other = run(ap_loss, scores[:, order], target[:, order], torch.ones(1), **options)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.gradient[:, order], other.gradient)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_auto_takes_one_of_the_two(surrogate):
    """Row by row, to the bit: the scan for many positives, the pairwise kernels for few."""
    scores = torch.randn(6, 5000) * 0.2
    target = torch.rand(6, 5000) < torch.tensor([0.0, 3e-4, 3e-3, 0.03, 0.2, 0.6])[:, None]
    target[1:, 0] = True
    weight = torch.ones(6)
    auto, pairwise, scan = (
        run(ap_loss, scores, target, weight, method=m, surrogate=surrogate) for m in ("auto", "pairwise", "sorted")
    )
    taken = []
    for row in range(6):
        is_tiled, is_sorted = (
            torch.equal(auto.loss[row], x.loss[row]) and torch.equal(auto.gradient[row], x.gradient[row])
            for x in (pairwise, scan)
        )
        assert is_tiled or is_sorted
        taken.append("both" if is_tiled and is_sorted else "pairwise" if is_tiled else "sorted")
    assert taken[0] == "both"
    assert taken[1] == "pairwise"
    assert taken[-1] == "sorted"
    assert_close(auto.loss, pairwise.loss, 4 * EPS)
