"""Exact metrics against loops, scikit-learn and pytorch-metric-learning; the kernel's path and the plain one."""

import bisect
import math
import sys
import time

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.measure import in_fresh_process, peak_growth
from roadmap_ext import metrics, ops, ranking
from roadmap_ext.metrics import average_precision, retrieval_metrics
from roadmap_ext.pairs import Lists, Pairs, from_labels, from_pairs
from roadmap_ext.validation import as_tensor

MIB = 1 << 20
NAN = float("nan")

# --- average_precision -----------------------------------------------------------------------------------------------


def by_hand(row, target, ignore):
    kept = ~ignore
    values = []
    for i in torch.where(target & kept)[0]:
        above = (row >= row[i]) & kept
        values.append((above & target).sum().double() / above.sum())
    return torch.stack(values).mean() if values else torch.tensor(float("nan"), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (4, 300), (3, 0), (0, 3)])
def test_against_a_loop(dtype, shape):
    scores = (torch.randint(-10, 10, shape) / 16).to(dtype)
    target, ignore = torch.rand(shape) < 0.3, torch.rand(shape) < 0.2
    expected = torch.tensor([by_hand(s, t, i) for s, t, i in zip(scores, target, ignore, strict=True)])
    result = average_precision(scores, target, ignore)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected.double(), equal_nan=True, rtol=1e-6, atol=1e-7)


def test_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, target = torch.randn(20, 500, dtype=torch.float64), torch.rand(20, 500) < 0.1
    expected = [sklearn.average_precision_score(t.numpy(), s.numpy()) for s, t in zip(scores, target, strict=True)]
    torch.testing.assert_close(average_precision(scores, target), torch.tensor(expected, dtype=torch.float64))


def test_ignored_ties_and_infinities():
    inf = float("inf")
    scores = torch.tensor([[inf, 0.5, -inf, -inf, inf]])
    target = torch.tensor([[False, True, True, False, False]])
    ignore = torch.tensor([[True, False, False, False, False]])
    torch.testing.assert_close(average_precision(scores, target, ignore), torch.tensor([(1 / 2 + 2 / 4) / 2]))


def test_nan():
    scores = torch.tensor([[0.5, float("nan"), 0.1], [0.5, float("nan"), 0.1]])
    target = torch.tensor([[True, False, False], [True, False, False]])
    ignore = torch.tensor([[False, False, False], [False, True, False]])
    result = average_precision(scores, target, ignore)
    assert result[0].isnan()
    assert result[1] == 1


@pytest.mark.parametrize("kernel", [True, False])
def test_chunks_agree(monkeypatch, kernel):
    scores, target = torch.randn(9, 40).half(), torch.rand(9, 40) < 0.3
    whole = average_precision(scores, target)
    if not kernel:
        monkeypatch.setattr(ranking, "has_kernel", lambda x: False)
        torch.testing.assert_close(average_precision(scores, target), whole, equal_nan=True)
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", {"cpu": 80, "cuda": 80})
    torch.testing.assert_close(average_precision(scores, target), whole, equal_nan=True)


# --- retrieval_metrics -----------------------------------------------------------------------------------------------


def counted_by_hand(row, target, ignore):
    """AP, mAP@R, R-precision and the smallest rank of a positive, from the definitions, in Python's integers."""
    row, kept = row.tolist(), (~ignore).tolist()
    positives = [i for i in range(len(row)) if target[i] and kept[i]]
    if not positives:
        return [NAN, NAN, NAN, math.inf]
    if any(row[j] != row[j] for j in range(len(row)) if kept[j]):
        return [NAN] * 4
    others, relevant = sorted(row[j] for j in range(len(row)) if kept[j]), sorted(row[i] for i in positives)
    rank = [len(others) - bisect.bisect_left(others, row[i]) for i in positives]
    rank_positive = [len(relevant) - bisect.bisect_left(relevant, row[i]) for i in positives]
    size = len(positives)
    ratio = [plus / all_ for plus, all_ in zip(rank_positive, rank, strict=True)]
    near = [r for r, all_ in zip(ratio, rank, strict=True) if all_ <= size]
    return [math.fsum(ratio) / size, math.fsum(near) / size, len(near) / size, min(rank)]


def rows_by_hand(scores, target, ignore):
    rows = [counted_by_hand(*row) for row in zip(scores, target, ignore, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def check_rows(scores, target, ignore):
    """The kernel and the plain path against the loop: ranks are exact, the sums of ratios but for their rounding."""
    expected = rows_by_hand(scores, target, ignore)
    by_kernel = torch.ops.roadmap_ext.rank_metrics_masked(scores, target, ignore)
    values, smallest = ranking.by_sorting(scores, target, ignore)
    smallest = torch.tensor([{0: NAN, 1 << 62: math.inf}.get(rank, rank) for rank in smallest.tolist()]).double()
    for rows in (by_kernel, torch.cat([values, smallest[:, None]], dim=1)):
        assert rows.dtype == torch.float64
        torch.testing.assert_close(rows, expected, rtol=1e-13, atol=0, equal_nan=True)
        torch.testing.assert_close(rows[:, 2:], expected[:, 2:], rtol=0, atol=0, equal_nan=True)


KINDS = {
    "spread": lambda shape: torch.randn(shape, dtype=torch.float64),
    "tied": lambda shape: torch.randint(-3, 3, shape).double() / 4,
    "all equal": lambda shape: torch.full(shape, 0.25, dtype=torch.float64),
    "clustered": lambda shape: 0.5 + 1e-6 * torch.rand(shape, dtype=torch.float64),
    # Most share a bucket of the kernel's table: it has to sort and to look inside.
    "outliers": lambda shape: (
        1e-6 * torch.randn(shape, dtype=torch.float64) + (torch.rand(shape) < 0.01) * torch.randn(shape)
    ),
    "infinite": lambda shape: torch.tensor([math.inf, -math.inf, 1.0, 0.0, -0.0, -2.0])[
        torch.randint(6, shape)
    ].double(),
    "huge": lambda shape: 3e38 * (2 * torch.rand(shape, dtype=torch.float64) - 1),
    "denormal": lambda shape: 1e-44 * torch.randint(-9, 9, shape).double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu_kernels
def test_rows_against_the_loop(kind, dtype):
    for columns in (1, 2, 31, 33, 63, 64, 65, 129, 4096, 4128):
        scores = KINDS[kind]((6, columns)).to(dtype)
        density = torch.tensor([0, 0.004, 0.05, 0.3, 0.9, 1])[:, None]
        check_rows(scores, torch.rand(6, columns) < density, torch.rand(6, columns) < 0.1)


@pytest.mark.parametrize("positives", [1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 34, 63, 64, 65, 200, 999])
@pytest.mark.parametrize("kind", ["spread", "tied", "clustered"])
@pytest.mark.cpu_kernels
def test_every_number_of_positives(kind, positives):
    scores = KINDS[kind]((4, 1000)).float()
    target = torch.zeros(4, 1000, dtype=torch.bool)
    for row in target:
        row[torch.randperm(1000)[:positives]] = True
    check_rows(scores, target, torch.zeros_like(target))


@pytest.mark.cpu_kernels
def test_special_scores():
    """A NaN that counts is its row's, one that is left out is nobody's; a row without positives needs no scores."""
    scores = torch.randn(6, 300)
    target, ignore = torch.rand(6, 300) < 0.2, torch.zeros(6, 300, dtype=torch.bool)
    target[5] = False
    target[:5, 7], target[:, 8] = True, False
    scores[1, 7] = scores[2, 8] = scores[3, 7] = scores[4, 8] = scores[5, 8] = NAN
    ignore[3, 7] = ignore[4, 8] = True
    check_rows(scores, target, ignore)
    check_rows(scores, target, torch.zeros_like(target))
    check_rows(scores.repeat(1, 30), target.repeat(1, 30), ignore.repeat(1, 30))  # and with many positives


@pytest.mark.cpu_kernels
def test_a_single_row_is_shared_by_threads():
    """Few rows of many columns: threads count in parts of a row, which changes nothing."""
    scores = torch.randn(2, 70_001)
    target = torch.rand(2, 70_001) < torch.tensor([[0.0002], [0.05]])
    ignore = torch.rand(2, 70_001) < 0.1
    torch.set_num_threads(2)
    check_rows(scores, target, ignore)
    two = torch.ops.roadmap_ext.rank_metrics_masked(scores, target, ignore)
    torch.set_num_threads(1)
    assert torch.equal(torch.ops.roadmap_ext.rank_metrics_masked(scores, target, ignore), two)
    torch.set_num_threads(2)
    for column in (0, 30_000, 70_000):
        bad = scores.clone()
        bad[1, column], ignore[1, column] = NAN, False
        rows = torch.ops.roadmap_ext.rank_metrics_masked(bad, target, ignore)
        assert torch.equal(rows[0], two[0])
        assert rows[1].isnan().all()


def cosines(x, references=None):
    x = functional.normalize(x.double())
    return x @ (x if references is None else functional.normalize(references.double())).T


def expected_metrics(scores, target, ignore, k=(1, 10, 100)):
    rows = rows_by_hand(scores, target, ignore)
    rows = rows[rows[:, 3] != math.inf]
    result = dict(zip(("mAP", "mAP@R", "R-precision"), rows.mean(0).tolist(), strict=False))
    return result | {f"R@{each}": (rows[:, 3] <= each).double().mean().item() for each in k}


def points(n=60, classes=15, dim=8, dtype=torch.float64):
    centres = torch.randn(classes, dim, dtype=dtype)
    labels = torch.randint(classes, (n,))
    return centres[labels] + torch.randn(n, dim, dtype=dtype), labels


@pytest.fixture(params=["kernel", "plain"])
def path(request, monkeypatch):
    """Each way to the metrics: the second is that of other devices, here on the CPU."""
    if request.param == "plain":
        monkeypatch.setattr(ranking, "has_kernel", lambda x: False)
    return request.param


@pytest.mark.usefixtures("path")
class TestRetrievalMetrics:
    def test_a_batch_that_ranks_itself(self):
        for n, classes in ((1, 1), (2, 1), (31, 8), (33, 40), (129, 5)):
            x, labels = points(n, classes)
            target, own = labels[:, None] == labels, torch.eye(n, dtype=torch.bool)
            expected = expected_metrics(cosines(x), target, own)
            for result in (retrieval_metrics(x, labels), retrieval_metrics(x, labels, x, labels)):
                assert list(result) == ["mAP", "mAP@R", "R-precision", "R@1", "R@10", "R@100"]
                assert all(type(value) is float for value in result.values())
                assert result == pytest.approx(expected, rel=1e-12, nan_ok=True)

    def test_references_and_ids(self):
        """A copy of the batch among the references is not the batch, unless ids say so; stale copies share its id."""
        (x, labels), (others, other_labels) = points(40), points(50)
        references, ref_labels = torch.cat([others, x, x + 0.1]), torch.cat([other_labels, labels, labels])
        ids, ref_ids = torch.arange(40) - 2**40, torch.cat([torch.arange(50), *[torch.arange(40) - 2**40] * 2])
        scores, target = cosines(x, references), labels[:, None] == ref_labels
        same = ids[:, None] == ref_ids
        result = retrieval_metrics(x, labels, references, ref_labels)
        assert result == pytest.approx(expected_metrics(scores, target, torch.zeros_like(same)), rel=1e-12)
        result = retrieval_metrics(x, labels, references, ref_labels, ids=ids, ref_ids=ref_ids)
        assert result == pytest.approx(expected_metrics(scores, target, same), rel=1e-12)
        # Ids beside the index: both leave out.
        pairs = torch.arange(40) // 2
        both = (pairs[:, None] == pairs) | torch.eye(40, dtype=torch.bool)
        result = retrieval_metrics(x, labels, ids=pairs, ref_ids=pairs)
        assert result == pytest.approx(
            expected_metrics(cosines(x), labels[:, None] == labels, both, (1, 10, 100)), rel=1e-12
        )
        result = retrieval_metrics(x, labels, ids=pairs, ref_ids=pairs + 1000)
        assert result == retrieval_metrics(x, labels)

    def test_a_duplicate_is_a_reference_like_any_other(self):
        """It may stand before the query in the ranking of the query: places in the ranking say nothing."""
        x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        result = retrieval_metrics(x, torch.tensor([0, 1, 0, 1]), k=(1, 2, 3), reduction="none")
        assert result["mAP"].tolist() == [1 / 3] * 4
        assert result["R@1"].tolist() == result["R@2"].tolist() == [0] * 4
        assert result["R@3"].tolist() == [1] * 4
        assert retrieval_metrics(x, torch.tensor([0, 0, 1, 1]))["mAP"] == 1

    def test_without_positives(self):
        x, labels = points(20)
        labels = torch.cat([labels[:10] % 2, torch.arange(10) + 100])
        each = retrieval_metrics(x, labels, reduction="none")
        for name, values in each.items():
            assert values.shape == (20,)
            assert values.dtype == torch.float64
            assert values[10:].isnan().all()
            assert not values[:10].isnan().any()
            assert retrieval_metrics(x, labels)[name] == pytest.approx(values[:10].mean().item(), rel=1e-14)
        for nobody in (retrieval_metrics(x, torch.arange(20)), retrieval_metrics(x[:0], labels[:0])):
            assert all(math.isnan(value) for value in nobody.values())
        alone = retrieval_metrics(x, labels, x[:0], labels[:0], reduction="none", k=())
        assert list(alone) == ["mAP", "mAP@R", "R-precision"]
        assert all(value.shape == (20,) and value.isnan().all() for value in alone.values())

    def test_nan_and_no_direction(self):
        x, labels = points(30, 3)
        x[4] = 0
        x[5] = 1e-14
        ranked = cosines(x)
        ranked[4:6] = ranked[:, 4:6] = 0
        target, own = labels[:, None] == labels, torch.eye(30, dtype=torch.bool)
        assert retrieval_metrics(x, labels) == pytest.approx(expected_metrics(ranked, target, own), rel=1e-12)
        references, ref_labels = points(20, 3)
        for bad in (NAN, math.inf):
            y = x.clone()
            y[7, 2] = bad
            each = retrieval_metrics(y, labels, references, ref_labels, reduction="none")
            expected = retrieval_metrics(x, labels, references, ref_labels, reduction="none")
            for name, values in each.items():
                assert values.isnan().nonzero().tolist() == [[7]]
                assert torch.equal(values[:7], expected[name][:7])
            assert all(math.isnan(value) for value in retrieval_metrics(y, labels, references, ref_labels).values())
            assert all(math.isnan(value) for value in retrieval_metrics(y, labels).values())
        y = x.float()
        y[7] *= 1e30  # whose norm is not finite in float32
        each = retrieval_metrics(y, labels, references.float(), ref_labels, reduction="none")
        assert all(values.isnan().nonzero().tolist() == [[7]] for values in each.values())
        assert retrieval_metrics(y, labels, reduction="none")["mAP"].isnan().all()

    def test_plain_products(self):
        x, labels = points(50)
        x *= 10 * torch.rand(50, 1)
        target, own = labels[:, None] == labels, torch.eye(50, dtype=torch.bool)
        result = retrieval_metrics(x, labels, normalize=False)
        assert result == pytest.approx(expected_metrics(x @ x.T, target, own), rel=1e-12)
        assert result != retrieval_metrics(x, labels)

    def test_chunks_agree(self):
        x, labels = points(100)
        references, ref_labels = points(70)
        ids = torch.randperm(100)
        whole = retrieval_metrics(x, labels)
        apart = retrieval_metrics(x, labels, references, ref_labels)
        for chunk_size in (1, 7, 99, 100, 1000):
            assert retrieval_metrics(x, labels, chunk_size=chunk_size) == pytest.approx(whole, rel=1e-14)
            result = retrieval_metrics(x, labels, references, ref_labels, chunk_size=chunk_size)
            assert result == pytest.approx(apart, rel=1e-14)
            # Each query has its own copy among the references, and it alone is left out.
            result = retrieval_metrics(
                x, labels, x.flip(0), labels.flip(0), ids=ids, ref_ids=ids.flip(0), chunk_size=chunk_size
            )
            assert result == pytest.approx(whole, rel=1e-14)

    def test_dimension_one(self):
        x, labels = points(40, 4, 1)
        target, own = labels[:, None] == labels, torch.eye(40, dtype=torch.bool)
        scores = x.sign() * x.sign().T
        result = retrieval_metrics(x, labels)
        assert result == pytest.approx(expected_metrics(scores, target, own), rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_half_types_are_widened(self, dtype):
        x, labels = points(50)
        x = (x * 8).round() / 8  # so that products of bfloat16 numbers are exact in float32
        for autocast in (False, True):
            with torch.autocast("cpu", enabled=autocast):
                result = retrieval_metrics(x.to(dtype), labels, normalize=False)
            assert result == retrieval_metrics(x, labels, normalize=False)
        mixed = retrieval_metrics(x.to(dtype), labels, x, labels, ids=torch.arange(50), ref_ids=torch.arange(50))
        assert mixed == pytest.approx(retrieval_metrics(x, labels), rel=1e-12)

    def test_any_memory_layout(self):
        x, labels = points(40)
        expected = retrieval_metrics(x, labels)
        wide = torch.zeros(80, 16, dtype=torch.float64)
        wide[::2, ::2] = x
        assert retrieval_metrics(wide[::2, ::2], labels.repeat_interleave(2)[::2]) == expected
        assert retrieval_metrics(x.T.contiguous().T, labels.int()) == pytest.approx(expected, rel=1e-14)
        one = x[:1].expand(40, 8)  # all tied
        assert retrieval_metrics(one, labels.to(torch.uint8), normalize=False)["R@1"] == 0
        assert retrieval_metrics(x.clone().requires_grad_(), labels) == expected
        with torch.inference_mode():
            assert retrieval_metrics(x, labels) == expected
        assert retrieval_metrics(x, labels) == expected  # after what inference mode left behind

    def test_progress(self, capsys):
        x, labels = points(50)
        done = []
        retrieval_metrics(x, labels, chunk_size=7, progress=done.append)
        assert done == [7] * 7 + [1]
        for nothing in (None, False):
            retrieval_metrics(x, labels, progress=nothing)
        assert capsys.readouterr().err == ""

    def test_k_in_the_order_given(self):
        x, labels = points(50)
        result = retrieval_metrics(x, labels, k=[5, 2, 5, numpy.int64(30), 10**30])
        assert list(result)[3:] == ["R@5", "R@2", "R@30", f"R@{10**30}"]
        assert result["R@2"] <= result["R@5"] <= result["R@30"] <= result[f"R@{10**30}"] == 1

    def test_against_scikit_learn(self):
        sklearn = pytest.importorskip("sklearn.metrics")
        (x, labels), (references, ref_labels) = points(30), points(200)
        each = retrieval_metrics(x, labels, references, ref_labels, reduction="none")["mAP"]
        scores, target = cosines(x, references), labels[:, None] == ref_labels
        expected = [sklearn.average_precision_score(t, s) for s, t in zip(scores.numpy(), target.numpy(), strict=True)]
        torch.testing.assert_close(each, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("alone", [True, False])
    def test_against_pytorch_metric_learning(self, alone):
        """Where no scores are tied, every query has a positive and a query is the first in its own ranking."""
        accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
        inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
        distances = pytest.importorskip("pytorch_metric_learning.distances")
        x, labels = points(150)
        calculator = accuracy.AccuracyCalculator(
            include=("mean_average_precision", "mean_average_precision_at_r", "r_precision", "precision_at_1"),
            k=None,
            device=torch.device("cpu"),
            knn_func=inference.CustomKNN(distances.CosineSimilarity()),
        )
        if alone:
            theirs, ours = calculator.get_accuracy(x, labels), retrieval_metrics(x, labels)
        else:
            others, other_labels = points(200)
            theirs = calculator.get_accuracy(x, labels, others, other_labels)
            ours = retrieval_metrics(x, labels, others, other_labels)
        names = {
            "mAP": "mean_average_precision",
            "mAP@R": "mean_average_precision_at_r",
            "R-precision": "r_precision",
            "R@1": "precision_at_1",
        }
        for name, their_name in names.items():
            assert ours[name] == pytest.approx(theirs[their_name], rel=1e-9), name

    @given(seed=st.integers(0, 2**31), n=st.integers(2, 40), classes=st.integers(1, 10), grid=st.booleans())
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_properties(self, seed, n, classes, grid):
        torch.manual_seed(seed)
        x, labels = points(n, classes)
        references, ref_labels = points(n + 3, classes)
        if grid:  # ties
            x, references = x.round(), references.round()
        each = retrieval_metrics(x, labels, references, ref_labels, normalize=False, reduction="none", k=(1, 3, 10))
        order = torch.randperm(n + 3)
        shuffled = retrieval_metrics(
            x, labels, references[order], ref_labels[order], normalize=False, reduction="none", k=(1, 3, 10)
        )
        for name, values in each.items():
            torch.testing.assert_close(shuffled[name], values, rtol=1e-12, atol=0, equal_nan=True)
            has = ~values.isnan()
            assert ((values[has] >= 0) & (values[has] <= 1)).all()
            assert torch.equal(has, (labels[:, None] == ref_labels).any(1))
        has = ~each["mAP"].isnan()
        assert (each["mAP@R"] <= each["mAP"] + 1e-12)[has].all()
        assert (each["mAP@R"] <= each["R-precision"] + 1e-12)[has].all()
        assert (each["R@1"] <= each["R@3"])[has].all()
        # A positive on top of all others makes nothing worse.
        better = retrieval_metrics(
            x[:1],
            labels[:1],
            torch.cat([references, 100 * x[:1]]),
            torch.cat([ref_labels, labels[:1]]),
            normalize=False,
            reduction="none",
            k=(1, 3, 10),
        )
        if has[0] and x[0].norm() > 0:
            assert better["mAP"][0] >= each["mAP"][0] - 1e-12
            assert better["R@3"][0] >= each["R@3"][0]


def test_the_paths_agree():
    """The same integers: per-query metrics differ by the rounding of their sums alone, the others not at all."""
    for classes, dtype in ((300, torch.float32), (5, torch.float32), (30, torch.float64)):
        x, labels = points(1000, classes, 16, dtype)
        x = (4 * x).round() / 4  # so that both see the same products
        kernel = retrieval_metrics(x, labels, normalize=False, reduction="none")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "has_kernel", lambda x: False)
            patch.setattr(ranking, "_CHUNK_ELEMENTS", {"cpu": 64_000, "cuda": 64_000})
            plain = retrieval_metrics(x, labels, normalize=False, reduction="none")
        for name, values in kernel.items():
            tolerance = 1e-13 if name.startswith("mAP") else 0
            torch.testing.assert_close(values, plain[name], rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("classes", [300, 4])
def test_threads_change_no_bit(classes):
    x, _ = points(1200, classes)
    labels, scores = torch.arange(1200) % classes, x @ x.T
    pairs = from_labels(labels, labels, None, None, True, False)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.rank_metrics(scores, pairs))
        results.append(torch.ops.roadmap_ext.rank_metrics_masked(scores, *pairs.masks(1200)))
    assert not results[0].isnan().any()
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.cpu_kernels
def test_lists_and_masks_agree():
    """Own, left out, both at once, positive and left out, and named pairs alone."""
    scores = torch.randn(20, 300).round(decimals=1)
    labels, ref_labels = torch.randint(4, (20,)), torch.randint(4, (300,))
    ids, ref_ids = torch.arange(20) % 10, torch.randint(10, (300,))
    for pairs in (
        from_labels(labels, ref_labels, None, None, False, False),
        from_labels(labels, ref_labels, ids, ref_ids, False, False),
        from_labels(labels, ref_labels, ids, ref_ids, True, False),
        from_labels(ref_labels[:20], ref_labels, None, None, True, False),
        from_pairs(
            20, 300, (torch.arange(400) % 20, torch.arange(400) % 297), (torch.arange(90) % 19, torch.arange(90))
        ),
    ):
        for part in (slice(0, 20), slice(5, 9)):
            target, ignore = (mask[part] for mask in pairs.masks(300))
            expected = torch.ops.roadmap_ext.rank_metrics_masked(scores[part], target, ignore)
            values = ops.rank_metrics(scores[part], pairs.rows(part))
            assert torch.equal(values.nan_to_num(-1), expected.nan_to_num(-1))
            check_rows(scores[part], target, ignore)


def test_crowded_buckets_stay_fast():
    """Two far ends leave all other positives to one bucket: comparing each with each would take half a minute."""
    scores = 1e-6 * torch.rand(1, 400_000)
    scores[0, 0], scores[0, 1] = -1, 1
    begin = time.perf_counter()
    rows = torch.ops.roadmap_ext.rank_metrics_masked(scores, torch.ones(1, 400_000, dtype=torch.bool), None)
    assert time.perf_counter() - begin < 5
    torch.testing.assert_close(rows, torch.ones(1, 4, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.cpu_kernels
def test_strided_scores():
    wide, target = torch.randn(12, 200), torch.rand(6, 100) < 0.3
    for scores in (wide[::2, ::2], wide[:6, 50:150], wide[:1, :100].expand(6, 100), wide.T[:6, :12]):
        check_rows(scores, target[:, : scores.shape[1]], torch.zeros(scores.shape, dtype=torch.bool))


@pytest.mark.cpu_kernels
def test_lists_of_nonsense_lead_nowhere():
    """Columns that are not there, unsorted, repeated: whatever comes, it comes from the row."""
    scores = torch.randn(2, 40)
    span = torch.tensor([[0, 8], [3, 8]])
    column = torch.tensor([2**62, -(2**62), -1, 40, 39, 0, 0, 41])
    result = ops.rank_metrics(scores, Pairs(Lists(span, column), Lists(span, column.flip(0)), None, 10**9))
    assert result.shape == (2, 4)


def test_ops_check_what_memory_depends_on():
    of = torch.ops.roadmap_ext
    scores, span, column = torch.randn(2, 3), torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1])
    none = (None,) * 4
    for bad, error in (
        ((scores[0], [span, column, *none], -1), "scores must be a 2-D CPU tensor of float32 or float64"),
        ((scores.half(), [span, column, *none], -1), "scores must be a 2-D CPU tensor of float32 or float64"),
        ((scores, [span[:1], column, *none], -1), "positive_span must be a CPU tensor"),
        ((scores, [span + 1, column, *none], -1), "positive_span must lie within"),
        ((scores, [span, column.int(), *none], -1), "positive_column must be a 1-D CPU tensor of int64"),
        ((scores, [span, column, span, None, None, None], -1), "come together"),
        ((scores, [span, column], -1), "pairs are 6 tensors"),
        ((scores, [span, column, *none, span, column], -1), "pairs are 6 tensors"),
        ((scores, [None, None, *none], -1), "which are positive"),
        ((scores, [span, column, *none], 2**62), "own must be"),
        ((scores[:, :1].expand(2, 2**31), [span, column, *none], -1), "less than 2.31 columns"),
    ):
        with pytest.raises(RuntimeError, match=error):
            of.rank_metrics(*bad)
    with pytest.raises(RuntimeError, match="target must be a bool CPU tensor"):
        of.rank_metrics_masked(scores, scores, None)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        of.rank_metrics_masked(scores.half(), scores > 0, None)


def test_opcheck():
    labels = torch.randint(4, (10,))
    pairs = from_labels(labels, labels, labels, labels + 1, True, False)
    scores = torch.randn(10, 10)
    cases = [
        (torch.ops.roadmap_ext.rank_metrics, (scores, pairs.flat(), 0)),
        (torch.ops.roadmap_ext.rank_metrics_masked, (scores.double(), scores > 0, None)),
        (torch.ops.roadmap_ext.rank_metrics_masked, (scores, scores > 0, scores > 1)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def _memory_at_scale():
    torch.manual_seed(0)
    x, labels = points(10_000, 2_000, 64, torch.float32)
    retrieval_metrics(x[:100], labels[:100])  # thread pools and libraries
    return peak_growth(lambda: retrieval_metrics(x, labels))


def test_memory_is_that_of_a_chunk():
    """The scores are 381 MiB, a chunk of them 64; the normalised copy is 2.4."""
    growth = in_fresh_process(_memory_at_scale)
    if growth is None:
        pytest.skip("peak memory is read from Linux's /proc")
    assert growth <= 80 * MIB


def test_progress_bar(capsys, monkeypatch):
    x, labels = points(50)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress=True draws its bar with tqdm, which is not installed: pip install"):
        retrieval_metrics(x, labels, progress=True)
    monkeypatch.delitem(sys.modules, "tqdm")
    pytest.importorskip("tqdm")
    retrieval_metrics(x, labels, progress=True)
    assert "50/50" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": "10"}, TypeError, "k must be an integer or a sequence of integers, such as"),
        ({"k": 2.5}, TypeError, "got 2.5"),
        ({"k": (1, 2.5)}, TypeError, "got 2.5"),
        ({"k": (True,)}, TypeError, "got True"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": (1, 0)}, ValueError, "k must be at least 1, for ranks begin there, got 0"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        ({"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be None or an integer"),
        (
            {"progress": 1},
            TypeError,
            "progress must be None, True .* or a function that takes a number of queries, got",
        ),
        ({"ignore_label": "none"}, TypeError, "ignore_label must be None or an integer"),
        ({"ids": torch.arange(50)}, ValueError, "ids was given without ref_ids"),
        ({"ref_emb": torch.randn(5, 8)}, ValueError, "ref_emb was given without ref_labels"),
    ],
)
def test_bad_input(options, error, message):
    x, labels = points(50)
    with pytest.raises(error, match=message):
        retrieval_metrics(x, labels, **options)


def test_bad_embeddings():
    x, labels = points(50)
    with pytest.raises(TypeError, match=r"embeddings must be a torch.Tensor"):
        retrieval_metrics(x.tolist(), labels)
    with pytest.raises(ValueError, match="tensors on the meta device have none"):
        retrieval_metrics(x.to("meta"), labels=labels.to("meta"))
    with pytest.raises(ValueError, match="labels must be 1-D with one entry a row of embeddings, 50"):
        retrieval_metrics(x, labels[:4])
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        retrieval_metrics(x, labels.float())
    with pytest.raises(ValueError, match="ref_emb must have the dimension of embeddings, 8, got 7"):
        retrieval_metrics(x, labels, x[:, :7], labels)


# --- what they take --------------------------------------------------------------------------------------------------


def as_arrays(values):
    """Tensors as arrays of NumPy's, and lists of them; the same tensor as the same array."""
    made = {id(x): x.numpy() for x in values if isinstance(x, torch.Tensor)}
    return [as_arrays(x) if isinstance(x, list) else made.get(id(x), x) for x in values]


def test_arrays_of_numpy():
    """What tensors give, bit for bit; the same array twice is the batch itself."""
    x, labels = points(50)
    scores, target = torch.randn(9, 30), torch.rand(9, 30) < 0.3
    batches = [torch.arange(20), torch.arange(20, 50)]
    for function, arguments, options in (
        (retrieval_metrics, (x, labels), {"k": numpy.array([1, 5])}),
        (retrieval_metrics, (x, labels, x, labels), {}),
        (retrieval_metrics, (x[:9], labels[:9], x, labels), {"ids": labels[:9], "ref_ids": labels}),
        (metrics.decomposability_gap, (x, labels, batches), {}),
        (average_precision, (scores, target, ~target), {}),
        (metrics.decomposability_gap_of_scores, (scores, target, torch.arange(30) % 4), {}),
        (metrics.decomposability_bound, (target.long(), 3 * target.long()), {}),
    ):
        expected = function(*arguments, **options)
        options = dict(zip(options, as_arrays(options.values()), strict=True))
        measured = function(*as_arrays(arguments), **options)
        torch.testing.assert_close(measured, expected, rtol=0, atol=0, equal_nan=True)


def test_an_array_is_read_where_it_is(recwarn):
    x, labels = points(50)
    x, labels = x.double().numpy(), labels.numpy()
    for each in (x, labels):
        each.flags.writeable = False
    assert as_tensor(x).data_ptr() == x.ctypes.data
    retrieval_metrics(x, labels)
    assert not recwarn.list


def test_one_k():
    x, labels = points(50)
    for k in (3, numpy.int64(3), numpy.array(3), torch.tensor(3), torch.tensor([3]), [3]):
        assert retrieval_metrics(x, labels, k=k) == retrieval_metrics(x, labels, k=(3,))


@pytest.mark.parametrize("gallery", [False, True])
def test_an_ignored_label_is_as_good_as_absent(path, gallery):
    """Neither as a query nor as a reference does such an item count, whatever its embedding is."""
    x, labels = points(60)
    references, ref_labels = points(80)
    labels[::4], ref_labels[::3] = -1, -1
    x[::4], references[::3] = NAN, NAN
    kept, ref_kept = labels != -1, ref_labels != -1
    given = (x, labels, references, ref_labels) if gallery else (x, labels)
    removed = (
        (x[kept], labels[kept], references[ref_kept], ref_labels[ref_kept]) if gallery else (x[kept], labels[kept])
    )
    assert retrieval_metrics(*given, ignore_label=-1) == pytest.approx(retrieval_metrics(*removed), rel=1e-12)
    each = retrieval_metrics(*given, ignore_label=-1, reduction="none")
    for name, values in retrieval_metrics(*removed, reduction="none").items():
        assert each[name][~kept].isnan().all()
        torch.testing.assert_close(each[name][kept], values, rtol=1e-12, atol=0, equal_nan=True)
    # Of the gap, the batches keep their places.
    batches = torch.arange(len(ref_labels if gallery else labels)) % 3
    gap = metrics.decomposability_gap(*given[:2], batches, *given[2:], ignore_label=-1)
    without = metrics.decomposability_gap(*removed[:2], batches[ref_kept if gallery else kept], *removed[2:])
    assert gap == pytest.approx(without, rel=1e-12)
