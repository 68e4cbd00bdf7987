"""The noise stream evaluated in float64, written out here once more in NumPy."""

import numpy as np
import torch

SEED, OFFSET = 0x0123_4567_89AB_CDEF, 41


def philox_words(seed: int, offset: int, groups: np.ndarray) -> list[np.ndarray]:
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [groups & low, groups >> shift, np.full_like(groups, offset & 0xFFFFFFFF), np.full_like(groups, offset >> 32)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def stream64(count: int, start: int = 0, seed: int = SEED, offset: int = OFFSET) -> torch.Tensor:
    """Elements start, start + 1, ... of the stream, evaluated in float64."""
    first, last = start // 4, (start + count + 3) // 4
    w = philox_words(seed, offset, np.arange(first, last, dtype=np.uint64))
    out = np.empty((last - first, 4))
    for pair in (0, 2):
        u = ((w[pair] >> np.uint64(8)).astype(np.float64) + 1) * 2.0**-24
        theta = 2 * np.pi * (w[pair + 1] >> np.uint64(8)).astype(np.float64) * 2.0**-24
        r = np.sqrt(-2 * np.log(u))
        out[:, pair], out[:, pair + 1] = r * np.cos(theta), r * np.sin(theta)
    return torch.from_numpy(out.reshape(-1)[start - 4 * first :][:count].copy())
