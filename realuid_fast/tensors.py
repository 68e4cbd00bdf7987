"""The checks of a fused call's arguments: tensors of one shape, type, device and layout; refusals name the argument.

No check waits for the device: all but the CPU's coefficients are checked by their metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import noise as noises
from . import ops
from .coefficients import Coefficients
from .contracts import check_tensor, check_whole, host_checks_allowed, is_number, type_name
from .errors import UserError
from .objectives import Objective

if TYPE_CHECKING:
    from .paths.base import Path

# The unconditional output and the scale of a guided teacher.
Guidance = tuple[Tensor | None, Tensor | None]
# The types that tensors may have; for each, the type of its arithmetic and of its coefficients.
_REAL = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def refuse_gradients(call: str, **tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise UserError(f"{call} gives no gradient in {name}: pass {name}.detach()")


def check(x: Tensor, coef: Tensor, noise: Tensor, noise_rows: int | None, **others: Tensor | None) -> int:
    """Refuse tensors that one pass cannot run over; returns ``noise_rows``, or its default."""
    if _fits(x, coef, noise, noise_rows, others):
        noise_rows = x.shape[0] if noise_rows is None else noise_rows
    else:
        noise_rows = _check_each(x, coef, noise, noise_rows, others)
    for name, column in (("x_t", "k_x"), ("endpoint", "q" if "x_t" in others else "b")):
        if name in others and others[name] is None:
            _check_left_out(name, coef, column)
    return noise_rows


def check_noise(noise: object) -> None:
    """Refuse what is neither a key nor a tensor of noise."""
    if not isinstance(noise, Tensor):
        raise UserError(
            f"noise must be a key from NoiseStream.next_key() or a tensor of noise like x, not {type_name(noise)}"
        )


def _check_each(
    x: Tensor, coef: Tensor, noise: Tensor, noise_rows: int | None, others: Mapping[str, Tensor | None]
) -> int:
    check_tensor("x", x)
    check_tensor("coef", coef)
    check_noise(noise)
    if noise_rows is not None:
        check_whole("noise_rows", noise_rows)
    if x.dim() == 0:
        raise UserError("x must have a batch dimension, got a scalar")
    # Under autocast the losses' inputs are cast to float32 on their way into the operator.
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype not in _REAL:
        raise UserError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    rows = x.shape[0]
    noise_rows = rows if noise_rows is None else noise_rows
    if not (0 < noise_rows <= rows or rows == noise_rows == 0):
        raise UserError(f"noise_rows must lie between 1 and the number of rows {rows}, got {noise_rows}")
    _check_layout("x", x)

    for name, tensor in others.items():
        if tensor is not None:
            check_tensor(name, tensor)
            _check_like(name, tensor, x, x.shape, autocast)
    if noises.is_key(noise):
        noises.check_key(noise, x.device, "noise")
    else:
        _check_like("noise", noise, x, torch.Size((noise_rows, *x.shape[1:])), autocast)
        refuse_gradients("a fused call", noise=noise)

    wanted = _REAL[x.dtype]
    if coef.shape != (rows, 9):
        raise UserError(f"coef must have shape ({rows}, 9), one row a sample of x, not {tuple(coef.shape)}")
    if coef.dtype != wanted or coef.device != x.device:
        raise UserError(
            f"coef must be contiguous {wanted} on {x.device} for {x.dtype} samples, not {coef.dtype} on {coef.device}"
        )
    if not coef.is_contiguous():
        raise UserError(f"coef must be contiguous, its strides are {coef.stride()}: pass coef.contiguous()")
    refuse_gradients("a fused call", coef=coef)
    return noise_rows


def _fits(x: object, coef: object, noise: object, noise_rows: int | None, others: Mapping[str, Tensor | None]) -> bool:
    """Whether this is the common call: all tensors contiguous and of one type, noise for every row or a key.

    On a few samples :func:`check` takes as long as the kernel, so calls that pass this shorter check skip its rest. A
    call that does not pass may still be right; :func:`check` decides, and names the tensor that is wrong.
    """
    if not (isinstance(x, Tensor) and isinstance(coef, Tensor) and isinstance(noise, Tensor)):
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    for tensor in others.values():
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.dtype == dtype
            and tensor.device == device
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
        ):
            return False
    return (
        x.dim() > 0
        and (noise_rows is None or (type(noise_rows) is int and 0 < noise_rows <= shape[0]))
        and x.is_contiguous()
        and coef.shape == (shape[0], 9)
        and coef.dtype == _REAL.get(dtype)
        and coef.device == device
        and coef.is_contiguous()
        and not coef.requires_grad
        and noise.device == device
        and (
            noise.shape == (2,)
            if noise.dtype == torch.int64
            else noise.shape == shape
            and noise_rows in (None, shape[0])
            and noise.dtype == dtype
            and noise.is_contiguous()
            and not noise.requires_grad
        )
    )


def _check_left_out(name: str, coef: Tensor, column: str) -> None:
    """Refuse a missing tensor, unless its column of coefficients is zero in every row."""
    if not host_checks_allowed(coef) or torch._C._are_functorch_transforms_active():
        return
    values = getattr(Coefficients(coef), column)
    if bool(values.any()):  # NaN counts as different from 0
        if bool(values.isnan().any()):
            raise UserError(f"coef must have no NaN, and its column {column} has")
        row = int(values.nonzero()[0])
        raise UserError(f"{name} is needed: row {row} of coef has {column} different from 0")


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: torch.Size, autocast: bool) -> None:
    if tensor.shape != shape:
        raise UserError(f"{name} must have shape {tuple(shape)} to go with x, not {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype and not (autocast and tensor.is_floating_point()):
        raise UserError(f"{name} must have x's dtype {x.dtype}, not {tensor.dtype}")
    if tensor.device != x.device:
        raise UserError(f"{name} must be on x's device {x.device}, not {tensor.device}")
    _check_strided(name, tensor)
    if tensor.is_contiguous() and x.is_contiguous():
        return
    if not (ops.is_channels_last(tensor) and ops.is_channels_last(x)):
        _check_layout(name, tensor)
        last = "channels_last" if x.dim() == 4 else "channels_last_3d"
        how = "" if x.is_contiguous() else f"memory_format=torch.{last}"
        raise UserError(
            f"{name} and x must share one memory layout, contiguous or channels_last: strides are "
            f"{tensor.stride()} and {x.stride()}; pass {name}.contiguous({how})"
        )


def _check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise UserError(f"{name} must be a plain dense tensor, not {tensor.layout}: pass {name}.to_dense()")


def _check_layout(name: str, tensor: Tensor) -> None:
    _check_strided(name, tensor)
    if not (tensor.is_contiguous() or ops.is_channels_last(tensor)):
        raise UserError(
            f"{name} must be contiguous or channels_last, its strides are {tensor.stride()}: call .contiguous() first"
        )


def refuse_mixed(call: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors of another dtype in a call that autocast does not cast; :func:`check` let them pass for it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != x.dtype:
            raise UserError(
                f"{name} must have x's dtype {x.dtype} in {call}, not {tensor.dtype}: autocast casts the arguments "
                f"of the losses alone, so call {name}.to(x.dtype)"
            )


def guidance_inputs(teacher_uncond: Tensor | None, guidance: float | Tensor, coef: Tensor) -> Guidance:
    """The operators' arguments for a guided teacher: its unconditional output and the scale ``(R,)``, or neither."""
    if teacher_uncond is None and isinstance(guidance, float) and guidance == 1.0:
        return None, None
    if not isinstance(guidance, Tensor):
        if not is_number(guidance):
            raise UserError(f"guidance must be a number or a tensor of one number a row, not {type_name(guidance)}")
        if teacher_uncond is None:
            if guidance != 1.0:
                raise UserError(f"teacher_uncond must be given with a guidance of {guidance:g}")
            return None, None
        if not math.isfinite(guidance):
            raise UserError(f"guidance must be finite, got {guidance}")
        return teacher_uncond, coef.new_full((coef.shape[0],), float(guidance))
    if teacher_uncond is None:
        raise UserError("teacher_uncond must be given with a guidance")
    if guidance.shape != coef.shape[:1] or guidance.dtype != coef.dtype or guidance.device != coef.device:
        raise UserError(
            f"guidance must be a number or have shape ({coef.shape[0]},), dtype {coef.dtype} and device {coef.device}, "
            f"not {tuple(guidance.shape)}, {guidance.dtype} and {guidance.device}"
        )
    refuse_gradients("a fused call", guidance=guidance)
    return teacher_uncond, guidance.contiguous()


def check_objective(objective: Objective) -> None:
    """Refuse what is no objective."""
    if not isinstance(objective, Objective):
        raise UserError(
            f"objective must be an Objective such as objectives.RealUID(0.92, 0.94), not {type_name(objective)}"
        )


def check_match(objective: Objective, path: Path, match: str) -> None:
    """Refuse a match space in which an objective's loss of the generator is another than its formula."""
    if (objective.sample_scale or not objective.needs_fake) and match != "x0":
        raise UserError(
            f"match must be x0 for {objective.name}, not {match}: it compares a sample with the teacher's prediction "
            'of it. Give match="x0", path.match=x0 in a configuration'
        )
    if objective.flows == "x" and not path.target_has_x(match):
        raise UserError(
            f"match must not be {match} for {objective.name} on the path {type(path).__name__}: its gradient flows "
            "through the sample in the target alone, and that target does not depend on it. Give "
            'match="x0", path.match=x0 in a configuration'
        )


def fake_arguments(
    fake_out: Tensor,
    x: Tensor,
    x_t: Tensor | None,
    coef: Tensor,
    noise: Tensor,
    objective: Objective,
    n_real: int,
    teacher_out: Tensor | None,
    endpoint: Tensor | None,
    noise_rows: int | None,
    teacher_uncond: Tensor | None,
    guidance: float | Tensor,
) -> tuple[object, ...]:
    """The fake operator's arguments up to the switches, checked."""
    check_objective(objective)
    check_tensor("fake_out", fake_out)
    check_whole("n_real", n_real)
    noise_rows = check(
        x,
        coef,
        noise,
        noise_rows,
        endpoint=endpoint,
        fake_out=fake_out,
        x_t=x_t,
        teacher_out=teacher_out,
        teacher_uncond=teacher_uncond,
    )
    guided = guidance_inputs(teacher_uncond, guidance, coef)
    if not objective.needs_fake:
        raise UserError(f"{objective.name} has no fake model, and so no loss for one")
    rows = x.shape[0]
    if not 0 <= n_real <= rows or (n_real == rows and rows > 0):
        raise UserError(f"n_real must leave at least one generated row: got {n_real} of {rows} rows")
    if n_real and not objective.needs_real:
        raise UserError(f"n_real must be 0 for {objective.name} with alpha = 1: real data plays no part in it")
    if not n_real and rows and objective.needs_real:
        raise UserError(
            f"n_real must not be 0 for {objective.name} with alpha = {objective.alpha:g}: its fake loss needs real rows"
        )
    if teacher_out is None and objective.needs_teacher:
        raise UserError(
            f"teacher_out must be given for {objective.name} with gamma kappa = {objective.gamma * objective.kappa:g} "
            f"and alpha = {objective.alpha:g}"
        )
    if not objective.needs_teacher:
        teacher_out, guided = None, (None, None)
    halves = (*objective.generated, *objective.real)
    return fake_out, x, x_t, coef, noise, teacher_out, endpoint, *guided, noise_rows, n_real, *halves
