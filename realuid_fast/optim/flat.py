"""Parameters and what belongs to them in memory: laid into one buffer, or this rank's share of sharded ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError

# Tensors begin at multiples of this many elements: vectors of every width are aligned, on every device.
ALIGN = 64


class FlatParameters:
    """Moves parameters into one buffer. Each parameter becomes a view of it, with the shape and the strides it had.

    One kernel launch can then update all of them. Views of the parameters' old memory (a ``frozen_view``, a state dict)
    do not follow, so make them afterwards. ``net.to(...)`` and ``copy.deepcopy`` take parameters out of the buffer
    again.

    Gradients stay in autograd's own buffers at first: autograd hands those over without a copy as long as ``p.grad`` is
    None, and :meth:`gather` copies them together with a few launches. Accumulating into views from the start would cost
    a launch for every parameter and twice the memory traffic. If gradients are accumulated anyhow, :meth:`attach` makes
    the views.

    Args:
        params: parameters of one dtype and device, each without gaps in memory.

    Attributes:
        data: ``(N,)``, the parameters in order, each padded with zeros to a multiple of 64 elements.
        grad: ``(N,)``, the gradients likewise.

    Raises:
        UserError: a parameter of another dtype or device, or one with gaps in memory.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)
        check_parameters(self.params)
        self._offsets, self._size = [], 0
        for p in self.params:
            self._offsets.append(self._size)
            self._size += padded(p.numel())
        self.data, self.grad = self.buffer(), self.buffer()
        self._views, self._grads = self.views(self.data), self.views(self.grad)
        for p, view in zip(self.params, self._views, strict=True):
            p.data = view.copy_(p.detach())

    def buffer(self, rows: int | None = None) -> Tensor:
        """Zeros ``(N,)``, or ``(rows, N)``, with a place for every parameter, for instance for its moments."""
        first = self.params[0]
        shape = (self._size,) if rows is None else (rows, self._size)
        return torch.zeros(shape, dtype=first.dtype, device=first.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Every parameter's view of a :meth:`buffer`, laid out like the parameter; ``(rows, ...)`` of one with rows."""
        lead, strides = buffer.shape[:-1], buffer.stride()[:-1]
        return [
            buffer.as_strided((*lead, *p.shape), (*strides, *p.stride()), offset)
            for p, offset in zip(self.params, self._offsets, strict=True)
        ]

    def attach(self, span: slice = slice(None)) -> None:
        """Make every ``p.grad`` a view of :attr:`grad`, for backward to add to; clear it with ``set_to_none=False``.

        ``span`` is a slice of the list of parameters.
        """
        for p, view in zip(self.params[span], self._grads[span], strict=True):
            p.grad = view

    def gradients(self, span: slice) -> Tensor:
        """The stretch of :attr:`grad` that belongs to the parameters of ``span``, a slice of their list."""
        first, end, _ = span.indices(len(self.params))
        return self.grad[self._offsets[first] : self._offsets[end] if end < len(self.params) else self._size]

    def gather(self, span: slice = slice(None)) -> bool:
        """Copy all gradients into :attr:`grad`. Returns False, and copies nothing, if a parameter has no gradient.

        ``span`` is a slice of the list of parameters, as for :meth:`attach`.

        Raises:
            UserError: a parameter has left the buffer.
        """
        strays: list[Tensor] = []
        homes: list[Tensor] = []
        for p, view, home in zip(self.params[span], self._views[span], self._grads[span], strict=True):
            if p.data_ptr() != view.data_ptr():
                raise UserError("a parameter has left its flat buffer: it was moved or cast after it was laid there")
            if p.grad is None:
                return False
            check_dense(p.grad)
            if p.grad.data_ptr() != home.data_ptr():
                strays.append(p.grad)
                homes.append(home)
        if strays:
            torch._foreach_copy_(homes, strays)
        return True


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold only a share."""
    return hasattr(tensor, "to_local")


def spread(local: Tensor, p: Tensor) -> Tensor:
    """``local``, this rank's share of a moment or average of ``p``, as a DTensor on the same memory if ``p`` is one.

    It is sharded as ``p`` is; any dimensions beyond those of ``p`` come first.
    """
    if not is_sharded(p):
        return local
    # Imported here, because this module takes longer to import than all of this package.
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(p, DTensor)
    rows = local.dim() - p.dim()
    shape = torch.Size((*local.shape[:rows], *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(rows + each.dim) if isinstance(each, Shard) else each for each in p.placements]
    return DTensor.from_local(local, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def local(tensor: Tensor) -> Tensor:
    """The tensor's memory on this rank, without gradient: of a sharded tensor this rank's share."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def check_parameters(params: Sequence[Tensor]) -> None:
    if not params:
        raise UserError("params must have at least one parameter")
    first = params[0]
    if first.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"params must be float32 or float64, got {first.dtype}: keep the parameters in float32 and run the network "
            "under torch.autocast"
        )
    for p in params:
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise UserError(f"params must be alike, got {first.dtype} on {first.device} and {p.dtype} on {p.device}")
        if is_sharded(p) != is_sharded(first):
            raise UserError("params must be alike, got sharded and whole ones")
        if is_sharded(p):
            if p.device_mesh.ndim != 1 or not p.placements[0].is_shard():  # type: ignore[attr-defined]
                raise UserError("params that are sharded must be so over all ranks of a mesh of one dimension")
            p = local(p)
        if torch.empty_like(p, device="meta").stride() != p.stride():
            raise UserError(f"params must have no gaps in memory, got one of shape {tuple(p.shape)} with {p.stride()}")


def check_dense(grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise UserError("a gradient is sparse, and FusedAdam takes dense ones only: build embeddings with sparse=False")


def like_parameter(p: nn.Parameter) -> Tensor:
    """The gradient of ``p`` with its elements in the order that ``p`` has them in memory."""
    assert p.grad is not None
    check_dense(p.grad)
    own, grad = local(p), local(p.grad)
    if (here := grad.stride()) == (there := own.stride()):
        return grad
    # The stride of a dimension of size 1 has no meaning, so it is not compared.
    same = all(a == b or size < 2 for a, b, size in zip(here, there, own.shape, strict=True))
    return grad if same else torch.empty_like(own).copy_(grad)
