"""Drop-in replacements: the published loss functions on fused calls, and other packages' paths as ours.

The losses of this method's published code are here. Other frameworks' losses are in modules named after them:
:mod:`~realuid_fast.compat.fastgen`, :mod:`~realuid_fast.compat.modelopt`, :mod:`~realuid_fast.compat.sid` and
:mod:`~realuid_fast.compat.dmd2`.
"""

from . import dmd2, fastgen, modelopt, sid
from .losses import GANloss, dist_loss, general_dist_loss
from .matchers import from_flow_matching, from_torchcfm

__all__ = [
    "GANloss",
    "dist_loss",
    "dmd2",
    "fastgen",
    "from_flow_matching",
    "from_torchcfm",
    "general_dist_loss",
    "modelopt",
    "sid",
]
