"""Whether to build the CUDA kernels, with which toolkit and for which GPUs: decided once, by setup.py, and said aloud.

The decision rests on the torch that is installed and on a toolkit that is really there, never on a visible GPU:
machines that build often have none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0", "11.0", "12.0+PTX")
"""Turing to Blackwell, for builds that see no GPU and are told no TORCH_CUDA_ARCH_LIST."""


@dataclass(frozen=True)
class Decision:
    """What setup.py does about CUDA: `build` it or not, for which `reason`, with the toolkit at `root`, for `archs`."""

    build: bool
    reason: str
    root: Path | None = None
    archs: str = ""

    def __str__(self) -> str:
        if self.build:
            return f"CUDA kernels: built for {self.archs} with the toolkit at {self.root}"
        return f"CUDA kernels: not built because {self.reason}"


def toolkit_candidates(environ: Mapping[str, str]) -> list[Path]:
    """Places where a toolkit may be, the most explicit first."""
    candidates = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append(Path("/usr/local/cuda"))
    return candidates


def is_toolkit(root: Path) -> bool:
    """An nvcc alone is not a toolkit: a wrapper in a bin folder has no headers beside it, and linking would fail."""
    return (root / "include" / "cuda_runtime.h").is_file() and (root / "bin" / "nvcc").is_file()


def nvcc_version(root: Path) -> str:
    """The release that nvcc states, as "13.0"; empty when it does not run."""
    try:
        text = subprocess.run(
            [str(root / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else ""


def choose_archs(environ: Mapping[str, str], capabilities: Sequence[tuple[int, int]], version: str) -> str:
    """TORCH_CUDA_ARCH_LIST if given, else the visible GPUs', else DEFAULT_ARCHS that this nvcc knows."""
    listed = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed:
        return listed
    if capabilities:
        return ";".join(sorted({f"{major}.{minor}" for major, minor in capabilities}))
    known = tuple(map(int, version.split(".")))
    if known >= (13, 0):
        return ";".join(DEFAULT_ARCHS)
    if known >= (12, 8):
        return ";".join(arch for arch in DEFAULT_ARCHS if arch != "11.0")  # which had another number
    return "7.5;8.0;9.0+PTX"  # Blackwell came with 12.8


def decide(
    torch_version: str,
    torch_cuda: str | None,
    sources: Sequence[str],
    environ: Mapping[str, str],
    capabilities: Sequence[tuple[int, int]] = (),
    candidates: Callable[[Mapping[str, str]], list[Path]] = toolkit_candidates,
    version_of: Callable[[Path], str] = nvcc_version,
) -> Decision:
    """Decide. Raises SystemExit with the reason where FORCE_CUDA=1 asks for what cannot be had."""
    decision = _decide(torch_version, torch_cuda, sources, environ, capabilities, candidates, version_of)
    if environ.get("FORCE_CUDA") == "1" and not decision.build:
        raise SystemExit(f"FORCE_CUDA=1, but the CUDA kernels cannot be built: {decision.reason}.")
    return decision


def _decide(
    torch_version: str,
    torch_cuda: str | None,
    sources: Sequence[str],
    environ: Mapping[str, str],
    capabilities: Sequence[tuple[int, int]],
    candidates: Callable[[Mapping[str, str]], list[Path]],
    version_of: Callable[[Path], str],
) -> Decision:
    if environ.get("FORCE_CUDA") == "0":
        return Decision(False, "FORCE_CUDA=0 was set")
    if not sources:
        return Decision(False, "the sources of the CUDA kernels, csrc/cuda, are not in this tree")
    if not torch_cuda:
        return Decision(False, f"torch {torch_version} is a CPU build: install a CUDA build of torch and build again")
    tried = candidates(environ)
    root = next((place for place in tried if is_toolkit(place)), None)
    if root is None:
        places = ", ".join(map(str, tried))
        return Decision(
            False,
            f"no CUDA toolkit was found for torch's CUDA {torch_cuda} (include/cuda_runtime.h and bin/nvcc in none of "
            f"{places}): install one or set CUDA_HOME",
        )
    version = version_of(root)
    if not version:
        return Decision(False, f"the nvcc at {root} does not run: install a toolkit for CUDA {torch_cuda}")
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        return Decision(
            False,
            f"the toolkit at {root} is CUDA {version}, but torch {torch_version} was built with CUDA {torch_cuda}: "
            "their major versions must agree; set CUDA_HOME to a matching one",
        )
    return Decision(True, "", root, choose_archs(environ, capabilities, version))
