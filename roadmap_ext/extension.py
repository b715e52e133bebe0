"""Loads the compiled modules, and words what it means when they are not there."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ._version import __version__

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def reference_only() -> bool:
    """Whether the package was installed, or is run, without kernels on purpose."""
    return find_spec(f"{__package__}._reference_only") is not None or os.environ.get("ROADMAP_EXT_NO_BUILD") == "1"


def _load() -> ModuleType | None:
    if reference_only():
        return None
    try:
        return import_module(f"{__package__}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            raise
        here = Path(__file__).resolve().parent
        raise ImportError(
            f"roadmap_ext was imported from {here}, which has no compiled extension (_C). If it is installed "
            "elsewhere, this is its source tree shadowing it: start Python from another folder. Otherwise build it "
            "here with `make build` or `pip install --no-build-isolation -e .`; ROADMAP_EXT_NO_BUILD=1 runs the "
            "plain PyTorch reference alone."
        ) from error
    except ImportError as error:
        raise ImportError(
            f"the compiled extension of roadmap_ext does not load with torch {torch.__version__}: {error}. "
            f"It needs torch>=2.11; build it again for this one with `{REBUILD}` in its source folder."
        ) from error


def _load_cuda() -> str:
    """Register the CUDA kernels where this torch can run them. Returns why not: empty where they are there."""
    if _C is None:
        return "roadmap_ext was installed with ROADMAP_EXT_NO_BUILD=1"
    if not _C.cuda_version:
        return str(_C.cuda_reason)
    built, found = _C.cuda_version, torch.version.cuda
    if found is None:
        return f"torch {torch.__version__} is a CPU build: install a CUDA {built.split('.')[0]} build of torch"
    if found.split(".")[0] != built.split(".")[0]:
        return (
            f"they were built for CUDA {built} and torch {torch.__version__} brings CUDA {found}, another major version"
        )
    try:
        import_module(f"{__package__}._cuda")
    except ImportError as error:
        return f"they do not load: {error}"
    return ""


_C = _load()
# Constants, which torch.compile can read.
_CUDA_REASON: str = _load_cuda()
_WITH_CUDA: bool = not _CUDA_REASON
_REFERENCE_ONLY: bool = _C is None


def build_info() -> dict[str, Any]:
    """What was built and what runs.

    Returns:
        A dict: ``version`` and ``python``; ``torch`` it was built with; ``compiler``; ``cuda`` (bool), whether its CUDA
        kernels are loaded, ``cuda_reason`` (why not) and ``cuda_archs``, what they were built for; ``cpu``, the
        instruction set in use (``"avx512"``, ``"avx2"`` or ``"baseline"``; the environment variable ``ROADMAP_EXT_CPU``
        chooses one before the first call) and ``cpu_available``. Without kernels, ``cpu`` is ``"reference"``.
    """
    info: dict[str, Any] = {
        "version": __version__,
        "python": sys.version.split()[0],
        "cuda": _WITH_CUDA,
        "cuda_reason": _CUDA_REASON,
    }
    if _C is None:
        info |= {
            "torch": torch.__version__,
            "compiler": None,
            "cuda_archs": "",
            "cpu": "reference",
            "cpu_available": [],
        }
    else:
        info |= _C.build_info()
    return info


def check_kernels(device: torch.device, method: str) -> None:
    """Raise RuntimeError, saying what to do, where no kernels for ``device`` were built."""
    if _C is None:
        raise RuntimeError(
            f"method={method!r} needs the kernels, but {_CUDA_REASON}. Build them with `{REBUILD}`, or pass "
            "method='reference'."
        )
    if device.type in ("cpu", "meta") or (device.type == "cuda" and _WITH_CUDA):
        return
    if device.type == "cuda":
        raise RuntimeError(
            f"the inputs are on {device}, but this roadmap_ext has no CUDA kernels because "
            f"{_CUDA_REASON}. Rebuild with `FORCE_CUDA=1 {REBUILD}`, which says what is missing; until then "
            "call the loss on inputs.cpu(), through which gradients flow back, or pass method='reference'."
        )
    kinds = "CPU and CUDA" if _WITH_CUDA else f"CPU (no CUDA because {_CUDA_REASON})"
    raise RuntimeError(
        f"the inputs are on {device}, but this build of roadmap_ext has kernels for {kinds}. `{REBUILD}` builds all "
        f"there are, none for {device.type!r}; call the loss on inputs.cpu() or pass method='reference'."
    )
