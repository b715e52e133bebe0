"""Average-precision losses for retrieval training, in fused kernels that never build the pairwise tensor."""

from . import metrics, reference
from ._extension import build_info
from ._ranks import SmoothRank
from ._version import __version__
from .functional import ap_loss, smooth_rank
from .modules import APLoss

__all__ = ["APLoss", "SmoothRank", "__version__", "ap_loss", "build_info", "metrics", "reference", "smooth_rank"]
