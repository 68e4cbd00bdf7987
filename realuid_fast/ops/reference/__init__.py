"""The operators in plain torch: the readable reference, which also runs on devices without a faster backend.

There is one function for each operator, with the arguments of its schema.
"""

from __future__ import annotations

from .adam import adam_, average_, begin_step_
from .layers import conv3x3, conv3x3_grads, group_norm, group_norm_grads, norm_silu, norm_silu_grads
from .losses import (
    fake,
    generator,
    interpolate,
    interpolate_grads,
    matching,
    mean_abs_error,
    normal_like,
    scale_grads_,
)
