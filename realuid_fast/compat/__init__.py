"""Drop-in replacements: the published loss functions on fused calls, and other packages' paths as ours."""

from .losses import GANloss, dist_loss, general_dist_loss
from .matchers import from_flow_matching, from_torchcfm

__all__ = ["GANloss", "dist_loss", "from_flow_matching", "from_torchcfm", "general_dist_loss"]
