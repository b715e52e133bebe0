"""The functions of losses.py, under the name that it once had."""

from .losses import ap_loss, roadmap_loss, smooth_rank

__all__ = ["ap_loss", "roadmap_loss", "smooth_rank"]
