"""Networks that one GPU does not hold: FSDP2 shards them over all ranks, and what a run needs of them then.

Of a sharded network every rank holds a share of each parameter's rows, its moments and its averages. A part of the
network is brought together when it is called, in the forward pass and again in the backward pass, and dropped after.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..generator import frozen_view
from ..optim import is_sharded
from . import distributed
from .checkpoint import Rows, rows_of


def shard(net: nn.Module, device: torch.device, offload: bool = False) -> nn.Module:
    """``net`` itself, its parameters sharded over all ranks and moved to ``device`` one part at a time.

    The parts that are brought together are the network's children, and of a list or dictionary of modules each item.
    The network must call each part as a module and must not read the parameters of a part's own modules: the call is
    what brings them together.

    Args:
        net: on the host. Parameters become contiguous, which FSDP2 asks for.
        device: where it is called.
        offload: keep the shares in host memory, pinned for a GPU: a part is on the device only while it is used.
    """
    # Not at the top: they take longer to import than all of this package.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    # An output that is a view is a trap for who writes into it, which nobody here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for p in net.parameters():
        p.data = p.data.contiguous()
    mesh = init_device_mesh(device.type, (distributed.size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in (*parts(net), net):
        # Also of the whole network nothing stays together after a pass: the next may follow an optimiser's step.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    return net


def parts(net: nn.Module) -> list[nn.Module]:
    """What :func:`shard` brings together at once, each of them."""
    containers = (nn.ModuleList, nn.ModuleDict)
    children = [m for child in net.children() for m in (child.children() if isinstance(child, containers) else [child])]
    return [m for m in children if any(True for _ in m.parameters())]


def frozen(net: nn.Module) -> Callable[..., Tensor]:
    """Calls a sharded network in training as if it were frozen: its parameters get no gradient and keep nothing for it.

    FSDP2 takes what a parameter requires from its share whenever it brings it together, so that the next call trains.
    """

    def call(*arguments: Tensor | None) -> Tensor:
        net.requires_grad_(False)
        try:
            return net(*arguments)
        finally:
            net.requires_grad_(True)

    return call


@contextlib.contextmanager
def standing_in(net: nn.Module, average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within it a sharded network is in evaluation mode and has its ``average`` as parameters, by name.

    The shares change places and change back: no second network is brought together, and no bit changes.
    """

    @torch.no_grad()
    def swap() -> None:
        for name, p in net.state_dict().items():
            if average is not None and is_sharded(p):
                share = p.to_local()
                kept = share.clone()
                share.copy_(average[name])
                average[name].copy_(kept)

    swap()
    net.eval()
    try:
        yield
    finally:
        swap()
        net.train()


def exported(
    net: nn.Module, average: Mapping[str, Tensor] | None, sharded: bool
) -> tuple[nn.Module, Callable[[], contextlib.AbstractContextManager[None]]]:
    """The network that is evaluated and saved, with ``average``'s parameters, and the context that it is used in.

    Where networks are whole that is a view beside the one in training, else that one itself (:func:`standing_in`).
    """
    if sharded:
        return net, functools.partial(standing_in, net, average)
    return frozen_view(net, average).eval(), contextlib.nullcontext


@torch.no_grad()
def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose sharded tensors rank 0 gets whole, in host memory; other ranks, who must call too, get none.

    They come together one after another: no device holds more than one of them.
    """
    gathered = {}
    for name, tensor in state.items():
        if is_sharded(tensor):
            tensor = tensor.full_tensor()  # type: ignore[attr-defined]
            if distributed.rank():
                continue
            tensor = tensor.cpu()
        gathered[name] = tensor
    return gathered


@torch.no_grad()
def taken(own: Any, saved: Any) -> Any:
    """A saved state, sharded over however many ranks or whole, for a trainer whose state ``own`` is now.

    What is sharded there is read into its memory at once, this rank's rows of it, and stands for itself in the result;
    so nothing is held twice. Everything else is read whole.

    Raises:
        UserError: a saved tensor of another shape.
    """
    if isinstance(saved, Mapping):
        return {key: taken(own.get(key) if isinstance(own, Mapping) else None, value) for key, value in saved.items()}
    if not isinstance(saved, (Tensor, Rows)):
        return saved
    if not isinstance(own, Tensor) or not is_sharded(own):
        return saved if isinstance(saved, Tensor) else saved[:]
    if tuple(saved.shape) != tuple(own.shape):
        raise UserError(f"the checkpoint has a tensor of shape {tuple(saved.shape)}, the run one of {tuple(own.shape)}")
    local = own.to_local()  # type: ignore[attr-defined]
    local.copy_(saved[rows_of(len(own), distributed.rank(), distributed.size())])
    return own
