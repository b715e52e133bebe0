"""Several processes as one: losses, memory and cached_backward on 2 and 3 gloo ranks against a single process.

One start of the ranks runs all cases; each test then looks at what they brought. Where ranks fail, they are started for
that alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time

import pytest
import torch
from cases import deep
from ranks import begin, start, statuses
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import roadmap_ext
from roadmap_ext import EmbeddingMemory, cached_backward, distributed

LOSSES = {
    "roadmap": roadmap_ext.RoadmapLoss,
    "released": functools.partial(roadmap_ext.RoadmapLoss, calibration_reduction="violating_pairs"),
    "smooth, calibrated": functools.partial(roadmap_ext.RoadmapLoss, surrogate="smooth"),
    "fitted margins": functools.partial(roadmap_ext.RoadmapLoss, margins="auto"),
    "sup": roadmap_ext.SupAPLoss,
    "smooth": roadmap_ext.SmoothAPLoss,
    "calibration": roadmap_ext.CalibrationLoss,
    "sum": functools.partial(roadmap_ext.RoadmapLoss, reduction="sum"),
    "none": functools.partial(roadmap_ext.RoadmapLoss, reduction="none"),
    "with self": functools.partial(roadmap_ext.RoadmapLoss, include_self=True),
    "ignored label": functools.partial(roadmap_ext.RoadmapLoss, ignore_label=1),
    "ignored label, violating pairs": functools.partial(
        roadmap_ext.RoadmapLoss, ignore_label=7, calibration_reduction="violating_pairs"
    ),
    "ignored label, reference": functools.partial(roadmap_ext.RoadmapLoss, ignore_label=1, method="reference"),
    "products": functools.partial(roadmap_ext.RoadmapLoss, normalize=False, tau=0.5),
    "small chunks": functools.partial(roadmap_ext.RoadmapLoss, chunk_size=2),
    "sorted": functools.partial(roadmap_ext.RoadmapLoss, method="sorted"),
    "reference": functools.partial(roadmap_ext.RoadmapLoss, method="reference"),
    "reference, none": functools.partial(roadmap_ext.RoadmapLoss, method="reference", reduction="none"),
}
# How many items each rank has.
SHARES = {
    2: {"equal": [9, 9], "unequal": [4, 13], "empty": [0, 11], "single": [1, 8], "nothing": [0, 0]},
    3: {"equal": [6, 6, 6], "unequal": [2, 11, 5], "empty": [7, 0, 6], "last alone": [0, 0, 9]},
}
DIM, FEATURES = 5, 4
TIMEOUT = 3  # seconds that a rank waits for the others where they fail


def batch(rows, dtype=torch.float64):
    """Features [n, 4], labels and ids [n]; the labels 7 and 9 are those of one rank alone, 9 that of a single item."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    labels[-3:] = 7
    labels[:1] = 9
    ids = torch.arange(rows) // 2 * 2 if rows > 4 else torch.arange(rows)  # some items come twice
    return torch.randn(rows, FEATURES, generator=generator, dtype=dtype), labels, ids


def network(dtype=torch.float64):
    """A small model, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, DIM)).to(dtype)


def gradients(model):
    """Those of all parameters, in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


class Whole:
    """One process with all items: what every case is compared with."""

    world, first = 1, 0
    wrap = staticmethod(lambda model: model)
    gather = False

    def __init__(self, rows):
        self.rank, self.mine = 0, slice(0, sum(rows))


class Rank:
    """One of several, with its own items."""

    wrap = staticmethod(DistributedDataParallel)
    gather = True

    def __init__(self, rows, rank):
        self.rank, self.world, self.first = rank, len(rows), sum(rows[:rank])
        self.mine = slice(self.first, self.first + rows[rank])


# --- cases: each returns what a rank has to show; `tests` say how it relates to that of one process ------------------


def train(kind, who, rows, dtype=torch.float64):
    """Loss and parameter gradients, by the plain call."""
    x, labels, _ = (tensor[who.mine] for tensor in batch(sum(rows), dtype))
    model = who.wrap(network(dtype))
    loss = LOSSES[kind](gather_across_devices=who.gather)(model(x), labels)
    # Of "none" the mean over all queries is what a single process would take.
    (loss if loss.dim() == 0 else loss.sum() * who.world / max(1, sum(rows))).backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def with_ids(who, rows):
    """Items that come more than once are left out by their ids, whichever rank has them."""
    x, labels, ids = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = who.wrap(network())
    loss = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather)(model(x), labels, ids=ids, ref_ids=ids)
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def two_views(who, rows, **settings):
    """References of their own, with their gradients; there are more of them than queries."""
    x, labels, ids = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = who.wrap(network())
    both = model(torch.cat([x, x + 0.1, x.flip(1)]))
    queries, references = both.split([len(x), 2 * len(x)])
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather, **settings)
    loss = loss_function(
        queries, labels, ref_emb=references, ref_labels=labels.repeat(2), ids=ids, ref_ids=ids.repeat(2)
    )
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def detached_references(who, rows):
    """References without gradient."""
    x, labels, ids = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = who.wrap(network())
    embeddings = model(x)
    loss = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather)(
        embeddings, labels, ref_emb=embeddings.detach().clone(), ref_labels=labels, ids=ids, ref_ids=ids
    )
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def memory(who, rows, mini_batch_size=None, **settings):
    """Four steps with a memory that is shorter than they are long, and warm."""
    x, labels, ids = batch(sum(rows))
    model = who.wrap(network())
    held = EmbeddingMemory(
        max(1, 2 * sum(rows) + 3), DIM, warm_up=1, gather_across_devices=who.gather, dtype=torch.float64
    )
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather, **settings)
    losses = []
    for step in range(4):
        mine, labels_now, ids_now = (x + step)[who.mine], labels[who.mine], (ids + 5 * step)[who.mine]

        def ranked(embeddings, labels, ids=ids_now):
            held.enqueue(embeddings, labels, ids)
            return loss_function(embeddings, labels, ref_emb=held, ids=ids)

        if mini_batch_size is None:
            loss = ranked(model(mine), labels_now)
            loss.backward()
        else:
            loss = cached_backward(model, mine, labels_now, ranked, mini_batch_size=mini_batch_size)
        losses.append(loss.detach())
    return {
        "loss": torch.stack(losses),
        "gradients": gradients(model),
        "memory": torch.cat([held.embeddings, held.labels[:, None], held.ids[:, None]], dim=1),
    }


def cached(who, rows, mini_batch_size=2, scale=None, later=False):
    """cached_backward, or CachedLoss, with unequal numbers of mini-batches; gradients of two calls add up."""
    x, labels, _ = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = who.wrap(network())
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    for _ in range(2):
        if later:
            loss = roadmap_ext.CachedLoss(model, loss_function, mini_batch_size)(x, labels)
            loss.backward()
            loss = loss.detach()
        else:
            loss = cached_backward(model, x, labels, loss_function, mini_batch_size=mini_batch_size, scaler=scaler)
    return {"loss": loss, "gradients": gradients(model) / (scale or 1)}


def norms(who, rows):
    """A model with buffers that change in every forward, which DistributedDataParallel sends along."""
    x, labels, _ = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = network()
    with torch.random.fork_rng():
        torch.manual_seed(2 if who.first else 1)  # rank 0 has the buffers that count
        model[0] = nn.utils.parametrizations.spectral_norm(model[0], n_power_iterations=1)
    model = who.wrap(model)
    for _ in range(2):
        loss = cached_backward(
            model, x, labels, roadmap_ext.RoadmapLoss(gather_across_devices=who.gather), mini_batch_size=100
        )
    return {"loss": loss, "gradients": gradients(model)}


def no_gradient(who, rows):
    """Evaluation."""
    x, labels, _ = (tensor[who.mine] for tensor in batch(sum(rows)))
    with torch.no_grad():
        return {"loss": roadmap_ext.RoadmapLoss(gather_across_devices=who.gather)(network()(x), labels)}


def inference_references(who, rows, reduction="mean"):
    """References that were made under torch.inference_mode()."""
    x, labels, ids = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = who.wrap(network())
    with torch.inference_mode():
        references = network()(x.flip(1))
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather, reduction=reduction)
    loss = loss_function(model(x), labels, ref_emb=references, ref_labels=labels, ids=ids, ref_ids=ids)
    (loss if loss.dim() == 0 else loss.sum() * who.world / max(1, sum(rows))).backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def on_one_rank(who, rows):
    """Rank 0 alone wants a gradient; what the others bring is of inference mode, and owes a conjugate."""
    x = torch.complex(*batch(sum(rows))[0][who.mine].split(2, dim=1))
    if who.rank == 0:
        x = x.clone().requires_grad_()
    else:
        with torch.inference_mode():
            x = x.conj_physical().conj()
    every = distributed.gather(x) if who.gather else x
    every.abs().sum().backward()
    return {"rows": torch.view_as_real(every.detach().resolve_conj())}


def default_device(who, rows):
    """A default device that holds no numbers: what the ranks tell each other lies on the CPU, whatever it is."""
    x, labels, ids = (tensor[who.mine] for tensor in batch(sum(rows)))
    model = who.wrap(network())
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=who.gather)
    held = EmbeddingMemory(2 * sum(rows) + 3, DIM, gather_across_devices=who.gather, dtype=torch.float64, device="cpu")

    def ranked(embeddings, labels):
        held.enqueue(embeddings, labels, ids)
        return loss_function(embeddings, labels, ref_emb=held, ids=ids) + loss_function(embeddings, labels)

    with torch.device("meta"):
        loss = cached_backward(model, x, labels, ranked, mini_batch_size=3)
    return {"loss": loss, "gradients": gradients(model)}


def measured(who, rows):
    """RetrievalMetrics of all ranks' items, which come in two batches and one of them twice."""
    x, labels, ids = (tensor[who.mine] for tensor in batch(sum(rows)))
    metrics = roadmap_ext.RetrievalMetrics(k=(1, 2))
    for part in (slice(None), slice(None, 1)):
        metrics.update(x[part], labels[part], ids[part])
    return {"rows": torch.tensor(list(metrics.compute().values())).nan_to_num()}


def gathered(who, rows):
    """distributed.gather, its gradient and its gradient's gradient."""
    x = batch(sum(rows))[0][who.mine].clone().requires_grad_()
    every = distributed.gather(x) if who.gather else x
    (first,) = torch.autograd.grad((every**3).sum() / who.world, x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    return {"rows": every.detach(), "first": first.detach(), "second": second}


CASES = {f"train, {kind}": functools.partial(train, kind) for kind in LOSSES} | {
    "ids": with_ids,
    "two views": two_views,
    "two views, reference": functools.partial(two_views, method="reference"),
    "two views, ignored label": functools.partial(two_views, ignore_label=1),
    "detached references": detached_references,
    "inference references": inference_references,
    "inference references, none": functools.partial(inference_references, reduction="none"),
    "on one rank": on_one_rank,
    "default device": default_device,
    "memory": memory,
    "memory, reference": functools.partial(memory, method="reference"),
    "memory, ignored label": functools.partial(memory, ignore_label=1),
    "memory, cached": functools.partial(memory, mini_batch_size=3),
    "cached": cached,
    "cached, scaled": functools.partial(cached, scale=2.0**12),
    "cached, backward later": functools.partial(cached, later=True),
    "spectral norm": norms,
    "no gradient": no_gradient,
    "gathered": gathered,
    "measured": measured,
    "float32": functools.partial(train, "roadmap", dtype=torch.float32),
    "bfloat16": functools.partial(train, "roadmap", dtype=torch.bfloat16),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}


def work(rank, world, folder):
    """One rank: every case with every share, then one wrong call after another."""
    begin(rank, world, folder, 30)
    results = {
        (name, share): case(Rank(rows, rank), rows)
        for name, case in CASES.items()
        for share, rows in SHARES[world].items()
    }
    torch.save(results, folder / f"{rank}.pt")
    torch.save(exchanged(world), folder / f"bytes {rank}.pt")
    errors = {}
    for name, call in WRONG.items():
        try:
            call(rank)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    torch.save(errors, folder / f"errors {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, *deep(3)])
def ranks(request, tmp_path_factory):
    """What each rank brought of all cases, the errors of all wrong calls, and the bytes of a step."""
    folder = tmp_path_factory.mktemp(f"{request.param} ranks")
    assert statuses(start(request.param, work, folder)) == [0] * request.param
    each = range(request.param)
    return [[torch.load(folder / f"{what}{rank}.pt") for rank in each] for what in ("", "errors ", "bytes ")]


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(ranks, name):
    """Loss and gradients, as DistributedDataParallel averages them, are those of one process with the whole batch."""
    brought = ranks[0]
    tolerance = TOLERANCE.get(name, 1e-9)
    for share, rows in SHARES[len(brought)].items():
        whole = CASES[name](Whole(rows), rows)
        assert rows == [0, 0] or whole["loss" if "loss" in whole else "rows"].abs().sum() > 0
        for rank, ours in enumerate(result[name, share] for result in brought):
            mine = Rank(rows, rank).mine
            for what, expected in whole.items():
                if what in ("first", "second") or (what == "loss" and expected.dim() and "none" in name):
                    expected = expected[mine]
                where = f"{share}, {what}: "
                torch.testing.assert_close(
                    ours[what], expected, rtol=tolerance, atol=tolerance, msg=lambda text, where=where: where + text
                )


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_every_rank(ranks, name):
    brought = ranks[0]
    for share in SHARES[len(brought)]:
        first, *others = (result[name, share] for result in brought)
        for other in others:
            for what in ("gradients", "memory", *(["loss"] if "none" not in name else [])):
                assert what not in first or torch.equal(first[what], other[what]), (share, what)


def exchanged(world):
    """Bytes from the other ranks in forward and in backward, for equal shares of 6 items of 5 float32."""
    received = []

    def count(call):
        def counted(out, *arguments):
            received.append(out.numel() * out.element_size() * (world - 1) // world)
            return call(out, *arguments)

        return counted

    for name in (distributed._ALL_GATHER, "all_to_all_single"):
        setattr(torch.distributed, name, count(getattr(torch.distributed, name)))
    embeddings = torch.randn(6, 5, requires_grad=True)
    loss = roadmap_ext.RoadmapLoss(gather_across_devices=True)(embeddings, torch.arange(6) // 3)
    forward = sum(received)
    loss.backward()
    return forward, sum(received) - forward


def test_bytes_a_step(ranks):
    """are those of docs/large-batches.md."""
    n, d, s = 6, 5, 4
    for counted in ranks[2]:
        assert counted == (
            (len(ranks[0]) - 1) * (512 + 8 * n + n * d * s + 24),
            (len(ranks[0]) - 1) * (8 + n * d * s),
        )


# --- what does not fit together --------------------------------------------------------------------------------------


def call(rank, wrong, **settings):
    """A loss on every rank, and on rank 1 something that is wrong: (embeddings, labels, keywords) to the same."""
    x, labels, ids = batch(8)
    arguments = (x[:, :3].clone().requires_grad_(), labels, {"ids": ids, "ref_ids": ids})
    if rank == 1:
        arguments = wrong(*arguments)
    return roadmap_ext.RoadmapLoss(gather_across_devices=True, **settings)(*arguments[:2], **arguments[2])


def with_memory(rank, enqueue):
    """A memory that is enqueued, and on rank 1 something that is wrong."""
    x, labels, ids = batch(8)
    held = EmbeddingMemory(9, FEATURES, gather_across_devices=True, dtype=torch.float64)
    arguments = enqueue(x, labels, ids) if rank == 1 else (x, labels, ids)
    held.enqueue(*arguments)


def gradients_off_on(rank):
    with torch.no_grad() if rank == 1 else contextlib.nullcontext():
        call(0, None)


WRONG = {
    "labels": lambda rank: call(rank, lambda x, y, ids: (x, y.double(), ids)),
    "no tensor": lambda rank: call(rank, lambda x, y, ids: (None, y, ids)),
    "dimension": lambda rank: call(rank, lambda x, y, ids: (x[:, :2], y, ids)),
    "dtype": lambda rank: call(rank, lambda x, y, ids: (x.float(), y, ids)),
    "ids": lambda rank: call(rank, lambda x, y, ids: (x, y, {})),
    "references": lambda rank: call(rank, lambda x, y, ids: (x, y, {"ref_emb": x.clone(), "ref_labels": y, **ids})),
    "settings": lambda rank: call(0, None, tau=0.01 * (1 + rank)),
    "gradients": gradients_off_on,
    "memory's ids": lambda rank: call(
        rank, lambda x, y, ids: (x, y, {"ref_emb": EmbeddingMemory(3, 3, dtype=torch.float64)})
    ),
    "enqueued": lambda rank: with_memory(rank, lambda x, y, ids: (x, y[1:], ids)),
    "enqueued dimension": lambda rank: with_memory(rank, lambda x, y, ids: (x[:, :2], y, ids)),
    "gathered": lambda rank: distributed.gather(torch.zeros(3, 2 + (rank == 1))),
    "gathered number": lambda rank: distributed.gather(torch.tensor(1.0) if rank == 1 else torch.zeros(3, 2)),
}


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        (
            "labels",
            "TypeError: labels must have an integer dtype",
            "RuntimeError: rank 1 of .* failed.*: TypeError: lab",
        ),
        ("no tensor", "TypeError: embeddings must be a torch.Tensor", "RuntimeError: rank 1 of .* TypeError: emb"),
        (
            "dimension",
            "ValueError: the ranks have to agree in dimension 1, .*this one, rank 1, has 2",
            "ValueError: .*3",
        ),
        ("dtype", "ValueError: .*dtype.*rank 1, has torch.float32", "ValueError: .*dtype.*has torch.float64"),
        ("ids", "ValueError: the ranks have to agree in ids", "ValueError: the ranks have to agree in ids"),
        ("references", "ValueError: the ranks make different calls: .*references", "ValueError: the ranks make differ"),
        ("settings", "ValueError: .* agree in settings.*tau=0.02", "ValueError: .* agree in settings"),
        ("gradients", "ValueError: .* agree in grad mode", "ValueError: .* agree in grad mode"),
        ("memory's ids", "ValueError: ref_emb is an EmbeddingMemory, which holds", "RuntimeError: rank 1 .*ValueError"),
        ("enqueued", "ValueError: labels must be 1-D", "RuntimeError: rank 1 .*ValueError: labels"),
        (
            "enqueued dimension",
            "ValueError: embeddings must have the memory's dim",
            "RuntimeError: rank 1 .*ValueError",
        ),
        ("gathered", "ValueError: .*dimension 1", "ValueError: .*dimension 1"),
        ("gathered number", "ValueError: gather takes a tensor of rows", "RuntimeError: rank 1 .*ValueError: gather"),
    ],
)
def test_wrong_on_one_rank(ranks, name, own, others):
    """Bad arguments of one rank end the call on all of them, and the next call works: they run one after another."""
    for rank, errors in enumerate(ranks[1]):
        assert re.match(own if rank == 1 else others, errors[name], re.DOTALL), errors[name]


def fail(rank, world, folder, how):
    """Two steps on every rank, but on the last, which fails in the second."""
    begin(rank, world, folder, TIMEOUT)
    x, labels, _ = batch(12)
    model = network() if how != "late, cached" else DistributedDataParallel(network())
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=True)
    loss_function(model(x), labels).backward()
    try:
        if rank == world - 1:
            if how == "exits":
                os._exit(0)
            if how == "raises":
                raise FileNotFoundError("an image")
            time.sleep(TIMEOUT * 2)  # is late, and goes on to what no longer works
        if how == "late, cached":
            cached_backward(model, x, labels, loss_function, mini_batch_size=5)
        else:
            loss_function(model(x), labels).backward()
    except (RuntimeError, FileNotFoundError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # gloo's own clean-up of a group that is broken may abort the process, or wait without end


HOWS = ("exits", "raises", "late", "late, cached")


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The errors of two ranks whose third fails, for each way to fail; all at once, for most of it is waiting."""
    folders = {how: tmp_path_factory.mktemp(how) for how in HOWS}
    began = time.monotonic()
    started = [start(3, fail, folders[how], how) for how in HOWS]
    assert [statuses(processes, 60) for processes in started] == [[0, 0, 0]] * len(HOWS)
    assert time.monotonic() - began < 50
    return {how: [(folders[how] / f"{rank}.txt").read_text() for rank in range(2)] for how in HOWS}


@pytest.mark.parametrize("how", HOWS)
def test_rank_that_fails(how, failed):
    """No rank waits longer than the process group's timeout says."""
    for rank, text in enumerate(failed[how]):
        assert text.startswith(f"RuntimeError: rank {rank} of 3 waited in vain for the others"), text


def sharded(rank, world, folder):
    """Steps of a model under FSDP2, with as many mini-batches on each rank, and with different numbers of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    begin(rank, world, folder, 10)
    mesh = init_device_mesh("cpu", (world,))
    rows = [7, 9] if world == 2 else [7, 9, 8]
    x, labels, _ = (tensor[Rank(rows, rank).mine] for tensor in batch(sum(rows)))
    loss_function = roadmap_ext.RoadmapLoss(gather_across_devices=True)
    found = {}
    for name, size in {"one": 100, "equal": 5, "different": 3 - rank}.items():
        model = network()
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        began = time.monotonic()
        try:
            loss = cached_backward(model, x, labels, loss_function, mini_batch_size=size)
            each = torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])
            found[name] = {"loss": loss, "gradients": each}
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert time.monotonic() - began < 5
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.deep
@pytest.mark.parametrize("world", [2, 3])
def test_fully_sharded(world, tmp_path):
    """Equal numbers of mini-batches are as in one process; others, which abort in the backend, raise on every rank."""
    assert statuses(start(world, sharded, tmp_path)) == [0] * world
    rows = [7, 9] if world == 2 else [7, 9, 8]
    expected = cached(Whole(rows), rows)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in ("one", "equal"):
            torch.testing.assert_close(found[name]["loss"], expected["loss"])
            torch.testing.assert_close(2 * found[name]["gradients"], expected["gradients"])
        assert re.match("ValueError: the ranks have to agree in number of mini-batches", found["different"])


# --- one process -----------------------------------------------------------------------------------------------------


def test_not_initialised():
    x, labels, ids = batch(8)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised: call .* torchrun"):
        roadmap_ext.RoadmapLoss(gather_across_devices=True)(x, labels)
    with pytest.raises(RuntimeError, match="not initialised"):
        EmbeddingMemory(4, FEATURES, gather_across_devices=True).enqueue(x, labels, ids)
    with pytest.raises(RuntimeError, match="not initialised"):
        distributed.gather(x)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    begin(0, 1, tmp_path, 10)
    yield
    torch.distributed.destroy_process_group()


def test_a_single_rank(alone):
    """is one process: the same bits as without a group."""
    for name in ("train, roadmap", "memory", "cached", "gathered"):
        rows = [17]
        for what, expected in CASES[name](Whole(rows), rows).items():
            assert torch.equal(CASES[name](Rank(rows, 0), rows)[what], expected), (name, what)


@pytest.fixture
def as_several(alone, monkeypatch):
    """The way of several ranks; there is one."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(roadmap_ext.memory, "world_size", lambda: 2)


@pytest.mark.parametrize("name", CASES)
def test_a_single_rank_by_the_way_of_several(as_several, name):
    rows, tolerance = [17], TOLERANCE.get(name, 1e-9)
    ours = CASES[name](Rank(rows, 0), rows)
    for what, expected in CASES[name](Whole(rows), rows).items():
        torch.testing.assert_close(ours[what], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("labels", "labels must have an integer dtype"),
        ("no tensor", "embeddings must be a torch.Tensor"),
        ("memory's ids", "ref_emb is an EmbeddingMemory, which holds"),
        ("enqueued dimension", "embeddings must have the memory's dim"),
        ("gathered number", "gather takes a tensor of rows"),
    ],
)
def test_wrong_on_the_only_rank(as_several, name, match):
    with pytest.raises((TypeError, ValueError), match=match):
        WRONG[name](1)


def test_what_is_no_tensor_or_has_no_backend(as_several):
    with pytest.raises(TypeError, match=r"rows must be a torch\.Tensor, got list"):
        distributed.gather([1.0])
    with pytest.raises(ValueError, match=r"no backend for tensors on meta, only .*cpu:gloo.*: move them there"):
        distributed.gather(torch.zeros(3, device="meta"))


def test_compiled(as_several):
    """torch.compile leaves the exchange out of its graphs."""
    x, labels, _ = batch(8)
    loss = roadmap_ext.RoadmapLoss(gather_across_devices=True)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compile(lambda x: loss(2 * x, labels), backend="aot_eager")(leaf).backward()
    loss(2 * other, labels).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
