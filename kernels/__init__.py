"""Triton kernels of the fused calls; the functional layer imports them where a GPU runs them."""

if __name__ == "kernels":
    raise ImportError("import realuid_fast.kernels, not kernels: the operators would be registered twice")
