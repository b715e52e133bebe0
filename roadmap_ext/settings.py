"""The settings of the losses: names, types, defaults and checks, each once, and the objects that they become.

A public function takes its settings as keywords and makes one object of them with :func:`checked`; everything after it
takes the object. Where an op is called, ``flat()`` says the same in numbers; csrc/tensors.h reads these.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from .validation import check_chunk_size, check_flag, check_ignore_label, check_ks, one_of

SURROGATES = ("sup", "smooth")  # the ops take their places
LOSSES = ("ap", "recall", "ndcg", "mrr", "hap")  # the ops take their places
GRADED = ("ndcg", "hap")  # those to which one positive can be worth more than another
GAINS = ("exponential", "linear")
REDUCTIONS = ("none", "mean", "sum")  # the ops take their places
METHODS = ("auto", "pairwise", "sorted", "reference")  # the ops take the places of all but the last
CALIBRATION_REDUCTIONS = ("per_query", "violating_pairs")

# Kernels add up settings, 1 / tau and rho * tau in float32, which ends at 3.4e38: a row of 2^32 pairs stays below.
_SMALLEST_TAU = 1e-20
_LARGEST = 1e28
# A vector of smaller norm has no direction: normalised it is 0, with no gradient.
SMALLEST_NORM = 1e-12

_F = TypeVar("_F", bound=Callable[..., Any])

# --- the objects -----------------------------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """What stands for the steps of a rank: H- of :func:`roadmap_ext.ap_loss`."""

    surrogate: str = "sup"
    tau: float = 0.01
    rho: float = 100.0
    delta: float = 0.05
    start: float = 0.5
    offset: float | None = None  # None: continuous at the threshold

    def value_above_threshold(self) -> float:
        """The offset, or the default that makes the surrogate continuous."""
        return self.start + 1 / (1 + math.exp(-self.delta / self.tau)) if self.offset is None else self.offset

    def flat(self) -> list[float]:
        """The same as the ops take it: the kind, then tau to offset."""
        kind = float(SURROGATES.index(self.surrogate))
        return [kind, self.tau, self.rho, self.delta, self.start, self.value_above_threshold()]


class Ranking(NamedTuple):
    """What a loss makes of the ranks of a query's positives: see the functions of the same names in losses.py."""

    loss: str = "ap"
    k: tuple[int, ...] = (1, 2, 4, 8, 16)  # recall
    rank_temperature: float = 1.0  # recall
    gain: str = "exponential"  # ndcg
    alpha: float = 1.0  # hap, from labels
    leak: float = 0.0  # hap
    beta: float = 0.0  # hap
    gamma: float = 1.0  # hap

    def flat(self) -> list[float]:
        """The same as the ops take it; alpha is in what positives are worth."""
        kind, gain = float(LOSSES.index(self.loss)), float(GAINS.index(self.gain))
        return [kind, self.rank_temperature, self.leak, self.beta, self.gamma, gain, *map(float, self.k)]


class Objective(NamedTuple):
    """What a loss of embeddings is: (1 - calibration_weight) loss of ranks + calibration_weight calibration loss."""

    surrogate: Surrogate = Surrogate()
    ranking: Ranking = Ranking()
    calibration_weight: float = 0.5
    positive_margin: float = 0.9
    negative_margin: float = 0.6
    margins: str | None = None  # "auto": to be read from the data, by margins.to_fit()
    calibration_reduction: str = "per_query"
    normalize: bool = True
    reduction: str = "mean"

    def flat(self) -> list[float]:
        """The same as the ops take it: the surrogate, which of the two parts are asked for, and the margins."""
        # Not float() of a comparison: where torch.compile takes the weight for a variable, that stays one.
        parts = [1.0 if self.calibration_weight < 1 else 0.0, 1.0 if self.calibration_weight > 0 else 0.0]
        return [*self.surrogate.flat(), *parts, self.positive_margin, self.negative_margin, *self.ranking.flat()]


class Settings(NamedTuple):
    """All settings of a loss: what it is, which pairs it counts, and how it is computed."""

    objective: Objective = Objective()
    include_self: bool = False
    ignore_label: int | None = None
    chunk_size: int | None = None
    gather_across_devices: bool = False
    method: str = "auto"


def _defaults() -> dict[str, Any]:
    kinds: tuple[Any, ...] = (Ranking, Objective, Settings, Surrogate)
    of = {
        name: value for kind in kinds for name, value in kind._field_defaults.items() if not hasattr(value, "_fields")
    }
    return of | {name: of.pop(name) for name in ("reduction", "method")}  # last, as everybody has them


DEFAULTS = _defaults()

# --- the keywords that each function and module takes ----------------------------------------------------------------


class _Tau(TypedDict, total=False):
    tau: float


class _Shape(_Tau, total=False):
    rho: float
    delta: float
    start: float
    offset: float | None


class _Recall(TypedDict, total=False):
    k: int | Iterable[int]
    rank_temperature: float


class _NDCG(TypedDict, total=False):
    gain: str


class _HAP(TypedDict, total=False):
    leak: float
    beta: float
    gamma: float


class _Margins(TypedDict, total=False):
    positive_margin: float
    negative_margin: float
    margins: str | None
    calibration_reduction: str


class _Reduction(TypedDict, total=False):
    reduction: str


class _Ranked(_Reduction, total=False):
    normalize: bool
    include_self: bool
    ignore_label: int | None


class _Method(TypedDict, total=False):
    method: str


class _Run(_Method, total=False):
    chunk_size: int | None
    gather_across_devices: bool


class SurrogateKeywords(_Shape, total=False):
    surrogate: str


class RankKeywords(SurrogateKeywords, _Method, total=False):
    """smooth_rank's."""


class PlainScoreKeywords(SurrogateKeywords, _Reduction, total=False):
    """reference.ap_loss's."""


class ScoreKeywords(PlainScoreKeywords, _Method, total=False):
    """ap_loss's and APLoss's, and mrr_loss's."""


class PlainRecallKeywords(_Recall, PlainScoreKeywords, total=False):
    """reference.recall_loss's."""


class RecallKeywords(PlainRecallKeywords, _Method, total=False):
    """recall_loss's."""


class PlainNDCGKeywords(_NDCG, PlainScoreKeywords, total=False):
    """reference.ndcg_loss's."""


class NDCGKeywords(PlainNDCGKeywords, _Method, total=False):
    """ndcg_loss's."""


class PlainHAPKeywords(_HAP, PlainScoreKeywords, total=False):
    """reference.hap_loss's."""


class HAPKeywords(PlainHAPKeywords, _Method, total=False):
    """hap_loss's."""


class RoadmapKeywords(SurrogateKeywords, _Margins, _Ranked, _Run, total=False):
    """RoadmapLoss's."""

    calibration_weight: float


class _Losses(_Recall, _NDCG, _HAP, total=False):
    loss: str
    alpha: float


class PlainEmbeddingKeywords(_Losses, SurrogateKeywords, _Margins, _Ranked, total=False):
    """reference.roadmap_loss's."""

    calibration_weight: float


class EmbeddingKeywords(PlainEmbeddingKeywords, _Run, total=False):
    """roadmap_loss's: all there are."""


class RecallAtKKeywords(_Recall, RoadmapKeywords, total=False):
    """RecallAtKLoss's."""


class NDCGLossKeywords(_NDCG, RoadmapKeywords, total=False):
    """NDCGLoss's."""


class HierarchicalAPKeywords(_HAP, RoadmapKeywords, total=False):
    """HierarchicalAPLoss's."""

    alpha: float


class SupAPKeywords(_Shape, _Ranked, _Run, total=False):
    """SupAPLoss's."""


class SmoothAPKeywords(_Tau, _Ranked, _Run, total=False):
    """SmoothAPLoss's."""


class CalibrationKeywords(_Margins, _Ranked, _Run, total=False):
    """CalibrationLoss's."""


def accepts(keywords: type, **changed: Any) -> Callable[[_F], _F]:
    """Shows the names and defaults of the settings that a function takes as ``**settings`` in its signature.

    ``changed`` are defaults that are not everybody's.
    """

    def written(function: _F) -> _F:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        kinds = {name: kind.__forward_arg__ for name, kind in keywords.__annotations__.items()}
        shown = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
            for name, default in (defaults_of(keywords) | changed).items()
        ]
        # inspect reads it from any function, but typeshed does not declare it.
        function.__signature__ = signature.replace(parameters=[*named, *shown])  # type: ignore[attr-defined]
        return function

    return written


# --- the checks ------------------------------------------------------------------------------------------------------


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = f", which cannot be learnt here: use {name}.item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")
    number = float(value)
    if not -_LARGEST <= number <= _LARGEST:  # nor is NaN; torch.compile can trace a comparison
        raise ValueError(
            f"{name} must be finite, and at most {_LARGEST:g} in magnitude so that sums stay finite in float32, got "
            f"{value}"
        )
    return number


def _not_negative(name: str, value: object) -> float:
    number = _number(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def _temperature(name: str, value: object) -> float:
    number = _number(name, value)
    if number < _SMALLEST_TAU:
        raise ValueError(f"{name} must be positive, from {_SMALLEST_TAU:g} to {_LARGEST:g}, got {number}")
    return number


def _share(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(
            f"{name} must lie between 0 (the AP loss alone) and 1 (the calibration loss alone), got {number}"
        )
    return number


def _unit(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {number}")
    return number


def _ks(name: str, value: object) -> tuple[int, ...]:
    ks = check_ks(value)
    if not ks:
        raise ValueError(f"{name} must hold an integer at least, such as (1, 2, 4, 8, 16), got none")
    return ks


def _number_or_none(name: str, value: object) -> float | None:
    return None if value is None else _number(name, value)


def _margins(name: str, value: object) -> str | None:
    return None if value is None else one_of(name, value, ("auto",))


def _method(name: str, value: object) -> str:
    return one_of(name, "pairwise" if value == "tiled" else value, METHODS)  # an older name


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "loss": partial(one_of, accepted=LOSSES),
    "k": _ks,
    "rank_temperature": _temperature,
    "gain": partial(one_of, accepted=GAINS),
    "alpha": _not_negative,
    "leak": _not_negative,
    "beta": _not_negative,
    "gamma": _unit,
    "calibration_weight": _share,
    "positive_margin": _number,
    "negative_margin": _number,
    "margins": _margins,
    "calibration_reduction": partial(one_of, accepted=CALIBRATION_REDUCTIONS),
    "normalize": check_flag,
    "include_self": check_flag,
    "ignore_label": check_ignore_label,
    "chunk_size": check_chunk_size,
    "gather_across_devices": check_flag,
    "surrogate": partial(one_of, accepted=SURROGATES),
    "tau": _temperature,
    "rho": _not_negative,
    "delta": _not_negative,
    "start": _number,
    "offset": _number_or_none,
    "reduction": partial(one_of, accepted=REDUCTIONS),
    "method": _method,
}


def defaults_of(keywords: type) -> dict[str, Any]:
    """The settings of one of the TypedDicts above, with their defaults."""
    return {name: default for name, default in DEFAULTS.items() if name in keywords.__annotations__}


def without_margins(settings: dict[str, Any]) -> dict[str, Any]:
    """A module's settings, all of them, as a function takes them: with ``margins`` no default beside it."""
    if settings.get("margins") is None:
        return settings
    return {name: x for name, x in settings.items() if not name.endswith("_margin") or x != DEFAULTS[name]}


def checked(given: Mapping[str, Any], accepted: Mapping[str, Any] = DEFAULTS, loss: str = "ap") -> Settings:
    """The settings that a function was given which takes those ``accepted``, and defaults for all others.

    ``loss`` is that of a function which does not take it as a setting.

    Raises TypeError for an unknown name and for what has the wrong type, ValueError for what is out of range.
    """
    # With dynamic=True torch.compile takes defaults for variables, too: it has to meet them before autograd Functions.
    compiling = torch.compiler.is_compiling()
    changed = {}
    for name, value in ({**accepted, **given} if compiling else given).items():
        if name not in accepted:
            raise TypeError(f"got an unexpected keyword argument {name!r}; the settings are {', '.join(accepted)}")
        if compiling or value is not DEFAULTS[name]:
            changed[name] = _CHECKS[name](name, value)
    beside = [name for name in ("positive_margin", "negative_margin") if name in given]
    if given.get("margins") is not None and beside:
        raise ValueError(f'margins="auto" reads both margins from the data: leave {beside[0]} out, or margins')
    if not changed and loss == "ap":
        return Settings()
    values = {**DEFAULTS, "loss": loss, **changed}
    if values["rho"] * values["tau"] > _LARGEST:
        raise ValueError(
            f"rho * tau must be at most {_LARGEST:g} so that sums stay finite in float32, got {values['rho']} * "
            f"{values['tau']}"
        )
    surrogate = Surrogate(*[values[name] for name in Surrogate._fields])
    ranking = Ranking(*[values[name] for name in Ranking._fields])
    objective = Objective(surrogate, ranking, *[values[name] for name in Objective._fields[2:]])
    return Settings(objective, *[values[name] for name in Settings._fields if name != "objective"])
