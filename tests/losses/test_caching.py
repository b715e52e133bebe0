"""cached_backward and CachedLoss in one process: gradients of the one big batch, equal chance in both passes, errors.

Of several ranks: test_distributed.py.
"""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn

from roadmap_ext import CachedLoss, EmbeddingMemory, RoadmapLoss, cached_backward

ROWS, SIZES = 13, (1, 4, 12, 13, 100)


def batch(dtype=torch.float64):
    return torch.randn(ROWS, 6, dtype=dtype), torch.arange(ROWS) % 4


def network(*more, dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), *more, nn.Linear(16, 5)).to(dtype)


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def by_parts(model, inputs, labels, loss_fn, size):
    """What it has to come to: one graph over the same mini-batches. The loss; gradients add to the parameters'."""
    loss = loss_fn(torch.cat([model(part) for part in inputs.split(size)]), labels)
    loss.backward()
    return loss.detach()


@pytest.fixture
def calls():
    """Of a model: rows of each forward, whether it had a graph, and what came out."""

    def watch(model):
        seen = []
        model.register_forward_hook(lambda _, inputs, out: seen.append((len(out), out.requires_grad, out.detach())))
        return seen

    return watch


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_the_whole_batch(size, calls):
    (x, labels), model = batch(), network()
    expected = RoadmapLoss()(model(x), labels)
    expected.backward()
    whole = gradients(model)
    model.zero_grad()
    seen = calls(model)
    for times in (1, 2):
        loss = cached_backward(model, x, labels, RoadmapLoss(), mini_batch_size=size)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        assert not loss.requires_grad
        torch.testing.assert_close(gradients(model), times * whole, rtol=1e-10, atol=1e-12)
    parts = [len(part) for part in x.split(size)]
    once = [(rows, True) for rows in parts]
    first = [] if len(parts) == 1 else [(rows, False) for rows in parts]  # one mini-batch needs no second forward
    assert [call[:2] for call in seen] == 2 * (first + once)


@pytest.mark.parametrize("size", [1, 4, 13])
def test_chance_is_drawn_alike_in_both_passes(size, calls):
    (x, labels), model = batch(), network(nn.Dropout(0.4))

    def noisy(embeddings, labels):  # a loss may draw, too
        return RoadmapLoss()(embeddings + 0.1 * torch.rand_like(embeddings), labels)

    torch.manual_seed(3)
    expected = by_parts(model, x, labels, noisy, size)
    after, wanted = torch.rand(3), gradients(model)
    model.zero_grad()
    seen = calls(model)
    torch.manual_seed(3)
    loss = cached_backward(model, x, labels, noisy, mini_batch_size=size)
    assert torch.equal(torch.rand(3), after)  # what comes next draws what it would have drawn
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-10, atol=1e-12)
    outputs = [out for *_, out in seen]
    parts = -(-ROWS // size)
    assert len(outputs) == (1 if parts == 1 else 2 * parts)
    assert all(map(torch.equal, outputs, outputs[-parts:]))


def test_every_device_that_may_draw_is_restored(monkeypatch):
    """The generators of the inputs' and of the parameters' devices, and of a GPU that is in use in any case."""
    from roadmap_ext import caching

    model = network().to("meta")
    x = {"x": torch.zeros(3, 6)}
    assert caching._devices(model, x) == [torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert caching._devices(lambda x: x, x) == [torch.device("cpu"), torch.device("cuda", 1)]
    states = {}

    class Module:
        @staticmethod
        def get_rng_state(device):
            return torch.tensor(states.setdefault(device, 0))

        @staticmethod
        def set_rng_state(state, device):
            states[device] = int(state)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    device = torch.device("cuda", 1)
    chance = caching._Chance([device])
    before = chance.state()
    states[device] = 5
    chance.restore(before)
    assert states == {device: 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, calls):
    """Both passes and the loss run under it; what torch cast without a graph has no part in the second pass."""
    (x, labels), model = batch(torch.float32), network(dtype=torch.float32)
    seen, within = calls(model), []

    def loss_fn(embeddings, labels):
        within.append((embeddings.dtype, torch.is_autocast_enabled("cpu")))
        return RoadmapLoss()(embeddings, labels)

    with torch.autocast("cpu", dtype):
        expected = loss_fn(model(x), labels)
    expected.backward()
    whole = gradients(model)
    for outside in (False, True):  # nor may the cache of a forward before this one get in the way
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            if outside:
                with torch.no_grad():
                    model(x)
            loss = cached_backward(model, x, labels, loss_fn, mini_batch_size=5)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        # Gradients of a weight are rounded in each mini-batch.
        torch.testing.assert_close(gradients(model), whole, rtol=0, atol=2 * torch.finfo(dtype).eps * whole.abs().max())
    assert {out.dtype for *_, out in seen} == {dtype}
    assert set(within) == {(dtype, True)}


@pytest.mark.parametrize("size", [7, 14])
def test_backward_is_outside_autocast(size):
    """so that what the model computes in float32 has its gradient in float32."""

    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    x, model = torch.randn(14, 6), Exact(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = RoadmapLoss()(model(x), torch.arange(14) // 2)
    expected.backward()
    whole = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(model, x, torch.arange(14) // 2, RoadmapLoss(), mini_batch_size=size)
    torch.testing.assert_close(gradients(model), whole)


@pytest.mark.parametrize("size", [5, 13])
def test_grad_scaler(size):
    (x, labels), model = batch(torch.float32), network(dtype=torch.float32)
    cached_backward(model, x, labels, RoadmapLoss(), mini_batch_size=size)
    plain = gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.zero_grad()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    loss = cached_backward(model, x, labels, RoadmapLoss(), mini_batch_size=size, scaler=scaler)
    assert loss < 2  # without the factor
    torch.testing.assert_close(gradients(model), 2.0**10 * plain)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()).detach(), before - 0.5 * plain)

    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.zero_grad()
    cached_backward(model, x / 0, labels, RoadmapLoss(), mini_batch_size=size, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()).detach(), before)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("size", [5, 13])
def test_gradients_are_exchanged_with_the_last_mini_batch(size):
    class Wrapped(nn.Sequential):
        def __init__(self, *modules):
            super().__init__(*modules)
            self.on, self.log = True, []
            self[0].weight.register_hook(lambda _: self.log.append(("backward", self.on)))

        @contextlib.contextmanager
        def no_sync(self):
            self.on = False
            yield
            self.on = True

        def forward(self, x):
            self.log.append(("forward" if torch.is_grad_enabled() else "first pass", self.on))
            return super().forward(x)

    (x, labels), model = batch(), Wrapped(*network())
    cached_backward(model, x, labels, RoadmapLoss(), mini_batch_size=size)
    parts = -(-ROWS // size)
    # All ranks go the same way, whatever their share: a rank of a single mini-batch, too.
    first = [("first pass", True)] * parts
    second = [(what, part == parts - 1) for part in range(parts) for what in ("forward", "backward")]
    assert model.log == first + second


def test_structures_of_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.seen = []

        def forward(self, x, *, pair, scale, name, nothing):
            self.seen.append((len(x), [len(part) for part in pair["both"]], name, nothing))
            return self.net(x + pair["both"][0] * pair["both"][1] * scale)

    x, labels = batch()
    y, z = torch.randn_like(x), torch.randn(ROWS, 1).double()
    inputs = {"x": x, "pair": {"both": (y, z)}, "scale": torch.tensor(0.5), "name": "a", "nothing": None}
    model = Model()
    call = lambda model, inputs: model(**inputs)  # noqa: E731 - as the docstring has it
    loss = cached_backward(model, inputs, labels, RoadmapLoss(), mini_batch_size=6, call=call)
    assert model.seen == 2 * [(rows, [rows, rows], "a", None) for rows in (6, 6, 1)]
    got = gradients(model)
    model.zero_grad()
    expected = RoadmapLoss()(model(**inputs), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(got, gradients(model), rtol=1e-10, atol=1e-12)


def test_batch_norm_sees_each_mini_batch_once():
    (x, labels), model = batch(), network(nn.BatchNorm1d(16))
    other = copy.deepcopy(model)
    by_parts(other, x, labels, RoadmapLoss(), 5)
    cached_backward(model, x, labels, RoadmapLoss(), mini_batch_size=5)
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert model[2].num_batches_tracked == 3
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-9, atol=1e-12)


class Towers(nn.Module):
    """A network of several methods, of which none is its forward, with buffers of several kinds."""

    def __init__(self):
        super().__init__()
        self.net = network(nn.BatchNorm1d(16))
        for name in ("seen", "largest", "constant"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def encode(self, x, scale=1.0):
        self.seen += len(x)  # in place
        self.largest = torch.maximum(self.largest, x.detach().max())  # by another tensor
        return self.net(x * scale)


def wrapped(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)

    return call


class Pipeline:
    """No module, but it has one."""

    def __init__(self, towers):
        self.towers = towers

    def __call__(self, x):
        return self.towers.encode(x)


def global_encoder(towers):
    """A function that refers to the network as a notebook's does: by a name of its module."""
    scope = {"network": towers}
    exec("def encode(x):\n    return network.encode(x)", scope)
    return scope["encode"]


CALLABLES = {
    "method": lambda towers: towers.encode,
    "partial": lambda towers: functools.partial(towers.encode, scale=1.0),
    "partial of a partial": lambda towers: functools.partial(functools.partial(towers.encode), scale=1.0),
    "function": lambda towers: lambda x: towers.net(x),
    "function of the module": lambda towers: functools.partial(lambda model, x: model.encode(x), towers),
    "function of a method": lambda towers: (lambda encode: lambda x: encode(x))(towers.encode),
    "wrapped": lambda towers: wrapped(towers.net),
    "object": lambda towers: Pipeline(towers),
    "method of an object": lambda towers: Pipeline(towers).__call__,
    "function of an object": lambda towers: (lambda pipeline: lambda x: pipeline(x))(Pipeline(towers)),
    "global": lambda towers: global_encoder(towers),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_buffers_of_whatever_is_called_count_once(name):
    """The network is found in methods, partials, closures, global names and attributes."""
    (x, labels), towers = batch(), Towers()
    other = copy.deepcopy(towers)
    by_parts(CALLABLES[name](other), x, labels, RoadmapLoss(), 5)
    for times in (1, 2):
        cached_backward(CALLABLES[name](towers), x, labels, RoadmapLoss(), mini_batch_size=5)
        assert towers.net[2].num_batches_tracked == 3 * times
    by_parts(CALLABLES[name](other), x, labels, RoadmapLoss(), 5)
    for (buffer, ours), theirs in zip(towers.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=buffer)
    torch.testing.assert_close(gradients(towers), gradients(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["method", "partial", "inner"])
def test_no_sync_of_a_method(name):
    """It is that of the module that the method is of, or of the modules in it."""

    class Synced(Towers):
        log = ()

        @contextlib.contextmanager
        def no_sync(self):
            self.log += ("off",)
            yield
            self.log += ("on",)

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def run(self, x):
            return self.inner.encode(x)

    (x, labels), towers = batch(), Synced()
    given = Outer(towers).run if name == "inner" else CALLABLES[name](towers)
    cached_backward(given, x, labels, RoadmapLoss(), mini_batch_size=5)
    assert towers.log == ("off", "on", "off", "on")  # all but the last of three mini-batches


def test_a_compiled_function():
    (x, labels), towers = batch(), Towers()
    function = torch.compile(lambda x: towers.net(x), backend="aot_eager")
    other = copy.deepcopy(towers)
    by_parts(other.net, x, labels, RoadmapLoss(), 5)
    cached_backward(function, x, labels, RoadmapLoss(), mini_batch_size=5)
    torch.testing.assert_close(gradients(towers.net), gradients(other.net), rtol=1e-9, atol=1e-12)
    assert towers.net[2].num_batches_tracked == 3


def test_inputs_and_a_loss_that_learn():
    """Leaves among the inputs, and parameters of the loss, have their gradients, too."""
    (x, labels), model = batch(), network()
    leaf, scale = x.clone().requires_grad_(), torch.ones(5, dtype=torch.float64, requires_grad=True)

    def loss_fn(embeddings, labels):
        return RoadmapLoss()(embeddings * scale, labels)

    loss_fn(model(leaf), labels).backward()
    wanted, leaf.grad, scale.grad = (leaf.grad, scale.grad), None, None
    cached_backward(model, leaf, labels, loss_fn, mini_batch_size=4)
    torch.testing.assert_close((leaf.grad, scale.grad), wanted, rtol=1e-10, atol=1e-12)


def test_with_a_memory():
    (x, labels), ids = batch(), torch.arange(ROWS)
    results = []
    for size in (4, None):
        torch.manual_seed(1)
        model, memory, loss_function = network(), EmbeddingMemory(30, 5, dtype=torch.float64), RoadmapLoss()

        def ranked(embeddings, labels, memory=memory, loss_function=loss_function):
            memory.enqueue(embeddings, labels, ids)
            return loss_function(embeddings, labels, ref_emb=memory, ids=ids)

        for step in range(3):
            now = x + step
            if size is None:
                ranked(model(now), labels).backward()
            else:
                cached_backward(model, now, labels, ranked, mini_batch_size=size)
        results.append((gradients(model), memory.embeddings, memory.ids))
        assert len(memory) == 30  # enqueued once a step
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_an_empty_batch():
    model = network()
    loss = cached_backward(model, torch.zeros(0, 6).double(), torch.zeros(0).long(), RoadmapLoss(), mini_batch_size=4)
    assert loss == 0
    assert not gradients(model).any()


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize(
    ("kind", "match", "change"),
    [
        (TypeError, "mini_batch_size must be an integer", {"mini_batch_size": 2.0}),
        (ValueError, "mini_batch_size must be .*1", {"mini_batch_size": 0}),
        (ValueError, "inputs must hold a tensor .* got list", {"inputs": ["a", torch.tensor(1)]}),
        (ValueError, r"batch first, got \[12, 13\] rows", {"inputs": [torch.zeros(13, 6), torch.zeros(12)]}),
        (ValueError, "result of something differentiable", {"inputs": torch.ones(13, 6, requires_grad=True) * 2}),
        (TypeError, "one tensor of embeddings, got tuple: call=", {"model": lambda x: (x, x)}),
        (ValueError, "a row for each of .* inputs, got shape", {"model": lambda x: x.sum(0)}),
        (ValueError, "a row for each of", {"model": lambda x: x.sum()}),
        (TypeError, "loss_fn has to return a tensor, got float", {"loss_fn": lambda e, y: 1.0}),
        (ValueError, r"scalar, got shape \(13,\): reduction", {"loss_fn": RoadmapLoss(reduction="none")}),
        (ValueError, "does not depend on the embeddings", {"loss_fn": lambda e, y: torch.ones(())}),
        (ValueError, "embeddings have no gradient: are all", {"model": lambda x: x.detach()}),
        (TypeError, "model must be something to call, got NoneType", {"model": None}),
        (TypeError, "loss_fn must be something to call, got float", {"loss_fn": 1.0}),
        (TypeError, "call must be something to call, got str", {"call": "encode"}),
        (TypeError, r"scaler must be a torch\.amp\.GradScaler or None, got float", {"scaler": 2.0**10}),
    ],
)
def test_errors(size, kind, match, change):
    model = network(dtype=torch.float32)
    given = {"model": model, "inputs": torch.randn(13, 6), "labels": torch.arange(13) % 4}
    given |= {"loss_fn": RoadmapLoss(), "mini_batch_size": size}
    with pytest.raises(kind, match=match):
        cached_backward(**(given | change))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_switched_off():
    x, labels = batch()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call it outside no_grad\(\)"):
        cached_backward(network(), x, labels, RoadmapLoss(), mini_batch_size=4)


class TestCachedLoss:
    """What cached_backward does, split between a forward and the backward that a trainer owns."""

    @pytest.mark.parametrize("size", [4, 13])
    def test_backward_of_whatever_the_trainer_makes_of_it(self, size, calls):
        (x, labels), model = batch(), network(nn.Dropout(0.4))
        torch.manual_seed(3)
        expected = by_parts(model, x, labels, RoadmapLoss(), size)
        after, whole = torch.rand(3), gradients(model)
        model.zero_grad()
        seen = calls(model)
        torch.manual_seed(3)
        loss = CachedLoss(model, RoadmapLoss(), size)(x, labels)
        assert torch.equal(torch.rand(3), after)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
        assert [graph for _, graph, _ in seen] == ([True] if size == 13 else [False] * 4)
        state = torch.get_rng_state()
        (loss / 4).backward()
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(4 * gradients(model), whole, rtol=1e-10, atol=1e-12)
        if size == 4:
            with pytest.raises(RuntimeError, match="has done so: it can be called once"):
                loss.backward()

    def test_several_losses_before_their_backward(self):
        """Each has its own batch, and none takes another's gradients."""
        (x, labels), model, cached = batch(), network(), None
        (RoadmapLoss()(model(x), labels) + 2 * RoadmapLoss()(model(-x), labels.flip(0))).backward()
        whole = gradients(model)
        model.zero_grad()
        cached = CachedLoss(model, RoadmapLoss(), 5)
        (cached(x, labels) + 2 * cached(-x, labels.flip(0))).backward()
        torch.testing.assert_close(gradients(model), whole, rtol=1e-10, atol=1e-12)

    def test_backward_outside_the_autocast_of_the_forward(self, calls):
        (x, labels), model = batch(torch.float32), network(dtype=torch.float32)
        seen = calls(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = CachedLoss(model, RoadmapLoss(), 5)(x, labels)
        loss.backward()
        assert [(graph, out.dtype) for _, graph, out in seen] == [
            *[(False, torch.bfloat16)] * 3,
            *[(True, torch.bfloat16)] * 3,
        ]

    def test_evaluation(self, calls):
        """One run, whose batch norm counts as that of any evaluation."""
        (x, labels), model = batch(), network(nn.BatchNorm1d(16)).eval()
        seen = calls(model)
        with torch.no_grad():
            loss = CachedLoss(model, RoadmapLoss(), 5)(x, labels)
        torch.testing.assert_close(loss, RoadmapLoss()(model(x), labels).detach(), rtol=1e-12, atol=0)
        assert [rows for rows, *_ in seen[:3]] == [5, 5, 3]
        assert not loss.requires_grad

    def test_structures_and_a_memory(self):
        """Its call and its loss are those of cached_backward, so that a model of texts has its dict of tensors."""
        (x, labels), model = batch(), network()
        memory = EmbeddingMemory(40, 5, dtype=torch.float64)

        def ranked(embeddings, labels):
            memory.enqueue(embeddings, labels, torch.arange(ROWS))
            return RoadmapLoss()(embeddings, labels, ref_emb=memory, ids=torch.arange(ROWS))

        cached = CachedLoss(model, ranked, 5, call=lambda model, inputs: model(inputs["x"]))
        cached({"x": x, "name": "batch"}, labels).backward()
        assert len(memory) == ROWS
        assert gradients(model).abs().sum() > 0
