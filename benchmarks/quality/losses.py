"""All losses by name, each of embeddings as the network gives them and of labels, with the settings it is known by.

From pytorch-metric-learning where it has a correct one, else from peers.py or from roadmap_ext.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss, FastAPLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from torch import Tensor, nn

import roadmap_ext

from .margins import MeasuredMargins, fifths, medians
from .peers import BlackBoxAP, SoftBinAP


class HardTriplets(nn.Module):
    """For each image its farthest positive and nearest negative (Hermans et al., "In Defense of the Triplet Loss")."""

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        self.miner, self.loss = BatchHardMiner(), TripletMarginLoss(margin)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] with labels [B]."""
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


class WithoutIds(nn.Module):
    """A loss as the training program calls it, which also says what image each is. Here each comes once in a batch, so
    that losses that know of no ids miss nothing."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embeddings: Tensor, labels: Tensor, ids: Tensor, ref_ids: Tensor) -> Tensor:
        """The loss of embeddings [B, D] with labels [B]."""
        assert len(ids.unique()) == len(ids)
        return self.loss(embeddings, labels)


class Loss(NamedTuple):
    """A loss as it is written, and how it is made."""

    title: str
    make: Callable[[], nn.Module]


LOSSES = {
    # The margins of cross-batch memory: positives up to similarity 1, negatives down to 0.5.
    "contrastive": Loss("contrastive", lambda: ContrastiveLoss(1.0, 0.5, distance=CosineSimilarity())),
    "triplet": Loss("triplet, hard", HardTriplets),
    "fast-ap": Loss("FastAP", lambda: FastAPLoss(num_bins=10)),
    "soft-bin-ap": Loss("SoftBinAP", SoftBinAP),
    "black-box-ap": Loss("BlackBox AP", BlackBoxAP),
    "smooth-ap": Loss("Smooth-AP", roadmap_ext.SmoothAPLoss),
    "sup-ap": Loss("SupAP", roadmap_ext.SupAPLoss),
    "calibration": Loss("calibration", roadmap_ext.CalibrationLoss),
    "roadmap": Loss("ROADMAP", roadmap_ext.RoadmapLoss),
}
NINE = tuple(LOSSES)
LOSSES |= {
    "smooth-ap-0.05": Loss("Smooth-AP, tau 0.05", lambda: roadmap_ext.SmoothAPLoss(tau=0.05)),
    "sup-ap-0.05": Loss("SupAP, tau 0.05", lambda: roadmap_ext.SupAPLoss(tau=0.05)),
    "roadmap-0.05": Loss("ROADMAP, tau 0.05", lambda: roadmap_ext.RoadmapLoss(tau=0.05)),
    "medians": Loss("ROADMAP, medians", lambda: MeasuredMargins(medians)),
    "first-medians": Loss("ROADMAP, first medians", lambda: MeasuredMargins(medians, once=True)),
    "fifths": Loss("ROADMAP, fifths", lambda: MeasuredMargins(fifths)),
    "equal-errors": Loss("ROADMAP, equal errors", lambda: roadmap_ext.RoadmapLoss(margins="auto")),
    "medians-0.05": Loss("ROADMAP, medians, tau 0.05", lambda: MeasuredMargins(medians, tau=0.05)),
    "equal-errors-0.05": Loss(
        "ROADMAP, equal errors, tau 0.05", lambda: roadmap_ext.RoadmapLoss(margins="auto", tau=0.05)
    ),
}
RULES = ("medians", "first-medians", "fifths", "equal-errors")  # that read margins from a batch
