"""Which implementation of the operators runs, and what is missing for the others: the public face of ``ops.backends``.

======== ==================================== =========================================
backend  runs                                 needs
======== ==================================== =========================================
torch    the plain reference, on any device   nothing
cpp      the C++ extension, on CPU            the extension, built at installation
triton   the Triton kernels, on CUDA or ROCm  a GPU and the triton package
======== ==================================== =========================================

``REALUID_FAST_BACKEND`` sets the choice for a process, :func:`backend` for a block of code. :func:`keep_freed_memory`
makes loops over large tensors on a CPU faster.
"""

from __future__ import annotations

from .ops.backends import NAMES, Backend, backend, check, compiled, load, report, select
from .ops.extension import keep_freed_memory

__all__ = ["NAMES", "Backend", "backend", "check", "compiled", "keep_freed_memory", "load", "report", "select"]
