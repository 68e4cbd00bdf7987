"""Refusals of an optimiser's settings, of a saved state that does not fit, and of parameters that have moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import host_checks_allowed
from ..errors import UserError
from .flat import is_sharded, local


def check_setting(name: str, value: Any, words: str, fits: Callable[[float], bool]) -> None:
    """Refuse a setting that is not a number, or of which ``fits`` is not true; ``words`` say what it must be."""
    try:
        good = not isinstance(value, (str, bytes, bool)) and fits(float(value))
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise UserError(f"{name} must {words}, got {value!r:.60}")


def check_decays(decays: Any) -> None:
    """Refuse averages' decays that are not different numbers in (0, 1)."""
    if not isinstance(decays, (tuple, list)):
        raise UserError(f"ema_decays must be a tuple or a list of numbers in (0, 1), got {decays!r:.60}")
    for decay in decays:
        check_setting("ema_decays", decay, "be different numbers in (0, 1)", lambda d: 0 < d < 1)
    if len(set(decays)) != len(decays):
        raise UserError(f"ema_decays must be different numbers in (0, 1), got {list(decays)}")


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse a group of parameters with a setting outside its range. A tensor of rates on a GPU is not read."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        device = group["params"][0].device if group["params"] else lr.device
        if lr.device != device or lr.dtype not in (torch.float32, torch.float64):
            raise UserError(f"lr as a tensor must be float32 or float64 on {device}, got {lr.dtype} on {lr.device}")
        if not lr.numel() or not lr.is_contiguous():
            raise UserError(f"lr as a tensor must be contiguous with at least one element, got shape {tuple(lr.shape)}")
        if host_checks_allowed(lr) and not bool((torch.isfinite(lr) & (lr >= 0)).all()):
            raise UserError("lr as a tensor must hold finite numbers from 0 on")
    else:
        check_setting("lr", lr, "be a finite number that is not negative", lambda rate: 0 <= rate < math.inf)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise UserError(f"betas must be two numbers in [0, 1), got {betas!r:.60}")
    for beta in betas:
        check_setting("betas", beta, "be two numbers in [0, 1)", lambda beta: 0 <= beta < 1)
    check_setting("eps", group["eps"], "be a positive number", lambda eps: 0 < eps < math.inf)
    decay = group["weight_decay"]
    check_setting("weight_decay", decay, "be a finite number that is not negative", lambda rate: 0 <= rate < math.inf)


def check_state(state: Mapping[str, Any], params: Sequence[Tensor], averages: int) -> None:
    """Refuse a saved state that does not fit the parameters, before anything of it is taken."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise UserError(
            "state_dict must be the state of a FusedAdam or a torch.optim.Adam, with state and param_groups"
        )
    for group in state["param_groups"]:
        for name in ("amsgrad", "decoupled_weight_decay"):
            if group.get(name):
                raise UserError(f"state_dict was made with {name}, which FusedAdam does not have")
        if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]:
            raise UserError(f"state_dict has no {missing[0]} in its param_groups: it is of another optimiser")
    for values in state["state"].values():
        if "ema" in values and len(values["ema"]) != averages:
            raise UserError(f"state_dict has {len(values['ema'])} averages, this has {averages}")
    keys = [key for group in state["param_groups"] for key in group["params"]]
    # torch refuses groups of other sizes.
    for index, (p, key) in enumerate(zip(params, keys, strict=False)):
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            if (value := state["state"].get(key, {}).get(name)) is None:
                continue
            shape = (averages, *p.shape) if name == "ema" else tuple(p.shape)
            if tuple(value.shape) != shape:
                raise UserError(
                    f"state_dict has {name} of shape {tuple(value.shape)} for the parameter {index}, not {shape}: "
                    "it is of another network"
                )
            if is_sharded(p) and not is_sharded(value):
                raise UserError(f"state_dict holds a whole {name}, the parameters are sharded")


def check_unmoved(params: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
    """Refuse parameters whose type, device or layout is no longer that of their ``moments``."""
    for index, (p, moment) in enumerate(zip(map(local, params), moments, strict=True)):
        for what, now, then in (
            ("type", p.dtype, moment.dtype),
            ("device", p.device, moment.device),
            ("shape", tuple(p.shape), tuple(moment.shape)),
            ("layout in memory", p.stride(), moment.stride()),
        ):
            if now != then:
                raise UserError(
                    f"the parameter {index} has changed its {what} since the optimiser was built, from {then} to "
                    f"{now}: build the optimiser after the network is moved, cast or laid out, and load its old state"
                ) from None
