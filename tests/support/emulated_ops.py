"""The CUDA ops, emulated on the CPU: their library, and a pytest plugin that puts them in place for a whole run.

As a plugin (tests/matrix.py: the cells "emulated-ops", "ptx-80" and "ptx-90") it has tests call the package as ever;
each test plays one of several devices, so that every schedule meets every kind of input. tests/emulated uses the
library test by test.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from implementation import Counted

from tools.cuda import is_toolkit, toolkit_candidates

ROOT = Path(__file__).resolve().parents[2]
EMULATED, PTX = ROOT / "tests" / "emulated", ROOT / "tests" / "ptx"
ARCHS = (80, 90)
# (multiprocessors, bytes of workspace, threads a block, blocks a row, short pieces, positives from which on rows are
# scanned): 0 for what the plan chooses.
NEVER = 1 << 30
DEVICES = [
    (2, 64 << 20, 0, 0, 0, 256),  # as it is chosen for a small GPU
    (2, 64 << 20, 64, 0, 1, NEVER),  # longer rows by way of the workspace
    (3, 64 << 20, 64, 2, 0, NEVER),  # rows shared by two blocks
    (3, 1 << 15, 32, 5, 1, NEVER),  # the same in pieces, with room for few rows at a time
    (2, 64 << 20, 96, 0, 1, 0),  # all rows scanned
    (3, 1 << 15, 64, 3, 1, 8),  # most rows, shared by three blocks
]
SOURCES = {".cpp", ".h", ".cuh", ".cu"}


def built(arch=None, self_test=False):
    """The library for the torch of this run: build/emulated-*.so, compiled where its sources have changed.

    With an arch, such as 80, kernels are what nvcc makes of them for it, run by the machine in tests/ptx; else they run
    under tests/emulated/emulator.h. With self_test, the program of tests/ptx/self_test.cu instead.
    """
    compiler = (os.environ.get("CXX") or shutil.which("c++") or "").split()
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux", allow_module_level=True)
    objects = compilations_of_ptx(compiler, arch, self_test) if arch else {}
    link = ["-pthread"]
    if not self_test:
        root = Path(torch.__file__).parent
        objects["ops.o"] = [
            *(*compiler, "-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"),
            *filled(compiler),
            *("-U_FORTIFY_SOURCE", "-DROADMAP_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
            *([f"-I{PTX}", "-DROADMAP_PTX"] if arch else [f"-I{EMULATED}"]),
            *(f"-I{path}" for path in (root / "include", root / "include/torch/csrc/api/include")),
            *("-c", str(EMULATED / "emulated_ops.cpp")),
        ]  # fmt: skip
        link = ["-shared", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    sources = sorted(
        path for folder in (EMULATED, PTX, ROOT / "csrc") for path in folder.rglob("*") if path.suffix in SOURCES
    )
    state = hashlib.sha256(repr((objects, link, torch.__version__)).encode())
    for source in sources:
        state.update(source.read_bytes())
    kind = f"{'self-test' if self_test else 'emulated'}{arch or ''}"
    made = ROOT / "build" / f"{kind}-{state.hexdigest()[:16]}{'' if self_test else '.so'}"
    made.parent.mkdir(exist_ok=True)
    with (made.parent / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest-xdist ask at the same time
        if not made.exists():
            for old in made.parent.glob(f"{kind}-*"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=made.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(run, ([*command, "-o", f"{folder}/{name}"] for name, command in objects.items())))
                run([*compiler, *(f"{folder}/{name}" for name in objects), *link, "-o", f"{folder}/made"])
                Path(folder, "made").rename(made)
    return made


def run(command):
    """Run it; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def filled(compiler):
    """The option by which variables that nobody has set hold no zeros by chance. GCC 12, clang 16."""
    fill = "-ftrivial-auto-var-init=pattern"
    asked = [*compiler, fill, "-x", "c++", "-fsyntax-only", os.devnull]
    return [] if subprocess.run(asked, capture_output=True).returncode else [fill]


def compilations_of_ptx(compiler, arch, self_test):
    """By object file: the machine, and the kernels as nvcc compiles them for an arch."""
    root = next((root for root in toolkit_candidates(os.environ) if is_toolkit(root)), None)
    if not root:
        pytest.skip("there is no CUDA toolkit: set CUDA_HOME", allow_module_level=True)
    # The machine is for this processor alone; integers wrap around as on a GPU.
    # For this machine, which alone runs what is built here: the lanes of a warp become its vectors.
    flags = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fwrapv", "-fPIC", "-fvisibility=hidden"]
    objects = {f"{source.stem}.o": [*compiler, *flags, "-c", str(source)] for source in PTX.glob("*.cpp")}
    nvcc = [
        *(str(root / "bin" / "nvcc"), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "--no-compress"),
        *("-gencode", f"arch=compute_{arch},code=compute_{arch}", "-Wno-deprecated-gpu-targets"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-fwrapv", "-Ddevice_resources=real_resources"),
    ]  # fmt: skip
    if self_test:
        return objects | {"self_test.o": [*nvcc, "-c", str(PTX / "self_test.cu")]}
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        objects[f"{source.stem}.o"] = [*nvcc, "-Dlaunch_rows=launch_long_rows", "-c", str(source)]
        if source.stem.startswith("rows"):
            objects[f"short_{source.stem}.o"] = [*nvcc, "-include", str(PTX / "short.h"), "-c", str(source)]
    return objects


@functools.cache
def load():
    """The library, its ops registered as torch.ops.roadmap_ext_emulated."""
    path = str(built(os.environ.get("ROADMAP_PTX")))
    library = ctypes.CDLL(path)
    torch.ops.load_library(path)
    library.emulate_device.argtypes = [ctypes.c_int, ctypes.c_int64, *[ctypes.c_int] * 4, *[ctypes.c_uint64] * 2]
    library.plan_of.argtypes = [*[ctypes.c_int64] * 2, *[ctypes.c_int] * 2, ctypes.POINTER(ctypes.c_int64)]
    library.launches.restype = ctypes.c_int64
    return library


class Ops:
    """torch.ops.roadmap_ext, but for the ops that there are on CUDA: those of the library."""

    def __init__(self, real):
        load()
        self._real, self._emulated = real, torch.ops.roadmap_ext_emulated

    def __getattr__(self, name):
        op, has_kernel = f"roadmap_ext_emulated::{name}", torch._C._dispatch_has_kernel_for_dispatch_key
        emulated = hasattr(self._emulated, name) and has_kernel(op, "CPU")
        return getattr(self._emulated if emulated else self._real, name)


def play_a_device(test):
    """Emulate one of DEVICES, and an order of threads, by the name of a test."""
    name = zlib.crc32(test.encode())
    load().emulate_device(*DEVICES[name % len(DEVICES)], 1 + name, 1 + name)


# --- the plugin ------------------------------------------------------------------------------------------------------


def pytest_configure(config):
    """Put the emulated ops in place."""
    import roadmap_ext  # noqa: F401 - registers the real ones

    torch.ops.roadmap_ext = Ops(torch.ops.roadmap_ext)
    config.pluginmanager.register(Counted("launches emulated", lambda: load().launches()))


@pytest.fixture(autouse=True)
def _device(request):
    play_a_device(request.node.nodeid)
