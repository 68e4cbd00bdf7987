"""What to do about memory that does not suffice: how much a sample takes, measured, and how many would fit."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.recompute import parts as parts_of
from ..networks.recompute import recompute
from ..optim import is_sharded
from ..sampling import arguments, takes_endpoint

# What allocations without an error class of their own say when they fail.
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
    """Whether an error is an allocation that failed, on whatever device, or was raised in the wake of one.

    A CUDA graph whose capture runs out of memory says, as it is left, that the capture is invalid.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _EXHAUSTED):
        return True
    return error.__context__ is not None and is_exhausted(error.__context__)


def bytes_per_sample(net: nn.Module, shape: tuple[int, ...], device: torch.device) -> int:
    """Bytes that one sample's forward pass keeps for the backward pass: what a second one adds to the first."""
    return kept_bytes(net, shape, device, 2) - kept_bytes(net, shape, device, 1)


def kept_bytes(net: nn.Module, shape: tuple[int, ...], device: torch.device, batch: int, to_input: bool = False) -> int:
    """Bytes that a forward pass of ``batch`` samples keeps for the backward pass, the parameters aside: counted in one.

    Every piece of memory counts once, however many operations keep it; what autocast makes of the parameters counts
    too. ``to_input``: for a backward pass to the samples. Of parts that run again in it, inputs count and the most that
    one of them keeps then.
    """
    again, most = parts_of(net), 0
    # Known by themselves and not by where they lie: the network's may be fake tensors, which lie nowhere.
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
        # What is kept stays alive until the output goes, so that no address is counted for two.
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
        hook for part in again for hook in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))
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
    """Bytes that ``device`` could still give; None where nobody knows."""
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


def advice(net: nn.Module, batch: int, parts: int, rows: int, shape: tuple[int, ...], device: torch.device) -> str:
    """What it takes to have ``batch`` samples, one of ``parts``, in ``rows`` passes each, and what would fit."""
    asked = f"the memory of {device} does not suffice for a batch of {batch}"
    if any(is_sharded(p) for p in net.parameters()):
        # Counting takes a forward pass, which takes all ranks.
        return f"{asked}; with a larger run.accumulate it goes through in smaller parts"
    free = free_bytes(device)
    try:
        size = rows * bytes_per_sample(net, shape, device)
    except (RuntimeError, MemoryError, TypeError, ValueError) as error:
        # A network may want more than a time, a sample and a label: then nothing is counted.
        return f"{asked}, nor for a batch of 1" if is_exhausted(error) else asked
    if free is None or not size:
        return asked
    fits = min(free // size, batch - 1)
    said = (
        f"{asked}: a sample's activations take {size / 1e6:,.1f} MB (counted with one sample, in {rows} passes through "
        f"a network), {free / 1e6:,.0f} MB are free now, so that about {fits} would fit"
    )
    if not fits:
        return said
    goes = next(n for n in range(2, batch + 1) if batch % n == 0 and batch // n <= fits)
    return f"{said}; with run.accumulate={parts * goes} the batch goes through in parts of {batch // goes}"
