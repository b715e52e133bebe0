"""What the CUDA ops promise beyond the CPU's, under the emulator."""

import ctypes
import math

import pytest
import torch
from emulated_ops import DEVICES

from roadmap_ext import RoadmapLoss, ap_loss, embedding_loss, ops, reference, smooth_rank
from roadmap_ext.pairs import Lists, Pairs
from roadmap_ext.settings import Objective, Surrogate

pytestmark = [pytest.mark.usefixtures("emulated"), pytest.mark.deep]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LISTS = ["positive", "left_out", "negative"]


def lists_of(mask):
    """The columns that are set, as lists."""
    row, column = mask.nonzero(as_tuple=True)
    end = torch.bincount(row, minlength=len(mask)).cumsum(0)
    return Lists(torch.stack([end - mask.sum(1), end], 1), column)


def objective(scores, positive, left_out=None, negative=None, own=-1, scale=None, gradient=None, **options):
    """values [B, 5] and the gradient of objective_rows_."""
    rows = len(scores)
    values = torch.full((rows, 5), float("nan"), dtype=torch.float64)
    weight = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).expand(rows, 3).contiguous()
    work = scores.clone()
    pairs, row_scale, column_scale = Pairs(positive, left_out, negative, own), *(scale or (None, None))
    torch.ops.roadmap_ext.objective_rows_(
        work, values, pairs.flat(), own, weight, Objective(Surrogate(**options)).flat(), row_scale, column_scale, True,
        gradient,
    )  # fmt: skip
    return values, work if gradient is None else gradient


def expected(scores, target, ignore, scale=None, **options):
    """The same from the reference, in float64."""
    leaf = scores.to(torch.float64, copy=True).requires_grad_()
    ranked = leaf if scale is None else leaf * scale[0].double()[:, None] * scale[1].double()
    ap = reference.ap_loss(ranked, target, ignore=ignore, reduction="none", **options)
    below = ((0.9 - ranked).relu() * (target & ~ignore)).sum(1)
    above = ((ranked - 0.6).relu() * ~(target | ignore)).sum(1)
    (0.5 * ap + 0.25 * below + 0.125 * above).sum().backward()
    return torch.stack([ap, below, above], 1).detach(), leaf.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["labels", "left out", "named", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_objective_of_lists(kind, device, dtype, emulated):
    """Lists, in every order of what is positive, left out and named, with scales and without."""
    emulated.emulate_device(*device, 3, 3)
    scores = (torch.randn(6, 200, dtype=dtype) * 20).round() / 64
    target = torch.rand(6, 200) < 0.3
    target[0], target[1] = False, True
    left_out, named = torch.rand(6, 200) < 0.2, torch.rand(6, 200) < 0.5
    ignore = torch.zeros_like(target)
    extra = {}
    if kind == "left out":
        ignore, extra = left_out, {"left_out": lists_of(left_out)}
    elif kind == "named":
        ignore = ~(named | target) | left_out
        extra = {"negative": lists_of(named), "left_out": lists_of(left_out)}
    elif kind == "own":
        ignore, extra = torch.eye(6, 200, dtype=torch.bool).roll(4, 1), {"own": 4}
    scale = 2.0 ** torch.randint(-1, 2, (6,)).to(dtype), 2.0 ** torch.randint(-1, 2, (200,)).to(dtype)
    for scales in (None, scale):
        values, gradient = objective(scores, lists_of(target), scale=scales, **extra)
        truth, true_gradient = expected(scores, target, ignore, scales)
        torch.testing.assert_close(values[:, :3], truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-5)
        assert (gradient[ignore] == 0).all()
        if scales is None and dtype == torch.float32:  # to a half type instead of over the scores
            narrow = torch.full_like(scores, float("nan"), dtype=torch.bfloat16)
            _, narrow = objective(scores, lists_of(target), gradient=narrow, **extra)
            assert torch.equal(narrow, gradient.bfloat16())
        pairs = Pairs(lists_of(target), extra.get("left_out"), extra.get("negative"), extra.get("own", -1))
        counts = ops.count_pairs(pairs, 6, 200)
        assert torch.equal(counts[:, 0], (target & ~ignore).sum(1))
        assert torch.equal(counts[:, 1], (~target & ~ignore).sum(1))


@pytest.mark.parametrize("device", DEVICES)
def test_no_list_leads_out_of_bounds(device, emulated):
    """Spans and columns lie on the device, where nobody checks them: whatever they hold, every access is in bounds."""
    emulated.emulate_device(*device, 5, 5)
    far = torch.iinfo(torch.int64)
    odd = torch.tensor([0, 1, -1, 3, 7, 40, 70, 71, 1 << 31, -(1 << 31), far.max, far.min, far.min + 1])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, generator=generator):
            return odd[torch.randint(len(odd), shape, generator=generator)]

        given = {name: Lists(draw(4, 2), draw(50)) for name in LISTS}
        objective(torch.randn(4, 70), own=int(draw(1).clamp(max=1 << 61)), **given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_order(dtype, surrogate, device, emulated):
    scores, target = (torch.randn(5, 700) / 4).to(dtype), torch.rand(5, 700) < 0.15
    seen = []
    for seed in range(1, 5):
        emulated.emulate_device(*device, seed, 9)
        leaf = scores.clone().requires_grad_()
        loss = ap_loss(leaf, target, surrogate=surrogate, ignore=torch.eye(5, 700, dtype=torch.bool))
        loss.backward()
        ranks = smooth_rank(scores, target, surrogate=surrogate)
        seen.append([loss.detach(), leaf.grad, *ranks])
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_long_sums_leave_their_thread(surrogate, emulated):
    """More tiles than a thread may sum in a row, and one block a row."""
    emulated.emulate_device(1, 64 << 20, 32, 1, 0, 256, 1, 1)
    columns = 32 * 8 * 32 * 2 + 77
    scores, target = (torch.randn(2, columns) * 16).round() / 64, torch.rand(2, columns) < 1e-3
    leaf = scores.clone().requires_grad_()
    loss = ap_loss(leaf, target, surrogate=surrogate, reduction="sum")
    loss.backward()
    exact = scores.double().requires_grad_()
    truth = reference.ap_loss(exact, target, surrogate=surrogate, reduction="sum")
    truth.backward()
    assert abs(loss.item() - truth.item()) < 1e-6
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_compensated_exponents(device, emulated):
    """Within reach of its positive, the share of a single negative is as good as float32 can say."""
    emulated.emulate_device(*device, 7, 7)
    positives = 0.3 + 0.19 * torch.rand(300, 64)
    scores = torch.cat([positives, positives.amin(1, keepdim=True) - 0.01 * torch.rand(300, 1)], 1)
    target = torch.ones(300, 65, dtype=torch.bool)
    target[:, 64] = False
    ours = smooth_rank(scores, target, surrogate="smooth").negative_rank.double()
    truth = reference.smooth_rank(scores.double(), target, surrogate="smooth").negative_rank
    assert ((ours - truth) / truth).abs().max() < 8e-7  # that of plain float32: 2e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_products(dtype, alone, chunk_size, normalize, monkeypatch):
    """Half embeddings enter the products as they are; scores and sums are float32, the gradient of a score is not."""
    monkeypatch.setattr(embedding_loss, "_HALF_PRODUCTS", {"cpu"})
    x = torch.nn.functional.normalize(torch.randn(40, 16), dim=1).to(dtype)
    other = None if alone else torch.nn.functional.normalize(torch.randn(60, 16), dim=1).to(dtype)
    labels, other_labels = torch.arange(40) % 8, None if alone else torch.arange(60) % 8
    results = []
    for method, kind in (("pairwise", dtype), ("reference", torch.float64)):
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in (x, other) if t is not None]
        loss = RoadmapLoss(chunk_size=chunk_size, method=method, normalize=normalize)(
            leaves[0], labels, ref_emb=None if alone else leaves[1], ref_labels=other_labels
        )
        (loss * 1e4).backward()
        results.append((loss.double(), *(leaf.grad.double() for leaf in leaves)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for ours, truth in zip(results[0][1:], results[1][1:], strict=True):
        assert (ours - truth).norm() < 3 * torch.finfo(dtype).eps * truth.norm()


def test_a_nan_in_half_products_stays_with_its_query(monkeypatch):
    monkeypatch.setattr(embedding_loss, "_HALF_PRODUCTS", {"cpu"})
    x = torch.randn(12, 8).half()
    x[3, 2] = float("nan")
    gallery = torch.randn(20, 8).half()
    leaf = x.requires_grad_()
    loss = RoadmapLoss(reduction="sum")(leaf, torch.arange(12) % 4, ref_emb=gallery, ref_labels=torch.arange(20) % 4)
    loss.backward()
    assert leaf.grad[3].isnan().all()
    assert leaf.grad[torch.arange(12) != 3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 31, 33, 129, 4128])
def test_scale_rows(dtype, columns):
    memory = torch.randn(6 * columns + 1).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.tensor([4.0, -2.0, 0.0, 3e4, float("inf"), 1.5], dtype=kind)
    factor = torch.tensor([0.25, 7.0, 1.0, 1e-3, 1.0, 0.3], dtype=kind)
    for offset in (0, 1):  # of the first element from where vectors lie
        gradient = memory[offset : offset + 6 * columns].view(6, columns)
        gradient[:, 0] = 0
        for w, f in ((weight, factor), (weight[:1], factor), (weight, factor[:1]), (weight[:1], factor[:1])):
            ours = torch.ops.roadmap_ext.scale_rows(gradient, w, f)
            by = (w.double() * f.double()).expand(6)[:, None]
            truth = torch.where(gradient == 0, 0.0, gradient.double() * by).to(dtype)
            torch.testing.assert_close(ours, truth, rtol=2 * torch.finfo(dtype).eps, atol=0)
            before = memory.clone()
            torch.ops.roadmap_ext.scale_rows_(gradient, w, f)
            assert torch.equal(gradient, ours)
            memory.copy_(before)
    small, up, down = torch.full((1, 9), 2.0**-14), torch.full((1,), 2.0**60), torch.full((1,), 2.0**-50)
    product = torch.ops.roadmap_ext.scale_rows(small.to(dtype), up.to(kind), down.to(kind))
    assert (product == 2.0**-4).all()


def test_nothing_is_touched_where_the_product_is_one(emulated):
    """The usual backward of a mean: its weight lies in the gradient, as long as every row has a positive."""
    scores, target = torch.randn(49, 40), torch.zeros(49, 40, dtype=torch.bool)
    target[:, 7] = True
    for empty in (False, True):
        target[3, 7] = not empty
        _, gradient, factor = ops.rank_loss(scores, target, None, None, Objective(), True, "auto")
        assert (factor == 1).all() == (not empty)
        truth = scores.double().requires_grad_()
        reference.ap_loss(truth, target).backward()
        torch.testing.assert_close(gradient.double() * factor, truth.grad, rtol=1e-5, atol=1e-9)
        untouched = torch.full_like(gradient, -0.0)  # 0 whatever it is multiplied by
        torch.ops.roadmap_ext.scale_rows_(untouched, torch.ones(()), factor)
        assert untouched.signbit().all() == (not empty)


@pytest.mark.parametrize("n", [1, 31, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_around_the_products(n, dtype):
    matrix = torch.randn(n, n, dtype=dtype)
    ours = matrix.clone()
    torch.ops.roadmap_ext.symmetrise_(ours)
    assert torch.equal(ours, matrix + matrix.T)
    gradient, scale = torch.randn(5, n, dtype=dtype), torch.rand(5, dtype=dtype)
    wide = torch.randn(5, 2 * n, dtype=dtype)
    for x in (wide[:, :n].contiguous(), wide[:, :n], torch.randn(n, 5, dtype=dtype).T):
        ours = gradient.clone()
        torch.ops.roadmap_ext.remove_radial_(ours, x, scale)
        truth = gradient - x * (x * gradient).sum(1, keepdim=True) * scale[:, None] ** 2
        torch.testing.assert_close(ours, truth)
    if dtype == torch.float32:
        x = torch.randn(5, n).half()
        ours = gradient.clone()
        torch.ops.roadmap_ext.remove_radial_(ours, x, scale)
        torch.testing.assert_close(ours, gradient - x * (x * gradient).sum(1, keepdim=True) * scale[:, None] ** 2)


@pytest.mark.parametrize("double", [0, 1])
def test_plans(double, emulated):
    """The workspace stays within its bound, and few long rows fill the GPU as many short ones do."""
    out = (ctypes.c_int64 * 3)()
    for rows in (1, 2, 8, 100, 300, 1000, 4096, 100_000):
        for columns in (1, 100, 1024, 10_000, 65_536, 1_000_000, 5_000_000):
            emulated.plan_of(rows, columns, double, 132, out)
            launches, size, threads = out
            bound = max(64 << 20, 32 * columns)
            if not double:  # rows may go by boxes
                bound = max(bound, 64 * columns, min(256 << 20, 2 * rows * columns))
            assert size <= bound, (rows, columns)
            assert launches <= 9 * (9 if double else 42)
            if rows * columns >= 1 << 22 and rows * 32 >= columns / (4 if double else 8) / 132:
                assert threads >= 132 * 256, (rows, columns, threads)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    scores, target = torch.randn(*shape).requires_grad_(), torch.ones(*shape, dtype=torch.bool)
    for reduction in ("mean", "sum", "none"):
        loss = ap_loss(scores, target, reduction=reduction)
        loss.sum().backward()
        assert (loss == 0).all()
        assert loss.shape == (shape[:1] if reduction == "none" else ())
    assert all(len(part) == 0 for part in smooth_rank(scores, target))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ap", [True, False])
def test_on_the_knee_and_on_the_margins(ap, dtype, surrogate, device, emulated):
    """Gaps of exactly delta, scores of exactly a margin: neither is past it. And how many hinges are not 0."""
    emulated.emulate_device(*device, 3, 3)
    scores = (torch.randn(6, 200, dtype=dtype) * 20).round() / 64
    target = torch.rand(6, 200) < 0.3
    scores[:, 0], target[:, 0] = 0.875, True  # one of each on its margin
    scores[:, 1], target[:, 1] = 0.625, False
    values = torch.full((6, 5), float("nan"), dtype=torch.float64)
    weight = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).expand(6, 3).contiguous()
    margins = {"calibration_weight": 0.5 if ap else 1.0, "positive_margin": 0.875, "negative_margin": 0.625}
    objective = Objective(Surrogate(surrogate, delta=0.0625), **margins).flat()
    work = scores.clone()
    torch.ops.roadmap_ext.objective_rows_(
        work, values, Pairs(lists_of(target)).flat(), -1, weight, objective, None, None, True
    )
    leaf = scores.to(torch.float64, copy=True).requires_grad_()
    loss = reference.ap_loss(leaf, target, reduction="none", delta=0.0625, surrogate=surrogate) * ap
    below, above = ((0.875 - leaf).relu() * target).sum(1), ((leaf - 0.625).relu() * ~target).sum(1)
    (0.5 * loss + 0.25 * below + 0.125 * above).sum().backward()
    counts = [(leaf < 0.875) & target, (leaf > 0.625) & ~target]
    truth = torch.stack([loss, below, above, *(count.sum(1).double() for count in counts)], 1).detach()
    torch.testing.assert_close(values, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(work.double(), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("column", [9, 300, 599])
def test_nan_is_seen_whichever_thread_reads_it(column, device, emulated):
    emulated.emulate_device(*device, 3, 3)
    for positive in (True, False):
        scores, target = torch.randn(3, 600), torch.rand(3, 600) < 0.2
        scores[1, column], target[1, column] = float("nan"), positive
        leaf = scores.requires_grad_()
        loss = ap_loss(leaf, target, reduction="none")
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, False]
        assert leaf.grad.isnan().all(1).tolist() == [False, True, False]
        assert not leaf.grad[::2].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_positive_before_one_of_zero(device, emulated):
    """What the first finite positive finds is not what a variable happens to hold."""
    emulated.emulate_device(*device, 3, 3)
    scores, target = torch.rand(2, 300) * 0.1 - 0.09, torch.zeros(2, 300, dtype=torch.bool)
    scores[:, :2], target[:, :2] = torch.tensor([-math.inf, 0.0]), True
    leaf, exact = scores.clone().requires_grad_(), scores.double().requires_grad_()
    ap_loss(leaf, target).backward()
    reference.ap_loss(exact, target).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_just_a_piece(device, emulated):
    """A row whose positives just fill a piece is done once: a second time would start from its gradient."""
    emulated.emulate_device(*device, 3, 3)
    for piece in (32, 512):
        scores = (torch.randn(4, 2 * piece) * 20).round() / 64
        target = torch.zeros(4, 2 * piece, dtype=torch.bool)
        for row, positives in enumerate((piece - 1, piece, piece + 1, 2 * piece)):
            target[row, torch.randperm(2 * piece)[:positives]] = True
        values, gradient = objective(scores, lists_of(target))
        truth, true_gradient = expected(scores, target, torch.zeros_like(target))
        torch.testing.assert_close(values[:, :3], truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-5)
