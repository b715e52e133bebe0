"""What was made under torch.inference_mode(), where no gradient of it is wanted: galleries, masks, labels, memories.

Autograd saves no such tensor for backward, and nothing outside of inference mode may write to one.
"""

import copy
import io
import pickle

import pytest
import torch

from roadmap_ext import EmbeddingMemory, RoadmapLoss, SmoothAPLoss, ap_loss, cached_backward, roadmap_loss, smooth_rank

REDUCTIONS = ("mean", "sum", "none")


def made_there(*tensors):
    with torch.inference_mode():
        out = [x.clone() for x in tensors]
    assert all(x.is_inference() for x in out)
    return out


def batch(count=8):
    return torch.randn(count, 5), torch.randint(0, 3, (count,)), torch.arange(count)


def assert_same_gradients(call, leaves, plain, there):
    """Of ``call`` with tensors made outside and inside of inference mode; twice each, through a retained graph."""
    results = []
    for given in (plain, there):
        loss = call(*leaves, *given)
        seed = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results += [torch.autograd.grad(loss, leaves, seed, retain_graph=again) for again in (True, False)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    assert all(gradient.abs().sum() > 0 for gradient in results[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", ["auto", "pairwise", "sorted", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("calibration_reduction", ["per_query", "violating_pairs"])
def test_a_gallery(reduction, method, normalize, calibration_reduction):
    """With its labels and ids, and those of the queries."""
    x, labels, ids = batch()
    gallery, ref_labels, ref_ids = batch(11)
    settings = {"reduction": reduction, "method": method, "normalize": normalize}

    def call(x, *given):
        names = ("ref_emb", "ref_labels", "ids", "ref_ids", "labels")
        return roadmap_loss(
            x, **dict(zip(names, given, strict=True)), **settings, calibration_reduction=calibration_reduction
        )

    given = gallery, ref_labels, ids, ref_ids, labels
    assert_same_gradients(call, [x.requires_grad_()], given, made_there(*given))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", ["auto", "reference"])
def test_queries(reduction, method):
    """Where only what they rank learns."""
    x, labels, _ = batch()
    gallery, ref_labels, _ = batch(11)

    def call(gallery, x):
        return roadmap_loss(x, labels, gallery, ref_labels, reduction=reduction, method=method, normalize=False)

    assert_same_gradients(call, [gallery.requires_grad_()], [x], made_there(x))


@pytest.mark.parametrize("method", ["auto", "reference"])
@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
def test_masks(method, surrogate):
    scores, target, ignore = torch.randn(4, 9, requires_grad=True), torch.rand(4, 9) < 0.4, torch.rand(4, 9) < 0.2
    target[:, 0] = ignore[:, 1] = True
    target[:, 1] = ignore[:, 0] = False
    settings = {"method": method, "surrogate": surrogate, "tau": 0.3}

    def loss(scores, target, ignore):
        return ap_loss(scores, target, ignore=ignore, reduction="none", **settings)

    def ranks(scores, target, ignore):
        return smooth_rank(scores, target, ignore=ignore, **settings).negative_rank

    for call in (loss, ranks):
        assert_same_gradients(call, [scores], [target, ignore], made_there(target, ignore))


def bytes_saved(call):
    """Of what autograd is given to keep for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        call()
    return sum(saved)


@pytest.mark.parametrize(("reduction", "kept"), [("mean", 0), ("sum", 0), ("none", 4 * 5 * (8 + 11) + 8 * 8 * 3)])
def test_what_is_saved_for_backward(reduction, kept):
    """Not the embeddings, where the gradient is known; else both sides, the weights and the lists of positives."""
    (x, labels, _), (gallery, ref_labels, _) = batch(), batch(11)
    x.requires_grad_()
    saved = bytes_saved(lambda: roadmap_loss(x, labels, gallery, ref_labels, reduction=reduction))
    assert kept <= saved <= kept + (kept > 0) * 8 * (2 * 8 + 11)


def test_a_gradient_that_was_handed_on_is_not_there_twice():
    """Without retain_graph the second backward is torch's own error; with it each gradient is a tensor of its own."""
    x, labels, _ = batch()
    loss = roadmap_loss(x.requires_grad_(), labels)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    (last,) = torch.autograd.grad(loss, x)
    assert torch.equal(last, second)
    assert last.abs().sum() > 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_what_is_written_after_the_loss_does_not_matter():
    """Backward does not read the embeddings: a buffer of theirs can be used again."""
    x, labels, _ = batch()
    gallery = x.clone()
    loss = roadmap_loss(x.requires_grad_(), labels, gallery, labels, ids=labels, ref_ids=labels + 3)
    gallery.zero_()
    loss.backward()
    assert x.grad.abs().sum() > 0


def stored_copy(memory):
    return torch.load(io.BytesIO(pickle_of(memory)), weights_only=False)


def pickle_of(memory):
    file = io.BytesIO()
    torch.save(memory, file)
    return file.getvalue()


WAYS = {
    "built": lambda memory: EmbeddingMemory(9, 5),
    "moved": lambda memory: memory.double().float(),
    "copied": copy.deepcopy,
    "pickled": lambda memory: pickle.loads(pickle.dumps(memory)),
    "stored": stored_copy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["enqueue", "load"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_memory_made_there(way, first, reduction):
    """It can be written to, be loaded and be ranked, inside and outside, as any other."""
    x, labels, ids = batch(4)
    expected = EmbeddingMemory(9, 5)
    with torch.inference_mode():
        memory = WAYS[way](EmbeddingMemory(9, 5))
        for each in (memory, expected):
            each.enqueue(x, labels, ids)
    if first == "load":
        memory.load_state_dict(expected.state_dict())
    losses = []
    for each in (memory, expected):
        each.enqueue(x + 1, labels, ids + 4)
        leaf = x.clone().requires_grad_()
        loss = SmoothAPLoss(reduction=reduction)(leaf, labels, ref_emb=each, ids=ids)
        loss.sum().backward()
        losses.append((loss.detach(), leaf.grad, each.ids, each.embeddings))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_a_buffer_made_there():
    """cached_backward puts buffers back, and leaves alone what cannot change."""

    class Centred(torch.nn.Linear):
        def __init__(self):
            super().__init__(5, 4)
            with torch.inference_mode():
                self.register_buffer("centre", torch.ones(4))

        def forward(self, x):
            return super().forward(x) - self.centre

    x, labels, _ = batch()
    model = Centred()
    cached_backward(model, x, labels, RoadmapLoss(), mini_batch_size=3)
    assert model.weight.grad.abs().sum() > 0
