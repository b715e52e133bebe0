"""What ap_loss promises beside its values: conventions, memory, autograd, torch.compile, strides, determinism."""

import ctypes
import doctest
import functools
import math
import pickle

import pytest
import torch
from cases import BACKENDS, deep
from oracle import assert_accurate, grid_scores, run
from torch._subclasses.fake_tensor import FakeTensorMode

import roadmap_ext
from roadmap_ext import APLoss, ap_loss, reference, roadmap_loss
from roadmap_ext.settings import Objective

pytestmark = pytest.mark.ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INF, NAN = math.inf, math.nan


def case(rows=5, columns=200, dtype=torch.float32):
    scores, target = grid_scores(rows, columns, dtype), torch.rand(rows, columns) < 0.1
    return scores, target, torch.rand(rows, columns) < 0.1


@pytest.mark.parametrize("method", ["pairwise", "reference", "auto"])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
class TestConventions:
    def test_reductions(self, method, surrogate):
        scores, target, ignore = case()
        target[2] = False
        options = {"ignore": ignore, "surrogate": surrogate, "method": method}
        each = ap_loss(scores, target, reduction="none", **options)
        assert each.shape == (5,)
        assert each[2] == 0
        torch.testing.assert_close(ap_loss(scores, target, reduction="sum", **options), each.sum())
        torch.testing.assert_close(ap_loss(scores, target, **options), each.sum() / 4)

    def test_no_query_has_a_positive(self, method, surrogate):
        scores = torch.randn(3, 7, requires_grad=True)
        loss = ap_loss(scores, torch.zeros(3, 7, dtype=torch.bool), surrogate=surrogate, method=method)
        assert loss == 0
        loss.backward()
        assert (scores.grad == 0).all()

    def test_no_negative_means_ap_one(self, method, surrogate):
        scores = torch.randn(3, 7, requires_grad=True)
        loss = ap_loss(scores, torch.ones(3, 7, dtype=torch.bool), surrogate=surrogate, method=method)
        torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)
        loss.backward()
        torch.testing.assert_close(scores.grad, torch.zeros(3, 7), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
    def test_empty(self, method, surrogate, shape):
        scores = torch.zeros(shape, requires_grad=True)
        mask = torch.zeros(shape, dtype=torch.bool)
        options = {"surrogate": surrogate, "method": method}
        assert ap_loss(scores, mask, reduction="none", **options).shape == shape[:1]
        loss = ap_loss(scores, mask, **options)
        loss.backward()
        assert loss == 0
        assert scores.grad.shape == shape

    def test_positive_and_ignored_is_ignored(self, method, surrogate):
        scores, target, ignore = case()
        options = {"surrogate": surrogate, "method": method, "ignore": ignore}
        one = run(ap_loss, scores, target, torch.ones(5), **options)
        other = run(ap_loss, scores, target & ~ignore, torch.ones(5), **options)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.gradient, other.gradient)
        assert (one.gradient[ignore] == 0).all()

    def test_ignored_pairs_are_as_good_as_absent(self, method, surrogate):
        scores, target, _ = case(columns=120)
        ignore = torch.zeros(5, 120, dtype=torch.bool)
        ignore[:, 40:60] = True
        kept = torch.cat([torch.arange(40), torch.arange(60, 120)])
        one = run(ap_loss, scores, target, torch.ones(5), surrogate=surrogate, method=method, ignore=ignore)
        other = run(ap_loss, scores[:, kept], target[:, kept], torch.ones(5), surrogate=surrogate, method=method)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.gradient[:, kept], other.gradient, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("where", ["positive", "negative", "no positives"])
    def test_nan_stays_in_its_row(self, method, surrogate, where):
        scores, target, _ = case()
        target[1, 3], target[1, 4] = True, False
        if where == "no positives":
            target[1] = False
        scores[1, 3 if where == "positive" else 4] = NAN
        clean = scores.nan_to_num(0.0)
        one = run(ap_loss, scores, target, torch.ones(5), surrogate=surrogate, method=method)
        other = run(ap_loss, clean, target, torch.ones(5), surrogate=surrogate, method=method)
        rest = torch.tensor([0, 2, 3, 4])
        assert one.loss[1].isnan()
        assert one.gradient[1].isnan().any()
        assert torch.equal(one.loss[rest], other.loss[rest])
        assert torch.equal(one.gradient[rest], other.gradient[rest])
        assert ap_loss(scores, target, surrogate=surrogate, method=method).isnan()

    def test_ignored_nan_and_infinity_do_nothing(self, method, surrogate):
        scores, target, _ = case()
        ignore = torch.zeros_like(target)
        ignore[:, :3] = True
        dirty = scores.clone()
        dirty[:, 0], dirty[:, 1], dirty[:, 2] = NAN, INF, -INF
        options = {"surrogate": surrogate, "method": method, "ignore": ignore}
        one, other = (run(ap_loss, s, target, torch.ones(5), **options) for s in (dirty, scores))
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.gradient, other.gradient)


@pytest.mark.parametrize(("columns", "parts"), [pytest.param(200_000, 13, marks=pytest.mark.long), (1000, 20)])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("method", ["pairwise", "sorted"])
def test_a_nan_in_any_part_of_a_shared_row(columns, parts, surrogate, method):
    """Threads, or blocks of a GPU, share the columns of a row and its positives: whoever meets the NaN, all notice."""
    torch.set_num_threads(3)
    scores, target = torch.randn(2, columns) * 100, torch.rand(2, columns) < min(0.1, 60 / columns)
    options = {"surrogate": surrogate, "method": method}
    clean = run(ap_loss, scores, target, torch.ones(2), **options)
    for part in range(parts):  # in a positive, in a negative, ...
        column = (2 * part + 1) * columns // (2 * parts)
        target[0, column], dirty = part % 2 == 0, scores.clone()
        dirty[0, column] = NAN
        ours = run(ap_loss, dirty, target, torch.ones(2), **options)
        assert ours.loss.isnan().tolist() == [True, False]
        assert ours.gradient.isnan().all(1).tolist() == [True, False]
        assert torch.equal(ours.gradient[1], clean.gradient[1])
        assert roadmap_ext.metrics.average_precision(dirty, target).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("rho", [100.0, 0.0])
def test_infinities_are_limits_and_equal_ones_ties(dtype, surrogate, rho):
    values = [INF, INF, 0.5, 0.25, -0.5, -INF, -INF]
    masks = torch.tensor([[(pattern >> j) & 1 for j in range(7)] for pattern in range(128)], dtype=torch.bool)
    scores = torch.tensor(values, dtype=dtype).repeat(128, 1)
    weight = torch.ones(128)
    ours = run(ap_loss, scores, masks, weight, surrogate=surrogate, rho=rho, method="pairwise")
    truth = run(reference.ap_loss, scores.double(), masks, weight, surrogate=surrogate, rho=rho)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.gradient.double(), truth.gradient, rtol=1e-2, atol=1e-4)
    assert ours.gradient.isfinite().all()


@pytest.mark.long
def test_infinity_in_a_long_row_shared_by_threads():
    scores, target = grid_scores(1, 20_000), torch.rand(1, 20_000) < 0.001
    scores[0, 5], scores[0, 6], target[0, 5], target[0, 6] = INF, -INF, True, True
    truth = run(reference.ap_loss, scores.double(), target, torch.ones(1))
    ours = run(ap_loss, scores, target, torch.ones(1))
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.gradient.double(), truth.gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """Transposed, sliced, expanded: the same bits as a contiguous copy."""
    scores, target, ignore = case(12, 150, dtype)
    expected = run(ap_loss, scores, target, torch.ones(12), ignore=ignore)

    def check(s, t, i):
        leaf = s.detach().requires_grad_()
        loss = ap_loss(leaf, t, ignore=i, reduction="none")
        loss.sum().backward()
        assert torch.equal(loss, expected.loss)
        assert torch.equal(leaf.grad, expected.gradient)

    def strided(x):
        return torch.stack([x, x], 2).flatten(1)[:, ::2]

    def rows_apart(x):
        return torch.cat([x, x], 1)[:, :150]

    for view in (lambda x: x.T.contiguous().T, strided, rows_apart, lambda x: x.flip(0).flip(0)):
        check(view(scores), view(target), view(ignore))
    one = scores[:1].expand(12, 150)
    assert torch.equal(
        ap_loss(one, target[:1].expand(12, 150), reduction="none"),
        ap_loss(one.contiguous(), target[:1].repeat(12, 1), reduction="none"),
    )
    wide = scores[:, :1].expand(12, 150)
    assert torch.equal(ap_loss(wide, target), ap_loss(wide.contiguous(), target))


def test_grad_out_of_any_stride_and_twice():
    scores, target, _ = case()
    leaf = scores.clone().requires_grad_()
    loss = ap_loss(leaf, target, reduction="none")
    weight = torch.randn(5, 3)[:, 1]
    (first,) = torch.autograd.grad(loss, leaf, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, weight.clone())
    assert torch.equal(first, second)
    expanded = ap_loss(leaf, target, reduction="none")
    (third,) = torch.autograd.grad(expanded, leaf, torch.ones(1).expand(5))
    assert torch.equal(third, run(ap_loss, scores, target, torch.ones(5)).gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_wait_for_the_scaler(dtype):
    """Gradients far below float16's range survive from forward to backward, and come out scaled."""
    scores, target = grid_scores(4, 3000, dtype), torch.rand(4, 3000) < 0.01
    largest = 2.0**16 / 4  # GradScaler's first factor, over the mean
    half = run(ap_loss, scores, target, torch.full((4,), largest))
    exact = run(reference.ap_loss, scores.double(), target, torch.full((4,), largest))
    exact.gradient.clamp_(-60000, 60000)
    error = (half.gradient.double().clamp(-60000, 60000) - exact.gradient).norm() / exact.gradient.norm()
    assert error < 2 * torch.finfo(dtype).eps
    unscaled = run(ap_loss, scores, target, torch.full((4,), 2.0**-12))
    rescued = (half.gradient != 0) & (unscaled.gradient == 0)
    assert dtype == torch.bfloat16 or rescued.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_keeps_one_matrix_for_backward(dtype, reduction):
    scores, target, _ = case(8, 500, dtype)
    kept = []
    leaf = scores.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ap_loss(leaf * 1.0, target, reduction=reduction)
    saved = [t for t in kept if t.numel() > 1 and t.data_ptr() != leaf.data_ptr()]
    assert sum(t.untyped_storage().nbytes() for t in saved) <= 8 * 500 * scores.element_size() + 8 * 8
    # ... and not the scores, which the network may want to free.
    anchor = [t for t in kept if t.numel() == 0]
    assert all(t.untyped_storage().nbytes() == 0 for t in anchor)


def test_no_gradient_no_matrix():
    scores, target, _ = case()
    with torch.no_grad():
        assert ap_loss(scores.requires_grad_(), target).grad_fn is None
    assert not ap_loss(scores.detach(), target).requires_grad


@pytest.mark.parametrize("shape", [(1, 40_000), (3, 20_000), (64, 512), (2, 140_000), (7, 9_000)])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.long
def test_bitwise_equal_for_any_number_of_threads(shape, surrogate, dtype):
    scores = (torch.randn(shape) * 0.2).to(dtype)
    target = torch.rand(shape) < min(0.1, 600 / shape[1])
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run(ap_loss, scores, target, torch.ones(shape[0]), surrogate=surrogate))
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        assert torch.equal(other.gradient, results[0].gradient)


def test_autocast_leaves_the_scores_alone():
    """Under autocast a matmul gives bfloat16 scores; the loss takes them as they are and sums in float32."""
    embeddings, target = torch.randn(6, 8, requires_grad=True), torch.rand(6, 6) < 0.4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = embeddings @ embeddings.T
        loss = ap_loss(scores, target)
        assert scores.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        wide = ap_loss(scores.float(), target)
    loss.backward()
    assert embeddings.grad.dtype == torch.float32
    torch.testing.assert_close(loss, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ap_loss(torch.randn(2, 5), torch.rand(2, 5) < 0.5).dtype == torch.float32
        assert ap_loss(torch.randn(2, 5), torch.rand(2, 5) < 0.5, method="reference").dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("want", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.host
def test_opcheck_rank_loss(dtype, want, reduction):
    scores, target, ignore = case(3, 40, dtype)
    settings = (Objective().flat(), ["none", "mean", "sum"].index(reduction), want)
    for mask in (ignore, None):
        torch.library.opcheck(torch.ops.roadmap_ext.rank_loss.default, (scores, target, None, mask, *settings))
    level, worth = target.to(torch.uint8) * 2, torch.ones(3, 2, dtype=torch.float64)
    torch.library.opcheck(torch.ops.roadmap_ext.rank_loss.default, (scores, level, worth, None, *settings))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.host
def test_opcheck_scale_rows(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = torch.randn(3, 40).to(dtype)
    for weight in (torch.rand(3, dtype=wide), torch.rand((), dtype=wide)):
        factor = torch.rand(3, dtype=wide)
        torch.library.opcheck(torch.ops.roadmap_ext.scale_rows.default, (gradient, weight, factor))
        torch.testing.assert_close(
            torch.ops.roadmap_ext.scale_rows(gradient, weight, factor),
            (gradient.to(wide) * (weight * factor)[:, None]).to(dtype),
        )
        torch.library.opcheck(torch.ops.roadmap_ext.scale_rows_.default, (gradient.clone(), weight, factor))
        in_place = gradient.clone()
        torch.ops.roadmap_ext.scale_rows_(in_place, weight, factor)
        assert torch.equal(in_place, torch.ops.roadmap_ext.scale_rows(gradient, weight, factor))


def test_backward_keeps_what_is_still_needed():
    """It writes over the gradient that forward kept where the graph is given up, and only there."""
    scores, target, _ = case(3, 40, torch.float32)
    leaf = scores.clone().requires_grad_()
    loss = ap_loss(leaf, target)
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    first, second = (torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0] for _ in range(2))
    last = torch.autograd.grad(loss, leaf, torch.tensor(3.0))[0]
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    assert first.data_ptr() != kept
    assert last.data_ptr() == kept
    with torch.autograd.graph.save_on_cpu():
        loss = ap_loss(leaf, target)
    (3 * loss).backward()
    assert torch.equal(leaf.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("method", ["pairwise", "reference"])
def test_gradcheck_through_the_function(method):
    scores = (torch.randn(2, 9, dtype=torch.float64) * 0.2).requires_grad_()
    target = torch.rand(2, 9) < 0.4
    assert torch.autograd.gradcheck(
        lambda s: ap_loss(s, target, tau=0.05, rho=3.0, reduction="none", method=method), scores, eps=1e-7, atol=1e-5
    )


def test_second_derivatives_raise():
    scores, target, _ = case()
    leaf = scores.requires_grad_()
    (gradient,) = torch.autograd.grad(ap_loss(leaf, target), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="method='reference'"):
        torch.autograd.grad(gradient.pow(2).sum(), leaf)


def test_second_derivatives_raise_beside_another_path():
    """A gradient penalty: the other path must not stand for the whole."""
    scores, target, _ = case()
    weight = torch.randn(200, requires_grad=True)
    leaf = scores * weight
    loss = ap_loss(leaf, target) + (leaf**3).sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        gradient.pow(2).sum().backward()


def test_second_derivatives_of_the_weighting_raise():
    """The gradient depends on grad_out, too."""
    scores, target, _ = case()
    leaf, weight = scores.requires_grad_(), torch.rand(5, requires_grad=True)
    loss = (ap_loss(leaf, target, reduction="none") * weight).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(gradient.sum(), weight)


@pytest.mark.parametrize(
    "function", [ap_loss, lambda s, t, **o: roadmap_ext.smooth_rank(s, t, **o).negative_rank.sum()]
)
def test_transforms_and_forward_mode_raise(function):
    """torch would return zeros, or nothing at all."""
    scores, target, _ = case()
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"torch\.func.*method='reference'"):
            transform(lambda s: function(s, target))(scores)
    with pytest.raises(RuntimeError, match="method='reference'"):
        torch.vmap(lambda s, t: function(s, t))(scores[None], target[None])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        function(torch.autograd.forward_ad.make_dual(scores, scores), target)
    by_reference = torch.func.grad(lambda s: function(s, target, method="reference"))(scores)
    leaf = scores.clone().requires_grad_()
    function(leaf, target).backward()
    torch.testing.assert_close(by_reference, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fullgraph", [False, *deep(True)])
@pytest.mark.parametrize("name", ["ap_loss", "smooth_rank", "roadmap_loss"])
@pytest.mark.host
def test_transforms_and_forward_mode_raise_when_compiled(name, fullgraph):
    """Whichever is inside the other, and whether the graph may break or not; outside a transform it all still runs."""
    scores, target, _ = case()
    labels = torch.arange(5) // 2

    def loss(x):
        if name == "smooth_rank":
            return roadmap_ext.smooth_rank(x, target).negative_rank.sum()
        return ap_loss(x, target) if name == "ap_loss" else roadmap_loss(x, labels)

    torch._dynamo.reset()  # it remembers which frames it could not take
    compiling = functools.partial(torch.compile, fullgraph=fullgraph, backend="eager")
    compiled = compiling(loss)
    assert torch.equal(compiled(scores), loss(scores))
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"torch\.func.*method='reference'"):
            compiling(transform(loss))(scores)
    for function in (compiling(torch.vmap(loss)), torch.vmap(compiled)):
        with pytest.raises(RuntimeError, match=r"torch\.func.*method='reference'"):
            function(scores[None])
    with pytest.raises(RuntimeError, match=r"torch\.func.*method='reference'"):
        torch.func.grad(compiled)(scores)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        compiled(torch.autograd.forward_ad.make_dual(scores, scores))
    assert torch.equal(compiled(scores), loss(scores))


def test_the_reference_has_second_derivatives():
    scores = (torch.randn(2, 6, dtype=torch.float64) * 0.3).requires_grad_()
    target = torch.rand(2, 6) < 0.5
    assert torch.autograd.gradgradcheck(
        lambda s: ap_loss(s, target, tau=0.2, rho=0.0, delta=5.0, method="reference"), scores
    )


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile_a_training_step(surrogate, backend):
    """fullgraph, with changing shapes, and the same bits as eager."""
    torch.compiler.reset()  # the cases share one function, and with it the limit on recompilations
    layer = torch.nn.Linear(16, 8)

    def step(x, labels):
        embeddings = torch.nn.functional.normalize(layer(x), dim=1)
        itself = torch.eye(len(x), dtype=torch.bool)
        return ap_loss(embeddings @ embeddings.T, labels[:, None] == labels[None], ignore=itself, surrogate=surrogate)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (12, 20, 33):
        x, labels = torch.randn(rows, 16), torch.arange(rows) % 4
        results = []
        for function in (step, compiled):
            layer.zero_grad()
            loss = function(x, labels)
            loss.backward()
            results.append((loss.detach(), layer.weight.grad.clone()))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, labels), step(x, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile_the_module_with_none(backend):
    scores, target, _ = case()
    module = APLoss(reduction="none")
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    leaf = scores.clone().requires_grad_()
    compiled(leaf, target).sum().backward()
    assert torch.equal(leaf.grad, run(ap_loss, scores, target, torch.ones(5)).gradient)


@pytest.mark.host
def test_fake_and_meta_tensors():
    with FakeTensorMode():
        fake = torch.empty(4, 9, dtype=torch.float16, requires_grad=True)
        loss = ap_loss(fake, torch.empty(4, 9, dtype=torch.bool))
        assert loss.shape == ()
        assert loss.dtype == torch.float32


def test_module():
    module = APLoss(tau=0.02, offset=1.44, reduction="sum")
    scores, target, ignore = case()
    assert torch.equal(
        module(scores, target, ignore), ap_loss(scores, target, ignore=ignore, tau=0.02, offset=1.44, reduction="sum")
    )
    again = pickle.loads(pickle.dumps(module))
    assert repr(again) == repr(module)
    assert "tau=0.02" in repr(module)
    assert "offset=1.44" in repr(module)
    assert "rho" not in repr(APLoss(surrogate="smooth"))
    assert torch.equal(again(scores, target), module(scores, target))
    with pytest.raises(ValueError, match="tau"):
        APLoss(tau=-1)


def test_tiled_is_an_alias_of_pairwise():
    scores, target, ignore = case()
    old, new = (run(ap_loss, scores, target, torch.ones(5), ignore=ignore, method=m) for m in ("tiled", "pairwise"))
    assert torch.equal(old.loss, new.loss)
    assert torch.equal(old.gradient, new.gradient)
    old, new = (roadmap_ext.smooth_rank(scores, target, method=m).negative_rank for m in ("tiled", "pairwise"))
    assert torch.equal(old, new)


def test_modules_made_with_tiled():
    scores, target, _ = case()
    module = APLoss(method="tiled")
    again = pickle.loads(pickle.dumps(module))
    assert repr(again) == repr(module) == repr(APLoss()).replace("auto", "tiled")
    assert torch.equal(again(scores, target), APLoss(method="pairwise")(scores, target))
    batch = torch.randn(8, 4), torch.arange(8) // 2
    old, new = (roadmap_ext.RoadmapLoss(method=m)(*batch) for m in ("tiled", "pairwise"))
    assert torch.equal(old, new)


@pytest.mark.host
def test_the_docstrings_examples():
    for module in (roadmap_ext.losses, roadmap_ext.modules):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_every_read_is_inside_the_tensor():
    """A view that ends where its storage ends, at sizes around a vector: what lies past it must not matter."""
    for columns in (1, 3, 15, 16, 17, 63, 64, 65, 130):
        room = torch.full((2 * columns + 64,), NAN)
        scores = room[: 2 * columns].view(2, columns)
        scores.copy_(grid_scores(2, columns))
        marks = torch.ones(2 * columns + 64, dtype=torch.bool)
        target = marks[: 2 * columns].view(2, columns)
        target.copy_(torch.rand(2, columns) < 0.3)
        assert_accurate(scores, target)


class TestBadInput:
    scores, target = torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.bool)

    @pytest.mark.parametrize(
        ("scores", "target", "ignore", "error", "words"),
        [
            ([[1.0]], target, None, TypeError, "scores must be a torch.Tensor, got list"),
            (scores[0], target, None, ValueError, r"2-D.*\(5,\).*scores\[None\]"),
            (scores[None], target, None, ValueError, "2-D"),
            (scores.tolist(), target, None, TypeError, "as_tensor"),
            (scores.int(), target, None, TypeError, "int32"),
            (scores.to(torch.complex64), target, None, TypeError, "complex64"),
            (scores.to(torch.float8_e4m3fn), target, None, TypeError, "float8"),
            (scores.to_sparse(), target, None, TypeError, "to_dense"),
            (scores, "mask", None, TypeError, "target must be a torch.Tensor of dtype torch.bool, got str"),
            (scores, target[:2], None, ValueError, r"\(3, 5\), got \(2, 5\)$"),
            (scores, target[:1], None, ValueError, r"\(3, 5\).*\(1, 5\).*expand_as"),
            (scores, target.float(), None, TypeError, r"float32.*target\.bool\(\)"),
            (scores, target.int(), None, TypeError, r"int32.*target\.bool\(\)"),
            (scores, torch.arange(3), None, TypeError, r"labels\[:, None\]"),
            (scores, target.to("meta"), None, ValueError, "cpu.*meta"),
            (scores, target.to_sparse(), None, TypeError, "to_dense"),
            (scores, target, target.float(), TypeError, r"ignore.*ignore\.bool\(\)"),
            (scores, target, target[:, :4], ValueError, "ignore must have the shape"),
            (scores, target, target.to("meta"), ValueError, r"ignore\.to\(scores\.device\)"),
            (scores, target, 3, TypeError, "ignore must be a torch.Tensor"),
        ],
    )
    @pytest.mark.parametrize("method", ["pairwise", "reference"])
    def test_tensors(self, scores, target, ignore, error, words, method):
        with pytest.raises(error, match=words):
            ap_loss(scores, target, ignore=ignore, method=method)
        if method == "pairwise":
            with pytest.raises(error, match=words):
                roadmap_ext.smooth_rank(scores, target, ignore=ignore)
            with pytest.raises(error, match=words):
                roadmap_ext.metrics.average_precision(scores, target, ignore)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"tau": 0.0}, ValueError, "tau must be positive"),
            ({"tau": -0.1}, ValueError, "tau must be positive"),
            ({"tau": NAN}, ValueError, "tau must be finite"),
            ({"tau": "warm"}, TypeError, "tau must be a number, got str"),
            ({"tau": torch.tensor(0.1)}, TypeError, r"got Tensor.*\.item\(\)"),
            ({"tau": True}, TypeError, "tau must be a number, got bool"),
            ({"tau": 1e-21}, ValueError, "tau must be positive, from 1e-20 to 1e\\+28, got 1e-21"),
            ({"tau": 1.1e28}, ValueError, r"tau must be finite, and at most 1e\+28 in magnitude .* got 1.1e\+28"),
            ({"tau": 1e20, "rho": 1e9}, ValueError, r"rho \* tau must be at most 1e\+28 .* got 1000000000.0 \* 1e\+20"),
            ({"offset": -1.1e28}, ValueError, r"offset must be finite, and at most 1e\+28"),
            ({"rho": -1.0}, ValueError, "rho must not be negative"),
            ({"rho": INF}, ValueError, "rho must be finite"),
            ({"delta": -0.1}, ValueError, "delta must not be negative"),
            ({"delta": NAN}, ValueError, "delta must be finite"),
            ({"start": NAN}, ValueError, "start must be finite"),
            ({"offset": NAN}, ValueError, "offset must be finite"),
            ({"surrogate": "step"}, ValueError, "'sup', 'smooth', got 'step'"),
            ({"reduction": "max"}, ValueError, "'none', 'mean', 'sum', got 'max'"),
            ({"reduction": None}, ValueError, "got None"),
            ({"method": "fast"}, ValueError, "'auto', 'pairwise', 'sorted', 'reference', got 'fast'"),
        ],
    )
    def test_settings(self, options, error, words):
        with pytest.raises(error, match=words):
            ap_loss(self.scores, self.target, **options)
        with pytest.raises(error, match=words):
            APLoss(**options)
        if "reduction" not in options:
            with pytest.raises(error, match=words):
                roadmap_ext.smooth_rank(self.scores, self.target, **options)

    @pytest.mark.host
    def test_other_devices(self):
        scores, target = self.scores.to("meta"), self.target.to("meta")
        assert ap_loss(scores, target).device.type == "meta"
        if not roadmap_ext.build_info()["cuda"]:
            with pytest.raises(RuntimeError, match=r"no CUDA kernels because .*FORCE_CUDA=1.*method='reference'"):
                roadmap_ext.extension.check_kernels(torch.device("cuda", 0), "pairwise")
        with pytest.raises(RuntimeError, match=r"none for 'mps'.*method='reference'"):
            roadmap_ext.extension.check_kernels(torch.device("mps"), "auto")

    @pytest.mark.host
    def test_the_ops_check_for_themselves(self):
        """Whoever calls an op directly meets an error, not a bad read."""
        ops = torch.ops.roadmap_ext
        settings = [0.0, 0.01, 100.0, 0.05, 0.5, 1.49]
        for scores, target, arguments in (
            (self.scores[0], self.target[0], settings),
            (self.scores, self.target[:, :3], settings),
            (self.scores, self.target.float(), settings),
            (self.scores.int(), self.target, settings),
            (self.scores, self.target, [2.0, *settings[1:]]),
            (self.scores, self.target, [0.5, *settings[1:]]),
            (self.scores, self.target, [0.0, 0.0, *settings[2:]]),
            (self.scores, self.target, [0.0, 0.01, -1.0, *settings[3:]]),
            (self.scores, self.target, [*settings[:5], NAN]),
            (self.scores, self.target, settings[:5]),
            (self.scores, self.target, [*settings, 0.0]),
            (self.scores, self.target, []),
        ):
            with pytest.raises(RuntimeError):
                ops.rank_loss(scores, target, None, None, arguments + Objective().flat()[6:], 1, True)
            with pytest.raises(RuntimeError):
                ops.smooth_rank(scores, target, None, arguments, True)
        with pytest.raises(RuntimeError):
            ops.rank_loss(self.scores, self.target, None, None, Objective().flat(), 3, True)
        worth = torch.ones(3, 2, dtype=torch.float64)
        for level, of in (
            (self.target, worth),
            (self.target.byte(), worth[:2]),
            (self.target.byte(), worth.float()),
            (self.target.byte(), None),
            (self.target.byte(), torch.ones(3, 17, dtype=torch.float64)),
        ):
            with pytest.raises(RuntimeError):
                ops.rank_loss(self.scores, level, of, None, Objective().flat(), 1, True)
        for place, wrong in ((10, 5.0), (10, 0.5), (11, 0.0), (12, NAN)):
            given = Objective().flat()
            given[place] = wrong
            with pytest.raises(RuntimeError):
                ops.rank_loss(self.scores, self.target, None, None, given, 1, True)
        with pytest.raises(RuntimeError):
            ops.scale_rows(self.scores, torch.ones(2), torch.ones(1))
        with pytest.raises(RuntimeError):
            ops.smooth_rank_backward(self.scores, ~self.target, None, torch.ones(2), None, torch.ones(2), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.long
def test_bits_do_not_depend_on_who_shares_a_row(dtype):
    """Thousands of positives with tails: a row alone and shared, alone on one thread, and in a batch."""
    scores, target = torch.randn(16, 8192, dtype=dtype), torch.rand(16, 8192) < 0.2
    results = []
    for threads, rows in ((1, 1), (2, 1), (3, 2), (2, 16)):
        torch.set_num_threads(threads)
        ranks = roadmap_ext.smooth_rank(scores[:rows], target[:rows]).negative_rank[: int(target[0].sum())]
        results.append((ranks, run(ap_loss, scores[:rows], target[:rows], torch.ones(rows)).gradient[0]))
    for ranks, gradient in results[1:]:
        assert torch.equal(ranks, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e6])
def test_float64_far_from_zero(offset):
    scores = torch.randn(3, 2000).double() * 0.3 + torch.randn(3, 2000).double() * 1e-9 + offset
    assert_accurate(scores, torch.rand(3, 2000) < 0.02)


@pytest.mark.parametrize("delta", [0.05, 0.25, 16.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_just_above_the_knee(delta, dtype):
    scores = torch.zeros(1, 1000, dtype=dtype)
    scores[0, 1:] = delta * (1 + torch.rand(999, dtype=dtype) * 1e-2) + 1e-3
    target = torch.arange(1000)[None] == 0
    assert_accurate(scores, target, delta=delta)


def test_float16_gradients_do_not_suffer_from_settings_without_a_part():
    scores = torch.tensor([[0.5, 0.49, 0.48]], dtype=torch.float16)
    target = torch.tensor([[True, False, False]])
    one, other = (run(ap_loss, scores, target, torch.ones(1), surrogate="smooth", rho=rho) for rho in (1e20, 0.0))
    assert torch.equal(one.gradient, other.gradient)


def test_no_gradient_stays_none_whatever_arrives():
    leaf = torch.randn(2, 4, requires_grad=True)
    target, ignore = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    target[0, 0], ignore[0, 3] = True, True
    (ap_loss(leaf, target, ignore=ignore) * INF).backward()
    assert (leaf.grad[1] == 0).all()
    assert leaf.grad[0, 3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile_with_dynamic_shapes_and_settings(backend):
    scores, target, _ = case()
    loss = torch.compile(lambda s, t, tau: ap_loss(s, t, tau=tau), dynamic=True, fullgraph=True, backend=backend)
    for tau in (0.01, 0.02, 0.05):
        torch.testing.assert_close(loss(scores, target, tau), ap_loss(scores, target, tau=tau))


@pytest.mark.host
def test_calls_leak_nothing():
    """Bytes in use by the C allocator after thousands of calls (glibc alone can say)."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc")

    class Info(ctypes.Structure):
        _fields_ = [(str(index), ctypes.c_size_t) for index in range(10)]  # the eighth: bytes allocated

    info = ctypes.CDLL(None).mallinfo2
    info.restype = Info
    scores, target = torch.randn(8, 100, requires_grad=True), torch.rand(8, 100) < 0.05

    def calls(count):
        for _ in range(count):
            scores.grad = None
            ap_loss(scores, target).backward()
            roadmap_ext.smooth_rank(scores, target).negative_rank.sum().backward()

    calls(200)
    before = getattr(info(), "7")
    calls(1000)
    assert (getattr(info(), "7") - before) / 1000 < 16
