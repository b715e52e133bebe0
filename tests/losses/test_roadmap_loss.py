"""What roadmap_loss and its modules promise beyond accuracy: relations, dtypes, memory, autograd, compiling, errors."""

import copy
import inspect
import math
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch
from cases import BACKENDS
from torch.autograd import gradcheck
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import roadmap_ext
from benchmarks.measure import in_fresh_process, peak_growth
from roadmap_ext import (
    CalibrationLoss,
    RoadmapLoss,
    SmoothAPLoss,
    SupAPLoss,
    chunks,
    embedding_loss,
    ops,
    pairs,
    reference,
    roadmap_loss,
    settings,
)

pytestmark = pytest.mark.ops

MIB = 1 << 20
NAN = float("nan")
MODULES = [RoadmapLoss, SupAPLoss, SmoothAPLoss, CalibrationLoss]
REDUCTIONS = ["mean", "sum", "none"]
CALIBRATIONS = ["per_query", "violating_pairs"]


def batch(n=40, dim=8, classes=8, dtype=torch.float32):
    return torch.randn(n, dim, dtype=dtype, requires_grad=True), torch.randint(classes, (n,))


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, torch.ones_like(loss))


# --- relations -------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_papers():
    """Written out for one query: two positives, two negatives, one of each beyond a margin."""
    x = normalize(torch.tensor([[1.0, 0], [1, 0.2], [1, 1.5], [1, 0.4], [0.1, 1]]))
    labels = torch.tensor([0, 0, 0, 1, 1])
    s = (x @ x.T)[0]
    gaps = s[[3, 4]][None] - s[[1, 2]][:, None]
    step = torch.sigmoid(gaps / 0.01) + 0.5 * (gaps >= 0)
    above = 100 * (gaps - 0.05) + 0.5 + 1 / (1 + math.exp(-5))
    rank_negative = torch.where(gaps > 0.05, above, step).sum(1)
    rank_positive = torch.tensor([1.0, 2.0])
    ap = (rank_positive / (rank_positive + rank_negative)).mean()
    calibration = torch.relu(0.9 - s[[1, 2]]).mean() + torch.relu(s[[3, 4]] - 0.6).mean()
    expected = 0.5 * (1 - ap) + 0.5 * calibration
    assert s[1] > 0.9 > s[2]
    assert s[3] > 0.6 > s[4]
    torch.testing.assert_close(roadmap_loss(x, labels, reduction="none")[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
)
def test_labels_of_any_integer_dtype(dtype):
    x, labels = batch()
    expected = roadmap_loss(x, labels * 3)
    assert torch.equal(roadmap_loss(x, (labels * 3).to(dtype)), expected)
    assert torch.equal(roadmap_loss(x, labels * 3, x, (labels * 3).to(dtype)), roadmap_loss(x, labels, x, labels))


def test_labels_are_names_not_numbers():
    """Negative, huge and far apart; and only equality counts."""
    x, labels = batch()
    names = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 2**32, 2**32 + 1, -(2**31)])
    assert torch.equal(roadmap_loss(x, names[labels]), roadmap_loss(x, labels))


def test_single_members_and_one_class():
    x, _ = batch(6)
    assert roadmap_loss(x, torch.arange(6), calibration_weight=0) == 0  # nobody has a positive
    assert roadmap_loss(x, torch.zeros(6).long(), calibration_weight=0) == 0  # nobody has a negative
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    losses = roadmap_loss(x, labels, calibration_weight=0, reduction="none")
    assert (losses[2:] == 0).all()
    torch.testing.assert_close(roadmap_loss(x, labels, calibration_weight=0), losses[:2].mean())
    # The calibration loss has all queries in its mean, with the part that each has.
    torch.testing.assert_close(
        roadmap_loss(x, labels, calibration_weight=1),
        roadmap_loss(x, labels, calibration_weight=1, reduction="none").mean(),
    )


def test_each_part_is_reduced_on_its_own():
    x, _ = batch(10)
    labels = torch.tensor([0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    for weight in (0.2, 0.5):
        parts = (1 - weight) * roadmap_loss(x, labels, calibration_weight=0)
        parts = parts + weight * roadmap_loss(x, labels, calibration_weight=1)
        torch.testing.assert_close(roadmap_loss(x, labels, calibration_weight=weight), parts)


def test_self_is_left_out_by_index():
    """A duplicate of the query, of its label or not, stays; the query itself does not."""
    x, labels = batch(20)
    x = torch.cat([x, x[:5]]).detach()
    for duplicates in (labels[:5], labels[:5] + 1):
        all_labels = torch.cat([labels, duplicates])
        ignore = torch.eye(25, dtype=torch.bool)
        scores = normalize(x) @ normalize(x).T
        expected = roadmap_ext.ap_loss(scores, all_labels[:, None] == all_labels[None], ignore=ignore)
        torch.testing.assert_close(SupAPLoss()(x, all_labels), expected, rtol=1e-4, atol=1e-6)
        with_self = roadmap_ext.ap_loss(scores, all_labels[:, None] == all_labels[None])
        torch.testing.assert_close(SupAPLoss(include_self=True)(x, all_labels), with_self, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_memory_that_holds_the_batch(reduction):
    """Ids leave out the query's own copy and older ones: the loss is that of references without them."""
    x, labels = batch(12, dtype=torch.float64)
    memory, memory_labels = batch(30, dtype=torch.float64)
    references = torch.cat([memory, x, x + 0.1])  # and stale copies
    ref_labels = torch.cat([memory_labels, labels, labels])
    ids, ref_ids = torch.arange(12) + 500, torch.cat([torch.arange(30), torch.arange(12) + 500, torch.arange(12) + 500])
    loss = roadmap_loss(x, labels, references, ref_labels, ids=ids, ref_ids=ref_ids, reduction=reduction)
    rows = []
    for i in range(12):
        others = torch.cat([memory, x[torch.arange(12) != i], x[torch.arange(12) != i] + 0.1])
        other_labels = torch.cat([memory_labels, *[labels[torch.arange(12) != i]] * 2])
        rows.append(roadmap_loss(x[i : i + 1], labels[i : i + 1], others, other_labels, reduction="none"))
    expected = torch.cat(rows)
    if reduction != "none":  # every query has a positive here
        expected = expected.sum() if reduction == "sum" else expected.mean()
    assert all((ref_labels[ref_ids != i] == label).any() for i, label in zip(ids, labels, strict=True))
    torch.testing.assert_close(loss, expected)
    kept = roadmap_loss(
        x, labels, references, ref_labels, ids=ids, ref_ids=ref_ids, include_self=True, reduction=reduction
    )
    torch.testing.assert_close(kept, roadmap_loss(x, labels, references, ref_labels, reduction=reduction))


def test_ids_beside_the_index():
    """A batch that holds an image twice: both copies are left out, and the query itself anyway."""
    x, labels = batch(20)
    ids = torch.arange(20) // 2
    loss = roadmap_loss(x, labels, ids=ids, ref_ids=ids)
    assert torch.equal(loss, roadmap_loss(x, labels, x.clone(), labels, ids=ids, ref_ids=ids))
    assert not torch.equal(loss, roadmap_loss(x, labels))


@pytest.mark.parametrize("function", [roadmap_loss, reference.roadmap_loss])
def test_the_batch_as_references_is_the_batch(function):
    """By identity: a copy is other references, in which a query finds itself."""
    x, labels = batch(20)
    alone = function(x, labels)
    assert torch.equal(function(x, labels, x, labels), alone)
    torch.testing.assert_close(gradients(function(x, labels, x, labels), x), gradients(alone, x))
    assert not torch.equal(function(x, labels, x.clone(), labels), alone)
    torch.testing.assert_close(
        function(x, labels, x.clone(), labels), function(x, labels, include_self=True), rtol=1e-4, atol=1e-5
    )
    others = labels.roll(1)  # references may be named otherwise than queries
    ids = torch.arange(20)
    torch.testing.assert_close(
        function(x, labels, x, others), function(x, labels, x.clone(), others, ids=ids, ref_ids=ids)
    )


def test_lists_are_those_of_torch():
    """The kernel's lists and those of sort and searchsorted, which other devices take."""
    names = torch.randint(-(2**31), 2**31, (300,)) * 2**32  # alike in their low halves; some share a slot of the table
    values, references = names[torch.randint(300, (50,))], names[torch.randint(250, (333,))]
    span, column = pairs._equal(values, references)
    ordered, expected = references.sort(stable=True)
    for value, (begin, end) in zip(values, span.tolist(), strict=True):
        first, last = (torch.searchsorted(ordered, value, right=right) for right in (False, True))
        assert torch.equal(column[begin:end], expected[first:last])
    lists = pairs.Lists(span, column)
    assert torch.equal(lists.mask(333), values[:, None] == references[None])


def test_named_pairs():
    """from_pairs: what is named counts, the rest is left out; naming a pair twice changes nothing."""
    query, reference_ = torch.tensor([0, 2, 0, 2, 0]), torch.tensor([4, 1, 2, 0, 4])
    other, negative = torch.tensor([2, 0, 0]), torch.tensor([3, 1, 3])
    named = pairs.from_pairs(3, 5, (query, reference_), (other, negative))
    target, ignore = named.masks(5)
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[query, reference_] = True
    assert torch.equal(target, expected)
    expected[other, negative] = True
    assert torch.equal(ignore, ~expected)
    counts = ops.count_pairs(named, 3, 5)
    assert counts.tolist() == [[2, 2], [0, 0], [2, 1]]


# --- reductions, chunks, dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration_reduction", CALIBRATIONS)
def test_reductions_agree(calibration_reduction):
    x, labels = batch(classes=5, dtype=torch.float64)
    options = {"calibration_reduction": calibration_reduction, "negative_margin": 0.1}
    each = roadmap_loss(x, labels, reduction="none", **options)
    assert each.shape == (40,)
    total = roadmap_loss(x, labels, reduction="sum", **options)
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(roadmap_loss(x, labels, **options), each.mean())
    torch.testing.assert_close(gradients(total, x), gradients(each, x))


def test_violating_pairs_by_hand():
    x, labels = batch(dtype=torch.float64)
    scores = normalize(x) @ normalize(x).T
    other = ~torch.eye(40, dtype=torch.bool)
    below = (0.9 - scores)[(labels[:, None] == labels[None]) & other]
    above = (scores - 0.2)[labels[:, None] != labels[None]]
    expected = below[below > 0].mean() + above[above > 0].mean()
    loss = CalibrationLoss(calibration_reduction="violating_pairs", negative_margin=0.2)(x, labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("references", [False, True])
def test_chunks_change_nothing(references, reduction):
    x, labels = batch(33, dtype=torch.float64)
    other = batch(50, dtype=torch.float64) if references else (None, None)
    inputs = (x, other[0]) if references else (x,)
    whole = roadmap_loss(x, labels, *other, reduction=reduction, chunk_size=33)
    expected = gradients(whole, *inputs)
    for chunk_size in (None, 1, 7, 32, 1000):
        loss = roadmap_loss(x, labels, *other, reduction=reduction, chunk_size=chunk_size)
        torch.testing.assert_close(loss, whole, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients(loss, *inputs), expected, rtol=1e-9, atol=1e-12)


def test_chunks_are_chosen_by_the_budget():
    def rows(queries, references, device):
        return chunks.rows_of_a_chunk(queries, chunks.rows_that_fit(references, 4, device), None)

    assert rows(1024, 1024, "cpu") == 1024
    assert rows(8192, 8192, "cpu") == 2048  # 64 MiB
    assert rows(8192, 8192, "cuda") == 8192  # 256 MiB
    assert rows(100, 6_000_000, "cpu") == 2
    assert rows(100, 1 << 40, "cpu") == 1
    assert rows(9000, 8192, "cpu") == 1800  # as equal as can be
    assert rows(0, 0, "cpu") == 1


def _gradient_at_scale():
    torch.manual_seed(0)
    x = torch.randn(8192, 128, requires_grad=True)
    labels = torch.arange(8192) % 2048
    roadmap_loss(torch.randn(64, 128), torch.arange(64) % 8)  # thread pools and libraries

    def step():
        loss = roadmap_loss(x, labels)
        loss.backward()
        return loss

    return peak_growth(step)


@pytest.mark.host
def test_memory_is_that_of_a_chunk():
    """Peak over inputs and their gradient; the scores alone are 256 MiB."""
    growth = in_fresh_process(_gradient_at_scale)
    if growth is None:
        pytest.skip("peak memory is read from Linux's /proc")
    assert growth - 8192 * 128 * 4 <= 128 * MIB


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_only_where_wanted(reduction, wanted):
    x, labels = batch()
    references, ref_labels = batch(60)
    both = gradients(roadmap_loss(x, labels, references, ref_labels, reduction=reduction), x, references)
    inputs = [t.detach().requires_grad_(want) for t, want in zip((x, references), wanted, strict=True)]
    loss = roadmap_loss(inputs[0], labels, inputs[1], ref_labels, reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if not loss.requires_grad:
        return
    loss.sum().backward()
    for tensor, want, expected in zip(inputs, wanted, both, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(tensor.grad, expected)


def test_without_grad_nothing_is_kept():
    x, labels = batch()
    with torch.no_grad():
        loss = roadmap_loss(x, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, roadmap_loss(x, labels).detach())
    assert not roadmap_loss(x.detach(), labels).requires_grad


@pytest.mark.host
def test_memory_that_is_kept_serves_all_calls():
    """Of another size, dtype and grad mode; of threads that call at once each has its own."""
    x, labels = batch(30, 8)
    chunks._idle.clear()
    with torch.inference_mode():
        expected = roadmap_loss(x, labels)
    assert [storage.nbytes() for storage in chunks._idle] == [4 * 900]
    assert torch.equal(roadmap_loss(x, labels).detach(), expected)
    assert torch.equal(
        roadmap_loss(x.double(), labels).float().detach(), reference.roadmap_loss(x.double(), labels).float()
    )
    assert torch.equal(roadmap_loss(x[:7], labels[:7], x, labels).detach(), roadmap_loss(x[:7], labels[:7], x, labels))
    results = [None] * 4

    def work(i):
        results[i] = [gradients(roadmap_loss(x, labels, negative_margin=0.1 * i), x)[0] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        alone = gradients(roadmap_loss(x, labels, negative_margin=0.1 * i), x)[0]
        for gradient in result:
            torch.testing.assert_close(gradient, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(dtype):
    """The products run in float32 on the CPU: the loss is that of the widened embeddings, the gradient rounded once."""
    x, labels = batch()
    half = x.detach().to(dtype).requires_grad_()
    wide = half.detach().float().requires_grad_()
    loss, expected = roadmap_loss(half, labels), roadmap_loss(wide, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(gradients(loss, half)[0], gradients(expected, wide)[0].to(dtype))


def test_dtypes_may_differ():
    """A memory may be kept in another dtype; the wider one decides."""
    x, labels = batch()
    for dtype, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        references = torch.randn(30, 8).to(dtype).requires_grad_()
        loss = roadmap_loss(x, labels, references, labels[:30])
        assert loss.dtype == result
        grads = gradients(loss, x, references)
        assert [g.dtype for g in grads] == [torch.float32, dtype]
        truth = reference.roadmap_loss(x, labels, references, labels[:30])
        torch.testing.assert_close(grads, gradients(truth, x, references), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_is_off_inside(dtype, reduction):
    x, labels = batch()
    expected = roadmap_loss(x, labels, reduction=reduction)
    with torch.autocast("cpu", dtype=dtype):
        loss = roadmap_loss(x, labels, reduction=reduction)
        assert torch.is_autocast_enabled("cpu")
        inside = gradients(loss, x)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(inside[0], gradients(expected, x)[0])
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=dtype):
        roadmap_loss(linear(x), labels).backward()
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.long
def test_gradients_survive_grad_scaler():
    """float16 at B = 8,192: a mean's gradients lie below float16's range until the scaler's factor is in them."""
    labels = torch.arange(8192) % 2048
    x = torch.randn(2048, 32)[labels] + 2 * torch.randn(8192, 32)
    half = x.half().requires_grad_()
    wide = half.detach().float().requires_grad_()
    scale = 65536.0
    (roadmap_loss(half, labels) * scale).backward()
    (roadmap_loss(wide, labels) * scale).backward()
    assert half.grad.isfinite().all()
    error = (half.grad.float() - wide.grad).norm() / wide.grad.norm()
    assert error < 1e-3
    # What would have been lost had the gradient been rounded before the factor came.
    early = (wide.grad / scale).half().float() * scale
    assert (early - wide.grad).norm() / wide.grad.norm() > 10 * error


def test_any_strides():
    wide, labels = torch.randn(40, 16, dtype=torch.float64), torch.randint(8, (40,))
    forms = {
        "columns": lambda x: x[:, ::2],
        "rows": lambda x: x[::2].repeat_interleave(2, 0)[:40, :8],
        "transposed": lambda x: x[:, :8].T.contiguous().T,
        "expanded": lambda x: x[:1, :8].expand(40, 8),
    }
    for name, form in forms.items():
        leaf = wide.clone().requires_grad_()
        copy_ = wide.clone().requires_grad_()
        loss, expected = roadmap_loss(form(leaf), labels), roadmap_loss(form(copy_).contiguous(), labels)
        torch.testing.assert_close(loss, expected, msg=name)
        torch.testing.assert_close(gradients(loss, leaf), gradients(expected, copy_), msg=name)
        loss = roadmap_loss(wide[:, :8], labels, form(leaf), labels[torch.arange(40)])
        expected = roadmap_loss(wide[:, :8], labels, form(copy_).contiguous(), labels)
        torch.testing.assert_close(gradients(loss, leaf), gradients(expected, copy_), msg=name)


def test_labels_may_be_strided():
    x, labels = batch()
    assert torch.equal(roadmap_loss(x, labels.repeat_interleave(2)[::2]), roadmap_loss(x, labels))


@pytest.mark.parametrize(("n", "references"), [(0, None), (1, None), (0, 5), (5, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("calibration_reduction", CALIBRATIONS)
def test_empty(n, references, reduction, calibration_reduction):
    x = torch.randn(n, 4, requires_grad=True)
    other = (None, None)
    if references is not None:
        other = torch.randn(references, 4, requires_grad=True), torch.zeros(references).long()
    loss = roadmap_loss(
        x, torch.zeros(n).long(), *other, reduction=reduction, calibration_reduction=calibration_reduction
    )
    assert loss.shape == ((n,) if reduction == "none" else ())
    assert (loss == 0).all()
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros(n, 4))
    if references is not None:
        assert torch.equal(other[0].grad, torch.zeros(references, 4))


def test_no_dimension():
    x = torch.empty(4, 0, requires_grad=True)
    roadmap_loss(x, torch.tensor([0, 0, 1, 1])).backward()
    assert x.grad.shape == (4, 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_vectors(reduction):
    """They have no direction: cosines 0, gradient 0, and the others' gradients as the reference has them."""
    x, labels = batch(dtype=torch.float64)
    x = x.detach()
    x[3], x[7], x[9] = 0, 1e-14, 0
    x.requires_grad_()
    loss, truth = (f(x, labels, reduction=reduction) for f in (roadmap_loss, reference.roadmap_loss))
    torch.testing.assert_close(loss, truth)
    grad, expected = gradients(loss, x)[0], gradients(truth, x)[0]
    torch.testing.assert_close(grad, expected)
    assert (grad[[3, 7, 9]] == 0).all()
    zeros = torch.zeros(6, 4, requires_grad=True)
    roadmap_loss(zeros, torch.tensor([0, 0, 1, 1, 2, 3])).backward()
    assert torch.equal(zeros.grad, torch.zeros(6, 4))
    half = torch.zeros(6, 4, dtype=torch.float16, requires_grad=True)
    roadmap_loss(half, torch.tensor([0, 0, 1, 1, 2, 3])).backward()
    assert torch.equal(half.grad, torch.zeros(6, 4).half())


def test_norms_far_from_1():
    x, labels = batch()
    expected = gradients(roadmap_loss(x, labels), x)[0]
    for power in (-30, 30):
        scaled = (x.detach() * 2.0**power).requires_grad_()
        loss = roadmap_loss(scaled, labels)
        torch.testing.assert_close(gradients(loss, scaled)[0] * 2.0**power, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize_", [True, False])
def test_a_nan_stays_with_its_query(normalize_):
    """As a query; as a reference it is everybody's."""
    x, labels = batch()
    references, ref_labels = batch(60)
    clean = roadmap_loss(x, labels, references, ref_labels, reduction="none", normalize=normalize_)
    dirty = x.detach().clone()
    dirty[5, 2] = NAN
    loss = roadmap_loss(dirty, labels, references, ref_labels, reduction="none", normalize=normalize_)
    assert loss[5].isnan()
    others = torch.arange(40) != 5
    torch.testing.assert_close(loss[others], clean[others].detach())
    assert roadmap_loss(dirty, labels, normalize=normalize_).isnan()
    dirty.requires_grad_()
    assert gradients(roadmap_loss(dirty, labels, normalize=normalize_), dirty)[0].isnan().any()


@pytest.mark.parametrize("where", ["a positive", "a negative", "the query"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_nan_is_not_in_the_counts_of_others(threads, where):
    """Hinges are averaged over the batch: over those of the queries that are numbers."""
    torch.set_num_threads(threads)
    x, labels = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    references, ref_labels = torch.randn(20, 3), torch.arange(20) % 4
    ids, ref_ids = torch.arange(6), torch.full((20,), 9)
    if where == "the query":
        x[3] = NAN
    else:  # one that all other queries leave out
        references[1] = NAN
        ref_labels[1], ids, ref_ids[1] = 1 if where == "a positive" else 0, torch.tensor([7, 7, 7, 3, 7, 7]), 7
    options = {"calibration_reduction": "violating_pairs", "reduction": "none", "negative_margin": 0.0}
    expected = reference.roadmap_loss(x, labels, references, ref_labels, ids=ids, ref_ids=ref_ids, **options)
    assert expected.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    for chunk_size in (None, 1, 4):
        loss = roadmap_loss(
            x, labels, references, ref_labels, ids=ids, ref_ids=ref_ids, chunk_size=chunk_size, **options
        )
        torch.testing.assert_close(loss, expected, equal_nan=True)


def test_infinite_similarities():
    """They act as limits: an infinite hinge makes the loss infinite, not NaN."""
    x, labels = torch.ones(2, 1), torch.tensor([0, 1])
    references, ref_labels = torch.tensor([[-math.inf], [0.5], [0.1], [0.2]]), torch.tensor([0, 0, 1, 2])
    for function in (roadmap_loss, reference.roadmap_loss):
        loss = function(x, labels, references, ref_labels, normalize=False, calibration_weight=1.0, reduction="none")
        torch.testing.assert_close(loss, torch.tensor([math.inf, 0.8]))


@pytest.mark.parametrize("function", [roadmap_loss, reference.roadmap_loss])
def test_a_norm_beyond_float32_is_no_zero_vector(function):
    x, labels = batch(6)
    assert function(x.detach() * 1e30, labels).isnan()
    assert function(x.detach().double() * 1e30, labels).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [roadmap_loss, reference.roadmap_loss])
def test_one_norm_beyond_float32_among_others(function, dtype):
    """As a query it spoils its own loss and gradient; as a reference those of all who rank it."""
    x, labels = batch()
    references, ref_labels = batch(60)
    x, references = x.detach().to(dtype), references.detach().to(dtype)
    ids, ref_ids = torch.arange(40), torch.arange(60) + 100
    ref_ids[7] = 3  # the query that leaves it out
    options = {"ids": ids, "ref_ids": ref_ids, "reduction": "none"}
    for large, side, spoilt in ((5, x, [5]), (7, references, [i for i in range(40) if i != 3])):
        dirty = side.clone()
        dirty[large] *= 1e30
        queries, others = (dirty, references) if side is x else (x, dirty)
        queries.requires_grad_()
        loss = function(queries, labels, others, ref_labels, **options)
        assert loss.isnan().nonzero()[:, 0].tolist() == spoilt
        loss.sum().backward()
        if side is x:
            assert queries.grad.isnan().any(1).nonzero()[:, 0].tolist() == spoilt


# --- autograd, compilation, modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("calibration_reduction", CALIBRATIONS)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("normalize_", [True, False])
@pytest.mark.long
def test_gradcheck(normalize_, surrogate, calibration_reduction, reduction):
    x, labels = batch(9, 4, 3, torch.float64)
    references, ref_labels = batch(7, 4, 3, torch.float64)
    options = {"surrogate": surrogate, "calibration_reduction": calibration_reduction, "reduction": reduction}
    # A wide temperature: finite differences of 1e-6 see no curvature.
    options |= {"tau": 0.5, "rho": 2.0, "delta": 0.3, "negative_margin": 0.1, "normalize": normalize_}
    assert gradcheck(lambda x: roadmap_loss(x, labels, **options), x)
    assert gradcheck(lambda x, r: roadmap_loss(x, labels, r, ref_labels, chunk_size=4, **options), (x, references))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_again(reduction):
    """Through a retained graph the gradient is computed once more, to the same bits; without one it is an error."""
    x, labels = batch()
    loss = roadmap_loss(x, labels, reduction=reduction).sum() * 3
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-7)
    torch.autograd.grad(loss, x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_an_incoming_gradient_scales():
    x, labels = batch()
    expected = gradients(roadmap_loss(x, labels), x)[0]
    assert torch.equal(gradients(roadmap_loss(x, labels) * -4.0, x)[0], expected * -4)
    assert torch.equal(gradients(roadmap_loss(x, labels) * 0.0, x)[0], expected * 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_raise(reduction):
    """Also where another path to the embeddings has one of its own."""
    x, labels = batch()
    loss = roadmap_loss(x, labels, reduction=reduction).sum() + x.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.norm().backward()
    penalty = reference.roadmap_loss(x, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(penalty, x, create_graph=True)
    grad.norm().backward()
    assert x.grad.isfinite().all()


def test_transforms_raise():
    x, labels = batch()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: roadmap_loss(x, labels))(x.detach())
    with pytest.raises(RuntimeError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        roadmap_loss(labels=labels, embeddings=torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients_raise(reduction):
    x, labels = batch()
    loss = roadmap_loss(x, labels, reduction=reduction)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.autograd.grad(loss, x, torch.ones(3, *loss.shape), is_grads_batched=True)


@pytest.mark.host
def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.randn(4, 3, requires_grad=True)
        roadmap_loss(x, torch.zeros(4).long()).backward()
        assert x.grad.shape == (4, 3)


@pytest.mark.host
def test_the_first_call_does_not_import_the_compiler():
    code = """if True:
        import sys, torch, roadmap_ext
        x = torch.randn(8, 4, requires_grad=True)
        roadmap_ext.roadmap_loss(x, torch.arange(8) // 4).backward()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from Linux's /proc")
@pytest.mark.host
def test_small_gradients_do_not_split_the_heap():
    """A process may have some 65,000 mappings, and hints to the system make more of them."""
    labels, kept = torch.arange(16) % 8, []
    for calls in range(400):
        x = torch.randn(16, 256, requires_grad=True)
        roadmap_loss(x, labels).backward()
        kept.append(x.grad)
        if calls == 100:
            before = len(Path("/proc/self/maps").read_text().splitlines())
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 50


def test_the_reference_keeps_its_dtype():
    x, labels = batch()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert reference.roadmap_loss(x, labels).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_inside_a_checkpoint():
    x, labels = batch()
    expected = gradients(roadmap_loss(x * 2, labels), x)[0]
    for reentrant in (True, False):
        loss = checkpoint(lambda x: roadmap_loss(x * 2, labels), x, use_reentrant=reentrant)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0] if not reentrant else _backward(loss, x), expected)


def _backward(loss, x):
    x.grad = None
    loss.backward()
    return x.grad


@pytest.mark.parametrize(("reduction", "calibration_reduction"), [("mean", "per_query"), ("none", "violating_pairs")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile(reduction, calibration_reduction, backend):
    """fullgraph, other batch sizes after the first, with and without references; the same bits."""
    torch._dynamo.reset()  # its limit of recompilations is for all cases of this test
    options = {"reduction": reduction, "calibration_reduction": calibration_reduction}
    compiled = torch.compile(lambda *inputs: roadmap_loss(*inputs, **options), fullgraph=True, backend=backend)
    for n, dtype in ((40, torch.float32), (33, torch.float32), (33, torch.float64)):
        x, labels = batch(n, dtype=dtype)
        references, ref_labels = batch(50, dtype=dtype)
        loss = compiled(x, labels, references, ref_labels)
        expected = roadmap_loss(x, labels, references, ref_labels, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradients(loss, x, references), gradients(expected, x, references))
        loss, expected = compiled(x, labels), roadmap_loss(x, labels, **options)
        torch.testing.assert_close(gradients(loss, x), gradients(expected, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, labels), roadmap_loss(x, labels, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.host
def test_compile_of_a_module_in_a_model(backend):
    linear, loss = torch.nn.Linear(8, 8), RoadmapLoss()
    x, labels = batch()
    step = torch.compile(lambda x: loss(linear(x), labels), fullgraph=True, backend=backend)
    step(x.detach()).backward()
    compiled = linear.weight.grad.clone()
    linear.weight.grad = None
    loss(linear(x.detach()), labels).backward()
    torch.testing.assert_close(linear.weight.grad, compiled)


@pytest.mark.host
def test_opcheck():
    x, labels = batch(10)
    x = x.detach()
    of_labels = pairs.from_labels(labels, labels, labels, labels + 1, True, False)
    flat, objective = of_labels.flat(), settings.Objective()
    weight = embedding_loss._weights(ops.count_pairs(of_labels, 10, 10), None, objective)
    of = torch.ops.roadmap_ext
    scale = torch.ones(10)
    cases = [
        (of.equal_lists, (labels, labels)),
        (of.count_pairs, (flat, 0, 10, 10)),
        (
            of.objective_rows_,
            (x @ x.T, torch.zeros(10, 5).double(), flat, 0, weight, objective.flat(), scale, scale, True),
        ),
        (of.symmetrise_, (x @ x.T,)),
        (of.remove_radial_, (x.clone(), x, scale)),
        (of.prefault_, (x.clone(),)),
        (of.sweep, (x, None, flat, 0, weight, objective.flat(), True, 4, True, False)),
        (of.sweep, (x, x[:5].clone(), flat, -1, weight, objective.flat(), True, 0, False, True)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_defaults_agree():
    """help() shows those of settings.py at each function and module."""
    defaults = inspect.signature(roadmap_loss).parameters
    scores = (
        roadmap_ext.ap_loss,
        roadmap_ext.smooth_rank,
        roadmap_ext.APLoss,
        reference.ap_loss,
        reference.smooth_rank,
    )
    for other in (*MODULES, *scores, roadmap_loss, reference.roadmap_loss):
        own = inspect.signature(other).parameters
        shown = {name: own[name].default for name in own if name in settings.DEFAULTS}
        assert shown == {name: settings.DEFAULTS[name] for name in shown}, other
        assert len(shown) >= 6, other
    assert set(inspect.signature(RoadmapLoss).parameters) == set(defaults) - {
        "embeddings", "labels", "ref_emb", "ref_labels", "ids", "ref_ids", "positives", "relevance",
        *settings.Ranking._fields,
    }  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_modules(module):
    x, labels = batch()
    loss = module(include_self=True, chunk_size=11)
    expected = {
        RoadmapLoss: {},
        SupAPLoss: {"calibration_weight": 0},
        SmoothAPLoss: {"calibration_weight": 0, "surrogate": "smooth"},
        CalibrationLoss: {"calibration_weight": 1},
    }[module]
    assert torch.equal(loss(x, labels), roadmap_loss(x, labels, include_self=True, chunk_size=11, **expected))
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(x, labels), loss(x, labels))
        assert repr(twin) == repr(loss)
    assert "include_self=True" in repr(loss)
    assert eval(repr(loss)).settings == loss.settings  # what is fixed is not in it
    with pytest.raises(TypeError):
        loss.settings["tau"] = 1.0  # would change nothing
    assert loss.state_dict() == {}
    loss.chunk_size = 5
    assert loss.settings["chunk_size"] == 5
    assert torch.equal(loss(x, labels), roadmap_loss(x, labels, include_self=True, chunk_size=5, **expected))
    references, ref_labels = batch(20)
    ids = torch.arange(20)
    with_ids = loss(x[:20], labels[:20], None, references, ref_labels, ids=ids, ref_ids=ids)
    as_they_are = loss.settings
    assert torch.equal(
        with_ids, roadmap_loss(x[:20], labels[:20], references, ref_labels, ids=ids, ref_ids=ids, **as_they_are)
    )
    with pytest.raises(ValueError, match=r"integrations\.pytorch_metric_learning"):
        loss(x, labels, (ids, ids, ids))
    with pytest.raises(ValueError, match="chunk_size"):
        module(chunk_size=0)
    with pytest.raises(TypeError):
        module(0.5)


def test_the_reference_method():
    x, labels = batch()
    for options in ({}, {"reduction": "none"}, {"calibration_reduction": "violating_pairs"}):
        by_method = roadmap_loss(x, labels, method="reference", **options)
        assert torch.equal(by_method, reference.roadmap_loss(x, labels, **options))


def test_the_same_bits_again():
    x, labels = batch(300, 32)
    first = gradients(roadmap_loss(x, labels), x)[0]
    for _ in range(3):
        assert torch.equal(gradients(roadmap_loss(x, labels), x)[0], first)


@pytest.mark.long
def test_the_row_op_is_bitwise_for_any_threads():
    scores = torch.randn(64, 9000) / 4
    labels = torch.randint(30, (9000,))
    of_labels = pairs.from_labels(labels[:64], labels, None, None, False, False)._replace(first_own=5)
    weight, results = torch.rand(64, 3).double(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (64, 3):  # a thread a row, and rows that are shared
            own, values = scores[:rows].clone(), torch.zeros(rows, 5).double()
            torch.ops.roadmap_ext.objective_rows_(
                own, values, of_labels.rows(slice(0, rows)).flat(), 5, weight[:rows], settings.Objective().flat(),
                torch.rand(rows, generator=torch.Generator().manual_seed(1)),
                torch.rand(9000, generator=torch.Generator().manual_seed(2)),
                True,
            )  # fmt: skip
            results.append((own[:3], values[:3]))
    for own, values in results[2::2]:
        assert torch.equal(own, results[0][0])
        assert torch.equal(values, results[0][1])


# --- errors ----------------------------------------------------------------------------------------------------------


class TestBadInput:
    """Raised before any kernel runs, by the function, the modules and the reference alike."""

    @staticmethod
    def raises(kind, match, *arguments, **options):
        for function in (roadmap_loss, reference.roadmap_loss):
            with pytest.raises(kind, match=match):
                function(*arguments, **options)

    def test_embeddings(self):
        x, labels = batch()
        self.raises(ValueError, r"embeddings must be 2-D.*\(40, 8, 1\).*flatten", x[:, :, None], labels)
        self.raises(ValueError, r"embeddings must be 2-D.*embeddings\[None\]", x[0], labels)
        self.raises(TypeError, "embeddings must be a torch.Tensor, got list", [[1.0]], labels)
        self.raises(TypeError, "embeddings must be float16.*got torch.int64", x.long(), labels)
        self.raises(TypeError, "dense", x.detach().to_sparse(), labels)

    def test_labels(self):
        x, labels = batch()
        self.raises(ValueError, r"labels must be 1-D.*40, got shape \(39,\)", x, labels[1:])
        self.raises(ValueError, r"labels must be 1-D", x, labels[:, None])
        self.raises(ValueError, "labels must be on the device of embeddings, cpu, got meta", x, labels.to("meta"))
        self.raises(TypeError, "labels must have an integer dtype, got torch.complex64", x, labels.to(torch.complex64))
        for dtype in (torch.float32, torch.float16, torch.bool):
            self.raises(TypeError, r"labels must have an integer dtype, got .*labels.long\(\)", x, labels.to(dtype))
        self.raises(TypeError, "labels must be a torch.Tensor of integers", x, labels.tolist())

    def test_references(self):
        x, labels = batch()
        self.raises(ValueError, "ref_emb was given without ref_labels", x, labels, x)
        self.raises(ValueError, "ref_labels was given without ref_emb", x, labels, None, labels)
        self.raises(ValueError, "dimension of embeddings, 8, got 7", x, labels, x[:, 1:], labels)
        self.raises(ValueError, "ref_labels must be 1-D.*row of ref_emb, 30", x, labels, x[:30], labels)
        self.raises(ValueError, "ref_emb must be 2-D", x, labels, x[0], labels)
        self.raises(TypeError, "ref_labels must have an integer dtype", x, labels, x, labels.float())
        self.raises(ValueError, "ref_emb must be on the device", x, labels, x.to("meta"), labels.to("meta"))

    def test_ids(self):
        x, labels = batch()
        self.raises(ValueError, "ids was given without ref_ids", x, labels, ids=labels)
        self.raises(ValueError, "ref_ids was given without ids", x, labels, ref_ids=labels)
        self.raises(ValueError, "ids must be 1-D", x, labels, ids=labels[1:], ref_ids=labels)
        self.raises(
            ValueError, "ref_ids must be 1-D.*ref_emb, 30", x, labels, x[:30], labels[:30], ids=labels, ref_ids=labels
        )
        self.raises(TypeError, "ids must have an integer dtype", x, labels, ids=labels.float(), ref_ids=labels)

    @pytest.mark.parametrize(
        ("kind", "match", "options"),
        [
            (ValueError, "between 0 .* and 1 .*got 1.5", {"calibration_weight": 1.5}),
            (ValueError, "between 0 .* and 1 .*got -0.1", {"calibration_weight": -0.1}),
            (ValueError, "calibration_weight must be finite", {"calibration_weight": NAN}),
            (ValueError, "positive_margin must be finite", {"positive_margin": math.inf}),
            (TypeError, "negative_margin must be a number", {"negative_margin": "0.6"}),
            (ValueError, "calibration_reduction must be one of 'per_query'", {"calibration_reduction": "mean"}),
            (ValueError, "reduction must be one of", {"reduction": "average"}),
            (TypeError, "normalize must be True or False", {"normalize": 1}),
            (TypeError, "include_self must be True or False", {"include_self": None}),
            (ValueError, "tau must be positive", {"tau": 0.0}),
            (ValueError, "surrogate must be one of", {"surrogate": "soft"}),
        ],
    )
    def test_settings(self, kind, match, options):
        x, labels = batch()
        self.raises(kind, match, x, labels, **options)
        with pytest.raises(kind, match=match):
            RoadmapLoss(**options)

    def test_what_the_reference_does_not_take(self):
        x, labels = batch()
        for bad, kind in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)):
            with pytest.raises(kind, match="chunk_size"):
                roadmap_loss(x, labels, chunk_size=bad)
        for large in (2**63, numpy.int64(40)):
            assert torch.equal(roadmap_loss(x, labels, chunk_size=large), roadmap_loss(x, labels, chunk_size=40))
        with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
            roadmap_loss(x, labels, gather_across_devices=True)
        with pytest.raises(TypeError, match="gather_across_devices"):
            RoadmapLoss(gather_across_devices=1)
        with pytest.raises(ValueError, match="method must be one of"):
            roadmap_loss(x, labels, method="fast")

    @pytest.mark.host
    def test_ops_keep_memory_safe(self):
        """Whoever calls them: lists outside their columns, wrong shapes and dtypes."""
        of = torch.ops.roadmap_ext
        span, column = torch.tensor([[0, 2], [1, 3]]), torch.tensor([0, 1, 2])
        none = (None, None, None, None)
        for bad in ([[0, 4], [0, 0]], [[-1, 1], [0, 0]], [[2, 1], [0, 0]]):
            with pytest.raises(RuntimeError, match="within"):
                of.count_pairs([torch.tensor(bad), column, *none], -1, 2, 3)
        for columns in ([5, -7, 2**62], [2, 1, 0], [0, 0, 0]):  # nonsense, but not outside
            of.count_pairs([span, torch.tensor(columns), *none], -1, 2, 3)
        # Spans that the values would overwrite while they are read.
        values = torch.zeros(4, 5, dtype=torch.float64)
        alias = values.view(torch.int64).view(-1)[:8].view(4, 2)
        alias.copy_(torch.tensor([[0, 3]] * 4))
        weight, scores = torch.ones(4, 3).double(), torch.randn(4, 10000)
        objective = settings.Objective().flat()
        of.objective_rows_(scores, values, [alias, column, *none], 0, weight, objective, None, None, True)
        with pytest.raises(RuntimeError, match="rows, 2"):
            of.count_pairs([span, column, *none], -1, 3, 3)
        with pytest.raises(RuntimeError, match="square"):
            of.symmetrise_(torch.zeros(2, 3))
        with pytest.raises(RuntimeError, match="shape and dtype"):
            of.remove_radial_(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))
        with pytest.raises(RuntimeError, match="contiguous CPU tensor"):
            of.remove_radial_(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
        for wrong in (objective[:15], [], [*objective[:9], NAN, *objective[10:]]):
            with pytest.raises(RuntimeError, match=r"16 numbers|settings must"):
                of.objective_rows_(scores, values, [alias, column, *none], 0, weight, wrong, None, None, True)
        for scores, values, weight in (
            (torch.zeros(2, 3).half(), torch.zeros(2, 5).double(), torch.zeros(2, 3).double()),
            (torch.zeros(3, 2).T, torch.zeros(2, 5).double(), torch.zeros(2, 3).double()),
            (torch.zeros(2, 3), torch.zeros(2, 4).double(), torch.zeros(2, 3).double()),
            (torch.zeros(2, 3), torch.zeros(2, 5).double(), torch.zeros(2, 3)),
        ):
            with pytest.raises(RuntimeError, match="must be a contiguous"):
                of.objective_rows_(scores, values, [span, column, *none], -1, weight, objective, None, None, True)
