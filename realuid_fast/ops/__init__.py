"""The operators and what runs them; importing this defines them and registers the backends' implementations.

``registry`` defines each operator once from its family: ``losses``, ``adam`` and ``layers`` hold schemas, shapes and
gradients. ``reference`` has the formulas in plain torch. ``extension`` and ``triton_backend`` register the C++ and
Triton implementations, ``backends`` chooses among them, ``philox`` defines the noise.
"""

from __future__ import annotations

from . import backends
from .autograd import is_channels_last, refuse_forward_mode
from .layers import NormSiluConv3x3
from .registry import KERNELS, LAYERS, LOSSES, current, load_nodes, plain, run

__all__ = [
    "KERNELS",
    "LAYERS",
    "LOSSES",
    "NormSiluConv3x3",
    "current",
    "is_channels_last",
    "plain",
    "refuse_forward_mode",
    "run",
]

load_nodes()
backends.load()
