"""roadmap_loss against the float64 reference: dtypes, settings, reductions, relations and sizes.

The rule is that of oracle.py, for a row of the gradient of the embeddings: twice the error of plain float32 PyTorch,
plus ULPS eps of what was summed to make the row, |G| |X|, and of the largest c / tau of a query, below which gradients
of scores may be dropped. It is applied row by row where similarities are exact in float32, so that both sides rank the
same scores. Where they are not, an error of eps in a score is one of eps / tau in the slopes of both sides, alike in
size but not in sign: there the rule is for the norm over all rows.
"""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import PUBLISHED, ULPS, largest_weight
from torch import Tensor
from torch.nn.functional import normalize

from roadmap_ext import reference, roadmap_loss
from roadmap_ext.settings import checked

pytestmark = pytest.mark.ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [1, 31, 33, 129]


def signs(labels: Tensor, dtype: torch.dtype = torch.float32, flips: float = 0.12) -> Tensor:
    """[n, 64] vectors of +-1/8 near the centre of their class, times a power of two.

    Norms are powers of two and cosines multiples of 1/32: exact in every dtype, many ties, never on a knee or a margin.
    """
    centres = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).sign() / 8
    flipped = torch.where(torch.rand(len(labels), 64) < flips, -1.0, 1.0)
    return (centres[labels.long() % 128] * flipped * 2.0 ** torch.randint(-2, 3, (len(labels), 1))).to(dtype)


@dataclass
class Problem:
    embeddings: Tensor
    labels: Tensor
    ref_emb: Tensor | None = None
    ref_labels: Tensor | None = None
    ids: Tensor | None = None
    ref_ids: Tensor | None = None

    def run(self, function, dtype=None, weight=None, **options):
        """Loss and the gradients of (loss * weight).sum() to embeddings and references."""
        leaves = [
            None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()
            for x in (self.embeddings, self.ref_emb)
        ]
        loss = function(
            leaves[0], self.labels, leaves[1], self.ref_labels, ids=self.ids, ref_ids=self.ref_ids, **options
        )
        (loss if weight is None else loss * weight.to(loss.dtype)).sum().backward()
        return loss.detach(), [leaf.grad for leaf in leaves if leaf is not None]

    def masks(self, include_self=False):
        """target and ignore, [B, N]."""
        labels = self.labels if self.ref_labels is None else self.ref_labels
        target = self.labels[:, None] == labels[None]
        ignore = torch.zeros_like(target)
        if not include_self:
            ignore |= torch.eye(*target.shape, dtype=torch.bool) & (self.ref_labels is None)
            if self.ids is not None:
                ignore |= self.ids[:, None] == self.ref_ids[None]
        return target, ignore

    def scale_of_errors(self, weight=None, normalize=True, include_self=False, **options):
        """Of every row of the gradients, float64: |G| |X|, and the largest c / tau by the norm of X."""
        inputs = [x.detach().double() for x in (self.embeddings, self.ref_emb) if x is not None]
        norms = [x.norm(dim=1, keepdim=True) if normalize else torch.ones(len(x), 1).double() for x in inputs]
        units = [x / norm for x, norm in zip(inputs, norms, strict=True)]
        target, ignore = self.masks(include_self)
        objective = objective_of(options)
        scores = (units[0] @ units[-1].T).requires_grad_()
        eye = torch.eye(scores.shape[1], dtype=torch.float64)  # scores are embeddings whose products they are
        loss = reference.embedding_loss(scores, eye, target, ignore, objective)
        (loss if weight is None else loss * weight.double()).sum().backward()
        gradient = scores.grad.abs()
        shares = [gradient @ units[-1].abs(), gradient.T @ units[0].abs()]
        shares = shares if self.ref_emb is not None else [shares[0] + shares[1]]
        ranked = int((target & ~ignore).any(1).sum()) if objective.reduction == "mean" else 1
        by = torch.ones(len(scores)) if weight is None else weight
        largest = largest_weight(scores.detach(), target, by / max(ranked, 1), ignore=ignore, **options)
        dropped = (1 - objective.calibration_weight) * largest.max() / options.get("tau", 0.01)
        spread = max(float(torch.linalg.matrix_norm(x, 2)) for x in units)
        return [
            rows_of(share / norm) + dropped * spread / norm[:, 0] for share, norm in zip(shares, norms, strict=True)
        ]


def objective_of(options):
    """The objective of roadmap_loss's keywords, on scores as they are."""
    return checked(options | {"normalize": False}).objective


def rows_of(value: Tensor) -> Tensor:
    return value.double().norm(dim=1)


def assert_accurate(problem, weight=None, rowwise=True, **options):
    chunk_size = options.pop("chunk_size", None)
    loss, gradients = problem.run(roadmap_loss, weight=weight, chunk_size=chunk_size, **options)
    plain_loss, plain = problem.run(reference.roadmap_loss, weight=weight, **options)
    true_loss, truth = problem.run(reference.roadmap_loss, torch.float64, weight, **options)
    dtype = problem.embeddings.dtype
    double = dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    assert loss.dtype == (torch.float64 if double else torch.float32)
    allowed_loss = 2 * (plain_loss.double() - true_loss).abs() + (16 if double else ULPS) * eps * true_loss.abs().clamp(
        1
    )
    assert ((loss.double() - true_loss).abs() <= allowed_loss).all(), (loss, true_loss)
    scales = problem.scale_of_errors(weight, **options)
    for ours, by_hand, true, scale in zip(gradients, plain, truth, scales, strict=True):
        assert ours.dtype == dtype
        # Of float64 the reference is as wrong as we are.
        allowed = 2 * rows_of(by_hand.double() - true) + (64 if double else ULPS) * eps * scale
        if dtype in (torch.float16, torch.bfloat16):
            allowed += torch.finfo(dtype).eps / 2 * rows_of(true) + torch.finfo(dtype).smallest_normal
        error = rows_of(ours.double() - true)
        if not rowwise:
            allowed, error = allowed.norm(), error.norm()
        assert (error <= allowed).all(), f"{(error / allowed.clamp(min=1e-300)).max():.3g} of what is allowed"


def labels_of(n: int, classes: int | None = None) -> Tensor:
    """Unequal classes, unsorted; some have a single member."""
    classes = classes or max(1, n // 4)
    return (torch.rand(n) ** 1.5 * classes).long()


def problem_of(n, references=None, dtype=torch.float32, ids=False):
    labels = labels_of(n)
    problem = Problem(signs(labels, dtype), labels)
    if references is not None:
        problem.ref_labels = labels_of(references, max(1, n // 4)).int()
        problem.ref_emb = signs(problem.ref_labels, dtype)
    if ids:
        problem.ids = torch.randint(0, max(1, n // 2), (n,))
        problem.ref_ids = problem.ids if references is None else torch.randint(0, max(1, n // 2), (references,))
    return problem


# Every seventh of all combinations: as no factor is a multiple of 7, these have every pair of values.
COMBINATIONS = list(
    product(
        [(False, False, None), (True, False, 7), (False, True, 1)],
        [0.0, 0.5, 1.0],
        [True, False],
        ["sup", "smooth"],
        [None, 75],
        ["mean", "sum", "none"],
        ["per_query", "violating_pairs"],
    )
)[::7]


@pytest.mark.parametrize(
    ("kind", "calibration_weight", "normalize_", "surrogate", "references", "reduction", "calibration_reduction"),
    COMBINATIONS,
)
def test_combinations(kind, calibration_weight, normalize_, surrogate, references, reduction, calibration_reduction):
    weight = 2.0 ** (torch.arange(40) % 3 - 1) if reduction == "none" else None
    include_self, ids, chunk_size = kind
    assert_accurate(
        problem_of(40, references, ids=ids),
        weight,
        surrogate=surrogate,
        reduction=reduction,
        calibration_weight=calibration_weight,
        calibration_reduction=calibration_reduction,
        normalize=normalize_,
        include_self=include_self,
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_settings(name, dtype):
    if name == "soft":  # its knee lies on no multiple of 1/32 either
        assert PUBLISHED[name]["delta"] * 32 % 1
    assert_accurate(problem_of(50, dtype=dtype), **PUBLISHED[name])
    assert_accurate(problem_of(50, 70, dtype=dtype), positive_margin=0.7, negative_margin=0.1, **PUBLISHED[name])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(n, dtype):
    assert_accurate(problem_of(n, dtype=dtype))
    assert_accurate(problem_of(n, dtype=dtype), chunk_size=10)
    assert_accurate(problem_of(5, n, dtype=dtype))
    assert_accurate(problem_of(n, 5, dtype=dtype), reduction="sum")


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.long
@pytest.mark.deep
def test_long_rows(surrogate):
    """More references than a block of columns, and few queries, whose rows are split over threads."""
    problem = problem_of(12, 4096 + 32)
    problem.ref_labels = torch.arange(4096 + 32) % 300
    problem.labels = torch.arange(12) % 5
    assert_accurate(problem, surrogate=surrogate)
    problem = problem_of(3, 9000)
    problem.ref_labels = torch.arange(9000) % 300
    problem.labels = torch.arange(3)
    assert_accurate(problem, surrogate=surrogate, reduction="sum")
    for queries, references in ((2, 8200), (9, 1400)):  # positives in two pieces, beside which hinges count once
        problem = problem_of(queries, references)
        problem.labels = torch.zeros(queries).long()
        problem.ref_labels = (torch.arange(references) >= 700).long()
        assert_accurate(problem, surrogate=surrogate, negative_margin=0.2)


def test_hinges_are_taken_from_the_margins_themselves():
    """0.9 and 0.6 have no float32, and a narrow hinge is a small difference: plain float32 loses three digits here."""
    x = torch.zeros(400, 64)
    x[:, :8] = 0.125  # products of 0.625 with the query
    query = torch.zeros(1, 64)
    query[0, :8] = 0.625
    options = {"calibration_weight": 1.0, "normalize": False, "calibration_reduction": "violating_pairs"}
    loss = roadmap_loss(query, torch.tensor([0]), x, torch.ones(400).long(), **options)
    assert abs(loss.double().item() - 0.025) <= 0.025 * 2e-7
    loss = roadmap_loss(query, torch.tensor([0]), x, torch.zeros(400).long(), positive_margin=0.65, **options)
    assert abs(loss.double().item() - 0.025) <= 0.025 * 2e-7


def off_the_kinks(problem, margin=2e-6, **options):
    """Whether no similarity is so near to a knee, a tie or a margin that a rounding error decides."""
    x = normalize(problem.embeddings.double())
    references = x if problem.ref_emb is None else normalize(problem.ref_emb.double())
    scores = x @ references.T
    labels = problem.labels if problem.ref_labels is None else problem.ref_labels
    positive = problem.labels[:, None] == labels[None]
    for row, is_positive in zip(scores, positive, strict=True):
        gaps = row[None] - row[is_positive][:, None]
        near = (gaps - 0.05).abs().min() if gaps.numel() else torch.tensor(1.0)
        others = gaps[:, ~is_positive]
        near = torch.minimum(near, others.abs().min() if others.numel() else torch.tensor(1.0))
        near = torch.minimum(near, torch.minimum((row - 0.9).abs().min(), (row - 0.6).abs().min()))
        if near < margin:
            return False
    return True


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_trained_and_untrained_embeddings(surrogate, noise):
    """Similarities with rounding errors, from clusters as in training."""
    labels = torch.arange(64) % 16
    for _ in range(50):
        centres = torch.randn(16, 48)
        problem = Problem(centres[labels] + noise * torch.randn(64, 48), labels)
        if off_the_kinks(problem):
            break
    assert_accurate(problem, rowwise=False, surrogate=surrogate)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_structure(data):
    """float64 against the reference, whatever labels, ids, settings and chunks."""
    n, references = data.draw(st.integers(1, 12)), data.draw(st.none() | st.integers(0, 20))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    label = st.integers(-3, 3)
    count = n if references is None else references
    problem = Problem(
        torch.randn(n, 5, dtype=torch.float64), torch.tensor(data.draw(st.lists(label, min_size=n, max_size=n)))
    )
    if references is not None:
        problem.ref_emb = torch.randn(references, 5, dtype=torch.float64)
        problem.ref_labels = torch.tensor(
            data.draw(st.lists(label, min_size=references, max_size=references)), dtype=torch.int8
        )
    if data.draw(st.booleans()):
        problem.ids = torch.randint(0, 6, (n,))
        problem.ref_ids = torch.randint(0, 6, (count,), dtype=torch.int32)
    options = {
        "surrogate": data.draw(st.sampled_from(["sup", "smooth"])),
        "tau": data.draw(st.sampled_from([0.01, 0.1, 1.0])),
        "rho": data.draw(st.sampled_from([0.0, 1.0, 100.0])),
        "delta": data.draw(st.sampled_from([0.0, 0.05, 0.5])),
        "calibration_weight": data.draw(st.sampled_from([0.0, 0.25, 1.0])),
        "calibration_reduction": data.draw(st.sampled_from(["per_query", "violating_pairs"])),
        "positive_margin": data.draw(st.sampled_from([-0.5, 0.9, 2.0])),
        "negative_margin": data.draw(st.sampled_from([-2.0, 0.3, 0.6])),
        "normalize": data.draw(st.booleans()),
        "include_self": data.draw(st.booleans()),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
    }
    weight = torch.randn(n, dtype=torch.float64) if options["reduction"] == "none" else None
    ours, gradients = problem.run(
        roadmap_loss, weight=weight, chunk_size=data.draw(st.none() | st.integers(1, 15)), **options
    )
    truth, true_gradients = problem.run(reference.roadmap_loss, weight=weight, **options)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    for ours_, true in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(ours_, true, rtol=1e-9, atol=1e-10)
