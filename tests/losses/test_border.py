"""What crosses from Python to the kernels: that it leaks nothing, and that it means the same on both sides."""

import ctypes
import math

import pytest
import torch

import roadmap_ext
from roadmap_ext import ap_loss, reference, settings
from roadmap_ext.pairs import Pairs, from_labels
from roadmap_ext.settings import Objective, Surrogate, checked

pytestmark = pytest.mark.host

LIBC = ctypes.CDLL(None)


class Memory(ctypes.Structure):
    """What glibc's mallinfo2() returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "free_blocks", "smblks", "maps", "mapped", "usmblks", "fsmblks", "used", "free", "keep")
    )


def bytes_in_use():
    """Of all that was ever allocated with malloc, what has not been freed."""
    if not hasattr(LIBC, "mallinfo2"):
        pytest.skip("live memory is read from glibc")
    LIBC.mallinfo2.restype = Memory
    memory = LIBC.mallinfo2()
    return memory.used + memory.mapped


def growth(call, calls=500):
    """Bytes that a call leaves behind, in the best of a few rounds: a leak is in each of them."""
    rounds = []
    for _ in range(5):
        before = bytes_in_use()
        for _ in range(calls):
            call()
        rounds.append((bytes_in_use() - before) / calls)
    return min(rounds)


SCORES = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.9, 0.3]])
TARGET, WEIGHT = SCORES > 0.4, torch.ones(2, 3, dtype=torch.float64)
PAIRS = from_labels(torch.tensor([0, 1]), torch.tensor([0, 1, 0]), *[torch.arange(2), torch.arange(3)], False, False)
SURROGATE, OBJECTIVE = Surrogate().flat(), Objective().flat()
CALLS = {
    "numbers": ("rank_loss", (SCORES, TARGET, None, None, OBJECTIVE, 1, True)),
    "optional tensor": ("rank_loss", (SCORES, TARGET, None, TARGET, OBJECTIVE, 1, False)),
    "tensors": ("count_pairs", (PAIRS.flat(), 0, 2, 3)),
    "both": (
        "objective_rows_",
        (SCORES, WEIGHT.new_zeros(2, 5), PAIRS.flat(), 0, WEIGHT, OBJECTIVE, None, None, False),
    ),
    "ranks": ("smooth_rank", (SCORES, TARGET, None, SURROGATE, True)),
    "metrics": ("rank_metrics", (SCORES, PAIRS.flat(), -1)),
    "too few numbers": ("rank_loss", (SCORES, TARGET, None, None, OBJECTIVE[:15], 1, True)),
    "too few tensors": ("count_pairs", (PAIRS.flat()[:5], 0, 2, 3)),
    "a list without its columns": ("count_pairs", ([*PAIRS.flat()[:5], TARGET], 0, 2, 3)),
}


@pytest.mark.parametrize("case", CALLS)
def test_nothing_leaks(case):
    """Lists of numbers and of tensors cross the stable ABI without a leak, where strings do not; errors, too."""
    name, arguments = CALLS[case]

    def call():
        try:
            getattr(torch.ops.roadmap_ext, name)(*arguments)
        except RuntimeError:
            assert case.startswith(("too few", "a list"))
        else:
            assert not case.startswith(("too few", "a list"))

    assert growth(call) < 4


def test_a_leak_would_be_seen():
    kept = []
    assert growth(lambda: kept.append(torch.empty(1))) > 16


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize(
    "given", [{}, {"offset": 3.0}, {"start": 0.25, "delta": 0.0}, {"tau": 0.2, "rho": 7.0, "delta": 0.3}]
)
def test_each_setting_arrives_where_it_belongs(surrogate, given):
    """Gaps below, between and above the threshold, for settings that all differ: an exchange of two would show."""
    scores = torch.tensor([[0.5, 0.4, 0.52, 0.58, 0.9, 0.1]], dtype=torch.float64)
    target = torch.tensor([[True, False, False, False, False, True]])
    ours = ap_loss(scores, target, surrogate=surrogate, **given)
    torch.testing.assert_close(ours, reference.ap_loss(scores, target, surrogate=surrogate, **given))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_settings_that_change(dynamic):
    """torch.compile takes a number that changes for a variable; it is one in the lists that cross, too."""
    x, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) % 3

    def both(scores, tau, weight):
        loss = roadmap_ext.roadmap_loss(x, labels, tau=tau, calibration_weight=weight)
        return loss + ap_loss(scores, TARGET, tau=tau)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tau, weight in ((0.01, 0.5), (0.02, 0.25), (0.05, 0.75), (0.05, 1.0)):
        leaf = SCORES.clone().requires_grad_()
        mine, right = compiled(leaf, tau, weight), both(leaf, tau, weight)
        torch.testing.assert_close(mine, right)
        torch.testing.assert_close(torch.autograd.grad(mine, (leaf, x)), torch.autograd.grad(right, (leaf, x)))


def test_objects_are_what_was_asked_for():
    made = checked({"tau": 1, "offset": None, "method": "tiled", "ignore_label": 7, "calibration_weight": 0})
    assert made == settings.Settings(
        Objective(Surrogate(tau=1.0), calibration_weight=0.0), ignore_label=7, method="pairwise"
    )
    assert checked({}) == settings.Settings()
    assert math.isclose(made.objective.surrogate.value_above_threshold(), 0.5 + 1 / (1 + math.exp(-0.05)))
    with pytest.raises(AttributeError):
        made.objective.surrogate.tau = 2.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        checked({"temperature": 1.0})


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (roadmap_ext.ap_loss, "normalize"),
        (roadmap_ext.smooth_rank, "reduction"),
        (reference.ap_loss, "method"),
        (reference.smooth_rank, "method"),
        (lambda _scores, _target, **more: roadmap_ext.SmoothAPLoss(**more), "rho"),
        (lambda _scores, _target, **more: roadmap_ext.CalibrationLoss(**more), "tau"),
    ],
)
def test_settings_of_others_are_refused(function, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        function(SCORES, TARGET, **{name: settings.DEFAULTS[name]})


def test_pairs_come_back_as_they_were():
    assert all(a is b for a, b in zip(Pairs.of(PAIRS.flat(), -1).flat(), PAIRS.flat(), strict=True))
    with pytest.raises(ValueError, match="unpack"):
        Pairs.of(PAIRS.flat()[:5], -1)
    own = PAIRS._replace(first_own=1)
    for begin in (0, 1):
        part, (target, ignore) = own.rows(slice(begin, begin + 1)), own.masks(3)
        assert all(torch.equal(a[0], b[begin]) for a, b in zip(part.masks(3), (target, ignore), strict=True))
