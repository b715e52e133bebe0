"""The decomposability gap against loops; its bound against every interleaving and every order of batches."""

import doctest
import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadmap_ext import decomposability, ranking
from roadmap_ext.metrics import (
    average_precision,
    decomposability_bound,
    decomposability_gap,
    decomposability_gap_of_scores,
)


def of_order(batches):
    """math: 1 minus the AP where batches (positives, negatives) follow each other, each perfect."""
    p = n = total = 0
    for positives, negatives in batches:
        total += sum((j + p) / (j + p + n) for j in range(1, positives + 1))
        p, n = p + positives, n + negatives
    return 1 - total / p


def interleavings(batches):
    """Every ranking of all in which each batch's positives stand above its negatives, as a string of + and -."""
    batches = tuple(batch for batch in batches if batch)
    if not batches:
        return {""}
    rest = ((batch[0], interleavings((*batches[:i], batch[1:], *batches[i + 1 :]))) for i, batch in enumerate(batches))
    return {first + ranking for first, rankings in rest for ranking in rankings}


def ap(ranking):
    found = [place for place, kind in enumerate(ranking, 1) if kind == "+"]
    return sum(rank / place for rank, place in enumerate(found, 1)) / len(found)


def bound_of(*cases):
    positives, negatives = (torch.tensor([[b[i] for b in case] for case in cases]) for i in (0, 1))
    values, exact = decomposability_bound(positives, negatives)
    return values.tolist(), exact.tolist()


COUNT = st.tuples(st.integers(0, 2), st.integers(0, 2))


class TestBound:
    @given(st.lists(COUNT, min_size=1, max_size=3).filter(lambda batches: any(p for p, _ in batches)))
    @settings(max_examples=60, deadline=None)
    def test_is_the_worst_interleaving(self, batches):
        worst = 1 - min(map(ap, interleavings(tuple("+" * p + "-" * n for p, n in batches))))
        values, exact = bound_of(batches)
        assert values == pytest.approx([worst], abs=1e-12)
        assert exact == [True]

    def test_of_every_pair_of_batches_is_the_worst_interleaving(self):
        """All of up to 3 positives and 3 negatives, in one call."""
        sizes = [(p, n) for p in range(4) for n in range(4)]
        cases = [(a, b) for a in sizes for b in sizes if a[0] + b[0]]
        expected = [1 - min(map(ap, interleavings(tuple("+" * p + "-" * n for p, n in case)))) for case in cases]
        values, exact = bound_of(*cases)
        assert values == pytest.approx(expected, abs=1e-12)
        assert all(exact)

    def test_is_the_worst_of_all_orders(self):
        torch.manual_seed(3)
        counts = torch.stack([torch.randint(0, 6, (60, 6)), torch.randint(0, 40, (60, 6))], dim=2).tolist()
        expected = [max(of_order(order) for order in permutations(case)) for case in counts]
        values, exact = bound_of(*counts)
        assert values == pytest.approx(expected, abs=1e-12)
        assert all(exact)
        # No single rule would do: by share, by positives, by negatives.
        for key in (lambda b: b[0] / max(1, sum(b)), lambda b: b[0], lambda b: -b[1]):
            assert any(of_order(sorted(case, key=key)) < e - 1e-9 for case, e in zip(counts, expected, strict=True))

    def test_the_largest_that_is_searched(self):
        torch.manual_seed(0)
        most = decomposability.MOST_SEARCHED
        counts = torch.stack([torch.randint(1, 5, (3, most)), torch.randint(0, 30, (3, most))], dim=2).tolist()
        values, exact = bound_of(*counts)
        assert all(exact)
        for case, value in zip(counts, values, strict=True):
            shuffled = [[case[i] for i in torch.randperm(most)] for _ in range(300)]
            assert max(map(of_order, shuffled)) <= value + 1e-12
            assert bound_of(shuffled[0])[0] == pytest.approx([value], abs=1e-12)
            assert of_order(sorted(case, key=lambda b: b[0] / sum(b))) <= value + 1e-12

    def test_batches_without_positives_do_not_count_as_searched(self):
        few = [(2, 3), (1, 5), (4, 1)]
        values, exact = bound_of(few + [(0, 2)] * 20)
        assert values == pytest.approx([max(of_order([(0, 40), *order]) for order in permutations(few))], abs=1e-12)
        assert exact == [True]

    def test_alike_batches_of_any_number_are_exact(self):
        alike, one_more, empty = [(3, 7)] * 30, [(3, 7)] * 29 + [(3, 8)], [(3, 7)] * 29 + [(0, 8)]
        values, exact = bound_of(alike, one_more, empty)
        assert exact == [True, False, True]
        assert values[0] == pytest.approx(of_order(alike), abs=1e-12)
        assert values[2] == pytest.approx(of_order([(0, 8), *alike[1:]]), abs=1e-12)
        # From below: of some order.
        assert of_order([*alike[1:], (3, 8)]) - 1e-12 <= values[1] <= of_order([(0, 8), *alike]) + 1e-12

    def test_an_estimate_is_near_the_worst(self, monkeypatch):
        torch.manual_seed(0)
        counts = torch.randint(0, 5, (100, 8)), torch.randint(0, 40, (100, 8))
        worst, _ = decomposability_bound(*counts)
        monkeypatch.setattr(decomposability, "MOST_SEARCHED", 3)
        estimate, exact = decomposability_bound(*counts)
        searched = (counts[0] > 0).sum(1) <= 3
        assert torch.equal(exact, searched)
        assert (estimate <= worst + 1e-12).all()
        assert (worst - estimate).mean() < 0.002
        assert (worst - estimate).max() < 0.05

    def test_a_mean_is_exact_if_every_bound_is(self, monkeypatch):
        monkeypatch.setattr(decomposability, "MOST_SEARCHED", 2)
        scores, number = torch.rand(2, 9), torch.arange(9) // 3
        target = torch.zeros(2, 9, dtype=torch.bool)
        target[:, [0, 3]] = True
        assert decomposability_gap_of_scores(scores, target, number).exact is True
        target[0, [6, 7]] = True
        assert decomposability_gap_of_scores(scores, target, number, reduction="none").exact.tolist() == [False, True]
        assert decomposability_gap_of_scores(scores, target, number).exact is False

    def test_no_positives(self):
        values, exact = bound_of([(0, 3), (0, 1)], [(1, 0), (0, 1)])
        assert math.isnan(values[0])
        assert exact == [True, True]
        for shape in ((2, 0), (0, 2), (0, 0)):
            none, exact = decomposability_bound(*torch.zeros(2, *shape, dtype=torch.int64))
            assert none.isnan().tolist() == exact.tolist() == [True] * shape[0]

    @pytest.mark.parametrize(
        ("positives", "negatives", "error", "message"),
        [
            (torch.ones(1, 2), torch.ones(1, 2), TypeError, "positives must be an integer torch.Tensor"),
            ([[1]], [[1]], TypeError, "positives must be an integer torch.Tensor.*got list"),
            (torch.tensor([1]), torch.tensor([1]), ValueError, r"positives must be 2-D, \[queries, batches\]"),
            (torch.tensor([[1]]), torch.tensor([[-1]]), ValueError, "negatives must not be negative, got -1"),
            (torch.tensor([[1]]), torch.tensor([[1, 2]]), ValueError, "negatives must have the shape of positives"),
        ],
    )
    def test_bad_input(self, positives, negatives, error, message):
        with pytest.raises(error, match=message):
            decomposability_bound(positives, negatives)


def test_examples():
    assert doctest.testmod(decomposability, extraglobs={"torch": torch}).failed == 0


def by_loops(scores, target, ignore, number):
    """gap, batch_ap, ap of each query, batch by batch."""
    rows = []
    for s, t, i in zip(scores, target, ignore, strict=True):
        whole = average_precision(s[None], t[None], i[None]).item()
        each = []
        for b in number.unique():
            of = number == b
            value = average_precision(s[None, of], t[None, of], i[None, of]).item()
            if (t & ~i)[of].any():
                each.append(value)
        mean = sum(each) / len(each) if each else math.nan
        rows.append((mean - whole, mean, whole))
    return torch.tensor(rows, dtype=torch.float64)


def points(n, classes=6, dim=5):
    return torch.randn(n, dim, dtype=torch.float64), torch.randint(classes, (n,))


class TestGap:
    @pytest.mark.parametrize("chunk_size", [None, 7])
    def test_against_loops(self, chunk_size):
        x, labels = points(60, 20)  # some queries have no positive, and most batches have none of a query
        number = torch.randint(5, (60,)) * 10 - 7
        each = decomposability_gap(x, labels, number, reduction="none", chunk_size=chunk_size)
        unit = torch.nn.functional.normalize(x)
        target, own = labels[:, None] == labels, torch.eye(60, dtype=torch.bool)
        expected = by_loops(unit @ unit.T, target, own, number)
        torch.testing.assert_close(torch.stack(each[:3], 1), expected, equal_nan=True)
        counted = target & ~own
        positives = torch.stack([counted[:, number == b].sum(1) for b in number.unique()], 1)
        negatives = torch.stack([(~target)[:, number == b].sum(1) for b in number.unique()], 1)
        torch.testing.assert_close(each[3:], decomposability_bound(positives, negatives), equal_nan=True)
        mean = decomposability_gap(x, labels, number, chunk_size=chunk_size)
        has = counted.any(1)
        assert mean[:4] == pytest.approx([column[has].mean().item() for column in each[:4]], rel=1e-12)
        assert mean.exact is True

    def test_queries_against_others_by_ids(self):
        x, labels = points(20)
        y, ref_labels = points(50)
        ids, ref_ids = torch.arange(20), torch.arange(50) % 30
        number = torch.arange(50) % 3
        each = decomposability_gap(
            x, labels, number, y, ref_labels, ids=ids, ref_ids=ref_ids, normalize=False, reduction="none"
        )
        expected = by_loops(x @ y.T, labels[:, None] == ref_labels, ids[:, None] == ref_ids, number)
        torch.testing.assert_close(torch.stack(each[:3], 1), expected, equal_nan=True)

    def test_numbers_and_lists_of_batches_are_the_same(self):
        x, labels = points(40)
        number = torch.randint(4, (40,))
        lists = [(number == b).nonzero().flatten() for b in (2, 0, 3, 1)] + [torch.tensor([], dtype=torch.int64)]
        by_number = decomposability_gap(x, labels, number, reduction="none")
        for column, other in zip(by_number, decomposability_gap(x, labels, lists, reduction="none"), strict=True):
            torch.testing.assert_close(column, other, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_of_scores(self, dtype, monkeypatch):
        scores, target = (torch.randn(30, 40).round(decimals=1)).to(dtype), torch.rand(30, 40) < 0.1
        ignore, number = torch.rand(30, 40) < 0.2, torch.randint(5, (40,))
        for small in (False, True):
            if small:
                monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", {"cpu": 100})
            each = decomposability_gap_of_scores(scores, target, number, ignore, reduction="none")
            expected = by_loops(scores, target, ignore, number)
            torch.testing.assert_close(torch.stack(each[:3], 1), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
        whole = decomposability_gap_of_scores(scores, target, torch.zeros(40, dtype=torch.int64))
        assert (whole.gap, whole.bound) == (0, pytest.approx(0, abs=1e-12))

    def test_without_kernels(self, monkeypatch):
        x, labels = points(60)
        number = torch.arange(60) % 4
        kernel = decomposability_gap(x, labels, number, reduction="none")
        monkeypatch.setattr(ranking, "has_kernel", lambda x: False)
        for column, other in zip(kernel, decomposability_gap(x, labels, number, reduction="none"), strict=True):
            torch.testing.assert_close(column, other, equal_nan=True)

    @given(seed=st.integers(0, 2**31), batches=st.integers(1, 4))
    @settings(max_examples=20, deadline=None)
    def test_perfect_batches_stay_within_the_bound(self, seed, batches):
        """Ties between batches, too; and some order of them comes to it."""
        torch.manual_seed(seed)
        number, target = torch.randint(batches, (25,)), torch.rand(1, 25) < 0.4
        target[0, 0] = True
        within = torch.randperm(25) / 25 + target  # below 2
        tied = torch.randint(0, 9, (1, 25)) + 9.0 * target + torch.randint(0, 30, (batches,))[number]
        of = decomposability_gap_of_scores(tied, target, number, reduction="none")
        assert of.batch_ap.item() == 1
        assert of.gap.item() <= of.bound.item() + 1e-6
        orders = [within + 2 * torch.tensor(order)[number] for order in permutations(range(batches))]
        worst = max(decomposability_gap_of_scores(scores, target, number).gap for scores in orders)
        assert worst == pytest.approx(of.bound.item(), abs=1e-6)

    def test_it_may_be_negative(self):
        scores, target = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[True, True, False, True]])
        number = torch.tensor([0, 0, 1, 1])
        assert decomposability_gap_of_scores(scores, target, number).gap == pytest.approx((1 + 0.5) / 2 - 11 / 12)

    def test_a_nan_is_seen_and_stays_in_its_row(self):
        scores, target = torch.rand(3, 8), torch.rand(3, 8) < 0.5
        target[:, 0] = True
        scores[1, 5] = math.nan
        number = torch.arange(8) % 2
        each = decomposability_gap_of_scores(scores, target, number, reduction="none")
        assert each.gap.isnan().tolist() == [False, True, False]
        assert math.isnan(decomposability_gap_of_scores(scores, target, number).gap)

    def test_nothing_to_measure(self):
        x, labels = points(5)
        alone = decomposability_gap(x, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        assert math.isnan(alone.gap)
        empty = decomposability_gap(x[:0], labels[:0], torch.zeros(0, dtype=torch.int64), reduction="none")
        assert all(len(column) == 0 for column in empty)
        nothing = decomposability_gap(x, labels, [], x[:0], labels[:0], reduction="none")
        assert nothing.gap.isnan().all()
        assert nothing.gap.shape == (5,)

    def test_progress(self):
        x, labels = points(50)
        seen = []
        decomposability_gap(x, labels, torch.arange(50) % 2, chunk_size=20, progress=seen.append)
        assert seen == [20, 20, 10]

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            (torch.zeros(4), TypeError, "batches must have an integer dtype, got torch.float32"),
            (torch.zeros(4, dtype=torch.int64), ValueError, "batches must have one entry a reference, 6, got 4"),
            (torch.zeros(6, 1, dtype=torch.int64), ValueError, r"batches must be 1-D, got shape \(6, 1\)"),
            (3, TypeError, "batches must be a tensor with the number of each reference's batch, or a list"),
            ([[0, 1, 2], [3, 4, 5]], TypeError, r"batches\[0\] must be a torch.Tensor of integers, got list"),
            ([torch.arange(6), torch.arange(3)], ValueError, "each of the 6 references once: they hold 9 indices, 6"),
            ([torch.arange(5)], ValueError, "they hold 5 indices, 5 of them different, from 0 to 4; leave"),
            ([torch.arange(1, 7)], ValueError, "from 1 to 6"),
            ([], ValueError, "they hold 0 indices, 0 of them different; leave"),
        ],
    )
    def test_bad_batches(self, batches, error, message):
        x, labels = points(6)
        with pytest.raises(error, match=message):
            decomposability_gap(x, labels, batches)
        with pytest.raises(error, match=message):
            decomposability_gap_of_scores(x @ x.T, labels[:, None] == labels, batches)

    def test_bad_settings(self):
        x, labels = points(6)
        number = torch.zeros(6, dtype=torch.int64)
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'none', got 'sum'"):
            decomposability_gap(x, labels, number, reduction="sum")
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            decomposability_gap(x, labels, number, chunk_size=0)
        with pytest.raises(TypeError, match="normalize must be True or False"):
            decomposability_gap(x, labels, number, normalize=1)
        with pytest.raises(TypeError, match="labels must have an integer dtype"):
            decomposability_gap(x, labels.float(), number)
