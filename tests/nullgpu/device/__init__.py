"""A GPU that runs nothing, under torch's own CUDA build; docs/without_gpu.md says what it can and cannot show.

A module that imports this is skipped where the process was not started on the null GPU, which ``make nullgpu`` does.
"""

import os

import pytest

from .counts import PRELOADED

if PRELOADED is None:
    pytest.skip("needs torch's CUDA build on the null GPU: make nullgpu", allow_module_level=True)

# Read by inductor when it is imported: it compiles in this process, where the stand-ins are.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from . import caches, cudnn, inductor, pools
from .counts import Counts, counts, reset

caches.install()
_CONVOLUTIONS = cudnn.install()
pools.install()
