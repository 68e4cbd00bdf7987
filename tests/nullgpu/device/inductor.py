"""Stand-ins for the kernels that torch.compile writes: counted by their kind, but not compiled.

inductor decides here as for a GPU what to fuse and what to allocate, but not which configuration of a kernel is the
fastest. Its names end in a number and begin with the kind: ``poi`` for pointwise, ``red`` and ``per`` for reductions.
"""

from . import counts

KINDS = {"poi": "pointwise", "red": "reduction", "per": "persistent reduction"}


class Kernel:
    """In place of a kernel that inductor wrote."""

    def __init__(self, name, source):
        kind = name.split("_")[1]
        self._launch = counts.launcher(f"inductor {KINDS.get(kind, kind)}")

    def run(self, *arguments, stream=None, **options):
        self._launch(stream)


def install():
    """Have torch.compile write its kernels in this process, and not compile them."""
    from torch._inductor import async_compile, config

    def write(self, kernel_name, source_code, device_str="cuda"):
        if counts.capturing():
            counts.violate(f"kernel {kernel_name} is written by torch.compile during capture")
        return Kernel(kernel_name, source_code)

    config.compile_threads = 1
    async_compile.AsyncCompile.triton = write
