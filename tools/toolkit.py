"""Prints the CUDA toolkit to build with: one that is there, else NVIDIA's compiler packages, installed into `.cuda`.

The Makefile sets CUDA_HOME to what `python -m tools.toolkit` prints. Nothing is printed where there is none to be had:
setup.py then decides and says why, as it does without this script. Packages (270 MB, once) are installed only for a
CUDA build of torch without a toolkit of its major version, on a machine with a GPU or with FORCE_CUDA=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.cuda import is_toolkit, nvcc_version, toolkit_candidates

HERE = Path(__file__).resolve().parent.parent
FIRST_MAJOR = 13
"""The packages for CUDA 12 have ptxas but no nvcc."""


def has_gpu() -> bool:
    """Whether the driver lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return listed.startswith("GPU ")


def packaged_roots(folder: Path) -> list[Path]:
    """The toolkits among the packages in `folder`, which unpack to nvidia/cu13 and the like."""
    return sorted(header.parent.parent for header in folder.glob("nvidia/*/include/cuda_runtime.h"))


def complete(root: Path) -> None:
    """Add the plain name that -lcudart links with: packages carry the versioned library alone."""
    plain = root / "lib" / "libcudart.so"
    versioned = sorted(plain.parent.glob("libcudart.so.*"))
    if versioned and not plain.exists():
        plain.symlink_to(versioned[-1].name)


def install(torch_cuda: str, folder: Path) -> None:
    """Install NVIDIA's compiler packages for CUDA `torch_cuda` into `folder`. Raises CalledProcessError."""
    package = f"cuda-toolkit[nvcc,cccl,cudart,crt,nvvm]=={torch_cuda}.*"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, "--target", str(folder), package], check=True, stdout=sys.stderr)


def choose(
    torch_cuda: str | None,
    sources: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    candidates: Callable[[Mapping[str, str]], list[Path]] = toolkit_candidates,
    version_of: Callable[[Path], str] = nvcc_version,
    gpu: Callable[[], bool] = has_gpu,
    installer: Callable[[str, Path], None] = install,
) -> Path | None:
    """The toolkit root to build with, installed first where need be; None where the build goes on without one."""
    forced = environ.get("FORCE_CUDA")
    if not torch_cuda or not sources or forced == "0":
        return None
    major = torch_cuda.split(".")[0]

    def first_usable(roots: Sequence[Path]) -> Path | None:
        return next((root for root in roots if is_toolkit(root) and version_of(root).split(".")[0] == major), None)

    found = first_usable([*candidates(environ), *packaged_roots(folder)])
    if found or not (forced == "1" or gpu()):
        return found
    if int(major) < FIRST_MAJOR:
        _say(f"NVIDIA packages no nvcc for CUDA {torch_cuda}: install that toolkit and set CUDA_HOME.")
        return None
    _say(f"installing NVIDIA's compiler packages for CUDA {torch_cuda} into {folder.name} (270 MB, once)")
    try:
        installer(torch_cuda, folder)
    except (OSError, subprocess.CalledProcessError):
        _say(f"they could not be installed: install a CUDA {torch_cuda} toolkit and set CUDA_HOME.")
        return None
    for root in packaged_roots(folder):
        complete(root)
    return first_usable(packaged_roots(folder))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # stdout is the answer


def main() -> None:
    """Print the answer for the torch of this interpreter."""
    import torch

    sources = [str(source) for source in HERE.glob("csrc/cuda/*.cu")]
    root = choose(torch.version.cuda, sources, os.environ, HERE / ".cuda")
    if root:
        print(root)


if __name__ == "__main__":
    main()
