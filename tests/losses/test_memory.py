"""EmbeddingMemory in one process: a ring, what it remembers over a stop, and what a loss makes of it.

Of several ranks: test_distributed.py.
"""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import roadmap_ext
from roadmap_ext import EmbeddingMemory, RoadmapLoss, SmoothAPLoss, SupAPLoss, roadmap_loss

DIM = 3


def rows(count, first=0):
    """Embeddings, labels and ids of which each tells which one it is."""
    ids = torch.arange(first, first + count)
    return ids[:, None] * torch.ones(DIM), ids * 10, ids


def filled(size, count, **options):
    memory = EmbeddingMemory(size, DIM, **options)
    memory.enqueue(*rows(count))
    return memory


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 12), max_size=8), warm_up=st.integers(0, 2))
def test_a_ring(size, batches, warm_up):
    memory, expected, count = EmbeddingMemory(size, DIM, warm_up=warm_up), [], itertools.count()
    for call, batch in enumerate(batches):
        ids = [next(count) for _ in range(batch)]
        embeddings, labels, numbers = rows(batch, ids[0] if ids else 0)
        memory.enqueue(embeddings, labels, numbers)
        expected = (expected + ids)[-size:] if call >= warm_up else []
        assert sorted(memory.ids.tolist()) == expected
        assert len(memory) == len(expected)
        assert torch.equal(memory.labels, memory.ids * 10)
        assert torch.equal(memory.embeddings, memory.ids[:, None] * torch.ones(DIM))


def test_it_goes_on_from_a_state():
    """To the same places as one that never stopped, wherever the ring was, and within the warm-up."""
    for batches, warm_up in [((2,), 0), ((4, 3), 0), ((5, 5, 1), 0), ((2, 2), 3)]:
        memory = EmbeddingMemory(5, DIM, warm_up=warm_up)
        for batch in batches:
            memory.enqueue(*rows(batch))
        copies = [copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), EmbeddingMemory(5, DIM, warm_up=warm_up)]
        copies[2].load_state_dict(memory.state_dict())
        for one in (memory, *copies):
            one.enqueue(*rows(2, first=50))
            one.enqueue(*rows(4, first=60))
        for one in copies:
            assert torch.equal(one.ids, memory.ids)
            assert torch.equal(one.labels, memory.labels)
            assert torch.equal(one.embeddings, memory.embeddings)
    for other in (EmbeddingMemory(6, DIM), EmbeddingMemory(5, DIM + 1)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict(memory.state_dict())
        assert len(other) == 0


def as_safetensors_walks(state):
    """What safetensors asks of each value of a state_dict before it writes it: a file as {name: tensor}."""
    places = set()
    for name, x in state.items():
        assert isinstance(x, torch.Tensor), name
        assert x.layout == torch.strided, name
        assert x.is_contiguous(), name
        if x.untyped_storage().size():
            place = x.device, x.untyped_storage().data_ptr()
            assert place not in places, name  # nothing is shared
            places.add(place)
    return {name: x.clone() for name, x in state.items()}


MODULES = {
    "RoadmapLoss": roadmap_ext.RoadmapLoss,
    "SupAPLoss": roadmap_ext.SupAPLoss,
    "SmoothAPLoss": roadmap_ext.SmoothAPLoss,
    "CalibrationLoss": roadmap_ext.CalibrationLoss,
    "RecallAtKLoss": roadmap_ext.RecallAtKLoss,
    "NDCGLoss": roadmap_ext.NDCGLoss,
    "MRRLoss": roadmap_ext.MRRLoss,
    "HierarchicalAPLoss": roadmap_ext.HierarchicalAPLoss,
    "APLoss": roadmap_ext.APLoss,
    "EmbeddingMemory": lambda: EmbeddingMemory(5, DIM),
    "CachedLoss": lambda: roadmap_ext.CachedLoss(nn.Linear(4, DIM), roadmap_ext.RoadmapLoss(), 2),
}


def test_every_module_is_looked_at():
    public = [value for name in roadmap_ext.__all__ if isinstance(value := getattr(roadmap_ext, name), type)]
    assert {kind.__name__ for kind in public if issubclass(kind, nn.Module)} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_state_holds_tensors_alone(name):
    """So that a model with it can be saved by whatever walks a state_dict, and is itself when it is loaded."""
    model, other = (nn.ModuleDict({"network": nn.Linear(4, DIM), "ours": MODULES[name]()}) for _ in range(2))
    if name == "EmbeddingMemory":
        for first in (0, 3):
            model["ours"].enqueue(*rows(3, first=first))
    written = as_safetensors_walks(model.state_dict())
    half = {key: x.half() for key, x in written.items()}  # as some loops do, to all alike
    for state in (written, half):
        other.load_state_dict(state)
        again = other.state_dict()
        assert all(torch.allclose(again[key], x, atol=1e-3) for key, x in written.items())
    if name == "EmbeddingMemory":
        for each in (model, other):
            each["ours"].enqueue(*rows(2, first=6))
        assert torch.equal(other["ours"].ids, model["ours"].ids)


def test_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    model, other = (nn.ModuleDict({"network": nn.Linear(4, DIM), "memory": filled(5, 7)}) for _ in range(2))
    other["memory"].clear()
    library.save_model(model, str(tmp_path / "model.safetensors"))
    assert library.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert len(other["memory"]) == 5
    assert torch.equal(other["memory"].ids, model["memory"].ids)


def test_a_state_from_when_its_place_was_a_dict():
    memory = filled(5, 7)
    state = memory.state_dict()
    names = ("size", "dim", "entries", "next", "calls")
    state["_extra_state"] = dict(zip(names, state["_extra_state"].tolist(), strict=True))
    other = EmbeddingMemory(5, DIM)
    other.load_state_dict(state)
    for one in (memory, other):
        one.enqueue(*rows(2, first=50))
    assert torch.equal(other.ids, memory.ids)
    smaller = EmbeddingMemory(4, DIM)
    with pytest.raises(RuntimeError, match="size mismatch"):
        smaller.load_state_dict(state)
    assert len(smaller) == 0


def test_dtypes():
    memory = filled(4, 2, dtype=torch.float64)
    memory.enqueue(torch.full((1, DIM), 0.1, dtype=torch.bfloat16), torch.tensor([1], dtype=torch.int8), rows(1)[2])
    assert memory.embeddings.dtype == torch.float64
    assert memory.labels.dtype == memory.ids.dtype == torch.int64
    assert memory.embeddings[2, 0] == torch.tensor(0.1, dtype=torch.bfloat16).double()
    assert memory.half().embeddings.dtype == torch.float16
    assert memory.labels.dtype == torch.int64
    assert list(memory.parameters()) == []


def test_no_gradient_is_kept():
    embeddings, labels, ids = rows(3)
    memory = EmbeddingMemory(5, DIM)
    memory.enqueue(embeddings.requires_grad_(), labels, ids)
    assert not memory.embeddings.requires_grad
    embeddings.data.zero_()
    assert memory.embeddings.sum() > 0  # a copy


def test_rows_that_are_not_finite():
    embeddings, labels, ids = rows(4)
    embeddings[1, 0], embeddings[2, 1] = torch.nan, -torch.inf
    memory = EmbeddingMemory(5, DIM)
    memory.enqueue(embeddings, labels, ids)
    assert memory.embeddings.sum(1).tolist() == [0, 0, 0, 9]


def test_clear():
    memory = filled(5, 7, warm_up=0)
    memory.clear()
    assert len(memory) == 0
    assert bool(memory)  # it is there
    memory.enqueue(*rows(2))
    assert memory.ids.tolist() == [0, 1]


# --- in a loss -------------------------------------------------------------------------------------------------------


def data(count):
    return torch.randn(count, DIM).double(), torch.randint(0, 3, (count,)), torch.arange(count)


@pytest.mark.parametrize("kind", [RoadmapLoss, SupAPLoss, SmoothAPLoss])
def test_a_loss_ranks_it(kind):
    embeddings, labels, ids = data(8)
    past, past_labels, _ = data(9)
    memory = EmbeddingMemory(30, DIM, dtype=torch.float64)
    labels = torch.arange(8) % 3
    # Ids 0 to 3 are stale copies of queries, the others of no query: what the copies are must not matter.
    memory.enqueue(past, past_labels, torch.tensor([0, 1, 2, 3, 20, 21, 22, 23, 24]))
    memory.enqueue(embeddings, labels, ids)
    leaf, other = (embeddings.clone().requires_grad_() for _ in range(2))
    loss = kind()(leaf, labels, ref_emb=memory, ids=ids)
    loss.backward()

    references, ref_labels = torch.cat([past, embeddings]), torch.cat([past_labels, labels])
    ref_ids = torch.cat([torch.tensor([0, 1, 2, 3, 20, 21, 22, 23, 24]), ids])
    each = [
        kind(reduction="none")(
            other[q : q + 1], labels[q : q + 1], ref_emb=references[keep], ref_labels=ref_labels[keep]
        )
        for q in range(8)
        for keep in [ref_ids != q]  # taken away, not left out
    ]
    torch.cat(each).mean().backward()
    torch.testing.assert_close(loss, torch.cat(each).mean())
    torch.testing.assert_close(leaf.grad, other.grad)


def test_an_empty_one_leaves_the_batch_to_rank_itself():
    embeddings, labels, ids = data(8)
    memory = EmbeddingMemory(30, DIM, warm_up=1)
    memory.enqueue(embeddings, labels, ids)
    leaf, other = (embeddings.clone().requires_grad_() for _ in range(2))
    ids[:2] = 0  # two of one id
    loss, expected = (
        RoadmapLoss()(leaf, labels, ref_emb=memory, ids=ids),
        roadmap_loss(other, labels, ids=ids, ref_ids=ids),
    )
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(leaf.grad, other.grad)


def test_it_is_not_written_over_before_backward():
    """reduction="none" reads the references once more in backward."""
    embeddings, labels, ids = data(4)
    memory = EmbeddingMemory(4, DIM, dtype=torch.float64)
    memory.enqueue(embeddings, labels, ids)
    loss = RoadmapLoss(reduction="none")(embeddings.requires_grad_(), labels, ref_emb=memory, ids=ids)
    memory.enqueue(embeddings, labels, ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        (ValueError, "size must be .*1", {"size": 0}),
        (TypeError, "size must be an integer", {"size": 3.0}),
        (ValueError, "dim must be .*1", {"dim": 0}),
        (ValueError, "warm_up must be .*0", {"warm_up": -1}),
        (TypeError, "gather_across_devices must be True or False", {"gather_across_devices": None}),
        (TypeError, "dtype must be torch.float16, .*, got torch.int64", {"dtype": torch.int64}),
    ],
)
def test_settings(kind, match, options):
    with pytest.raises(kind, match=match):
        EmbeddingMemory(**({"size": 4, "dim": DIM} | options))


@pytest.mark.parametrize(
    ("kind", "match", "change"),
    [
        (TypeError, "embeddings must be a torch.Tensor", {"embeddings": [1.0]}),
        (TypeError, "labels must have an integer dtype", {"labels": torch.zeros(4)}),
        (TypeError, "ids must be a torch.Tensor", {"ids": None}),
        (ValueError, "ids must be 1-D", {"ids": torch.arange(3)}),
        (ValueError, "memory's dimension, 3, got 2", {"embeddings": torch.zeros(4, 2)}),
    ],
)
def test_what_is_enqueued(kind, match, change):
    memory = EmbeddingMemory(5, DIM)
    with pytest.raises(kind, match=match):
        memory.enqueue(**(dict(zip(("embeddings", "labels", "ids"), rows(4), strict=True)) | change))
    assert len(memory) == 0


def test_what_a_loss_is_given():
    embeddings, labels, ids = rows(4)
    memory = filled(5, 4)
    for match, options in [
        (r"ids=\.\.\. has to say", {}),
        ("ref_labels was given beside an EmbeddingMemory", {"ids": ids, "ref_labels": labels}),
        ("ref_ids was given beside an EmbeddingMemory", {"ids": ids, "ref_ids": ids}),
    ]:
        with pytest.raises(ValueError, match=match):
            RoadmapLoss()(embeddings, labels, ref_emb=memory, **options)
