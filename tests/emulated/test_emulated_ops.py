"""Every schedule of the CUDA ops, emulated, on a small case of each op; the cell "emulated-ops" has all their tests."""

import pytest
import torch
from emulated_ops import DEVICES
from oracle import assert_accurate, grid_scores, ragged_target

from roadmap_ext import reference, roadmap_loss, smooth_rank


@pytest.mark.parametrize("surrogate", ["sup", "smooth"])
@pytest.mark.parametrize("device", DEVICES)
def test_each_schedule(device, surrogate, emulated):
    emulated.emulate_device(*device, 3, 3)
    before = emulated.launches()
    scores, target, ignore = grid_scores(3, 300), ragged_target(3, 300), torch.rand(3, 300) < 0.1
    assert_accurate(scores, target, method="auto", ignore=ignore, surrogate=surrogate)
    results = []
    for ranked, embedding_loss in ((smooth_rank, roadmap_loss), (reference.smooth_rank, reference.roadmap_loss)):
        leaf = scores.clone().requires_grad_()
        ranks = ranked(leaf, target, surrogate=surrogate)
        (of_ranks,) = torch.autograd.grad(ranks.negative_rank.sum(), leaf)
        loss = embedding_loss(leaf[:, :16].T, torch.arange(16) // 4, surrogate=surrogate, tau=0.1)
        results.append([*ranks, of_ranks, loss, *torch.autograd.grad(loss, leaf)])
    torch.testing.assert_close(*results, rtol=2e-4, atol=1e-4)
    assert emulated.launches() >= before + 5
