"""The reference, which other backends are compared with, against the formulas of the table of cases in float64."""

import torch

from ..cases import CASES, EVERY_CALL, assert_agrees


@CASES
@EVERY_CALL
def test_reference_agrees(call, shape, layout, keyed, extra):
    assert_agrees(torch.ops.realuid_fast_reference, call, shape, layout, keyed, extra, torch.float64)
