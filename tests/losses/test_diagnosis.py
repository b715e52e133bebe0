"""diagnose: every figure against plain loops over all pairs, and advice that holds once it is followed."""

import doctest
import math

import pytest
import torch
from torch.nn.functional import normalize

from roadmap_ext import CalibrationLoss, EmbeddingMemory, RoadmapLoss, SmoothAPLoss, SupAPLoss, diagnose, diagnosis
from roadmap_ext.diagnosis import QUANTILES, WIDE_TAU
from roadmap_ext.metrics import retrieval_metrics


def by_loops(embeddings, labels, loss, ref_emb=None, ref_labels=None, ids=None, ref_ids=None):
    """The shares that a diagnosis has, pair by pair in float64."""
    s, alone = {**RoadmapLoss().settings, **loss.settings}, ref_emb is None
    ref_emb, ref_labels = (embeddings, labels) if alone else (ref_emb, ref_labels)
    q, r = embeddings.double(), ref_emb.double()
    if s["normalize"]:
        q, r = normalize(q, dim=1), normalize(r, dim=1)
    scores, none = q @ r.T, s["ignore_label"]
    kinds = {"positives": [], "negatives": []}
    triples, positives, aps = [], [], []
    for i in range(len(q)):
        own, others = [], []
        for j in range(len(r)):
            itself = (alone and i == j) or (ids is not None and ids[i] == ref_ids[j])
            if (itself and not s["include_self"]) or none in (labels[i].item(), ref_labels[j].item()):
                continue
            (own if labels[i] == ref_labels[j] else others).append(scores[i, j].item())
        kinds["positives"] += own
        kinds["negatives"] += others
        for x in own:
            t = [y - x for y in others]
            triples += t
            positives.append(t)
        if own:
            aps.append(sum(1 / (1 + sum(y >= x for y in others) / sum(y >= x for y in own)) for x in own) / len(own))

    def felt(t, tau):
        top = 5 * tau if s["surrogate"] == "smooth" else math.inf if s["rho"] else min(s["delta"], 5 * tau)
        return -5 * tau <= t <= top

    def share(of):
        return sum(of) / len(of)

    return kinds, {
        "queries": len(aps),
        "batch_ap": share(aps),
        "outranking": share([t >= 0 for t in triples]),
        "linear": share([t > s["delta"] for t in triples]),
        "felt": share([felt(t, s["tau"]) for t in triples]),
        "felt_wide": share([felt(t, WIDE_TAU) for t in triples]),
        "moved": share([any(felt(x, s["tau"]) for x in t) for t in positives]),
        "stuck": share([max(t) >= 0 and not any(felt(x, s["tau"]) for x in t) for t in positives]),
        "pulled": share([x < s["positive_margin"] for x in kinds["positives"]]),
        "pushed": share([x > s["negative_margin"] for x in kinds["negatives"]]),
    }


CASES = {
    "the batch": (RoadmapLoss(), {}),
    "chunks": (RoadmapLoss(chunk_size=5), {}),
    "Smooth-AP": (SmoothAPLoss(tau=0.02), {}),
    "flat": (SupAPLoss(rho=0.0, delta=0.1, tau=0.03), {}),
    "calibration": (CalibrationLoss(positive_margin=0.4, negative_margin=0.2), {}),
    "products": (RoadmapLoss(normalize=False, tau=0.3), {}),
    "itself": (RoadmapLoss(include_self=True), {}),
    "labels that are none": (RoadmapLoss(ignore_label=2, chunk_size=7), {}),
    "ids": (RoadmapLoss(), {"ids": torch.arange(24) % 20, "ref_ids": torch.arange(24) % 20}),
    "a gallery": (RoadmapLoss(chunk_size=9), {"gallery": 31}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_figure(case):
    loss, more = CASES[case]
    embeddings, labels = torch.randn(24, 5, dtype=torch.float64) + 0.3, torch.arange(24) % 6
    more = dict(more)
    if count := more.pop("gallery", 0):
        more["ref_emb"], more["ref_labels"] = torch.randn(count, 5, dtype=torch.float64), torch.arange(count) % 7
        more |= {"ids": torch.arange(24), "ref_ids": torch.arange(count)}
    kinds, expected = by_loops(embeddings, labels, loss, **more)
    if case == "labels that are none":
        embeddings[labels == 2] = torch.nan
    found = diagnose(embeddings, labels, loss, **more)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    widest = max(map(abs, kinds["positives"] + kinds["negatives"]))
    for name, values in kinds.items():
        of, values = getattr(found, name), torch.tensor(values, dtype=torch.float64)
        assert of.pairs == len(values)
        assert of.mean == pytest.approx(values.mean().item())
        # Whatever is meant by a quantile of few values: as many are below it and above it.
        for q, value in zip(QUANTILES, of.quantiles, strict=True):
            bin_ = 2 * 4 * max(1.0, widest) / 4096
            assert (values < value - bin_).sum() <= q * len(values) <= (values <= value + bin_).sum()


def test_the_ap_is_that_of_the_metrics():
    embeddings, labels = torch.randn(300, 8), torch.arange(300) % 40
    found = diagnose(embeddings, labels)
    assert found.batch_ap == pytest.approx(retrieval_metrics(embeddings, labels)["mAP"], rel=1e-6)
    assert found == diagnose(embeddings, labels, RoadmapLoss())


def test_ties_count_against_the_ranking():
    embeddings, labels = torch.randint(0, 3, (24, 3)).double(), torch.arange(24) % 6
    loss = RoadmapLoss(normalize=False, delta=1.0)
    expected = by_loops(embeddings, labels, loss)[1]
    found = diagnose(embeddings, labels, loss)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)


def test_margins_of_the_batch():
    """The fractions that they leave on the wrong side are those of the two numbers, given by themselves."""
    embeddings, labels = torch.randn(60, 8), torch.arange(60) % 12
    found = diagnose(embeddings, labels, CalibrationLoss(margins="auto"))
    margins = {name: found.loss[name] for name in ("positive_margin", "negative_margin")}
    assert margins["positive_margin"] == pytest.approx(margins["negative_margin"] + 0.2)
    given = diagnose(embeddings, labels, CalibrationLoss(**margins))
    assert (found.pulled, found.pushed) == (given.pulled, given.pushed)


def test_references_of_a_memory():
    memory = EmbeddingMemory(40, 8, warm_up=0)
    embeddings, labels, ids = torch.randn(20, 8), torch.arange(20) % 5, torch.arange(20)
    memory.enqueue(embeddings, labels, ids)
    found = diagnose(embeddings, labels, ref_emb=memory, ids=ids)
    assert (found.positives.pairs, found.negatives.pairs) == (60, 320)


# --- advice ----------------------------------------------------------------------------------------------------------


def space(within, between, noise=0.02, classes=16):
    """Embeddings whose positives have one similarity and whose negatives have another, and their labels."""
    labels, items = torch.arange(classes).repeat_interleave(4), 4 * classes
    basis = torch.linalg.qr(torch.randn(1 + classes + items, 1 + classes + items))[0]
    parts = (between, max(0.0, within - between), 1 - max(within, between))
    common, of_class, own = (
        share**0.5 * rows for share, rows in zip(parts, basis.split([1, classes, items]), strict=True)
    )
    return common + of_class[labels] + own + noise * torch.randn(items, 1 + classes + items) / items**0.5, labels


def said(loss, embeddings, labels):
    found = diagnose(embeddings, labels, loss)
    return found.idle, " ".join(found.advice)


def test_margins_that_only_pull():
    embeddings, labels = space(0.3, 0.1, noise=0.3)
    idle, text = said(RoadmapLoss(), embeddings, labels)
    assert idle == ("the push on negatives",)
    assert "all but pulls" in text
    assert "margins='auto'" in text
    followed = diagnose(embeddings, labels, RoadmapLoss(margins="auto"))
    assert "the push on negatives" not in followed.idle
    assert "all but pulls" not in " ".join(followed.advice)


def test_margins_that_only_push():
    idle, text = said(CalibrationLoss(), *space(0.95, 0.85))
    assert idle == ("the pull on positives",)
    assert "all but pushes" in text


def test_margins_that_pull_ten_times_as_much():
    embeddings, labels = torch.randn(64, 24) + 0.7, torch.arange(64) % 16
    found = diagnose(embeddings, labels, CalibrationLoss())
    assert 0.01 < found.pushed < found.pulled / 10
    assert found.idle == ()
    assert "all but pulls" in found.advice[0]


def test_margins_that_are_kept():
    embeddings, labels = space(0.95, 0.2)
    idle, text = said(RoadmapLoss(), embeddings, labels)
    assert idle == ("the AP loss", "the calibration loss")
    assert "The batch is solved (AP 1.000)" in text
    assert said(RoadmapLoss(positive_margin=0.99, negative_margin=0.1), embeddings, labels)[0] == ("the AP loss",)


def test_positives_without_a_gradient():
    angle = torch.tensor([0.0, 180.0, 30.0, 210.0]).deg2rad()  # opposite each other, beside another class
    embeddings, labels = torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor([0, 0, 1, 1])
    assert diagnose(embeddings, labels, SmoothAPLoss()).stuck == 1
    idle, text = said(SmoothAPLoss(), embeddings, labels)
    assert idle == ("the AP loss",)
    assert "100 % of the positives are outranked and have no gradient" in text
    assert said(SupAPLoss(rho=0.0), embeddings, labels)[0] == ("the AP loss",)
    assert said(SupAPLoss(), embeddings, labels)[0] == said(SmoothAPLoss(tau=0.5), embeddings, labels)[0] == ()


def test_a_narrow_temperature():
    embeddings, labels = torch.randn(64, 24) + 0.2, torch.arange(64) % 16
    assert f"try tau={WIDE_TAU:g}" in said(SmoothAPLoss(), embeddings, labels)[1]
    assert said(SmoothAPLoss(tau=WIDE_TAU), embeddings, labels) == ((), "")


def test_embeddings_that_are_all_alike():
    assert "point the same way" in said(SupAPLoss(), torch.rand(64, 24) + 3, torch.arange(64) % 16)[1]


def test_nothing_to_rank():
    embeddings = torch.randn(6, 4)
    assert "No query has a positive" in said(None, embeddings, torch.arange(6))[1]
    assert "There are no negatives" in said(None, embeddings, torch.zeros(6, dtype=torch.int64))[1]
    found = diagnose(embeddings[:0], torch.zeros(0, dtype=torch.int64))
    assert math.isnan(found.batch_ap)
    assert "nan" in str(found)


def test_the_table():
    embeddings, labels = space(0.3, 0.1)
    text = str(diagnose(embeddings, labels))
    assert "positives          192" in text
    assert "AP loss, tau 0.01" in text
    assert "calibration loss, weight 0.5" in text
    assert "calibration" not in str(diagnose(embeddings, labels, SupAPLoss()))
    assert "AP loss" not in str(diagnose(embeddings, labels, CalibrationLoss()))
    assert "linear part" not in str(diagnose(embeddings, labels, SmoothAPLoss()))


def test_examples():
    assert not doctest.testmod(diagnosis, extraglobs={"torch": torch}).failed


def test_what_it_refuses():
    embeddings, labels = torch.randn(6, 4), torch.arange(6) % 2
    with pytest.raises(TypeError, match="loss must be None or a loss of embeddings of roadmap_ext"):
        diagnose(embeddings, labels, torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="labels must be 1-D"):
        diagnose(embeddings, labels[:3])
    embeddings[4, 1] = torch.inf
    with pytest.raises(ValueError, match="got 1 rows that are not, the first of them 4"):
        diagnose(embeddings, labels)
