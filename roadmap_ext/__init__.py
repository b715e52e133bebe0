"""Average-precision losses for retrieval training, in fused kernels that never build the pairwise tensor."""

from . import data, distributed, metrics, reference
from ._version import __version__
from .caching import CachedLoss, cached_backward
from .diagnosis import Diagnosis, diagnose
from .evaluation import RetrievalMetrics
from .extension import build_info
from .losses import ap_loss, hap_loss, mrr_loss, ndcg_loss, recall_loss, roadmap_loss, smooth_rank
from .memory import EmbeddingMemory
from .modules import (
    APLoss,
    CalibrationLoss,
    HierarchicalAPLoss,
    MRRLoss,
    NDCGLoss,
    RecallAtKLoss,
    RoadmapLoss,
    SmoothAPLoss,
    SupAPLoss,
)
from .reference import SmoothRank

__all__ = [
    "APLoss",
    "CachedLoss",
    "CalibrationLoss",
    "Diagnosis",
    "EmbeddingMemory",
    "HierarchicalAPLoss",
    "MRRLoss",
    "NDCGLoss",
    "RecallAtKLoss",
    "RetrievalMetrics",
    "RoadmapLoss",
    "SmoothAPLoss",
    "SmoothRank",
    "SupAPLoss",
    "__version__",
    "ap_loss",
    "build_info",
    "cached_backward",
    "data",
    "diagnose",
    "distributed",
    "hap_loss",
    "metrics",
    "mrr_loss",
    "ndcg_loss",
    "recall_loss",
    "reference",
    "roadmap_loss",
    "smooth_rank",
]
