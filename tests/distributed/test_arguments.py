"""Every argument of every call of several ranks, wrong on one rank alone: all of them raise, and soon.

One start of the ranks makes all calls, one after another, each wrong on another rank than the one before.
"""

from __future__ import annotations

import gc
import inspect
import re
import time

import pytest
import torch
from ranks import begin, start, statuses
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import roadmap_ext
from roadmap_ext import EmbeddingMemory, RoadmapLoss, cached_backward, distributed

ROWS, DIM, FEATURES = 8, 4, 6
SOON = 5  # seconds; the ranks' group would wait for 30
HEARD = r"RuntimeError: rank \d of \d failed|ValueError: the ranks (have to agree in|make different calls)"


class Of:
    """A wrong value that is made of the right arguments."""

    def __init__(self, make):
        self.make = make


def wrong_integers(rows=ROWS):
    return [None, [0] * rows, torch.zeros(rows - 1).long(), torch.zeros(rows), torch.zeros(rows, 2).long()]


def wrong_rows():
    x = torch.ones(ROWS, DIM)
    return [
        *(None, [[1.0]], x[:, 0], x.long(), x[:, :3], x.double()),
        *(x.to_sparse(), x.to("meta"), torch.zeros(ROWS, *[1] * 44)),
    ]


def fails(*_):
    raise FileNotFoundError("an image")


SETTINGS = {
    "loss": ["mean", None, "mrr"],
    "k": [0, (), "a", None, (1, 2)],
    "rank_temperature": [0, "a", None, 2.0],
    "gain": ["square", None, "linear"],
    "alpha": [0, "a", 2.0],
    "leak": [-1, "a", 0.1],
    "beta": [-1, "a", 0.1],
    "gamma": [-1, "a", 0.5],
    "calibration_weight": [-1, 2.0, "a", None, 0.4],
    "positive_margin": ["a", float("nan"), 0.8],
    "negative_margin": [None, float("inf"), 0.5],
    "margins": ["mean", 1, "auto"],
    "calibration_reduction": ["mean", None, "violating_pairs"],
    "normalize": [1, None, False],
    "include_self": [1, "no", True],
    "ignore_label": ["a", 1.5, True, 2**63, 3],
    "chunk_size": [0, 2.5, True],
    "surrogate": ["sigmoid", None, "smooth"],
    "tau": [-1, 0, float("nan"), "a", torch.tensor(0.01), 0.02],
    "rho": [-1, True, 99],
    "delta": [-0.1, "a", 0.06],
    "start": ["a", float("inf"), 0.6],
    "offset": ["a", float("nan"), 1.44],
    "reduction": ["median", None, "none", "sum"],
    "method": ["fast", None, "reference"],
}
QUERIES = {
    **{"embeddings": wrong_rows(), "labels": wrong_integers(), "ids": wrong_integers(), "ref_ids": wrong_integers()},
    # of what one rank brings the others know nothing
    "positives": [torch.ones(ROWS, ROWS).bool(), 3],
    "relevance": [torch.ones(ROWS, ROWS), "a"],
}
REFERENCES = {
    "ref_emb": [*wrong_rows(), EmbeddingMemory(9, DIM)],
    "ref_labels": wrong_integers(),
}
WRONG = {
    "roadmap_loss": QUERIES | REFERENCES | SETTINGS,
    "RoadmapLoss": QUERIES | REFERENCES | {"indices_tuple": [(torch.zeros(1).long(),) * 3, 3]},
    "gather": {"rows": [*wrong_rows(), torch.tensor(1.0)]},
    "enqueue": {
        "embeddings": wrong_rows(),
        "labels": [*wrong_integers(), torch.zeros(ROWS).int()],
        "ids": [*wrong_integers(), torch.zeros(ROWS).int()],
    },
    "cached_backward": {
        "model": [
            *(None, "network", lambda x: x[:, :DIM], nn.Linear(FEATURES, DIM)),
            *(Of(lambda right: right["model"].module), Of(lambda right: right["model"].module.forward)),
            Of(lambda right: lambda x: right["model"](x)),
        ],
        "inputs": [
            *(None, [], "abc", torch.tensor(1.0), {"a": torch.zeros(ROWS, FEATURES), "b": torch.zeros(ROWS - 1)}),
            *(torch.zeros(ROWS, FEATURES - 1), torch.zeros(ROWS, FEATURES).double()),
            torch.zeros(ROWS, FEATURES, requires_grad=True) * 2,
        ],
        "labels": [None, torch.zeros(ROWS - 1).long(), torch.zeros(ROWS)],
        "loss_fn": [
            *(None, 1.0, fails, lambda x, y: 1.0, lambda x, y: x, lambda x, y: torch.ones(())),
            *(RoadmapLoss(), RoadmapLoss(gather_across_devices=True, tau=0.02)),
            RoadmapLoss(gather_across_devices=True, reduction="none"),
            lambda x, y: roadmap_ext.roadmap_loss(x.detach().requires_grad_(), y, gather_across_devices=True),
        ],
        "mini_batch_size": [0, -1, 2.5, None, True],
        "scaler": [3.0, torch.amp.GradScaler("cpu")],
        "call": [
            *("encode", fails, lambda model, x: fails(model(x)), lambda model, x: (model(x), 1)),
            *(lambda model, x: model(x)[:1], lambda model, x: model(x).sum(), lambda model, x: model(x).detach()),
        ],
    },
}
SIGNATURES = {
    "roadmap_loss": roadmap_ext.roadmap_loss,
    "RoadmapLoss": RoadmapLoss.forward,
    "gather": distributed.gather,
    "enqueue": EmbeddingMemory.enqueue,
    "cached_backward": cached_backward,
}
CASES = [
    (call, argument, place)
    for call, arguments in WRONG.items()
    for argument, values in arguments.items()
    for place in range(len(values))
]


def right(call, rank):
    """A call, and arguments of which none is wrong."""
    generator = torch.Generator().manual_seed(rank)
    x, labels = torch.randn(ROWS, FEATURES, generator=generator), torch.arange(ROWS) % 3
    ids = torch.arange(ROWS) + rank * ROWS
    if call == "gather":
        return distributed.gather, {"rows": x[:, :DIM]}
    if call == "enqueue":
        memory = EmbeddingMemory(2 * ROWS, DIM, gather_across_devices=True)
        return memory.enqueue, {"embeddings": x[:, :DIM], "labels": labels, "ids": ids}
    if call == "cached_backward":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = DistributedDataParallel(nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, DIM)))
        loss_fn = RoadmapLoss(gather_across_devices=True)
        given = {"model": model, "inputs": x, "labels": labels, "loss_fn": loss_fn, "mini_batch_size": 3 + rank}
        cached_backward(**given)  # in the second step DistributedDataParallel also arranges its buckets
        return cached_backward, given
    given = {"embeddings": x[:, :DIM].clone().requires_grad_(), "labels": labels}
    given |= {"ref_emb": x[:, 1 : DIM + 1], "ref_labels": labels, "ids": ids, "ref_ids": ids + 3}
    if call == "RoadmapLoss":
        return RoadmapLoss(gather_across_devices=True), given
    return roadmap_ext.roadmap_loss, given | {"gather_across_devices": True}


def work(rank, world, folder):
    """One rank: all cases, until one of them takes so long that the ranks are no longer together."""
    begin(rank, world, folder, 30)
    found = {}
    for number, (call, argument, place) in enumerate(CASES):
        function, given = right(call, rank)
        if rank == number % world:
            value = WRONG[call][argument][place]
            given[argument] = value.make(given) if isinstance(value, Of) else value
        began = time.monotonic()
        try:
            function(**given)
            error = None
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        found[call, argument, place] = error, time.monotonic() - began
        torch.save(found, folder / f"{rank}.pt")
        if error is None or found[call, argument, place][1] > SOON:
            return
    # They still are, and tensors of any number of dimensions are right.
    many = distributed.gather(torch.full([1] * 45, float(rank)))
    assert many.shape == (world, *[1] * 44)
    assert many.flatten().tolist() == list(range(world))
    (folder / f"{rank} is through").touch()
    del function, given
    gc.collect()  # DistributedDataParallel has to go before its group
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.deep)])
def ranks(request, tmp_path_factory):
    """Of each rank, the error of every case and the seconds it took."""
    folder = tmp_path_factory.mktemp(f"{request.param} ranks")
    statuses(start(request.param, work, folder))
    through = [(folder / f"{rank} is through").exists() for rank in range(request.param)]
    return through, [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("call", WRONG)
def test_every_argument_is_tried(call):
    assert set(inspect.signature(SIGNATURES[call]).parameters) - {"self", "gather_across_devices"} == set(WRONG[call])


@pytest.mark.parametrize("call", WRONG)
def test_wrong_on_one_rank(ranks, call):
    for number, case in enumerate(CASES):
        if case[0] != call:
            continue
        for rank, found in enumerate(ranks[1]):
            error, seconds = found.get(case, ("the ranks did not come to it", 0))
            assert error, (case, rank)
            assert seconds < SOON, (case, rank, error)
            if rank != number % len(ranks[1]):
                assert re.match(HEARD, error), (case, rank, error)


def test_the_ranks_are_still_together(ranks):
    assert all(ranks[0])
