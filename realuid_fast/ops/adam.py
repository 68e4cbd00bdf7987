"""The optimiser step's operators: a pass over the gradients, then a pass over everything.

``counts`` is (updates, skipped updates).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import reference
from .operator import Operator


def _shapes_begin_step_(grads: Sequence[Tensor], *_: Any) -> Tensor:
    return grads[0].new_empty(())


def _shapes_adam_(*_: Any) -> None:
    return None


OPERATORS = (
    Operator(
        "begin_step_(Tensor[] grads, Tensor(a!)[] steps, Tensor(b!) counts) -> Tensor",
        reference.begin_step_,
        _shapes_begin_step_,
    ),
    Operator(
        "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
        "emas, Tensor norm, Tensor step, Tensor lr, Tensor counts, Tensor ema_decays, float clip, float beta1, float "
        "beta2, float eps, float weight_decay, bool maximize, bool ema_warmup) -> ()",
        reference.adam_,
        _shapes_adam_,
    ),
)
