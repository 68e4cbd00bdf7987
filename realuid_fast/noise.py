"""A counter-based stream of normals that every backend can regenerate, so that noise need not be stored.

``ops/philox.py`` has the arithmetic and its source.

A key or a tensor? Pass the key. A turn needs its noise twice, for the interpolant and for the loss. Drawing it in both
calls costs instructions; writing it once and reading it twice costs bytes. By the counts of ``bench.kernels_report``
drawing is cheaper on H200, H100 and A100 for every type and row, and on B200 with one exception: half-precision rows
of fewer than 512 elements, in a number not divisible by four. There every element draws a group of four for itself, and
a tensor from :func:`normal` is predicted to be cheaper. No call switches by itself. The trainers pass keys; with
``teacher.coupling`` the noise is a tensor, because it is reordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops
from .contracts import check_device, check_tensor, is_number, type_name
from .errors import UserError


class NoiseStream:
    """The source of noise keys: a seed and an offset in a device tensor, advanced on the device.

    A key is an int64 tensor ``(seed, offset)`` of shape ``(2,)``; pass it as the ``noise`` of a fused call. Since the
    state lives on the device, a replayed CUDA graph that contains :meth:`next_key` draws fresh noise every time.

    Args:
        seed: any integer in ``[0, 2^63)``. Streams with different seeds are independent.
        device: where the keys live; the device of the tensors they are used with.

    Raises:
        UserError: a seed outside its range, or a device that torch does not know or cannot use here.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        if not is_number(seed, whole=True) or not 0 <= seed < 2**63:
            raise UserError(f"seed must be an integer in [0, 2^63), not {seed!r}")
        check_device(device)
        try:
            self.state = torch.tensor([int(seed), 0], dtype=torch.int64, device=device)
        except (AssertionError, RuntimeError) as error:
            # A torch without CUDA raises an AssertionError for the device "cuda".
            raise UserError(f"device {str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from error

    def next_key(self) -> Tensor:
        """A key that no earlier call returned, as an int64 tensor of shape ``(2,)``."""
        key = self.state.clone()
        self.state[1] += 1
        return key

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises :class:`UserError` for anything else."""
        saved = state.get("state") if isinstance(state, Mapping) else None
        if not isinstance(saved, Tensor) or saved.shape != (2,) or saved.dtype != torch.int64:
            raise UserError("state must be what NoiseStream.state_dict() returned: a dict with an int64 pair 'state'")
        self.state.copy_(saved)


def is_key(noise: Tensor) -> bool:
    """Whether a ``noise`` argument is a key of a stream rather than the noise itself."""
    return not noise.is_floating_point()


def check_key(key: Tensor, device: torch.device, name: str = "key") -> None:
    """Refuse a key that is not an int64 pair ``(seed, offset)`` on ``device``."""
    if not isinstance(key, Tensor):
        raise UserError(f"{name} must be a key from NoiseStream.next_key(), not {type_name(key)}")
    if key.dtype != torch.int64 or key.shape != (2,):
        raise UserError(
            f"{name} must be a key from NoiseStream.next_key(), an int64 tensor of shape (2,), not {key.dtype} of "
            f"shape {tuple(key.shape)}"
        )
    if key.device != device:
        raise UserError(f"{name} is on {key.device}, the tensors it belongs to are on {device}")


def normal(key: Tensor, like: Tensor) -> Tensor:
    """The standard normals that a fused call draws for ``key`` where its ``x`` is shaped like ``like``.

    Args:
        key: int64 ``(seed, offset)``, shape ``(2,)``.
        like: ``(R, ...)``, dense; gives shape, dtype, device and memory layout.

    Returns:
        Normals like ``like``; element ``i`` in memory order is the stream's ``i``-th.
    """
    check_tensor("like", like)
    check_key(key, like.device)
    return ops.current(like.device).normal_like(key, like, like.shape[0] if like.dim() else 0)
