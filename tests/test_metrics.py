"""Exact average precision against a loop and against scikit-learn."""

import pytest
import torch

from roadmap_ext.metrics import average_precision


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


def test_chunks_agree(monkeypatch):
    scores, target = torch.randn(9, 40), torch.rand(9, 40) < 0.3
    whole = average_precision(scores, target)
    monkeypatch.setattr("roadmap_ext.metrics._CHUNK_ELEMENTS", 80)
    torch.testing.assert_close(average_precision(scores, target), whole, equal_nan=True)
