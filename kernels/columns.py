"""The places of a coefficient row's numbers, as constants of the kernels."""

from __future__ import annotations

import triton.language as tl

from realuid_fast.coefficients import COLUMNS

A, B, C, P, Q, S, K_OUT, K_X, W = (tl.constexpr(place) for place in range(len(COLUMNS)))
WIDTH = tl.constexpr(len(COLUMNS))
