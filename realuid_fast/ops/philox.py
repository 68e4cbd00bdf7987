"""Counter-based normals in plain torch: the definition that every backend reproduces.

Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with the seed as key and
``(i // 4, stream offset)`` as counter, ``i`` the element's index in memory order. Its four words give four normals by
Box and Muller's transform::

    u1 = ((w0 >> 8) + 1) 2^-24      theta = 2 pi (w1 >> 8) 2^-24      n0, n1 = sqrt(-2 ln u1) (cos theta, sin theta)

and likewise ``(w2, w3)`` for ``n2, n3``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; four tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64, and its two 32-bit halves are right all the same.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> 32 & _MASK) ^ c1 ^ k0,
            right & _MASK,
            (left >> 32 & _MASK) ^ c3 ^ k1,
            left & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return [c0, c1, c2, c3]


def normals(key: Tensor, n: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """``n`` normals of the stream for ``key``, plainly and in float64, rounded to ``dtype``; shape ``(n,)``.

    They begin with element ``first``, a multiple of 4.
    """
    group = torch.arange(first // 4, (first + n + 3) // 4, dtype=torch.int64, device=key.device)
    seed, offset = key[0], key[1]
    counter = (
        group & _MASK,
        group >> 32,
        (offset & _MASK).expand_as(group),
        (offset >> 32 & _MASK).expand_as(group),
    )
    words = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    pairs = []
    for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
        u1 = ((radius_word >> 8) + 1).double() * 2.0**-24
        theta = (angle_word >> 8).double() * (2.0**-24 * 2 * math.pi)
        radius = torch.sqrt(-2 * torch.log(u1))
        pairs += [radius * torch.cos(theta), radius * torch.sin(theta)]
    return torch.stack(pairs, dim=-1).flatten()[:n].to(dtype)
