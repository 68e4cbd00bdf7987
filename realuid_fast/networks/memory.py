"""Advice when memory does not suffice: the memory that a sample takes, by measurement, and how many would fit."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import is_sharded
from .calling import arguments, takes_endpoint
from .recompute import recompute, repeated

# Words in the messages of failed allocations that raise a plain RuntimeError.
_EXHAUSTED = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # torch's CPU allocator, elsewhere than on Linux
    "no memory for",  # this package's operators
    "std::bad_alloc",  # C++
    "could not create a primitive",  # oneDNN, which says no more; a primitive's descriptor too
    "could not create a memory",
    "could not execute a primitive",
    "out of memory",  # CUDA and its libraries
    "ALLOC_FAILED",  # cuBLAS, cuSOLVER, cuDNN
    "ALLOCATION_FAILED",  # cuDNN from version 9 on
)


def is_exhausted(error: BaseException) -> bool:
    """Whether an error, or one in whose handling it was raised, is a failed allocation on any device.

    The second case occurs with CUDA graphs: when a capture runs out of memory, leaving it raises that the capture is
    invalid.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _EXHAUSTED):
        return True
    return error.__context__ is not None and is_exhausted(error.__context__)


def bytes_per_sample(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> int:
    """Bytes that a forward pass keeps for the backward pass for each sample: those of two samples less those of one."""
    return kept_bytes(net, shape, device, 2) - kept_bytes(net, shape, device, 1)


def kept_bytes(net: nn.Module, shape: tuple[int, ...], device: torch.device, batch: int, to_input: bool = False) -> int:
    """Bytes that a forward pass of ``batch`` samples keeps for the backward pass, without parameters and buffers.

    The number is counted during a forward pass. Memory that several operations keep counts once. Copies of parameters
    that autocast makes count too. With ``to_input`` the backward pass goes to the samples as well. For blocks that run
    again in the backward pass, their inputs count, and the most that one of them keeps while it runs again.
    """
    again, most = repeated(net), 0
    # Storages are told apart by identity, not by address: the network may be made of fake tensors, which have none.
    own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    labels = torch.zeros(batch, dtype=torch.int64, device=device) if getattr(net, "num_classes", 0) else None
    x = torch.zeros(batch, *shape, device=device, requires_grad=to_input)
    end = torch.zeros_like(x) if takes_endpoint(net) else None

    def count() -> int:
        kept.clear()
        # `out` keeps all saved tensors alive until it is deleted, so that no storage's identity is used twice.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(*arguments(net, torch.zeros(batch, device=device), x, labels, end))
        del out
        return sum(kept.values())

    if not again:
        return count()
    before = 0

    def enter(*_: Any) -> None:
        nonlocal before
        before = sum(kept.values())

    def leave(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(kept.values()) - before)

    hooks = [
        hook for block in again for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    try:
        recompute(net, False)
        count()
    finally:
        for hook in hooks:
            hook.remove()
        recompute(net)
    return count() + most


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None if that is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        pages = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) * 1024 for line in pages.splitlines() if line.startswith("MemAvailable"))
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            free = min(free, max(limit - used, 0))
        return free
    except (OSError, StopIteration, ValueError):
        return None


def advice(net: nn.Module, batch: int, parts: int, passes: int, shape: tuple[int, ...], device: torch.device) -> str:
    """A sentence for a batch of ``batch`` samples that does not fit: the memory it takes, and a batch that would fit.

    A sample's activations are held for ``passes`` forward passes at once. An update runs ``parts`` such batches.
    """
    asked = f"the memory of {device} does not suffice for a batch of {batch}"
    if any(is_sharded(p) for p in net.parameters()):
        # Counting needs a forward pass, and a sharded network's forward pass needs all ranks.
        return f"{asked}; with a larger run.accumulate it goes through in smaller parts"
    free = free_bytes(device)
    try:
        size = passes * bytes_per_sample(net, shape, device)
    except (RuntimeError, MemoryError, TypeError, ValueError) as error:
        # If the network wants other arguments than a time, a sample and a label, nothing can be counted.
        return f"{asked}, nor for a batch of 1" if is_exhausted(error) else asked
    if free is None or not size:
        return asked
    fits = min(free // size, batch - 1)
    said = (
        f"{asked}: a sample's activations take {size / 1e6:,.1f} MB (counted with one sample, in {passes} passes "
        f"through a network), {free / 1e6:,.0f} MB are free now, so that about {fits} would fit"
    )
    if not fits:
        return said
    goes = next(n for n in range(2, batch + 1) if batch % n == 0 and batch // n <= fits)
    return f"{said}; with run.accumulate={parts * goes} the batch goes through in parts of {batch // goes}"
