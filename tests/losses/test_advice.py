"""Errors that say what to do: their remedy is applied to the value that caused them, and what comes of it is taken.

A case of CASES is a call, the argument that is wrong, its value, and code that the message has to show, which is then
run: it makes what is to be passed in the value's place, or it is the call to make instead. Where a message has no such
code, a case of OTHERS is the wrong call, words of the message, and the right call. Every message of the package that
suggests something is among them.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections import OrderedDict, UserDict
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import roadmap_ext
from roadmap_ext import (
    EmbeddingMemory,
    RoadmapLoss,
    ap_loss,
    cached_backward,
    distributed,
    extension,
    metrics,
    ndcg_loss,
    reference,
    roadmap_loss,
    validation,
)
from roadmap_ext.autograd import check_loss
from roadmap_ext.data import PerClassBatchSampler

pytestmark = pytest.mark.host

ROWS, DIM, COLUMNS = 6, 4, 8
NAN = float("nan")
X = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
DOUBLE = X.double() / 3
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
IDS = torch.arange(ROWS)
S = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
T = torch.arange(COLUMNS) % 3 == torch.arange(ROWS)[:, None] % 3
ONE_HOT = nn.functional.one_hot(LABELS)
MULTI_HOT = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]])
SOFT = 0.7 * ONE_HOT + 0.3 * ONE_HOT.flip(0)
RELATION = LABELS[:, None] == LABELS
TOKENS = torch.randn(ROWS, 5, DIM, generator=torch.Generator().manual_seed(2))
RELATED = {"ap_loss": ap_loss, "scores": X @ X.T, "itself": torch.eye(ROWS, dtype=torch.bool)}


def of_x(model, inputs):
    return model(inputs["x"])


class Output(OrderedDict):
    """What networks of transformers return: a dict whose values are attributes, too."""


def batch():
    return {"embeddings": X, "labels": LABELS}


def scored():
    return {"scores": S, "target": T}


def enqueue(**given):
    EmbeddingMemory(9, DIM).enqueue(**given)


CALLS = {
    "loss": (roadmap_loss, batch),
    "gallery": (roadmap_loss, lambda: batch() | {"ref_emb": X + 1, "ref_labels": LABELS, "ids": IDS, "ref_ids": IDS}),
    "reference": (reference.roadmap_loss, batch),
    "metrics": (metrics.retrieval_metrics, batch),
    "scores": (ap_loss, scored),
    "precision": (metrics.average_precision, scored),
    "gap": (metrics.decomposability_gap, lambda: batch() | {"batches": IDS % 2}),
    "enqueue": (enqueue, lambda: batch() | {"ids": IDS}),
}


def quantized(x):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


RAGGED = [5, 2, 8, 1, 4, 10]


def ragged(x, lengths, layout=torch.strided):
    """A nested tensor."""
    return torch.nested.nested_tensor(list(x.split(lengths)), layout=layout)


VECTORS = [
    (X.numpy(), "torch.as_tensor(embeddings)"),
    (X.tolist(), "torch.as_tensor(embeddings)"),
    (X.numpy()[::-1], "torch.as_tensor(embeddings.copy())"),
    (X.numpy().astype(">f4"), "torch.as_tensor(embeddings.astype(embeddings.dtype.newbyteorder('=')))"),
    ((10 * X).int().tolist(), "torch.as_tensor(embeddings).float()"),
    (list(X), "torch.stack(embeddings)"),
    ((X, ONE_HOT), "embeddings[0]"),
    (Output(loss=None, last_hidden_state=TOKENS, pooler_output=X), "embeddings['pooler_output']"),
    (Output(last_hidden_state=TOKENS, pooler_output=X), "embeddings['last_hidden_state'].mean(1)"),
    ({"logits": S, "image_embeds": X, "labels": LABELS}, "embeddings['image_embeds']"),
    ({"last_hidden_state": TOKENS}, "embeddings['last_hidden_state'].mean(1)"),
    ({"features": X}, "embeddings['features']"),
    (X.to_sparse(), "embeddings.to_dense()"),
    (X.to_sparse_csr(), "embeddings.to_dense()"),
    ((10 * X).int().to_sparse(), "embeddings.to_dense().float()"),
    (ragged(TOKENS.flatten(0, 1), RAGGED), "torch.stack([rows.mean(0) for rows in embeddings.unbind()])"),
    (ragged(TOKENS.flatten(0, 1), RAGGED, torch.jagged), "torch.stack([rows.mean(0) for rows in embeddings.unbind()])"),
    (quantized(X), "embeddings.dequantize()"),
    ((10 * X).long(), "embeddings.float()"),
    (X > 0, "embeddings.float()"),
    (X.to(torch.float8_e4m3fn), "embeddings.float()"),
    (X.to(torch.complex64), "torch.view_as_real(embeddings).flatten(-2)"),
    (X[:, :, None, None], "embeddings.flatten(1)"),
    (TOKENS, "embeddings.mean(1)"),
    (X[:, :, None, None].repeat(1, 1, 2, 3), "embeddings.flatten(2).mean(2)"),
    (X[:, :, None, None].repeat(1, 1, 2, 3), "embeddings.flatten(1)"),
]  # fmt: skip
NUMBERED = "torch.tensor([classes.index(each) for each in labels])"
NUMBERED_BUT_NONE = "torch.tensor([-1 if each is None else classes.index(each) for each in labels])"
CLASSES = [
    (LABELS.tolist(), "torch.as_tensor(labels)"),
    (tuple(LABELS.tolist()), "torch.as_tensor(labels)"),
    (LABELS.numpy(), "torch.as_tensor(labels)"),
    (LABELS.numpy()[::-1], "torch.as_tensor(labels.copy())"),
    (LABELS.double().numpy(), "torch.as_tensor(labels).long()"),
    (LABELS.numpy().astype(numpy.longdouble), "torch.as_tensor(labels.astype(float)).long()"),
    (LABELS.numpy().astype(object), "torch.as_tensor(labels.astype(int))"),
    ([f"class {x}" for x in LABELS.tolist()], NUMBERED),
    (numpy.array([f"class {x}" for x in LABELS]), NUMBERED),
    (numpy.array([b"a", b"a", b"b", b"b", b"c", b"c"]), NUMBERED),
    ([b"a", b"a", b"b", b"b", b"c", b"c"], NUMBERED),
    (LABELS.numpy().astype("datetime64[D]"), NUMBERED),
    ([0, 0, 1, 1, None, 2], NUMBERED_BUT_NONE),
    (numpy.array(["a", "a", None, "b", "b", None], dtype=object), NUMBERED_BUT_NONE),
    (numpy.ma.masked_array(LABELS.numpy(), LABELS == 1), "torch.as_tensor(labels.astype(int).filled(-1))"),
    (LABELS.to(torch.complex64), "torch.view_as_real(labels).unique(dim=0, return_inverse=True)[1]"),
    ({"pixels": X, "labels": LABELS}, "labels['labels']"),
    (ONE_HOT, "labels.argmax(1)"),
    (ONE_HOT.float(), "labels.argmax(1)"),
    (ONE_HOT.tolist(), "torch.as_tensor(labels).argmax(1)"),
    (ONE_HOT.to_sparse(), "labels.to_dense().argmax(1)"),
    (MULTI_HOT, "ap_loss(scores, labels.float() @ labels.float().T > 0, ignore=itself)"),
    (MULTI_HOT.double(), "ap_loss(scores, labels @ labels.T > 0, ignore=itself)"),
    (MULTI_HOT.float().to_sparse(), "ap_loss(scores, labels.to_dense() @ labels.to_dense().T > 0, ignore=itself)"),
    (SOFT, "ap_loss(scores, labels @ labels.T > 0.5, ignore=itself)"),
    ((4 * X).softmax(1), "ap_loss(scores, labels @ labels.T > 0.5, ignore=itself)"),
    (RELATION.int(), "ap_loss(scores, labels.bool(), ignore=itself)"),
    (0.8 * RELATION, "ap_loss(scores, labels > 0.5, ignore=itself)"),
    (LABELS[:, None], "labels.flatten()"),
    (LABELS[None], "labels.flatten()"),
    (LABELS[:, None].float(), "labels.flatten().long()"),
    (LABELS[::2], "labels.repeat(2)"),
    (LABELS > 0, "labels.long()"),
    (LABELS.half(), "labels.long()"),
    (LABELS / 4, "labels.unique(return_inverse=True)[1]"),
    (1 / LABELS, "labels.unique(return_inverse=True)[1]"),
    (ragged(LABELS, [4, 2]), "torch.cat(labels.unbind())"),
    (ragged(LABELS, [4, 2], torch.jagged), "torch.cat(labels.unbind())"),
    (quantized(LABELS), "labels.dequantize().long()"),
]  # fmt: skip
SCORES = [
    (S.numpy(), "torch.as_tensor(scores)"),
    (S.tolist(), "torch.as_tensor(scores)"),
    (Output(logits_per_image=S, image_embeds=X), "scores['logits_per_image']"),
    (S.to_sparse(), "scores.to_dense()"),
    (torch.nested.nested_tensor([S[0], *S[1:, :5]]), "torch.nested.to_padded_tensor(scores, -math.inf)"),
    (quantized(S), "scores.dequantize()"),
    ((10 * S).int(), "scores.float()"),
    (S.to(torch.float8_e5m2), "scores.float()"),
]
MASKS = [
    (T.numpy(), "torch.as_tensor(target)"),
    (T.int().tolist(), "torch.as_tensor(target).bool()"),
    (T.to_sparse(), "target.to_dense()"),
    (T.float(), "target.bool()"),
    (2 * T.int() - 1, "target > 0"),
    (4 * T.half(), "target > 0"),
    (T.T, "target.T"),
    (T[:1], "target.expand_as(scores)"),
    (T[0].int()[None], "target.expand_as(scores).bool()"),
    (T[:, 0], "target[:, None].expand_as(scores)"),
    (torch.nested.nested_tensor([T[0], *T[1:, :5]]), "torch.nested.to_padded_tensor(target, 0)"),
]
CASES = [
    *(("loss", "embeddings", value, code) for value, code in VECTORS),
    *(("loss", "labels", value, code) for value, code in CLASSES),
    *(("scores", "scores", value, code) for value, code in SCORES),
    *(("scores", "target", value, code) for value, code in MASKS),
    # The same of every argument and every call.
    *(
        ("gallery", "ref_emb", *case)
        for case in [(X.numpy(), "torch.as_tensor(ref_emb)"), (X.int(), "ref_emb.float()")]
    ),
    ("gallery", "ref_labels", ONE_HOT, "ref_labels.argmax(1)"),
    ("gallery", "ids", IDS.tolist(), "torch.as_tensor(ids)"),
    ("gallery", "ref_ids", IDS.double(), "ref_ids.long()"),
    ("metrics", "embeddings", X.tolist(), "torch.as_tensor(embeddings)"),
    ("metrics", "embeddings", (10 * X).int().numpy(), "torch.as_tensor(embeddings).float()"),
    ("metrics", "labels", ONE_HOT.numpy(), "torch.as_tensor(labels).argmax(1)"),
    ("metrics", "labels", ONE_HOT.bool(), "labels.int().argmax(1)"),
    ("metrics", "labels", torch.stack([LABELS, LABELS // 2], dim=1), "labels[:, 0]"),
    ("metrics", "labels", LABELS.double().numpy(), "torch.as_tensor(labels).long()"),
    ("metrics", "labels", (LABELS > 0).numpy(), "torch.as_tensor(labels).long()"),
    ("metrics", "labels", numpy.array([0, 0, 1, 1, NAN, 2]), "torch.as_tensor(labels).nan_to_num(nan=-1).long()"),
    ("precision", "target", T.float().numpy(), "torch.as_tensor(target).bool()"),
    ("gap", "batches", (IDS % 2).float(), "batches.long()"),
    ("enqueue", "embeddings", {"pooler_output": X}, "embeddings['pooler_output']"),
    ("enqueue", "labels", ONE_HOT, "labels.argmax(1)"),
    ("enqueue", "ids", IDS.tolist(), "torch.as_tensor(ids)"),
    ("scores", "ignore", T.float(), "ignore.bool()"),
    ("scores", "tau", torch.tensor(0.01), "tau.item()"),
]


def cached(loss_fn=None, inputs=X, model=None, **options):
    model, loss_fn = model or nn.Linear(DIM, 3), loss_fn or RoadmapLoss()
    return cached_backward(model, inputs, LABELS, loss_fn, mini_batch_size=2, **options)


def filled():
    memory = EmbeddingMemory(9, DIM)
    memory.enqueue(X, LABELS, IDS)
    return memory


def second_derivative(**options):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(roadmap_loss(x, LABELS, **options), x, create_graph=True)
    gradient.square().sum().backward()


def without(module, name, call):
    """A call where a part of something is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, None) if isinstance(module, str) else patch.setattr(module, name, None)
        return call()


def in_a_group(call):
    """A call where torch.distributed is initialised, for this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return call()
    finally:
        dist.destroy_process_group()


def sharded():
    return distribute_tensor(X, init_device_mesh("cpu", (1,)), [Shard(0)])


def in_no_grad(call):
    with torch.no_grad():
        return call()


def on_meta(**replaced):
    """Embeddings that are on another device than what is replaced."""
    x, labels = X.to("meta"), LABELS.to("meta")
    return roadmap_loss(**{"embeddings": x, "labels": labels, "ref_emb": x, "ref_labels": labels} | replaced)


def measured(*batches):
    """What RetrievalMetrics finds in these batches; None: after a reset."""
    metric = roadmap_ext.RetrievalMetrics(k=(1,))
    for batch in batches:
        metric.update(*batch) if batch else metric.reset()
    return metric.compute()


TWO = [IDS[:2], IDS[2:4]]
DERIVED = (X.clone().requires_grad_() * 2,)
OTHERS = [
    (lambda: roadmap_loss(X, LABELS, chunk_size=0), "leave it out", lambda: roadmap_loss(X, LABELS)),
    (
        lambda: metrics.decomposability_gap(X, LABELS, TWO),
        "leave references in no batch out of ref_emb",
        lambda: metrics.decomposability_gap(X, LABELS, TWO, X[:4], LABELS[:4]),
    ),
    (lambda: on_meta(labels=LABELS), "use labels.to('meta')", lambda: on_meta(labels=LABELS.to("meta"))),
    (
        lambda: metrics.retrieval_metrics(X.to("meta"), LABELS.numpy()),
        "use torch.as_tensor(labels).to('meta')",
        lambda: on_meta(labels=torch.as_tensor(LABELS.numpy()).to("meta")),
    ),
    (lambda: on_meta(ref_emb=X), "use ref_emb.to('meta')", lambda: on_meta(ref_emb=X.to("meta"))),
    (
        lambda: validation.check_batches(IDS, ROWS, torch.device("meta")),
        "use batches.to('meta')",
        lambda: validation.check_index("batches", IDS.to("meta"), torch.device("meta")),
    ),
    (
        lambda: roadmap_loss(X, None),
        "or pass positives or relevance",
        lambda: (
            roadmap_loss(X, None, positives=LABELS[:, None] == LABELS),
            roadmap_loss(X, None, relevance=(LABELS[:, None] == LABELS).long()),
        ),
    ),
    (
        lambda: RoadmapLoss(margins="auto", positive_margin=0.8),
        "leave positive_margin out, or margins",
        lambda: (RoadmapLoss(margins="auto"), RoadmapLoss(positive_margin=0.8)),
    ),
    (measured, "call update(embeddings, labels) first", lambda: measured((X, LABELS))),
    (
        lambda: measured((X, LABELS), (X.double(), LABELS)),
        "call reset() before another evaluation",
        lambda: measured((X, LABELS), None, (X.double(), LABELS)),
    ),
    (
        lambda: measured((X, LABELS, IDS), (X, LABELS)),
        "give them with all, or none",
        lambda: measured((X, LABELS, IDS), (X, LABELS, IDS)),
    ),
    (
        lambda: PerClassBatchSampler(LABELS, 2, 4, world_size=2),
        "do not fill a batch of 4 for each of 2 ranks: choose a batch_size of 3 at most",
        lambda: PerClassBatchSampler(LABELS, 2, 3, world_size=2),
    ),
    (lambda: ap_loss(S.to("meta"), T), "target.to(scores.device)", lambda: ap_loss(S.to("meta"), T.to("meta"))),
    (lambda: roadmap_loss(X, LABELS, X), "references need both", lambda: roadmap_loss(X, LABELS, X, LABELS)),
    (
        lambda: roadmap_loss(X, LABELS, ids=IDS),
        "needs no ids",
        lambda: roadmap_loss(X, LABELS),
    ),
    (
        lambda: roadmap_loss(X, LABELS, filled()),
        "ids=... has to say what each row is",
        lambda: roadmap_loss(X, LABELS, filled(), ids=IDS),
    ),
    (
        lambda: roadmap_loss(X, LABELS, filled(), LABELS, ids=IDS),
        "which has its own: leave it out",
        lambda: roadmap_loss(X, LABELS, filled(), ids=IDS),
    ),
    (
        lambda: roadmap_loss(X, LABELS, positives=RELATION),
        "pass one of them (labels=None beside positives)",
        lambda: roadmap_loss(X, positives=RELATION),
    ),
    (
        lambda: roadmap_loss(X, ref_emb=filled(), ids=IDS, positives=RELATION),
        "whose references it does not know: pass labels",
        lambda: roadmap_loss(X, LABELS, filled(), ids=IDS),
    ),
    (
        lambda: check_loss(torch.device("cuda"), "ndcg"),
        "pass method='reference', or CPU tensors",
        lambda: ndcg_loss(S, T, method="reference"),
    ),
    (
        lambda: RoadmapLoss()(X, LABELS, X, LABELS),
        "name references, ref_emb=... and ref_labels=...",
        lambda: RoadmapLoss()(X, LABELS, ref_emb=X, ref_labels=LABELS),
    ),
    (
        lambda: roadmap_loss((IDS, IDS, IDS), LABELS),
        "a miner's tuple is for the losses of roadmap_ext.integrations",
        lambda: pytest.importorskip("roadmap_ext.integrations.pytorch_metric_learning").RoadmapLoss()(
            X, LABELS, (IDS[::2], IDS[1::2], IDS[[2, 0, 0]])
        ),
    ),
    (lambda: ap_loss(S, torch.arange(ROWS)), "labels[:, None] == reference_labels[None]", lambda: ap_loss(S, T)),
    (
        lambda: ap_loss(X @ X.T, LABELS),
        "target[:, None] == target",
        lambda: ap_loss(X @ X.T, LABELS[:, None] == LABELS),
    ),
    (
        lambda: roadmap_loss(X, torch.tensor([0, 0, 1, 1, NAN, NAN])),
        "use labels.nan_to_num(nan=-1).long(), and ignore_label=-1 for the items that have none",
        lambda: roadmap_loss(X, torch.tensor([0, 0, 1, 1, NAN, NAN]).nan_to_num(nan=-1).long(), ignore_label=-1),
    ),
    (
        lambda: roadmap_loss(TOKENS, LABELS),
        "embeddings.flatten(0, 1) if it counts views, each with a label of its own",
        lambda: roadmap_loss(TOKENS.flatten(0, 1), LABELS.repeat_interleave(5)),
    ),
    (lambda: roadmap_loss(X[0], LABELS[:1]), "use embeddings[None]", lambda: roadmap_loss(X[0][None], LABELS[:1])),
    (
        lambda: roadmap_loss(LABELS, X),
        "embeddings.float()[None], unless it stands where labels belong",
        lambda: roadmap_loss(X, LABELS),
    ),
    (lambda: ap_loss(S[0], T[:1]), "use scores[None]", lambda: ap_loss(S[0][None], T[:1])),
    (
        lambda: ap_loss(S.view(2, 3, COLUMNS), T),
        "use scores.flatten(0, 1)",
        lambda: ap_loss(S.view(2, 3, COLUMNS).flatten(0, 1), T),
    ),
    (
        lambda: in_a_group(lambda: roadmap_loss(sharded(), LABELS)),
        "use embeddings.full_tensor(), or embeddings.to_local() and gather_across_devices=True",
        lambda: in_a_group(
            lambda: [
                roadmap_loss(sharded().full_tensor(), LABELS),
                roadmap_loss(sharded().to_local(), LABELS, gather_across_devices=True),
            ]
        ),
    ),
    *(
        (
            lambda rows=rows: in_a_group(lambda: distributed.gather(rows)),
            f"use {code}",
            lambda rows=rows, code=code: in_a_group(lambda: distributed.gather(eval(code, names(rows, "rows")))),
        )
        for rows, code in [
            ([1, 2], "torch.as_tensor(rows)"),
            (X.to_sparse(), "rows.to_dense()"),
            (ragged(LABELS, [4, 2]), "torch.cat(rows.unbind())"),
        ]
    ),
    (
        lambda: in_a_group(lambda: distributed.gather(torch.tensor(1.0))),
        "use rows[None]",
        lambda: in_a_group(lambda: distributed.gather(torch.tensor(1.0)[None])),
    ),
    (
        lambda: roadmap_loss(X, LABELS, gather_across_devices=True),
        "call torch.distributed.init_process_group() first",
        lambda: in_a_group(lambda: roadmap_loss(X, LABELS, gather_across_devices=True)),
    ),
    (second_derivative, "pass method='reference'", lambda: second_derivative(method="reference")),
    (
        lambda: torch.func.grad(lambda x: roadmap_loss(x, LABELS))(X),
        "pass method='reference'",
        lambda: torch.func.grad(lambda x: roadmap_loss(x, LABELS, method="reference"))(X),
    ),
    (
        lambda: without(extension, "_C", lambda: roadmap_loss(X, LABELS, method="sorted")),
        "pass method='reference'",
        lambda: without(extension, "_C", lambda: roadmap_loss(X, LABELS, method="reference")),
    ),
    (
        lambda: extension.check_kernels(torch.device("mps"), "auto"),
        "pass method='reference'",
        lambda: roadmap_loss(X, LABELS, method="reference"),
    ),
    (
        lambda: without("tqdm", None, lambda: metrics.retrieval_metrics(X, LABELS, progress=True)),
        "pass a function that takes the number of queries done since its last call",
        lambda: without("tqdm", None, lambda: metrics.retrieval_metrics(X, LABELS, progress=lambda queries: None)),
    ),
    (lambda: in_no_grad(cached), "call it outside no_grad()", cached),
    (lambda: cached(inputs=DERIVED), "detach it", lambda: cached(inputs=DERIVED[0].detach())),
    (lambda: cached(inputs=UserDict(x=X)), "dict(inputs)", lambda: cached(inputs=dict(UserDict(x=X)), call=of_x)),
    (
        lambda: cached(call=lambda model, x: (model(x), x)),
        "call=lambda model, inputs: ... picks it",
        lambda: cached(call=lambda model, x: (model(x), x)[0]),
    ),
    (
        lambda: cached(RoadmapLoss(reduction="none")),
        'reduction="mean" is one',
        lambda: cached(RoadmapLoss(reduction="mean")),
    ),
]
# Messages that other tests produce, by words of theirs, or that suggest nothing but what the user has to know.
ELSEWHERE = {
    "has no compiled extension": "tests/package",
    "does not load with torch": "tests/package",
    "has no CUDA kernels because": "tests/losses/test_ap_loss.py, test_other_devices",
    "the ranks make different calls": "tests/distributed",
    "this rank has no embeddings to measure": "tests/distributed",
    "has no backend for tensors on": "tests/distributed",
    "waited in vain for the others": "tests/distributed",
    "no query of this batch has a positive": "tests/integrations, test_the_sampler_that_is_named",
}


def names(value, argument):
    """What the code of a message may use."""
    classes = None
    with suppress(TypeError, RuntimeError):  # what is no list of labels
        classes = sorted(set(value) - {None})
    return {"torch": torch, "math": math, "scores": S, "classes": classes, argument: value}


def error_of(call):
    """What a wrong call says."""
    with pytest.raises((TypeError, ValueError, RuntimeError, ImportError)) as raised:
        call()
    return str(raised.value)


def error_of_case(call, argument, value):
    function, right = CALLS[call]
    return error_of(lambda: function(**right() | {argument: value}))


@pytest.mark.parametrize(
    ("call", "argument", "value", "code"),
    CASES,
    ids=[f"{call}, {argument}: {code}" for call, argument, _, code in CASES],
)
def test_the_code_in_a_message_is_taken(call, argument, value, code):
    assert code in error_of_case(call, argument, value)
    if code.startswith("ap_loss("):
        result = eval(code, names(value, argument) | RELATED)
    else:
        function, right = CALLS[call]
        result = function(**right() | {argument: eval(code, names(value, argument))})
    assert not isinstance(result, torch.Tensor) or result.isfinite().all()


@pytest.mark.parametrize(
    ("call", "argument", "value", "end"),
    [
        ("loss", "embeddings", None, "got NoneType"),
        ("loss", "embeddings", {}, "got dict"),
        ("loss", "embeddings", ["a"], "got list"),
        ("loss", "embeddings", [[1.0], [2.0, 3.0]], "got list"),
        ("loss", "embeddings", torch.tensor(1.0), r"got shape \(\)"),
        ("loss", "labels", {"names": ["a"]}, "got dict"),
        ("loss", "labels", LABELS[:4], r"got shape \(4,\)"),
        ("loss", "labels", torch.randn(ROWS, 3), r"got shape \(6, 3\)"),
        ("loss", "labels", ONE_HOT[None], r"got shape \(1, 6, 3\)"),
        ("loss", "labels", [0, 0, "a", "a", 1, 1], "got list"),
        ("metrics", "embeddings", numpy.ma.masked_array(X.numpy(), X > 0), "got MaskedArray"),
        ("loss", "labels", ONE_HOT.to("meta"), r"got shape \(6, 3\)"),  # there is nothing to look at
        ("scores", "scores", {"a": 1}, "got dict"),
        ("scores", "scores", S.to(torch.complex64), "got torch.complex64"),
        ("scores", "target", T[:4, :5], r"got \(4, 5\)"),
        ("scores", "target", "mask", "got str"),
    ],
)
def test_where_nothing_is_known_to_help_nothing_is_said(call, argument, value, end):
    assert re.search(f"{end}$", error_of_case(call, argument, value))


@pytest.mark.parametrize(
    "array",
    [
        DOUBLE.flip(0).numpy()[::-1],
        DOUBLE.numpy().astype(">f8"),
        DOUBLE.flip(0).numpy().astype(">f8")[::-1],
        DOUBLE.numpy().astype(object),
        DOUBLE.numpy().astype(numpy.longdouble),
    ],
    ids=["reversed", "bytes", "both", "objects", "long"],
)
def test_an_array_keeps_its_values(array):
    """float64 is not rounded on the way."""
    code = error_of_case("metrics", "embeddings", array).split(": use ")[1]
    made = eval(code, names(array, "embeddings"))
    assert made.dtype == torch.float64
    assert torch.equal(made, DOUBLE)


@pytest.mark.parametrize(("wrong", "words", "right"), OTHERS, ids=[words for _, words, _ in OTHERS])
def test_the_right_call_is_taken(wrong, words, right):
    assert words in error_of(wrong)
    right()


SUGGESTS = re.compile(
    r"(^|[:;,] |, or )(use|call|pass|leave|choose|give|name|move|wrap|install|make|number the) | become |=\.\.\."
)


def suggestions(path):
    """The texts of a file that suggest something, docstrings aside: each as its parts between what is filled in."""
    tree = ast.parse(path.read_text())
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | docs:
            parts = [node.value]
        else:
            continue
        if SUGGESTS.search(" ".join(parts)) and any(" " in part.strip() for part in parts):
            yield f"{path.name}:{node.lineno}", parts


def test_every_suggestion_is_among_the_cases():
    said = [error_of_case(*case[:3]) for case in CASES] + [error_of(wrong) for wrong, _, _ in OTHERS]
    found = [each for path in Path(roadmap_ext.__file__).parent.glob("*.py") for each in suggestions(path)]
    missing = [
        (place, parts)
        for place, parts in found
        if not any(words in " ".join(parts) for words in ELSEWHERE)
        and not any(all(part in message for part in parts) for message in said)
    ]
    assert not missing, missing
    assert len(found) > 30
