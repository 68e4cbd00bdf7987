"""The arithmetic of the networks in one turn: which are safe where, and how the rest of a turn is kept in float32.

The fake turn fits one network to a target: rounding adds noise to a gradient that has plenty, and bfloat16 does (on the
CIFAR-10 U-Net a relative error of 2.6 %, cosine 0.9997). The generator's gradient is driven by ``f* - f``, so that the
networks' rounding is amplified by one over the gap ``||F - F*|| / ||F*||`` of their raw outputs, which falls as the
fake model learns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .choices import PRECISIONS as PRECISIONS

# The type that autocast uses, None for float32 storage; the unit roundoff of a product's inputs.
_DTYPES = {"float32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
# A gradient that is off by more than this share is reported.
TOO_COARSE = 0.1


@dataclass(frozen=True)
class Precision:
    """One of :data:`PRECISIONS` on one device.

    ``float32`` is IEEE arithmetic: TF32 is off, for convolutions too, where torch's default has it on. ``tf32`` turns
    it on. ``bf16`` and ``fp16`` are autocast; the losses, the parameters, the networks' last layers and the optimiser
    stay in float32 under each of them.
    """

    name: str
    device: torch.device

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Around the making of samples, without gradients: :meth:`turn` and :meth:`networks` in one."""
        with torch.no_grad(), self.turn(), self.networks():
            yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around a whole turn with its backward passes: whether float32 products may be TF32."""
        with _tf32(self.name == "tf32") if self.device.type == "cuda" else contextlib.nullcontext():
            yield

    def networks(self) -> contextlib.AbstractContextManager[None]:
        """Around the networks' forward passes, and nothing else."""
        dtype = _DTYPES[self.name]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def gradient_error(self, gap: float) -> float:
        """About the relative error of the generator's gradient at ``gap = ||F - F*|| / ||F*||``: ``3 u / gap``.

        The factor is fitted to the CIFAR-10 U-Net: bf16 39, 14 and 5 % at gaps of 2.8, 8.4 and 27 %, fp16 5.7 % at
        2.8 %. ``u`` is the unit roundoff.
        """
        return math.inf if gap == 0 else 3 * _ROUNDOFF[self.name] / gap

    def concern(self, gap: float) -> str | None:
        """A sentence if :meth:`gradient_error` at this gap is above :data:`TOO_COARSE`; None if it is not."""
        error = self.gradient_error(gap)
        if not error > TOO_COARSE:
            return None
        return (
            f"{self.name} is too coarse: fake model and teacher differ by {gap:.2%}, so that rounding puts the "
            f"generator's gradient about {min(error, 1.0):.0%} off; use a finer one"
        )


@contextlib.contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Allow or forbid TF32 for float32 products inside the block, and restore the caller's settings after it.

    torch has older switches (``allow_tf32``, ``set_float32_matmul_precision``) and newer ones (``fp32_precision``).
    torch.compile reads both kinds, so both are set here, and they agree. Where a caller has set a newer one alone,
    reading the older one is an error of torch.
    """
    # torch makes these modules when it is imported, where no type checker sees them.
    backends: Any = torch.backends
    newer = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    before = [each.fp32_precision for each in newer]
    # If torch refuses to read a setting, it is restored to torch's default.
    matmul, conv = "highest", True
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        conv = backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    backends.cudnn.allow_tf32 = wanted
    # With the older switch off, convolutions follow torch's global setting, so the newer ones are set as well.
    backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = conv
        for each, value in zip(newer, before, strict=True):
            # "none" means that torch's global setting counts. The caller may have set that one alone.
            each.fp32_precision = "none"
            if each.fp32_precision != value:
                each.fp32_precision = value


def round_weights(net: nn.Module) -> None:
    """Store a frozen network's weights in bf16, which halves its memory; it then runs under ``bf16`` alone.

    Vectors stay in float32, and so does the network's last child, which is its output layer. Neither takes memory to
    speak of, and rounding the output layer would round the output itself.
    """
    *inner, _ = net.children()
    for p in (p for child in inner for p in child.parameters()):
        if p.dim() > 1:
            p.data = p.data.to(torch.bfloat16)


def why_not(name: str, device: torch.device | str) -> str | None:
    """A clause that says why a precision does not run on ``device``; None if it does."""
    device = torch.device(device)
    if device.type != "cuda":
        return "it needs a CUDA device" if name == "tf32" else None
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8 and name in ("tf32", "bf16"):
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def in_words(name: str) -> str:
    """An addition to the name of a distance, which says what its samples were computed in; empty for float32."""
    return "" if name == "float32" else f", samples made in {name}"


def seed_scale(batch: int) -> float:
    """The factor of an fp16 turn's seed gradients: the smallest power of two that is at least ``batch``.

    The losses are means over the batch, so this factor brings a seed gradient to the size of one sample's, near 1,
    where fp16 has most room to both sides. Dividing by a power of two afterwards is exact.
    """
    return 2.0 ** math.ceil(math.log2(batch))
