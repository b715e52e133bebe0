"""The kernels on a GPU: accuracy, autograd, graphs, streams, devices, sizes and errors. Skipped where there is none.

Inputs are drawn on the CPU, and the float64 reference runs there; only ours runs on DEVICE. Everything that this file
imports needs torch, numpy and pytest alone, so that `make gpu-check` runs it on a machine that can install nothing.
"""

import contextlib
import math

import oracle
import pytest
import test_ap_loss
import test_roadmap_loss
import test_smooth_rank
import torch
from oracle import PUBLISHED, ULPS, assert_accurate, grid_scores

# The CPU's own tests, once more, with ours carried to the GPU: pytest collects what this module imports.
from test_ap_loss import (
    TestConventions,
    test_float64_far_from_zero,
    test_grad_out_of_any_stride_and_twice,
    test_half_gradients_wait_for_the_scaler,
    test_infinities_are_limits_and_equal_ones_ties,
    test_infinity_in_a_long_row_shared_by_threads,
    test_just_above_the_knee,
    test_no_gradient_stays_none_whatever_arrives,
    test_second_derivatives_of_the_weighting_raise,
    test_second_derivatives_raise,
)
from test_roadmap_loss import (
    test_a_memory_that_holds_the_batch,
    test_a_nan_stays_with_its_query,
    test_an_incoming_gradient_scales,
    test_backward_again,
    test_chunks_change_nothing,
    test_dtypes_may_differ,
    test_empty,
    test_gradients_only_where_wanted,
    test_ids_beside_the_index,
    test_infinite_similarities,
    test_labels_are_names_not_numbers,
    test_labels_of_any_integer_dtype,
    test_no_dimension,
    test_norms_far_from_1,
    test_reductions_agree,
    test_single_members_and_one_class,
    test_the_objective_is_the_papers,
    test_zero_vectors,
)
from test_roadmap_loss import test_gradcheck as test_gradcheck_of_roadmap_loss
from test_roadmap_loss import test_second_derivatives_raise as test_second_derivatives_of_roadmap_loss
from test_smooth_rank import (
    test_ap_loss_is_made_of_it,
    test_far_above_a_distant_knee,
    test_no_positives,
    test_order_is_row_major,
    test_ranks_and_gradients,
    test_sup_positive_rank_carries_no_gradient,
)
from test_smooth_rank import test_gradcheck as test_gradcheck_of_smooth_rank
from test_smooth_rank import test_nan_stays_in_its_row as test_nan_of_smooth_rank
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._pytree import tree_map

import roadmap_ext
from roadmap_ext import (
    EmbeddingMemory,
    RoadmapLoss,
    ap_loss,
    cached_backward,
    embedding_loss,
    metrics,
    ops,
    pairs,
    reference,
    roadmap_loss,
    settings,
    smooth_rank,
)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MIB = 1 << 20
INF, NAN = math.inf, math.nan
SURROGATE, OBJECTIVE = settings.Surrogate().flat(), settings.Objective().flat()  # as the ops take them


def on_device(value):
    """The tensors in any structure, on DEVICE; those without memory stay as they are."""
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x, value)


def carried(function):
    """The function on DEVICE, for callers on the CPU: autograd carries gradients back through the copies."""

    def run(*arguments, **options):
        result = function(*on_device(arguments), **on_device(options))
        tensors = [result] if isinstance(result, Tensor) else list(result)
        assert all(tensor.device == DEVICE for tensor in tensors)
        return tree_map(lambda x: x.cpu(), result)

    return run


@pytest.fixture(autouse=True)
def _ours_on_the_gpu(monkeypatch):
    """The oracle and the tests of the CPU call ours on DEVICE."""
    for module in (oracle.roadmap_ext, test_ap_loss, test_roadmap_loss, test_smooth_rank):
        for function in (ap_loss, roadmap_loss, smooth_rank):
            if hasattr(module, function.__name__):
                monkeypatch.setattr(module, function.__name__, carried(function))
    yield
    synchronize()  # a kernel's error belongs to the test that launched it


def synchronize():
    torch.cuda.synchronize(DEVICE)


def case(rows=5, columns=200, dtype=torch.float32, density=0.1):
    """Scores, target and ignore on DEVICE."""
    scores, target = grid_scores(rows, columns, dtype), torch.rand(rows, columns) < density
    return on_device((scores, target, torch.rand(rows, columns) < 0.1))


def loss_and_gradient(function, leaf, *arguments, **options):
    """Of a function whose first input takes the gradient; loss [B] or a scalar."""
    leaf = leaf.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_same_bits(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


# --- accuracy of ap_loss: the oracle's rule --------------------------------------------------------------------------


def test_compensated_exponents():
    """Within reach of its positives (further away it is left out), one negative's share is as good as float32."""
    positives = 0.3 + 0.19 * torch.rand(300, 64)
    scores = torch.cat([positives, positives.amin(1, keepdim=True) - 0.01 * torch.rand(300, 1)], 1)
    target = torch.ones(300, 65, dtype=torch.bool)
    target[:, 64] = False
    ours = smooth_rank(*on_device((scores, target)), surrogate="smooth").negative_rank.double().cpu()
    truth = reference.smooth_rank(scores.double(), target, surrogate="smooth").negative_rank
    assert ((ours - truth) / truth).abs().max() < 8e-7  # that of plain float32: 2e-6


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_settings(name, dtype):
    scores, target = grid_scores(6, 300, dtype), torch.rand(6, 300) < 0.1
    assert_accurate(scores, target, ignore=torch.rand(6, 300) < 0.1, **PUBLISHED[name])


@pytest.mark.parametrize("columns", [1, 31, 33, 129, 4096 + 32])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(columns, surrogate, dtype):
    """Ragged: a row without positives, one of nothing else, one with a single one."""
    scores, target = grid_scores(5, columns, dtype), torch.rand(5, columns) < 0.1
    target[0] = False
    target[1] = torch.rand(columns) < 300 / columns  # the reference takes |P| x N
    target[2] = torch.arange(columns) == columns // 2
    assert_accurate(scores, target, surrogate=surrogate)
    assert_accurate(scores, target, surrogate=surrogate, ignore=torch.rand(5, columns) < 0.3)


def assert_accurate_together(scores, target, **options):
    """The rule for the norm over all rows: of hundreds, plain PyTorch is exact in some, by luck."""
    weight = torch.ones(len(scores))
    truth = oracle.run(reference.ap_loss, scores.double(), target, weight, **options)
    plain, ours = (oracle.run(f, scores, target, weight, **options) for f in (reference.ap_loss, carried(ap_loss)))
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=1e-6)
    largest = oracle.largest_weight(scores, target, weight, **options)
    allowed = oracle.allowed_gradient_error(plain.gradient, truth.gradient, largest, 0.01).norm()
    error = oracle.row_error(ours.gradient, truth.gradient).norm()
    assert error <= allowed, f"{error / allowed:.3g} of what is allowed"


@pytest.mark.parametrize(
    ("rows", "columns", "positives", "dtype"),
    [
        (2, 1_000_000, 8, torch.float32),  # few long rows, which blocks share
        (2, 1_000_000, 8, torch.bfloat16),
        (1, 200_001, 60, torch.float16),
        (2, 150_000, 8, torch.float64),
        (100, 9_000, 12, torch.float32),
        (600, 3_000, 5, torch.float32),
        (4096, 2048, 4, torch.float32),  # many short ones
        (4096, 2048, 4, torch.float16),
        (1, 20_000, 5_000, torch.float32),  # more positives than a block can hold
        (2, 9_000, 1_500, torch.bfloat16),
        (1, 3_000, 2_900, torch.float32),  # few negatives
    ],
    ids=str,
)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_shapes(rows, columns, positives, dtype, surrogate):
    target = torch.rand(rows, columns) < positives / columns
    check = assert_accurate if rows < 100 else assert_accurate_together
    check(grid_scores(rows, columns, dtype, scale=20.0), target, surrogate=surrogate)


@pytest.mark.parametrize("noise", [1.0, 2.0])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_clustered(noise, surrogate):
    """The scores that training has, on a grid of which no multiple is the knee."""
    labels = torch.arange(2000) % 50
    x = normalize(torch.randn(50, 64)[labels] + noise * torch.randn(2000, 64))
    scores, target = (x[:40] @ x.T).mul(4096).round() / 4096, labels[:40, None] == labels[None]
    assert_accurate_together(scores, target, surrogate=surrogate, ignore=torch.eye(40, 2000, dtype=torch.bool))


def test_cluster_of_thousands():
    """Sums of thousands of nearly equal shares: what drifts in float32 shows here."""
    scores = 0.5 + torch.randint(0, 8, (2, 20_000)) / 2**16
    target = torch.rand(2, 20_000) < 0.02
    assert_accurate(scores, target)
    assert_accurate(scores, target, surrogate="smooth")


def test_past_2_to_the_31_elements():
    """All but some columns lie so far below that they carry exactly nothing; those some are a matrix of their own."""
    rows, columns = 4, 2**29 + 64
    if torch.cuda.mem_get_info(DEVICE)[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free memory on the GPU")
    few = torch.cat([torch.randint(columns - 64, (3000,)).unique(), torch.arange(columns - 64, columns)]).to(DEVICE)
    part, marks = case(rows, len(few), torch.bfloat16, density=0.01)[:2]
    marks[:, -3:] = torch.tensor([True, False, True], device=DEVICE)
    scores = torch.full((rows, columns), -8.0, dtype=torch.bfloat16, device=DEVICE)
    target = torch.zeros(rows, columns, dtype=torch.bool, device=DEVICE)
    scores[:, few], target[:, few] = part, marks
    assert scores.numel() > 2**31
    loss, gradient = loss_and_gradient(ap_loss, scores, target, reduction="none")
    ours = oracle.Result(loss.cpu(), gradient[:, few].cpu())
    assert gradient.count_nonzero() == ours.gradient.count_nonzero()
    del scores, target, gradient
    part, marks, weight = part.cpu(), marks.cpu(), torch.ones(rows)
    truth, plain = (oracle.run(reference.ap_loss, s, marks, weight) for s in (part.double(), part))
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-6, atol=1e-6)
    largest = oracle.largest_weight(part, marks, weight)
    allowed = oracle.allowed_gradient_error(plain.gradient, truth.gradient, largest, 0.01)
    assert (oracle.row_error(ours.gradient, truth.gradient) <= allowed).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_gradcheck_of_ap_loss(surrogate, reduction):
    scores, target, ignore = case(3, 12, torch.float64, density=0.4)
    options = {"surrogate": surrogate, "tau": 0.05, "rho": 5.0, "reduction": reduction, "ignore": ignore}
    leaf = torch.randn_like(scores).mul(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ap_loss(s, target, **options), leaf, eps=1e-7, atol=1e-5)


# --- accuracy of RoadmapLoss -----------------------------------------------------------------------------------------


def signs(labels, dtype):
    """[n, 64] vectors of +-1/8 times a power of two, whose cosines are exact in every dtype: both sides rank alike."""
    centres = torch.randn(16, 64).sign() / 8
    flipped = torch.where(torch.rand(len(labels), 64) < 0.12, -1.0, 1.0)
    return (centres[labels % 16] * flipped * 2.0 ** torch.randint(-2, 3, (len(labels), 1))).to(dtype)


def summed(objective, inputs, target, ignore, weight):
    """|G| |X| of each side: what is summed to make the rows of its gradient; and the largest gradient of a score."""
    norms = [x.norm(dim=1, keepdim=True) for x in inputs]
    units = [x / norm for x, norm in zip(inputs, norms, strict=True)]
    scores = (units[0] @ units[-1].T).requires_grad_()  # scores are embeddings whose products they are
    eye = torch.eye(scores.shape[1], dtype=torch.float64)
    objective = objective._replace(normalize=False)
    (reference.embedding_loss(scores, eye, target, ignore, objective) * weight).sum().backward()
    size = scores.grad.abs()
    shares = [size @ units[-1].abs(), size.T @ units[0].abs()]
    shares = shares if len(inputs) == 2 else [shares[0] + shares[1]]
    return [share / norm for share, norm in zip(shares, norms, strict=True)], size.max()


ROADMAP = {
    "itself": {},
    "chunks": {"chunk_size": 7},
    "smooth": {"surrogate": "smooth"},
    "references": {"references": 130},
    "references in chunks": {"references": 130, "chunk_size": 16},
    "ids": {"references": 130, "ids": True},
    "violating pairs": {"calibration_reduction": "violating_pairs", "negative_margin": 0.3},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "references": 130},
    "without calibration": {"calibration_weight": 0.0},
    "calibration alone": {"calibration_weight": 1.0, "negative_margin": 0.3},
    "released": {"offset": 1.44},
}


@pytest.mark.parametrize("name", ROADMAP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_roadmap_loss(name, dtype):
    """Errors are 2-norms of a whole gradient: twice that of plain float32 PyTorch, and ULPS eps of what was summed.

    Half types multiply as they are, so that the gradient of the scores is rounded on its way into the products.
    """
    options = dict(ROADMAP[name])
    references, chunk_size = options.pop("references", None), options.pop("chunk_size", None)
    labels = torch.randint(16, (60,))
    leaves, others = [signs(labels, dtype)], {}
    if references:
        leaves.append(signs(torch.randint(16, (references,)), dtype))
        others["ref_labels"] = torch.randint(16, (references,))
    if options.pop("ids", False):
        others |= {"ids": torch.randint(30, (60,)), "ref_ids": torch.randint(30, (references,))}
    weight = 2.0 ** (torch.arange(60) % 3 - 1) if options.get("reduction") == "none" else torch.tensor(1.0)

    def run(function, wide, **more):
        inputs = [x.detach().to(wide).requires_grad_() for x in leaves]
        extra = {"ref_emb": inputs[1]} if references else {}
        loss = function(inputs[0], labels, **extra, **others, **options, **more)
        return loss.detach(), torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), inputs)

    loss, gradients = run(carried(roadmap_loss), dtype, chunk_size=chunk_size)
    double = dtype == torch.float64
    compute = torch.float64 if double else torch.float32
    plain_loss, plain = run(reference.roadmap_loss, compute)
    true_loss, truth = run(reference.roadmap_loss, torch.float64)
    eps = torch.finfo(compute).eps
    assert loss.dtype == compute
    allowed = 2 * (plain_loss - true_loss).abs() + (16 if double else ULPS) * eps * true_loss.abs().clamp(1)
    assert ((loss - true_loss).abs() <= allowed).all()

    target = labels[:, None] == others.get("ref_labels", labels)[None]
    ignore = torch.zeros_like(target) if references else torch.eye(60, dtype=torch.bool)
    if "ids" in others:
        ignore = others["ids"][:, None] == others["ref_ids"][None]
    objective = settings.checked(options).objective
    sums, largest = summed(objective, [x.double() for x in leaves], target, ignore, weight.double())
    for ours, by_hand, true, total in zip(gradients, plain, truth, sums, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (by_hand - true).norm() + (64 if double else ULPS) * eps * (total.norm() + largest)
        if dtype in (torch.float16, torch.bfloat16):
            allowed += torch.finfo(dtype).eps * total.norm() + torch.finfo(dtype).smallest_normal
        assert (ours - true).norm() <= allowed, f"{(ours - true).norm() / allowed:.3g} of what is allowed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_survive_grad_scaler(dtype):
    """At B = 8,192 a mean's gradients lie below float16's range until the scaler's factor is in them."""
    labels = torch.arange(8192, device=DEVICE) % 2048
    x = on_device(torch.randn(2048, 32))[labels] + 2 * on_device(torch.randn(8192, 32))
    wide, half = (
        loss_and_gradient(lambda e: roadmap_loss(e, labels) * 65536.0, x.to(dtype).to(d))[1].float()
        for d in (torch.float32, dtype)
    )
    assert half.isfinite().all()
    assert (half - wide).norm() <= 4 * torch.finfo(dtype).eps * wide.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_off_inside(dtype):
    x, labels = on_device((torch.randn(40, 8), torch.randint(8, (40,))))
    expected = loss_and_gradient(roadmap_loss, x, labels)
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert_same_bits(loss_and_gradient(roadmap_loss, x, labels), expected)


# --- layout, memory, bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    """Transposed, sliced, from the middle, expanded: the same bits as a contiguous copy."""
    scores, target, ignore = case(12, 150, dtype)
    expected = loss_and_gradient(ap_loss, scores, target, ignore=ignore, reduction="none")
    views = (
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], 2).flatten(1)[:, ::2],
        lambda x: torch.cat([x, x], 1)[:, :150],
        lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],  # at no address that a vector could be loaded from
    )
    for view in views:
        s, t, i = view(scores), view(target), view(ignore)
        assert_same_bits(loss_and_gradient(ap_loss, s, t, ignore=i, reduction="none"), expected)
        assert_same_bits(smooth_rank(s, t, ignore=i), smooth_rank(scores, target, ignore=ignore))
    for narrow in (lambda x: x[:1].expand(12, 150), lambda x: x[:, :1].expand(12, 150)):
        s, t = narrow(scores), narrow(target)
        assert torch.equal(ap_loss(s, target), ap_loss(s.contiguous(), target))
        assert torch.equal(ap_loss(scores, t), ap_loss(scores, t.contiguous()))


def test_every_read_is_inside_the_tensor():
    """A view that ends where its storage ends, at sizes around a vector: what lies past it must not matter."""
    for columns in (1, 3, 15, 16, 17, 63, 64, 65, 130):
        room = torch.full((2 * columns + 64,), NAN, device=DEVICE)
        marks = torch.ones(2 * columns + 64, dtype=torch.bool, device=DEVICE)
        scores, target = room[: 2 * columns].view(2, columns), marks[: 2 * columns].view(2, columns)
        values, bits = case(2, columns, density=0.3)[:2]
        expected = loss_and_gradient(ap_loss, values, bits)
        assert_same_bits(loss_and_gradient(ap_loss, scores.copy_(values), target.copy_(bits)), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(2, 300_000, 1e-3), (700, 3_000, 0.01), (4, 9_000, 0.3), (33, 129, 0.2)]
)
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again(rows, columns, density, surrogate, dtype):
    """From run to run, and whatever the memory held that a call is given."""
    scores, target, ignore = case(rows, columns, dtype, density)
    options = {"ignore": ignore, "surrogate": surrogate}

    def results():
        return *loss_and_gradient(ap_loss, scores, target, reduction="none", **options), *smooth_rank(
            scores, target, **options
        )

    expected = results()
    for value in (NAN, 1e30, 0.0):
        spoilt = [torch.full((size,), value, device=DEVICE) for size in (1 << 6, 1 << 12, 1 << 18, 1 << 25)]
        del spoilt
        assert_same_bits(results(), expected)


def test_the_same_bits_of_roadmap_loss():
    x, y = on_device((torch.randn(300, 64), torch.randn(900, 64)))
    labels, ref_labels = on_device((torch.randint(50, (300,)), torch.randint(50, (900,))))
    for dtype in DTYPES:
        for arguments in ((), (y.to(dtype), ref_labels)):
            expected = loss_and_gradient(roadmap_loss, x.to(dtype), labels, *arguments)
            assert_same_bits(loss_and_gradient(roadmap_loss, x.to(dtype), labels, *arguments), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(4, 1_000_000, 4e-6), (4096, 8192, 5e-4), (64, 65_536, 0.1), (1, 2_000_000, 1e-3)]
)
def test_memory(rows, columns, density):
    """Forward takes the gradient that it keeps and a bounded workspace, backward the gradient that it gives."""
    leaf = torch.randn(rows, columns, device=DEVICE, requires_grad=True)
    target = torch.rand(rows, columns, device=DEVICE) < density
    (ap_loss(leaf[:, :9], target[:, :9]) * 2).backward()  # what torch itself allocates once
    leaf.grad = None
    workspace, slack = max(64 * MIB, 32 * columns), 4 * MIB  # of the allocator, which rounds up
    synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    loss = ap_loss(leaf, target)
    assert torch.cuda.max_memory_allocated(DEVICE) - before <= leaf.nbytes + workspace + slack
    assert torch.cuda.memory_allocated(DEVICE) - before <= leaf.nbytes + slack  # what waits for backward
    loss.backward()
    assert torch.cuda.max_memory_allocated(DEVICE) - before <= 2 * leaf.nbytes + workspace + slack


# --- graphs, streams, devices ----------------------------------------------------------------------------------------


def captured(step):
    """A function that replays one call of ``step`` from a CUDA graph, and returns what it returned."""
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay():
        graph.replay()
        return [result.clone() for result in results]

    return replay


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(64, 500, torch.float32), (2, 200_000, torch.float32), (600, 2_000, torch.bfloat16), (3, 129, torch.float64)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_graph_of_ap_loss(rows, columns, dtype, reduction):
    """A replay takes new scores, and another number of positives."""
    scores, target, ignore = case(rows, columns, dtype, 0.02)

    def step():
        return loss_and_gradient(ap_loss, scores, target, ignore=ignore, reduction=reduction)

    replay = captured(step)
    for density in (0.05, 0.0, 3 / columns):
        for fixed, new in zip((scores, target, ignore), case(rows, columns, dtype, density), strict=True):
            fixed.copy_(new)
        assert_same_bits(replay(), step())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 50},
        {"reduction": "none"},
        {"calibration_reduction": "violating_pairs"},
        {"ref": True},
        {"ref": True, "chunk_size": 50},
    ],
    ids=str,
)
def test_graph_of_roadmap_loss(dtype, options):
    options = dict(options)
    others = options.pop("ref", False)
    loss_function = RoadmapLoss(**options)
    sizes = (120, 300) if others else (120,)

    def batch():
        return [(torch.randn(n, 32).to(DEVICE, dtype), torch.randint(20, (n,), device=DEVICE)) for n in sizes]

    fixed = batch()

    def step():
        leaves = [x.detach().requires_grad_() for x, _ in fixed]
        labels = [y for _, y in fixed]
        extra = {"ref_emb": leaves[1], "ref_labels": labels[1]} if others else {}
        loss = loss_function(leaves[0], labels[0], **extra)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    replay = captured(step)
    for _ in range(2):
        for (x, labels), (new_x, new_labels) in zip(fixed, batch(), strict=True):
            x.copy_(new_x), labels.copy_(new_labels)
        assert_same_bits(replay(), step())


def test_side_stream():
    """Everything waits its turn on the stream of the caller: the scores are there only late."""
    scores, target, _ = case(40, 3000)
    x, labels = on_device((torch.randn(200, 32), torch.randint(20, (200,))))
    expected = [*loss_and_gradient(ap_loss, scores, target), *loss_and_gradient(roadmap_loss, x, labels)]
    expected += smooth_rank(scores, target)
    late_scores, late_x = torch.full_like(scores, NAN), torch.full_like(x, NAN)
    late_target, late_labels = torch.zeros_like(target), torch.zeros_like(labels)
    synchronize()
    side = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for late, real in ((late_scores, scores), (late_x, x), (late_target, target), (late_labels, labels)):
            late.copy_(real)
        results = [
            *loss_and_gradient(ap_loss, late_scores, late_target),
            *loss_and_gradient(roadmap_loss, late_x, late_labels),
        ]
        results += smooth_rank(late_scores, late_target)
    side.synchronize()
    assert_same_bits(results, expected)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    scores, target, _ = case(40, 3000)
    x, labels = on_device((torch.randn(200, 32), torch.randint(20, (200,))))
    expected = [*loss_and_gradient(ap_loss, scores, target), *loss_and_gradient(roadmap_loss, x, labels)]
    expected += smooth_rank(scores, target)
    with torch.cuda.device(0):
        scores, target, x, labels = (t.to("cuda:1") for t in (scores, target, x, labels))
        results = [*loss_and_gradient(ap_loss, scores, target), *loss_and_gradient(roadmap_loss, x, labels)]
        results += smooth_rank(scores, target)
        assert torch.cuda.current_device() == 0
    assert all(result.device == scores.device for result in results)
    torch.cuda.synchronize("cuda:1")
    assert_same_bits([result.to(DEVICE) for result in results], expected)


# --- torch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    scores, target, ignore = case(3, 40, dtype)
    of, check = torch.ops.roadmap_ext, torch.library.opcheck
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mask in (ignore, None):
        for reduction in (0, 1, 2):
            for want in (True, False):
                check(of.rank_loss.default, (scores, target, None, mask, OBJECTIVE, reduction, want))
        for want in (True, False):
            check(of.smooth_rank.default, (scores, target, mask, SURROGATE, want))
    for weight in (torch.rand(3, dtype=wide, device=DEVICE), torch.rand((), dtype=wide, device=DEVICE)):
        check(of.scale_rows.default, (scores, weight, torch.rand(3, dtype=wide, device=DEVICE)))
        check(of.scale_rows_.default, (scores.clone(), weight, torch.rand(3, dtype=wide, device=DEVICE)))
    slope = of.smooth_rank(scores, target, ignore, SURROGATE, True)[-1]
    for positive in (None, torch.rand_like(slope)):
        arguments = (scores, target, ignore, slope, positive, torch.rand_like(slope), SURROGATE)
        check(of.smooth_rank_backward.default, arguments)


def test_opcheck_of_the_sweep():
    x, labels = on_device((torch.randn(10, 8), torch.randint(4, (10,))))
    of_labels = pairs.from_labels(labels, labels, labels, labels + 1, True, False)
    flat, objective = of_labels.flat(), settings.Objective()
    after = (embedding_loss._weights(ops.count_pairs(of_labels, 10, 10), None, objective), objective.flat(), True)
    for arguments in (
        (x, None, flat, 0, *after, 4, True, False),
        (x, x[:5].clone(), flat, -1, *after, 0, False, True),
    ):
        torch.library.opcheck(torch.ops.roadmap_ext.sweep, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile():
    """fullgraph, other sizes after the first, and what eager computes."""
    torch._dynamo.reset()

    def step(scores, x, labels):
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return ap_loss(scores, labels[:, None] == labels[None], ignore=itself) + roadmap_loss(x, labels)

    compiled = torch.compile(step, fullgraph=True)
    for n in (24, 40, 33):
        leaves = [t.requires_grad_() for t in on_device((torch.randn(n, n), torch.randn(n, 16)))]
        labels = torch.arange(n, device=DEVICE) % 6
        losses = [function(*leaves, labels) for function in (compiled, step)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


# --- bad input: what the CPU says ------------------------------------------------------------------------------------


def parametrized(function, names):
    """The cases of another test."""
    marks = function.pytestmark
    return next(mark.args[1] for mark in marks if mark.name == "parametrize" and mark.args[0] == names)


@pytest.mark.parametrize(
    ("scores", "target", "ignore", "error", "words"),
    parametrized(test_ap_loss.TestBadInput.test_tensors, ("scores", "target", "ignore", "error", "words")),
)
def test_bad_tensors(scores, target, ignore, error, words):
    scores, target, ignore = on_device((scores, target, ignore))
    for function in (ap_loss, smooth_rank, roadmap_ext.metrics.average_precision):
        with pytest.raises(error, match=words.replace("cpu", DEVICE.type)):
            function(scores, target, **({"ignore": ignore} if ignore is not None else {}))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    parametrized(test_ap_loss.TestBadInput.test_settings, ("options", "error", "words")),
)
def test_bad_settings(options, error, words):
    scores, target, _ = case()
    with pytest.raises(error, match=words):
        ap_loss(scores, target, **options)


def test_out_of_memory_is_torchs_own_error():
    n = 1 << 21  # squared, in float32, 16 TiB
    scores = torch.zeros(1, n, device=DEVICE).expand(n, n).requires_grad_()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        ap_loss(scores, torch.zeros(1, n, dtype=torch.bool, device=DEVICE).expand(n, n))


def test_mixed_devices():
    scores, target, ignore = case()
    x, labels = on_device((torch.randn(40, 8), torch.randint(8, (40,))))
    for function in (ap_loss, smooth_rank):
        with pytest.raises(
            ValueError, match=r"target must be on the device of scores, cuda:0, got cpu: use target\.to"
        ):
            function(scores, target.cpu())
        with pytest.raises(ValueError, match="target must be on the device of scores, cpu, got cuda:0"):
            function(scores.cpu(), target)
        with pytest.raises(ValueError, match="ignore must be on the device of scores, cuda:0, got cpu"):
            function(scores, target, ignore=ignore.cpu())
    for arguments, options, words in (
        ((x, labels.cpu()), {}, "labels must be on the device of embeddings, cuda:0, got cpu"),
        ((x, labels, x.cpu(), labels), {}, "ref_emb must be on the device of embeddings, cuda:0, got cpu"),
        ((x, labels, x.clone(), labels.cpu()), {}, "ref_labels must be on the device of ref_emb, cuda:0, got cpu"),
        ((x, labels), {"ids": labels.cpu(), "ref_ids": labels}, "ids must be on the device of embeddings, cuda:0"),
    ):
        with pytest.raises(ValueError, match=words):
            roadmap_loss(*arguments, **options)


def test_the_ops_check_for_themselves():
    """Whoever calls an op directly meets an error, not a bad read, and the GPU is well afterwards."""
    ops = torch.ops.roadmap_ext
    scores, target, _ = case()
    for bad_scores, bad_target, arguments in (
        (scores[0], target[0], SURROGATE),
        (scores, target[:, :3], SURROGATE),
        (scores, target.float(), SURROGATE),
        (scores, target.cpu(), SURROGATE),
        (scores.int(), target, SURROGATE),
        (scores, target, [2.0, *SURROGATE[1:]]),
        (scores, target, [0.0, 0.0, *SURROGATE[2:]]),
        (scores, target, [*SURROGATE[:5], NAN]),
        (scores, target, SURROGATE[:5]),
    ):
        with pytest.raises(RuntimeError):
            ops.rank_loss(bad_scores, bad_target, None, None, arguments + OBJECTIVE[6:], 1, True)
        with pytest.raises(RuntimeError):
            ops.smooth_rank(bad_scores, bad_target, None, arguments, True)
    with pytest.raises(RuntimeError):
        ops.rank_loss(scores, target, None, None, OBJECTIVE, 3, True)
    for weight in (torch.ones(2, device=DEVICE), torch.ones(5)):
        with pytest.raises(RuntimeError):
            ops.scale_rows(scores, weight, torch.ones(1, device=DEVICE))
    synchronize()
    assert ap_loss(scores, target).isfinite()


def test_lists_with_nonsense_are_read_inside():
    """Spans and columns cannot be looked at without waiting for the GPU; no kernel follows them out of their memory."""
    span = torch.tensor([[0, 4], [-1, 1], [2, 1], [0, 2**62]], device=DEVICE)
    column = torch.tensor([5, -7, 2**62], device=DEVICE)
    with contextlib.suppress(RuntimeError):  # or an op may refuse them, as on the CPU
        torch.ops.roadmap_ext.count_pairs([span, column, None, None, None, None], -1, 4, 3)
    synchronize()
    assert RoadmapLoss()(on_device(torch.randn(9, 4)), torch.arange(9, device=DEVICE) % 3).isfinite()


def test_cached_backward_draws_alike_in_both_passes_and_ranks_a_memory():
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.4), torch.nn.Linear(16, 5)).to(DEVICE)
    x, labels, ids = on_device((torch.randn(13, 6), torch.arange(13) % 4, torch.arange(13)))
    found = []
    for cached in (False, True):
        memory = EmbeddingMemory(40, 5, device=DEVICE)

        def ranked(embeddings, labels, memory=memory):
            memory.enqueue(embeddings, labels, ids)
            return RoadmapLoss()(embeddings, labels, ref_emb=memory, ids=ids)

        model.zero_grad()
        for seed in (3, 4):
            torch.manual_seed(seed)
            if cached:
                cached_backward(model, x, labels, ranked, mini_batch_size=5)
            else:
                ranked(torch.cat([model(part) for part in x.split(5)]), labels).backward()
        found.append(
            (torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), torch.rand(3, device=DEVICE))
        )
        assert memory.embeddings.device == DEVICE
        assert len(memory) == 26
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_build_info_names_the_gpus():
    info = roadmap_ext.build_info()
    assert info["cuda"]
    assert info["cuda_archs"]


def test_retrieval_metrics():
    """By sorting, in plain PyTorch, as on every device without a kernel of its own for them."""
    labels = torch.arange(500) % 15
    x = torch.randn(15, 8, dtype=torch.float64)[labels] + torch.randn(500, 8, dtype=torch.float64)
    on_gpu = metrics.retrieval_metrics(x.to(DEVICE), labels.to(DEVICE))
    assert on_gpu == pytest.approx(metrics.retrieval_metrics(x, labels), rel=1e-9)
