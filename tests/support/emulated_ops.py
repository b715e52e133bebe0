"""The CUDA ops, emulated on the CPU: their library, and a pytest plugin that puts them in place for a whole run.

As a plugin (tests/matrix.py: the cell "emulated-ops") it has tests call the package as ever; each test plays one of
several devices, so that every schedule meets every kind of input. tests/emulated uses the library test by test.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from implementation import Counted

ROOT = Path(__file__).resolve().parents[2]
EMULATED = ROOT / "tests" / "emulated"
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
SOURCES = {".cpp", ".h", ".cuh"}


def built():
    """The library for the torch of this run: build/emulated-*.so, compiled where its sources have changed."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux", allow_module_level=True)
    root = Path(torch.__file__).parent
    # Variables that nobody has set hold no zeros by chance. GCC 12, clang 16.
    fill = "-ftrivial-auto-var-init=pattern"
    asked = [*compiler.split(), fill, "-x", "c++", "-fsyntax-only", os.devnull]
    command = [
        *compiler.split(),
        *("-std=c++17", "-O1", "-g0", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"),
        *([] if subprocess.run(asked, capture_output=True).returncode else [fill]),
        *("-U_FORTIFY_SOURCE", "-DROADMAP_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *(f"-I{path}" for path in (EMULATED, root / "include", root / "include/torch/csrc/api/include")),
        *(str(EMULATED / "emulated_ops.cpp"), f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    sources = sorted(
        path for folder in (EMULATED, ROOT / "csrc") for path in folder.rglob("*") if path.suffix in SOURCES
    )
    state = hashlib.sha256(repr((command, torch.__version__)).encode())
    for source in sources:
        state.update(source.read_bytes())
    library = ROOT / "build" / f"emulated-{state.hexdigest()[:16]}.so"
    library.parent.mkdir(exist_ok=True)
    with (library.parent / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest-xdist ask at the same time
        if not library.exists():
            for old in library.parent.glob("emulated-*.so"):
                old.unlink()
            made = library.with_suffix(".new")
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            made.rename(library)
    return library


@functools.cache
def load():
    """The library, its ops registered as torch.ops.roadmap_ext_emulated."""
    path = str(built())
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
