"""What a batch gives a loss to do, as a table for a person, and what to change.

Similarities are looked at a chunk of queries at a time. Quantiles come of a histogram of 4,096 equal bins over all that
similarities can be; all other figures are exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import margins, ranking
from .chunks import rows_of_a_chunk
from .memory import EmbeddingMemory
from .modules import RoadmapLoss
from .pairs import Items, blank
from .settings import checked

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# In units of tau: a sigmoid that far from its middle has less than a thirtieth of its steepest slope.
REACH = 5.0
# Of a wider temperature to compare with: the first to try where embeddings are pretrained (docs/paper.md).
WIDE_TAU = 0.05
# A part of the loss that acts on a smaller share has nothing to do.
_FEW = 1e-3
_BINS = 4096


class Similarities(NamedTuple):
    """Of the pairs of one kind; NaN where there are none."""

    pairs: int
    mean: float
    quantiles: tuple[float, ...]  # of QUANTILES

    @property
    def median(self) -> float:
        return self.quantiles[2]


class Diagnosis(NamedTuple):
    """What :func:`diagnose` found; as a string, a table. Shares are from 0 to 1, NaN of nothing."""

    loss: Mapping[str, Any]  # its settings
    queries: int  # that have a positive
    alone: int  # that have none
    positives: Similarities
    negatives: Similarities
    batch_ap: float  # the mean over queries that have a positive; exact
    # Of all pairs of a positive and a negative of a query:
    outranking: float  # the negative is at least as similar
    linear: float  # it is more similar by more than delta
    felt: float  # the AP loss has a gradient there: see REACH
    felt_wide: float  # the same with WIDE_TAU
    # Of all positives:
    moved: float  # that the AP loss has a gradient for
    stuck: float  # that a negative outranks, with no gradient all the same
    # Of all positives and of all negatives; 0 where the loss has no such part:
    pulled: float  # below the positive margin
    pushed: float  # above the negative margin
    idle: tuple[str, ...]  # parts of the loss that have nothing to do
    advice: tuple[str, ...]  # what to change, and why

    def __str__(self) -> str:
        head = ["", "pairs", "mean", *(f"{100 * q:g} %" for q in QUANTILES)]
        rows = [head]
        for name, of in (("positives", self.positives), ("negatives", self.negatives)):
            rows.append([name, f"{of.pairs:,}", *(f"{x:.3f}" for x in (of.mean, *of.quantiles))])
        lines = ["similarity  " + "".join(f"{cell:>10}" for cell in rows[0][1:])]
        lines += [f"{row[0]:<12}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows[1:]]
        alone = f"; {self.alone:,} more have none" if self.alone else ""
        lines.append(f"AP of the batch {self.batch_ap:.3f}, over {self.queries:,} queries that have a positive{alone}")
        s, calibration = self.loss, self.loss["calibration_weight"]
        if calibration < 1:
            wide = f" ({_percent(self.felt_wide)} with tau {WIDE_TAU:g})" if s["tau"] < WIDE_TAU else ""
            lines.append(f"AP loss, tau {s['tau']:g}")
            lines.append(_line("of a positive and a negative: in the wrong order", self.outranking))
            if s["surrogate"] == "sup":
                lines.append(_line(f"  and more than {s['delta']:g} apart, in the linear part", self.linear))
            lines.append(_line("  with a gradient", self.felt) + wide)
            lines.append(_line("of positives: with a gradient", self.moved))
            lines.append(_line("  outranked, and without one", self.stuck))
        if calibration > 0:
            lines.append(f"calibration loss, weight {calibration:g}")
            lines.append(_line(f"of positives: pulled, below {s['positive_margin']:.3g}", self.pulled))
            lines.append(_line(f"of negatives: pushed, above {s['negative_margin']:.3g}", self.pushed))
        lines += [f"- {text}" for text in self.advice] or ["Nothing to change."]
        return "\n".join(lines)


@torch.no_grad()
def diagnose(
    embeddings: Tensor,
    labels: Tensor,
    loss: nn.Module | None = None,
    ref_emb: Tensor | EmbeddingMemory | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
) -> Diagnosis:
    """What a batch gives a loss to do, and what to change: ``print(diagnose(model(images), labels))``.

    Similarities of positives and negatives; which pairs are in the wrong order; where the AP loss has a gradient, and
    which pairs the margins of the calibration loss act on. A pair of a positive and a negative counts as one with a
    gradient if the negative is at most 5 ``tau`` less similar, and, with a surrogate that is flat far up, at most 5
    ``tau`` more similar.

    Args:
        embeddings: [B, D], labels: [B], ref_emb: [N, D], ref_labels: [N], ids: [B], ref_ids: [N]: as of
            :func:`roadmap_ext.roadmap_loss`.
        loss: a loss of embeddings of this package, whose settings are looked at; None for ``RoadmapLoss()``. Of one
            that gathers across devices, what this process has.

    Returns:
        :class:`Diagnosis`. Nothing of the size [B, N] is in memory; the host waits for the device.

    Raises:
        TypeError: an argument has the wrong type or dtype, or ``loss`` is none of this package's.
        ValueError: shapes or devices differ, or an embedding is not finite.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
        >>> found = diagnose(embeddings, torch.tensor([7, 7, 3, 3]))
        >>> round(found.batch_ap, 3), found.outranking, round(found.negatives.median, 2)
        (0.417, 0.75, 0.8)
    """
    settings = _settings(loss)
    items = _known(Items.checked(embeddings, labels, ref_emb, ref_labels, ids, ref_ids), settings["ignore_label"])
    for name, matrix in (("embeddings", items.embeddings), ("ref_emb", items.ref_emb)):
        if matrix is not None and not matrix.isfinite().all():
            rows = (~matrix.isfinite()).any(1).nonzero().flatten().tolist()
            raise ValueError(f"{name} must be finite, got {len(rows)} rows that are not, the first of them {rows[0]}")
    pairs = items.pairs(settings["include_self"], settings["ignore_label"])
    if settings["margins"] is not None:  # those that this batch has
        masks = partial(pairs.masks_of, columns=len(items.ref_labels))
        fitting = margins.to_fit(checked(settings).objective, items.embeddings, items.ref_emb, masks)
        settings = {**settings, **{name: getattr(fitting, name) for name in ("positive_margin", "negative_margin")}}
    with torch.autocast(embeddings.device.type, enabled=False):
        queries, references = ranking.vectors(items.embeddings, items.ref_emb, settings["normalize"])
        count = _Counts(settings, float(_longest(queries) * _longest(references)))
        columns = len(references)
        most = ranking.rows_to_sort(columns, embeddings.device)
        step = rows_of_a_chunk(len(queries), most, settings["chunk_size"])
        for begin in range(0, len(queries), step):
            part = slice(begin, min(begin + step, len(queries)))
            target, ignore = pairs.rows(part).masks(columns)
            count.add(queries[part] @ references.T, target & ~ignore, ~target & ~ignore)
    return count.found()


def _known(items: Items, ignore_label: int | None) -> Items:
    """Without what the embeddings of items of no known class are, NaN or not."""
    references = None if items.ref_emb is None else blank(items.ref_emb, items.ref_labels, ignore_label)
    return items._replace(embeddings=blank(items.embeddings, items.labels, ignore_label), ref_emb=references)


def _settings(loss: nn.Module | None) -> Mapping[str, Any]:
    settings = getattr(RoadmapLoss() if loss is None else loss, "settings", None)
    if not isinstance(settings, Mapping) or "normalize" not in settings:
        raise TypeError(
            "loss must be None or a loss of embeddings of roadmap_ext, such as RoadmapLoss(tau=0.02), got "
            f"{type(loss).__name__}"
        )
    if settings.get("margins") is not None:
        return {**RoadmapLoss(margins=settings["margins"]).settings, **settings}
    return {**RoadmapLoss().settings, **settings}  # a loss that lacks a part has its defaults, and does not use them


def _longest(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1).max() if len(vectors) else vectors.new_zeros(())


class _Histogram:
    """Of similarities up to a bound on either side."""

    def __init__(self, bound: float) -> None:
        self._bound = bound or 1.0
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._sum = 0.0

    def add(self, values: Tensor) -> None:
        """Values [n]."""
        place = ((values / self._bound + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
        self._counts += place.bincount(minlength=_BINS).cpu()
        self._sum += values.sum(dtype=ranking.widest(values.device)).item()

    def found(self) -> Similarities:
        pairs = int(self._counts.sum())
        if not pairs:
            return Similarities(0, math.nan, (math.nan,) * len(QUANTILES))
        total = self._counts.cumsum(0)
        quantiles = []
        for q in QUANTILES:
            place = int(torch.searchsorted(total, torch.tensor(q * pairs)))
            inside = (q * pairs - int(total[place] - self._counts[place])) / int(self._counts[place])
            quantiles.append(self._bound * ((place + inside) * 2 / _BINS - 1))
        return Similarities(pairs, self._sum / pairs, tuple(quantiles))


class _Counts:
    """All that is counted, a chunk of queries after the other."""

    def __init__(self, settings: Mapping[str, Any], bound: float) -> None:
        self._settings = settings
        self._positive, self._negative = _Histogram(bound), _Histogram(bound)
        self._n: Counter[str] = Counter()
        self._ap = 0.0

    def add(self, scores: Tensor, positive: Tensor, negative: Tensor) -> None:
        """Scores [b, N], and which are of positives and of negatives."""
        settings = self._settings
        self._positive.add(scores[positive])
        self._negative.add(scores[negative])
        self._count("pulled", (scores < settings["positive_margin"]) & positive)
        self._count("pushed", (scores > settings["negative_margin"]) & negative)
        size = positive.sum(1)
        self._count("queries", size > 0)
        self._count("alone", (size == 0) & negative.any(1))
        most = int(size.max())
        if not most:
            return
        others = scores.masked_fill(~negative, -torch.inf).sort(dim=1).values  # [b, N]
        own = scores.masked_fill(~positive, torch.inf).sort(dim=1).values[:, :most].contiguous()  # [b, P]
        there = torch.arange(most, device=scores.device) < size[:, None]

        def from_on(distance: float, *, beyond: bool = False) -> Tensor:
            """How many negatives are more similar than each positive by this, or, with ``beyond``, by more. [b, P]"""
            return (scores.shape[1] - torch.searchsorted(others, own + distance, right=beyond)) * there

        def felt(tau: float) -> Tensor:
            reach = REACH * tau
            near = from_on(-reach)
            if settings["surrogate"] == "smooth":
                return near - from_on(reach, beyond=True)
            # The sigmoid goes on to the threshold.
            return near if settings["rho"] > 0 else near - from_on(min(reach, settings["delta"]), beyond=True)

        outranking, felt_now = from_on(0.0), felt(settings["tau"])
        self._n["triples"] += int((negative.sum(1) * size).sum())
        self._n["outranking"] += int(outranking.sum())
        self._n["linear"] += int(from_on(settings["delta"], beyond=True).sum())
        self._n["felt"] += int(felt_now.sum())
        self._n["wide"] += int(felt(WIDE_TAU).sum())
        self._count("moved", felt_now > 0)
        self._count("stuck", (felt_now == 0) & (outranking > 0))
        ahead = (size[:, None] - torch.searchsorted(own, own)) * there
        precision = ahead / (ahead + outranking).clamp(min=1)
        self._ap += (precision.sum(1) / size.clamp(min=1)).sum(dtype=ranking.widest(scores.device)).item()

    def _count(self, name: str, mask: Tensor) -> None:
        self._n[name] += int(mask.sum())

    def found(self) -> Diagnosis:
        positives, negatives, n = self._positive.found(), self._negative.found(), self._n
        triples, queries = n["triples"], n["queries"]
        found = Diagnosis(
            loss=self._settings,
            queries=queries,
            alone=n["alone"],
            positives=positives,
            negatives=negatives,
            batch_ap=_share(self._ap, queries),
            outranking=_share(n["outranking"], triples),
            linear=_share(n["linear"], triples),
            felt=_share(n["felt"], triples),
            felt_wide=_share(n["wide"], triples),
            moved=_share(n["moved"], positives.pairs),
            stuck=_share(n["stuck"], positives.pairs),
            pulled=_share(n["pulled"], positives.pairs),
            pushed=_share(n["pushed"], negatives.pairs),
            idle=(),
            advice=(),
        )
        if not positives.pairs or not negatives.pairs:
            return found._replace(advice=(_without_pairs(found),))
        judged = _judged(found)
        return found._replace(
            idle=tuple(part for part, _ in judged if part), advice=tuple(advice for _, advice in judged)
        )


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.9995 or share == 1 else "> 99.9 %"


def _line(text: str, share: float) -> str:
    return f"  {text:<52}{_percent(share):>9}"


# --- what to change --------------------------------------------------------------------------------------------------


def _without_pairs(found: Diagnosis) -> str:
    if not found.positives.pairs:
        return (
            "No query has a positive, so there is nothing to rank: draw batches with several items of each class, "
            "such as four of each of a quarter as many classes."
        )
    return "There are no negatives, so every ranking is perfect: draw batches of several classes."


def _judged(found: Diagnosis) -> list[tuple[str, str]]:
    """The part of the loss that has nothing to do, or "", and what to change."""
    s, said = found.loss, []
    spread = found.negatives.quantiles[-1] - found.negatives.quantiles[0]
    if found.alone > found.queries:
        said.append(("", f"{found.alone:,} queries have no positive: draw batches with several items of each class."))
    if s["normalize"] and found.negatives.quantiles[0] > 0.7:
        said.append(
            (
                "",
                f"All embeddings point the same way: 95 % of the negatives have a similarity above "
                f"{found.negatives.quantiles[0]:.2f}. An untrained network is often so, and training spreads them; "
                "if it lasts, lower the learning rate.",
            )
        )
    if s["calibration_weight"] < 1:
        said += _of_ap(found, spread)
    if s["calibration_weight"] > 0:
        said += _of_calibration(found)
    return said


def _of_ap(found: Diagnosis, spread: float) -> list[tuple[str, str]]:
    tau, wide = found.loss["tau"], _percent(found.felt_wide)
    if found.moved < 10 * _FEW:
        if found.stuck > found.moved:
            return [("the AP loss", _stuck(found))]
        return [
            (
                "the AP loss",
                f"The batch is solved (AP {found.batch_ap:.3f}): no negative is near a positive. Take larger batches, "
                "past embeddings (EmbeddingMemory), or batches of classes that are alike.",
            )
        ]
    if found.stuck > 0.05:
        return [("", _stuck(found))]
    if found.batch_ap < 0.9 and tau < WIDE_TAU and REACH * tau < spread / 2 and found.felt_wide > 2 * found.felt:
        return [
            (
                "",
                f"tau is narrow for these similarities: {_percent(found.felt)} of the pairs of a positive and a "
                f"negative have a gradient, with tau={WIDE_TAU:g} {wide}. To fine-tune a pretrained encoder, try "
                f"tau={WIDE_TAU:g}.",
            )
        ]
    return []


def _stuck(found: Diagnosis) -> str:
    return (
        f"{_percent(found.stuck)} of the positives are outranked and have no gradient: the surrogate is flat there. "
        f"Use surrogate='sup' with rho > 0, or a wider tau ({WIDE_TAU:g})."
    )


def _of_calibration(found: Diagnosis) -> list[tuple[str, str]]:
    s, pulled, pushed = found.loss, found.pulled, found.pushed
    if max(pulled, pushed) < _FEW:
        text = "All pairs keep the margins, and the calibration loss is 0, as it should be in the end."
        return [("the calibration loss", text)]
    shares = (
        f"{_percent(pulled)} of the positives are below {s['positive_margin']:.3g}, and {_percent(pushed)} of the "
        f"negatives above {s['negative_margin']:.3g}"
    )
    if pulled > 0.5 and pushed < pulled / 10:
        part = "the push on negatives" if pushed < _FEW else ""
        return [
            (
                part,
                f"The calibration loss all but pulls: {shares}. It then draws everything together. Margins have to "
                "suit the embeddings: margins='auto' reads them from each batch; or take SupAPLoss.",
            )
        ]
    if pushed > 0.5 and pulled < pushed / 10:
        part = "the pull on positives" if pulled < _FEW else ""
        return [
            (
                part,
                f"The calibration loss all but pushes: {shares}. An untrained network is often so; if it lasts, raise "
                "the margins.",
            )
        ]
    return []
