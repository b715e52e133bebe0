"""The package imported more than once in a process, as notebooks and test suites do that clear sys.modules."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE = """
import importlib, sys
import torch

def use():
    import roadmap_ext
    x = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
    loss = roadmap_ext.RoadmapLoss()(x, torch.tensor([5, 5, 6, 6]))
    loss.backward()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):  # the shapes that torch.compile asks for
        scores = torch.randn(3, 7)
        assert roadmap_ext.ap_loss(scores, scores > 0, reduction="none").shape == (3,)
    ranks = roadmap_ext.smooth_rank(torch.tensor([[0.5, 0.4]]), torch.tensor([[True, False]]))
    return roadmap_ext, loss.item(), x.grad.tolist(), roadmap_ext.build_info(), ranks.negative_rank.tolist()

def ours():
    return [name for name in sys.modules if name.split(".")[0] == "roadmap_ext"]

first = use()
"""
OLD = """
old = first[0].roadmap_loss(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 6]))
assert old.item() == first[1]
"""
WAYS = {
    "all": "for name in ours(): del sys.modules[name]",
    "all but the extension": "for name in ours(): name.endswith('_C') or sys.modules.pop(name)",
    "some": "for name in ('roadmap_ext', 'roadmap_ext.embedding_loss', 'roadmap_ext.ops'): sys.modules.pop(name, None)",
    "reloaded": "for name in ours(): name.endswith('_C') or importlib.reload(sys.modules[name])",
}


@pytest.mark.parametrize("way", ["all", *(pytest.param(way, marks=pytest.mark.deep) for way in WAYS if way != "all")])
def test_again(way):
    """It works each time, and what an earlier import gave goes on working."""
    code = USE + 2 * f"{WAYS[way]}\nagain = use()\nassert again[1:] == first[1:]\n" + OLD
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
