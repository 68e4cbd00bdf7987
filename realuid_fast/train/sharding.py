"""Networks that do not fit on one GPU: FSDP2 shards them over all ranks.

Every rank holds a share of the rows of each parameter, with their moments and averages. A block of the network is
gathered on every rank when it is called, in the forward pass and again in the backward pass, and dropped afterwards.
A checkpoint holds such tensors in files beside it, one for each rank; any number of ranks can read them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.frozen import frozen_view
from ..networks.discriminator import Judged
from ..optim import is_sharded
from . import distributed


def shard(net: nn.Module, device: torch.device, offload: bool = False) -> nn.Module:
    """``net`` itself, its parameters sharded over all ranks and moved to ``device`` one block at a time.

    The blocks that are gathered are the network's children; of a list or dictionary of modules, each item. The network
    must call each block as a module and must not read the parameters of modules inside a block: only the call gathers
    them.

    Args:
        net: a network on the host. Its parameters become contiguous, which FSDP2 asks for.
        device: the device on which the network is called.
        offload: keep the shares in host memory, pinned for a GPU. A block is on the device only while it is used.
    """
    # Imported here, because these modules take longer to import than all of this package.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    # FSDP2 warns of outputs that are views, because writing into one is an error. Nothing here writes into an output.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for p in net.parameters():
        p.data = p.data.contiguous()
    mesh = init_device_mesh(device.type, (distributed.size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in (*blocks(net), net):
        # The outermost module too drops its gathered parameters after a pass: an optimiser may step before the next.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    return net


def is_sharded_net(net: nn.Module) -> bool:
    """Whether a network went through :func:`shard`."""
    return any(map(is_sharded, net.parameters()))


def blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network that :func:`shard` gathers, each on its own."""
    if isinstance(net, Judged):
        # The head reads what the network returns, so both are called as modules.
        return [*blocks(net.net), net.net, net.head]
    containers = (nn.ModuleList, nn.ModuleDict)
    children = [m for child in net.children() for m in (child.children() if isinstance(child, containers) else [child])]
    return [m for m in children if any(True for _ in m.parameters())]


def frozen(net: nn.Module) -> Callable[..., Any]:
    """A function that calls a sharded network in training as if it were frozen, without gradients for its parameters.

    Whenever FSDP2 gathers a parameter, the gathered one takes ``requires_grad`` from its share. So the network's next
    ordinary call trains again.
    """

    def call(*arguments: Tensor | None) -> Any:
        net.requires_grad_(False)
        try:
            return net(*arguments)
        finally:
            net.requires_grad_(True)

    return call


@contextlib.contextmanager
def standing_in(net: nn.Module, average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside the block a sharded network is in evaluation mode and has ``average`` (by name) as its parameters.

    The shares of parameters and averages are swapped, and swapped back afterwards. So no second network is held, and
    no bit changes.
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
    """The network that is evaluated and saved, with ``average`` as its parameters, and a context to use it in.

    A whole network is a view beside the one in training. A sharded one is the network in training itself, and the
    context is :func:`standing_in`.
    """
    if sharded:
        return net, functools.partial(standing_in, net, average)
    return frozen_view(net, average).eval(), contextlib.nullcontext


@torch.no_grad()
def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which rank 0 gets every sharded tensor whole, in host memory; other ranks get none of them.

    All ranks must call. Tensors are gathered one after another, so no device holds more than one whole tensor.
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
    """A saved state, whole or sharded over any number of ranks, for a trainer whose present state is ``own``.

    For a tensor that is sharded in ``own``, this rank's rows are read straight into that tensor, which then stands in
    the result. So nothing is held twice. Every other tensor is read whole.

    Raises:
        UserError: a saved tensor has another shape than the trainer's.
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


class Damaged(Exception):
    """A checkpoint whose content is not what was written."""


class OwnRows(NamedTuple):
    """This rank's rows of a sharded tensor, and the shape of the whole tensor."""

    shape: tuple[int, ...]
    rows: Tensor


class Rows:
    """A saved tensor whose rows are spread over several files. Indexing it with a slice reads those rows.

    Attributes:
        shape: the shape of the whole tensor.
    """

    def __init__(self, shape: tuple[int, ...], files: Shards, keys: tuple[Any, ...]) -> None:
        self.shape, self._files, self._keys = shape, files, keys

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, _ = rows.indices(self.shape[0])
        read: list[Tensor] = []
        for i in range(len(self._files)):
            there = rows_of(self.shape[0], i, len(self._files))
            if not read or max(first, there.start) < min(end, there.stop):
                shard = self._files.tensor(i, self._keys)
                if tuple(shard.shape) != (there.stop - there.start, *self.shape[1:]):
                    raise UserError(f"{self._files.names[i]} has rows of another shape than its checkpoint says")
                read.append(shard[max(first - there.start, 0) : max(end - there.start, 0)])
        return torch.cat(read)


class Shards:
    """The files of a sharded checkpoint. A file is opened with its first tensor, and only the pages used are read."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.names, self._folder = names, folder
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, i: int, keys: tuple[Any, ...]) -> Tensor:
        if i not in self._opened:
            file = self._folder / self.names[i]
            try:
                self._opened[i] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except MemoryError:
                raise
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
            except Exception as error:
                raise UserError(f"{file} cannot be read: {type(error).__name__}") from None
        found = self._opened[i]
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, Tensor):
            raise UserError(f"{self.names[i]} has no rows of {'.'.join(map(str, keys))}")
        return found


def rows_of(length: int, rank: int, size: int) -> slice:
    """The rows that ``rank`` of ``size`` ranks holds of ``length``: FSDP2 cuts tensors as ``torch.chunk`` does."""
    most = -(-length // size)
    return slice(min(rank * most, length), min((rank + 1) * most, length))


# The key of the entry that stands for a sharded tensor in a checkpoint; the entry's value is the tensor's shape.
ELSEWHERE = "rows in the shards, of a tensor of shape"


def split(tree: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """A state without its sharded tensors, and this rank's rows of them under the same keys."""
    rest: dict[Any, Any] = {}
    rows: dict[Any, Any] = {}
    for key, value in tree.items():
        if isinstance(value, OwnRows):
            rest[key], rows[key] = {ELSEWHERE: list(value.shape)}, value.rows
        elif isinstance(value, dict):
            rest[key], inner = split(value)
            if inner:
                rows[key] = inner
        else:
            rest[key] = value
    return rest, rows


def joined(tree: dict[Any, Any], files: Shards, keys: tuple[Any, ...] = ()) -> dict[Any, Any]:
    """The inverse of :func:`split`, for the rows of all ranks. None of the rows are read yet."""
    together: dict[Any, Any] = {}
    for key, value in tree.items():
        inside = (*keys, key)
        if not isinstance(value, dict):
            together[key] = value
        elif ELSEWHERE in value:
            shape = value[ELSEWHERE]
            if not isinstance(shape, list) or not shape or not all(type(n) is int and n >= 0 for n in shape):
                raise Damaged("it does not say how large a tensor is")
            together[key] = Rows(tuple(shape), files, inside)
        else:
            together[key] = joined(value, files, inside)
    return together
