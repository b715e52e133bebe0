"""Tests of this folder that ask for `emulated` call the CUDA ops, emulated, by the package's own functions."""

import emulated_ops
import pytest
import torch


@pytest.fixture
def emulated(request, monkeypatch):
    """The library itself, its ops in place of the CPU's until the test ends."""
    import roadmap_ext  # noqa: F401 - registers the real ones

    library = emulated_ops.load()
    monkeypatch.setattr(torch.ops, "roadmap_ext", emulated_ops.in_place_of(torch.ops.roadmap_ext))
    emulated_ops.play_a_device(request.node.nodeid)
    return library
