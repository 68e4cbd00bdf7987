"""A GPU that runs nothing, under torch's own CUDA build; docs/without_gpu.md says what it can and cannot show.

A module that imports this is skipped where the process was not started on the null GPU, which ``make nullgpu`` does.
"""

import hashlib
import os
from pathlib import Path

import pytest

from .counts import PRELOADED

if PRELOADED is None:
    pytest.skip("needs torch's CUDA build on the null GPU: make nullgpu", allow_module_level=True)


def _operators() -> str:
    """A name for the sources of the package's operators.

    inductor keeps compiled graphs under the names of operators, and would launch the kernels of an earlier source.
    """
    package = Path(__file__).resolve().parents[3] / "realuid_fast"
    sources = sorted(file for folder in ("kernels", "ops") for file in (package / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]


_BUILT = Path(PRELOADED).parent
os.environ["TRITON_CACHE_DIR"] = str(_BUILT / "triton")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_BUILT / "inductor" / _operators())
# Read by inductor when it is imported: it compiles in this process, where the stand-ins are.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from . import cudnn, inductor, pools
from .counts import Counts, counts, reset

_CONVOLUTIONS = cudnn.install()
pools.install()
