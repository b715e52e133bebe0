"""Tests of this folder that ask for `emulated` call the CUDA ops, emulated, by the package's own functions."""

import emulated_ops
import pytest
import torch


@pytest.fixture
def emulated(request, monkeypatch):
    """The library itself, its ops in place of the CPU's until the test ends."""
    library = emulated_ops.load()
    monkeypatch.setattr(torch.ops, "roadmap_ext", emulated_ops.Ops(torch.ops.roadmap_ext))
    emulated_ops.play_a_device(request.node.nodeid)
    return library
