"""A pytest plugin: the ops of this run are the CUDA ones, emulated on the CPU.

`python -m pytest -p emulated_ops` with ROADMAP_EMULATED naming the library that tests/emulated/test_emulated.py builds. Tests then
call the package as ever; each test plays one of several devices, so that every schedule meets every kind of input.
"""

import ctypes
import os
import zlib

import pytest
import torch

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


ON_CUDA = [
    "average_precision",
    "count_pairs",
    "objective_rows_",
    "remove_radial_",
    "scale_rows",
    "scale_rows_",
    "smooth_rank",
    "smooth_rank_backward",
    "symmetrise_",
]


class Ops:
    """torch.ops.roadmap_ext, but for the ops that there are on CUDA."""

    def __init__(self, real, emulated):
        self._real = real
        for name in ON_CUDA:
            setattr(self, name, getattr(emulated, name))

    def __getattr__(self, name):
        return getattr(self._real, name)


def pytest_configure(config):
    """Put the emulated ops in place."""
    import roadmap_ext  # noqa: F401 - registers the real ones

    path = os.environ["ROADMAP_EMULATED"]
    library = ctypes.CDLL(path)
    torch.ops.load_library(path)
    library.emulate_device.argtypes = [ctypes.c_int, ctypes.c_int64, *[ctypes.c_int] * 4, *[ctypes.c_uint64] * 2]
    library.plan_of.argtypes = [*[ctypes.c_int64] * 2, *[ctypes.c_int] * 2, ctypes.POINTER(ctypes.c_int64)]
    library.launches.restype = ctypes.c_int64
    config.emulated = library
    torch.ops.roadmap_ext = Ops(torch.ops.roadmap_ext, torch.ops.roadmap_ext_emulated)


@pytest.fixture
def emulated(request):
    """The library itself."""
    return request.config.emulated


@pytest.fixture(autouse=True)
def _device(request):
    name = zlib.crc32(request.node.nodeid.encode())
    request.config.emulated.emulate_device(*DEVICES[name % len(DEVICES)], 1 + name, 1 + name)


def pytest_terminal_summary(terminalreporter, config):
    """Say how much was emulated: none would prove nothing."""
    terminalreporter.write_line(f"{config.emulated.launches()} launches emulated")
