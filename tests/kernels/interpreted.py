"""Runs the Triton kernels in the interpreter against the float64 formulas; a script, run by test_interpreter.py.

The interpreter must be chosen before triton is imported, and then holds for the whole process: so this is one of its
own. Prints one line of JSON a case: name, worst error, tolerance.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import agreement
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from realuid_fast.kernels.noise import _philox
from realuid_fast.networks import build
from realuid_fast.ops import triton_backend

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope):
    _patch_tensor(tensor, scope)
    # triton 3.6 makes a loop's bound an int straight from its array of one element, which NumPy from 2.4 on refuses.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter._patch_lang_tensor = _patch_tensor_and_index

# A launch puts the interpreter's functions in triton.language. Triton does so again for each function that a kernel
# calls, which took two fifths of the time. Here a launch does it once, in both modules that such a function may name.
_patch_lang, NAMES = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _patch_in_launch(fn):
    return _patch_lang(NAMES) if tl.core.is_builtin(tl.load) else interpreter._LangPatchScope()


interpreter._patch_lang = _patch_in_launch
# The interpreter asks for NumPy's type 200,000 times, each time by a table that it builds anew.
_np_dtype, NUMPY = interpreter._get_np_dtype, {}


def _known_np_dtype(kind):
    name = kind.scalar.name  # not all of Triton's types can be hashed
    if name not in NUMPY:
        NUMPY[name] = _np_dtype(kind)
    return NUMPY[name]


interpreter._get_np_dtype = _known_np_dtype


@triton.jit
def philox_kernel(key_ptr, g, out_ptr):
    one = tl.arange(0, 1)
    w0, w1, w2, w3 = _philox(g.to(tl.int64) + one, tl.load(key_ptr), tl.load(key_ptr + 1))
    tl.store(out_ptr + one, w0.to(tl.int64))
    tl.store(out_ptr + 1 + one, w1.to(tl.int64))
    tl.store(out_ptr + 2 + one, w2.to(tl.int64))
    tl.store(out_ptr + 3 + one, w3.to(tl.int64))


def check_known_answers() -> None:
    """Random123's vectors for Philox4x32-10, as counters ``(g, stream)`` under a seed."""
    vectors = (
        ((0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((-1, -1, -1), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88 - (1 << 64)),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    )
    for (seed, stream, g), want in vectors:
        out = torch.zeros(4, dtype=torch.int64)
        philox_kernel[(1,)](torch.tensor([seed, stream]), g, out)
        wrong = sum(a != b for a, b in zip(out.tolist(), want, strict=True))
        print(json.dumps({"case": f"philox/{g:x}", "error": wrong, "tolerance": 0}), flush=True)


def check_network() -> None:
    """The U-Net whose normalisations run these kernels, forward and backward, beside itself in float64."""
    config = {"kind": "unet", "dim": [3, 8, 8], "num_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}
    twins = [build({**config, "norm_groups": 4, "middle_attention": True}) for _ in range(2)]
    with torch.no_grad():
        for parameter in twins[0].parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    twins[1].load_state_dict(twins[0].state_dict())
    twins[1].double()
    x, t, weight = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.rand(2), torch.randn(2, 3, 8, 8)
    library, ran = torch.library.Library("realuid_fast", "IMPL"), []
    for op in ("norm_silu", "norm_silu_grads"):

        def launch(*arguments, op=op):
            ran.append(op)
            return triton_backend.launcher(op)(*arguments)

        library.impl(op, launch, "CPU", allow_override=True)
    found = []
    for net, dtype in zip(twins, (torch.float32, torch.float64), strict=True):
        net.to(memory_format=torch.channels_last)
        (net(t.to(dtype), x.to(dtype)) * weight.to(dtype)).sum().backward()
        found.append(torch.cat([p.grad.flatten().double() for p in net.parameters()]))
    assert {"norm_silu", "norm_silu_grads"} <= set(ran)
    error = float((found[0] - found[1]).norm() / found[1].norm())
    print(json.dumps({"case": "norm_silu/network", "error": error, "tolerance": agreement.TOLERANCE[torch.float32]}))


def main() -> None:
    torch.manual_seed(0)
    check_known_answers()
    agreement.check_all()
    check_network()


if __name__ == "__main__":
    sys.exit(main())
