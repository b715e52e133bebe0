"""What torch's profiler and its counter of operations see of the losses."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from roadmap_ext import CachedLoss, RoadmapLoss, ap_loss, smooth_rank
from roadmap_ext.metrics import retrieval_metrics

pytestmark = pytest.mark.host

LABELS = torch.arange(48) // 4


def test_every_op_has_its_name():
    x, scores, target = torch.randn(48, 6, requires_grad=True), torch.randn(8, 48), torch.rand(8, 48) < 0.3
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        RoadmapLoss()(x, LABELS).backward()
        ap_loss(scores.requires_grad_(), target).backward()
        smooth_rank(scores, target).negative_rank.sum().backward()
        retrieval_metrics(x.detach(), LABELS)
        CachedLoss(torch.nn.Linear(6, 4), RoadmapLoss(), 16)(x.detach(), LABELS).backward()
    names = {event.key for event in seen.key_averages()}
    ops = ("sweep", "objective_rows_", "rank_loss", "smooth_rank", "smooth_rank_backward", "rank_metrics")
    assert {f"roadmap_ext::{name}" for name in (*ops, "cached first pass", "cached second pass")} <= names


@pytest.mark.parametrize(
    ("products", "settings", "two_views", "gradient"),
    [
        (1, {}, False, False),
        (2, {}, False, True),  # both shares of a gradient in one
        (3, {"chunk_size": 20}, False, True),
        (3, {}, True, True),
        (3, {"reduction": "none"}, False, True),
        (3, {"calibration_reduction": "violating_pairs"}, False, True),
        (4, {"calibration_reduction": "violating_pairs", "chunk_size": 20}, False, True),
    ],
)
def test_matrix_products_are_counted(products, settings, two_views, gradient):
    x = torch.randn(48, 6, requires_grad=gradient)
    others = {"ref_emb": torch.randn(48, 6, requires_grad=True), "ref_labels": LABELS} if two_views else {}
    with FlopCounterMode(display=False) as counter:
        loss = RoadmapLoss(**settings)(x, LABELS, **others)
        if gradient:
            loss.sum().backward()
    assert counter.get_total_flops() == products * 2 * 48 * 48 * 6
