"""Rows by boxes (csrc/cuda/boxes.cuh), under the emulator."""

import math

import pytest
import torch
from emulated_ops import NEVER
from oracle import assert_accurate, row_error, run
from test_cuda_ops import expected, lists_of, objective

from roadmap_ext import ap_loss, reference, smooth_rank

pytestmark = [pytest.mark.usefixtures("emulated"), pytest.mark.deep]

# As in emulated_ops.DEVICES, all rows by boxes: by blocks that own a row, and by 2, 3 and 5 that share it.
OWNING = [
    (2, 64 << 20, 96, 1, 1, 0),  # a slot a row
    (1, 1 << 14, 32, 1, 0, 0),  # one slot, one warp
    (2, 64 << 20, 64, 1, 1, 40),  # pieces shorter than rows that go pairwise
]
SHARED = [
    (3, 64 << 20, 64, 2, 0, 0),
    (3, 1 << 15, 64, 3, 1, 8),  # fewer slots than rows
    (3, 1 << 15, 32, 5, 1, 0),
]
DEVICES = OWNING + SHARED
SETTINGS = {
    "paper": {},
    "on the knee": {"delta": 3 / 64},
    "no knee": {"delta": 0.0, "offset": 1.44},
    "sharp": {"tau": 1e-3, "delta": 3 / 64},
    "soft": {"tau": 0.1, "rho": 10.0, "delta": 0.2},
    "no slope": {"rho": 0.0, "start": 0.0, "offset": 1.0},
    "far knee": {"delta": 7.01, "tau": 0.02},
    "smooth": {"surrogate": "smooth"},
    "smooth, sharp": {"surrogate": "smooth", "tau": 1e-3},
}


def rows_of_all_kinds(columns=333, seed=0):
    """Scores, target and ignore. No knee of SETTINGS lies so close to a gap that rounding would decide."""
    g = torch.Generator().manual_seed(seed)

    def integers(low, high):
        return torch.randint(low, high, (columns,), generator=g)

    order = torch.randperm(columns, generator=g)
    scores = [
        (torch.arange(columns) // 70 / 64)[order],  # runs of 70 equal ones
        integers(-8, 9) / 64,  # gaps of just the knee
        integers(0, 3) / 8 + integers(0, 1 << 12) / 2**24,  # crowds that differ in their last bits
        integers(-20_000, 20_000) / 64,
        integers(-5, 6) * 2.0**-148,  # the least numbers there are, and two zeros
        *(torch.randn(columns, generator=g).mul(16).round() / 64 for _ in range(5)),
    ]
    scores = torch.stack(scores)
    scores[4] = torch.where(scores[4] == 0, torch.tensor([0.0, -0.0])[integers(0, 2)], scores[4])
    target = torch.rand(scores.shape, generator=g) < 0.4
    target[5], target[6], target[7] = False, True, False
    target[7, columns // 2] = True
    ignore = torch.rand(scores.shape, generator=g) < 0.15
    ignore[9] = True
    ignore[9, :2], target[9, :2] = False, torch.tensor([True, False])[: min(columns, 2)]
    return scores, target, ignore


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, shared, emulated):
    devices = SHARED if shared else OWNING
    emulated.emulate_device(*devices[list(SETTINGS).index(name) % len(devices)], 3, 3)
    scores, target, ignore = rows_of_all_kinds()
    assert_accurate(scores, target, method="auto", ignore=ignore, **SETTINGS[name])


@pytest.mark.parametrize("device", [OWNING[0], SHARED[2]])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_flat(surrogate, device, emulated):
    """A temperature so far above all gaps that a row lies in one box or two, far from their middles."""
    emulated.emulate_device(*device, 3, 3)
    scores, target, ignore = rows_of_all_kinds()
    options = {"ignore": ignore, "surrogate": surrogate, "tau": 10.0, "rho": 0.5, "delta": 1.0}
    ours = run(ap_loss, scores, target, torch.ones(10), **options)
    truth = run(reference.ap_loss, scores.double(), target, torch.ones(10), **options)
    torch.testing.assert_close(ours.loss, truth.loss.float(), rtol=1e-6, atol=3e-7)
    # Of positives of one weight hardly anything is left for smooth.
    eps = 4 * torch.finfo(torch.float32).eps
    assert (row_error(ours.gradient, truth.gradient) <= eps * truth.gradient.norm(dim=1) + 1e-15).all()


@pytest.mark.parametrize("device", [OWNING[0], SHARED[2]])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 129])
def test_sizes(columns, surrogate, device, emulated):
    emulated.emulate_device(*device, 5, 5)
    scores, target, ignore = rows_of_all_kinds(columns, 1)
    for left_out in (None, ignore):
        assert_accurate(scores, target, method="auto", surrogate=surrogate, ignore=left_out)


@pytest.mark.parametrize("device", [OWNING[1], SHARED[1]])
@pytest.mark.parametrize("name", ["paper", "soft", "smooth"])
def test_more_boxes_than_threads(name, device, emulated):
    emulated.emulate_device(*device, 7, 7)
    scores = (torch.randn(2, 4128) * 16).round() / 64
    scores[1] = torch.randint(0, 6, (4128,)) / 16 + torch.randint(0, 1 << 10, (4128,)) / 2**22
    assert_accurate(scores, torch.rand(2, 4128) < 0.1, method="auto", **SETTINGS[name])


def anywhere(rows, columns, width, positives):
    """Scores at no multiple of a box, and no gap so close to the threshold 0.05 that rounding would decide."""
    scores, target = torch.rand(rows, columns) * width, torch.rand(rows, columns) < positives
    for row in range(rows):
        while True:
            gap = scores[row, ~target[row]] - scores[row, target[row], None] - 0.05
            close = (gap.abs() < 1e-6 * max(1, width)).any(0)
            if not close.any():
                break
            scores[row, (~target[row]).nonzero()[close, 0]] += 0.001
    return scores, target


@pytest.mark.parametrize("device", [OWNING[0], SHARED[1]])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("width", [0.003, 0.3, 2.0])
def test_anywhere_in_a_box(width, surrogate, device, emulated):
    emulated.emulate_device(*device, 3, 3)
    scores, target = anywhere(4, 700, width, 0.2)
    scores[3] = (1000 + scores[3] * 64).round() / 64 + 1 / 4096  # far from 0, and off the middle of each box
    assert_accurate(scores, target, method="auto", surrogate=surrogate)


@pytest.mark.parametrize("device", [OWNING[0], SHARED[0]])
def test_ties_at_the_end_of_a_box(device, emulated):
    """The moments of thousands of scores so far from the middle do not fit in 32 bits."""
    emulated.emulate_device(*device, 3, 3)
    width = 2.0**-10
    scores = torch.full((3, 6000), 300.48 * width)
    scores[1], scores[2] = 300.52 * width, 4 * width
    scores[:, :50] = (torch.arange(50) * 5 + 270.3) * width
    target = torch.arange(6000).expand(3, 6000) < 50
    assert_accurate(scores, target, method="auto")


@pytest.mark.parametrize("device", [OWNING[0], SHARED[0]])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_more_cells_than_shared_memory_holds(surrogate, device, emulated):
    """And more positives than a block sorts at a time, or than have a place in the first launch."""
    emulated.emulate_device(*device, 3, 3)
    scores, target = anywhere(2, 6000, 0.3, 0.4)
    assert_accurate(scores, target, method="auto", surrogate=surrogate)


@pytest.mark.parametrize("device", [OWNING[0], SHARED[0]])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype, surrogate, device, emulated):
    emulated.emulate_device(*device, 3, 3)
    scores, target, ignore = rows_of_all_kinds()
    scores[3] = (scores[3] / 64).round() / 64
    scores = scores.clamp(-2, 2).mul(64).round().div(64).to(dtype)
    assert_accurate(scores, target, method="auto", ignore=ignore, surrogate=surrogate)


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("parts", [1, 3])
def test_methods(parts, surrogate, emulated):
    """`sorted` and `pairwise` do as they say, whatever the device would choose."""
    scores, target, ignore = rows_of_all_kinds()
    truth = assert_accurate(scores.double(), target, method="auto", ignore=ignore, surrogate=surrogate)
    seen = {}
    for above in (0, NEVER):
        emulated.emulate_device(2, 64 << 20, 64, parts, 0, above, 3, 3)  # pieces that hold all positives
        for method in ("auto", "pairwise", "sorted"):
            result = assert_accurate(scores, target, method=method, ignore=ignore, surrogate=surrogate)
            seen[above, method] = result.gradient
            torch.testing.assert_close(result.loss, truth.loss.float(), rtol=2e-6, atol=1e-6)
    assert torch.equal(seen[0, "auto"], seen[0, "sorted"])
    assert torch.equal(seen[0, "sorted"], seen[NEVER, "sorted"])
    assert torch.equal(seen[NEVER, "auto"], seen[NEVER, "pairwise"])
    assert torch.equal(seen[0, "pairwise"], seen[NEVER, "pairwise"])
    differ = (seen[0, "pairwise"] != seen[0, "sorted"]).any(1)
    assert differ[[2, 8]].all()  # else one of them was not what it says


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_bits(surrogate, emulated):
    """Neither the order of threads and blocks nor their number on a row shows."""
    scores, target, ignore = rows_of_all_kinds()
    scores[8, 3], scores[1, 7] = math.inf, -math.inf  # one is left to the pairwise kernel
    ignore[8, 3], ignore[1, 7] = False, True
    weights = torch.randn(2, int((target & ~ignore).sum()))
    seen = []
    runs = ((1, 64 << 20), (1, 64 << 20), (1, 1 << 14), (2, 64 << 20), (5, 1 << 15))
    for seed, (parts, workspace) in enumerate(runs, 1):
        emulated.emulate_device(2, workspace, 64, parts, 1, 0, seed, 9)
        leaf = scores.clone().requires_grad_()
        loss = ap_loss(leaf, target, ignore=ignore, surrogate=surrogate, reduction="none")
        loss.sum().backward()
        other = scores.clone().requires_grad_()
        ranks = smooth_rank(other, target, ignore=ignore, surrogate=surrogate)
        value = (ranks.negative_rank * weights[0]).sum()
        if surrogate == "smooth":
            value = value + (ranks.positive_rank * weights[1]).sum()
        value.backward()
        values, gradient = objective(scores, lists_of(target), lists_of(ignore), surrogate=surrogate)
        kept = torch.arange(len(scores)) != 8  # spans of the pairwise kernel are summed apart
        rank_kept = kept[ranks.query]
        seen.append(
            [loss[kept], leaf.grad[kept], other.grad[kept], values[kept], gradient[kept], ranks.query]
            + [part[rank_kept] for part in ranks[1:]]
        )
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))


def odd_rows():
    """Rows for boxes among rows that are not: infinities of both roles, and NaN."""
    scores, target, ignore = rows_of_all_kinds(seed=3)
    positive, negative = target & ~ignore, ~target & ~ignore
    for row, roles, value in ((0, positive, 1), (1, negative, 1), (3, positive, -1), (8, negative, -1)):
        scores[row, roles[row].nonzero()[[0, 5]]] = value * math.inf
    scores[8, positive[8].nonzero()[3]] = math.inf
    for row in (2, 4):  # nobody asks what is left out
        scores[row, ignore[row].nonzero()[:3, 0]] = torch.tensor([math.inf, -math.inf, math.nan])
    return scores, target, ignore


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_infinities_and_nan(surrogate, device, emulated):
    emulated.emulate_device(*device, 3, 3)
    scores, target, ignore = odd_rows()
    pairwise = ap_loss(scores, target, ignore=ignore, surrogate=surrogate, reduction="none", method="pairwise")
    leaf = scores.clone().requires_grad_()
    loss = ap_loss(leaf, target, ignore=ignore, surrogate=surrogate, reduction="none")
    loss.sum().backward()
    wide = scores.double().requires_grad_()
    truth = reference.ap_loss(wide, target, ignore=ignore, surrogate=surrogate, reduction="none")
    truth.sum().backward()
    torch.testing.assert_close(loss, truth.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, pairwise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    sick = {1: (target & ~ignore)[1], 8: (~target & ~ignore)[8]}
    for row, roles in sick.items():
        scores[row, roles.nonzero()[2]] = math.nan
    other = scores.clone().requires_grad_()
    nan = ap_loss(other, target, ignore=ignore, surrogate=surrogate, reduction="none")
    nan.sum().backward()
    for row in range(len(scores)):
        if row in sick:
            assert nan[row].isnan()
            assert torch.equal(other.grad[row].isnan(), ~ignore[row])
            assert (other.grad[row, ignore[row]] == 0).all()
        else:
            assert torch.equal(nan[row], loss[row])
            assert torch.equal(other.grad[row], leaf.grad[row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_objective(surrogate, device, emulated):
    """The gradient over the scores: what one kernel has done the other must not do once more."""
    emulated.emulate_device(*device, 3, 3)
    scores, target, ignore = odd_rows()
    scores[2:4] = scores[2:4].clamp(-2, 2).mul(64).round() / 64  # hinges of 300 would hide all else
    scores.masked_fill_(ignore, math.nan)
    finite = scores.masked_fill(ignore, 0.0)
    g = torch.Generator().manual_seed(2)
    scale = 2.0 ** torch.randint(-1, 2, (10,), generator=g), 2.0 ** torch.randint(-1, 2, (333,), generator=g)
    options = {"delta": 3 / 64}
    kept = scores.masked_fill(ignore, 0).isfinite().all(1)
    for scales in (None, scale):
        for dtype in (None, torch.bfloat16):
            out = None if dtype is None else torch.full_like(scores, math.nan, dtype=dtype)
            values, gradient = objective(
                scores, lists_of(target), lists_of(ignore), scale=scales, gradient=out, surrogate=surrogate, **options
            )
            truth, right = expected(finite, target, ignore, scales, surrogate=surrogate, **options)
            torch.testing.assert_close(values[kept, :3], truth[kept], rtol=1e-5, atol=1e-6)
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 2**-8, "atol": 1e-5}
            torch.testing.assert_close(gradient[kept].double(), right[kept], **tolerance)
            torch.testing.assert_close(gradient[~kept].double(), right[~kept], **tolerance)
            assert (gradient[ignore] == 0).all()
            ranked = finite if scales is None else finite * scales[0][:, None] * scales[1]  # on no margin
            below, above = (ranked < 0.9) & target & ~ignore, (ranked > 0.6) & ~target & ~ignore
            assert torch.equal(values[:, 3], below.sum(1).double())
            assert torch.equal(values[:, 4], above.sum(1).double())


def backward(scores, target, ignore, weights, surrogate, method="auto"):
    leaf = scores.clone().requires_grad_()
    function = reference.smooth_rank if method == "reference" else smooth_rank
    more = {} if method == "reference" else {"method": method}
    ranks = function(leaf, target, ignore=ignore, surrogate=surrogate, **more)
    outputs, given = [ranks.negative_rank], [weights[0].to(ranks.negative_rank)]
    if surrogate == "smooth":
        outputs.append(ranks.positive_rank)
        given.append(weights[1].to(ranks.negative_rank))
    torch.autograd.backward(outputs, given)
    return ranks, leaf.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_smooth_rank(surrogate, device, emulated):
    emulated.emulate_device(*device, 3, 3)
    scores, target, ignore = rows_of_all_kinds(seed=5)
    count = int((target & ~ignore).sum())
    weights = torch.randn(2, count, generator=torch.Generator().manual_seed(1)).mul(8).round() / 8
    ranks, gradient = backward(scores, target, ignore, weights, surrogate)
    truth, right = backward(scores.double(), target, ignore, weights, surrogate, "reference")
    _, rough = backward(scores, target, ignore, weights, surrogate, "reference")
    assert torch.equal(ranks.query, truth.query)
    assert torch.equal(ranks.reference, truth.reference)
    eps = torch.finfo(torch.float32).eps
    for name in ("positive_rank", "negative_rank"):
        mine, exact = (getattr(r, name).detach().double() for r in (ranks, truth))
        torch.testing.assert_close(mine, exact, rtol=8 * eps, atol=1e-8)
    allowed = 2 * (rough.double() - right).norm(dim=1) + 4 * eps * weights.abs().max() / 0.01
    allowed += 2 * eps * right.norm(dim=1)
    assert ((gradient.double() - right).norm(dim=1) <= allowed).all()
    for value in (math.inf, math.nan):
        dirty = weights.clone()
        at = (ranks.query == 2).nonzero()[-1]
        dirty[0, at] = value
        if surrogate == "smooth":
            dirty[1, (ranks.query == 8).nonzero()[2]] = value
        _, mine = backward(scores, target, ignore, dirty, surrogate)
        _, pairwise = backward(scores, target, ignore, dirty, surrogate, "pairwise")
        touched = [2, 8] if surrogate == "smooth" else [2]
        clean = [row for row in range(len(scores)) if row not in touched]
        assert torch.equal(mine[clean], gradient[clean])
        torch.testing.assert_close(mine[touched], pairwise[touched], rtol=1e-5, atol=1e-4, equal_nan=True)
        assert not mine[2].isfinite().all()


@pytest.mark.parametrize("device", [OWNING[0], SHARED[1]])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_slopes_that_are_not_finite(value, device, emulated):
    """A forward pass that overflowed, or met a NaN, leaves them: the row goes to the pairwise kernel."""
    emulated.emulate_device(*device, 3, 3)
    scores, target, _ = rows_of_all_kinds(seed=7)
    row = target.nonzero()[:, 0]
    slope, weight = torch.rand(len(row)), torch.rand(len(row))
    slope[(row == 2).nonzero()[-1]] = value
    surrogate = [0.0, 0.01, 100.0, 0.05, 0.5, 1.49]
    scanned, pairwise = (
        torch.ops.roadmap_ext.smooth_rank_backward(scores, target, None, slope, None, weight, surrogate, method)
        for method in (0, 1)
    )
    torch.testing.assert_close(scanned, pairwise, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert not scanned[2].isfinite().all()
    assert scanned[[0, 1, *range(3, 10)]].isfinite().all()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_between_the_kernels(surrogate, parts, emulated):
    """Rows of a piece, longer ones that go pairwise, and ones that just go by boxes: each is done once."""
    emulated.emulate_device(2, 64 << 20, 64, parts, 1, 40, 3, 3)
    scores, target = (torch.randn(8, 130) * 16).round() / 64, torch.zeros(8, 130, dtype=torch.bool)
    for row, positives in enumerate((0, 31, 32, 33, 36, 40, 41, 130)):
        target[row, torch.randperm(130)[:positives]] = True
    values, gradient = objective(scores, lists_of(target), surrogate=surrogate)
    truth, right = expected(scores, target, torch.zeros_like(target), surrogate=surrogate)
    torch.testing.assert_close(values[:, :3], truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_far_below(surrogate, device, emulated):
    """Negatives too far below all positives get their hinges alone, and not even the least share of a rank."""
    emulated.emulate_device(*device, 3, 3)
    positives, cut = torch.tensor([[0.7], [0.75], [1.5]]) + torch.rand(3, 50) / 4, 0.01 * (17 + math.log(150))
    below = torch.tensor([cut - 0.002, cut + 0.002, 0.3, 1.0]).repeat(25)  # just not, and the last below all margins
    scores = torch.cat([positives, positives.amin(1, keepdim=True) - below], 1)
    target = torch.arange(150).expand(3, 150) < 50
    _, gradient = objective(scores, lists_of(target), surrogate=surrogate)
    gradient = gradient[:, 50:].view(3, 25, 4)
    assert (gradient[:2, :, 0] > 0).all()
    assert (gradient[:2, :, 1:] == 0).all()
    assert (gradient[2] == torch.tensor([0.125, 0.125, 0.125, 0])).all()
    leaf = torch.cat([positives, scores[:, 50:] - 0.01], 1).requires_grad_()  # nothing is within reach
    loss = ap_loss(leaf, target, surrogate=surrogate, reduction="sum")
    loss.backward()
    assert loss == 0
    assert (leaf.grad == 0).all()
