"""The losses of ranks as their definitions read, pair by pair in plain Python: what the references are held against."""

from __future__ import annotations

import math


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _surrogate(t, tau=0.01, rho=100.0, delta=0.05, start=0.5):
    """H-, continuous at the threshold."""
    if t > delta:
        return rho * (t - delta) + start + _sigmoid(delta / tau)
    return _sigmoid(t / tau) + (start if t >= 0 else 0.0)


def ranks(scores, level, step):
    """The rank of each positive of a query, by its column; ``step(t)`` stands for the step of pairs of lower level."""
    columns = range(len(scores))

    def one(i, j):
        t = scores[j] - scores[i]
        return float(t >= 0) if level[j] >= level[i] else step(t)

    return {i: 1 + sum(one(i, j) for j in columns if j != i) for i in columns if level[i] > 0}


def loss(name, scores, level, worth, exact, k=(1, 2, 4, 8, 16), temperature=1.0):
    """Of one query; ``level`` is 0 for a negative, ``worth`` that of each column; ``exact`` is by the true step."""
    step = (lambda t: float(t >= 0)) if exact else _surrogate
    if name not in ("ndcg", "hap"):
        level = [min(each, 1) for each in level]
    rank = ranks(scores, level, step)
    positives = list(rank)
    if not positives:
        return 0.0
    if name == "ap":
        above = {i: sum(scores[j] >= scores[i] for j in positives) for i in positives}
        return 1 - sum(above[i] / rank[i] for i in positives) / len(positives)
    if name == "recall":
        of_k = [
            sum(_sigmoid((each - rank[i]) / temperature) for i in positives) / min(len(positives), each) for each in k
        ]
        return 1 - sum(of_k) / len(of_k)
    if name == "ndcg":
        ideal = sorted((worth[i] for i in positives), reverse=True)
        best = sum(gain / math.log2(2 + place) for place, gain in enumerate(ideal))
        return 1 - sum(worth[i] / math.log2(1 + rank[i]) for i in positives) / best
    if name == "mrr":
        first = max(positives, key=lambda i: scores[i])
        above = sum(step(scores[j] - scores[first]) for j in range(len(scores)) if level[j] == 0)
        return 1 - 1 / (1 + above)
    assert name == "hap"
    total = 0.0
    for i in positives:
        shared = sum(min(worth[i], worth[j]) for j in positives if scores[j] >= scores[i])
        total += shared / rank[i]
    return 1 - total / sum(worth[i] for i in positives)
