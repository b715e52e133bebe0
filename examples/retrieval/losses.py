"""The losses by name, and every setting of theirs as an option of the command line."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import roadmap_ext

from .errors import InputError

# What each is made of, and what it is fixed to.
LOSSES: dict[str, tuple[Callable[..., nn.Module], dict[str, object]]] = {
    "roadmap": (roadmap_ext.RoadmapLoss, {}),
    "sup-ap": (roadmap_ext.SupAPLoss, {}),
    "smooth-ap": (roadmap_ext.SmoothAPLoss, {}),
    "reference": (roadmap_ext.RoadmapLoss, {"method": "reference"}),
}
_CHOICES = {
    "surrogate": ("sup", "smooth"),
    "reduction": ("mean", "sum"),
    "calibration_reduction": ("per_query", "violating_pairs"),
    "margins": ("auto",),
    "method": ("auto", "pairwise", "sorted", "reference", "tiled"),  # the last is an alias of "pairwise"
}
_ABOUT = {
    "calibration_weight": "share of the calibration loss, 0 to 1",
    "positive_margin": "similarity below which positives cost, in the calibration loss",
    "negative_margin": "similarity above which negatives cost, in the calibration loss",
    "margins": "auto reads both margins from each batch",
    "calibration_reduction": "what its means are over",
    "normalize": "rank by cosine similarity; else by plain products",
    "include_self": "leave a query in its own ranking",
    "chunk_size": "queries at a time; None chooses",
    "surrogate": "of the steps of the rank: SupAP's or a sigmoid",
    "tau": "temperature, in units of similarity",
    "rho": "SupAP: slope beyond delta",
    "delta": "SupAP: similarity above a positive from which the surrogate is linear",
    "start": "SupAP: jump at a tie",
    "offset": "SupAP: value at delta; None makes it continuous",
    "reduction": "of the queries' losses",
    "method": "which kernels",
}
_TYPES = {"float": float, "float | None": float, "int | None": int, "str": str}
_ELSEWHERE = {"gather_across_devices", "ignore_label"}  # as the processes are; images of it do not come here


def _settings(name: str) -> dict[str, inspect.Parameter]:
    made, fixed = LOSSES[name]
    parameters = inspect.signature(made).parameters
    return {key: value for key, value in parameters.items() if key not in fixed and key not in _ELSEWHERE}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--loss, and an option for each setting of any loss; one that is not given is None."""
    group = parser.add_argument_group("loss", "what the settings mean: docs/api.md")
    group.add_argument("--loss", choices=LOSSES, default="roadmap", help="reference: roadmap in plain PyTorch")
    for name, parameter in _settings("roadmap").items():
        option, about = "--" + name.replace("_", "-"), f"{_ABOUT[name]}; default {parameter.default}"
        if parameter.annotation == "bool":
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=about)
        elif name in _CHOICES:
            group.add_argument(option, choices=_CHOICES[name], help=about)
        else:
            kind = _TYPES[parameter.annotation]
            group.add_argument(option, type=kind, metavar="N" if kind is int else "X", help=about)


def setting_names() -> set[str]:
    """The options that are settings of some loss."""
    return set(_settings("roadmap"))


def make(options: argparse.Namespace, across_devices: bool = False) -> nn.Module:
    """The loss that the options ask for, of the batches of all processes as one if it is ``across_devices``.

    Raises:
        InputError: a setting that this loss does not have, or a value that it does not take.
    """
    made, fixed = LOSSES[options.loss]
    own = _settings(options.loss)
    given = {name: getattr(options, name) for name in _settings("roadmap") if getattr(options, name) is not None}
    foreign = [name for name in given if name not in own]
    if foreign:
        listed = ", ".join("--" + name.replace("_", "-") for name in own)
        raise InputError(f"--{foreign[0].replace('_', '-')} is no setting of --loss {options.loss}, which has {listed}")
    try:
        return made(**fixed, **given, gather_across_devices=across_devices)
    except ValueError as error:
        raise InputError(f"--loss {options.loss}: {error}") from error


def describe(loss: nn.Module) -> str:
    """Its name, and the settings that are not the defaults."""
    defaults = {name: value.default for name, value in inspect.signature(type(loss)).parameters.items()}
    changed = [
        f"{name}={loss.settings[name]!r}"
        for name in defaults
        if loss.settings.get(name, defaults[name]) != defaults[name] and name not in _ELSEWHERE
    ]
    return f"{type(loss).__name__}({', '.join(changed)})"


class Meter:
    """Keeps the time and memory that a loss of embeddings and its gradient take.

    Attributes:
        seconds: of the last call, until its backward had the gradient of the embeddings.
        bytes: by which the device's memory in use rose in that time, at the most: on the CPU the resident memory
            of the process, where the system is Linux and lets it be asked; else None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds, self.bytes = 0.0, None

    def __call__(self, embeddings: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """``loss(embeddings)`` of embeddings [B, D] that want a gradient."""
        before = self._mark()
        begin = time.perf_counter()

        def end(gradient: Tensor) -> None:
            self._wait()
            self.seconds = time.perf_counter() - begin
            peak = self._peak()
            self.bytes = None if before is None or peak is None else max(0, peak - before)

        embeddings.register_hook(end)
        return loss(embeddings)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _mark(self) -> int | None:
        """Bytes in use, from where the peak counts."""
        self._wait()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark, lowered to the present
        except OSError:
            return None
        return _status("VmRSS")

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), None)
