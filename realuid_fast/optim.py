"""One optimiser step: global-norm clip, Adam, learning-rate schedule, and every moving average of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

DECAYS = ("constant", "cosine", "linear")


class Optimiser:
    """Adam on the parameters of ``net`` with clip, schedule and moving averages; nothing in it waits for the device.

    One :meth:`step` does, with ``g`` all gradients as one vector and ``n`` the number of steps taken so far::

        g <- g min(1, clip / ||g||)                     clip to a global norm; clip = 0 leaves g alone
        lr_n = lr min(1, (n + 1) / warmup) fall(n / total)
        parameters <- Adam(lr_n, betas, eps)            Kingma and Ba, 2015 (1412.6980), algorithm 1
        ema_d <- ema_d + (1 - d_n) (parameters - ema_d),  d_n = min(d, (1 + n) / (10 + n))

    ``fall(u)`` is ``floor + (1 - floor) h(u)`` with ``h`` 1 (constant), ``1 - u`` (linear) or ``(1 + cos(pi u)) / 2``
    (cosine). The averages' decay starts low so that a short run's average is not dominated by its starting point. A
    gradient with a norm that is not finite changes neither parameters nor averages: the step is skipped, counted in
    :attr:`skipped`, and the schedule goes on. Parameters without a gradient stay as they are.

    Args:
        net: its parameters that require gradients are trained; all parameters are averaged, buffers copied.
        lr: peak learning rate, positive.
        betas: Adam's decay rates, in [0, 1).
        clip: largest global gradient norm, 0 for none.
        ema_decays: decays ``d`` in (0, 1), each once.
        warmup: steps of linear warm-up, 0 for none.
        total: steps until the learning rate has fallen to its floor; needed unless ``decay="constant"``.
        decay: ``"constant"``, ``"linear"`` or ``"cosine"``.
        floor: share of ``lr`` that is left at the end, in [0, 1].
        eps: Adam's epsilon.

    Attributes:
        ema: for every decay, a state dict of ``net`` with the averaged parameters.
        norm: the last gradient norm before clipping, a tensor ``()``.
        skipped: steps skipped so far, a float32 tensor ``()``.

    Raises:
        UserError: a setting outside its range.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        clip: float = 1.0,
        ema_decays: Sequence[float] = (),
        warmup: int = 0,
        total: int = 0,
        decay: str = "constant",
        floor: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not lr > 0:
            raise UserError(f"lr must be positive, got {lr:g}")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise UserError(f"betas must be two numbers in [0, 1), got {tuple(betas)}")
        if clip < 0 or warmup < 0 or total < 0:
            raise UserError(f"clip, warmup and total must not be negative, got {clip:g}, {warmup} and {total}")
        if not 0 <= floor <= 1:
            raise UserError(f"floor must lie in [0, 1], got {floor:g}")
        if decay not in DECAYS:
            raise UserError(f"decay must be one of {', '.join(DECAYS)}; got {decay!r}")
        if decay != "constant" and total < 1:
            raise UserError(f"total must be positive for a {decay} decay of the learning rate")
        if len(set(ema_decays)) != len(ema_decays) or not all(0 < d < 1 for d in ema_decays):
            raise UserError(f"ema_decays must be different numbers in (0, 1), got {list(ema_decays)}")
        self.base_lr, self.clip, self.floor = float(lr), float(clip), float(floor)
        self.warmup, self.total, self.decay = warmup, total, decay
        self.steps = 0
        self._params = [p for p in net.parameters() if p.requires_grad]
        if not self._params:
            raise UserError("net has no parameters that require gradients")
        device = self._params[0].device
        self._lr = torch.tensor(self.base_lr, device=device)
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        # The fused loop is the fast one on CPU (foreach: 3 times slower), and the only one that can skip by itself.
        self.adam = torch.optim.Adam(
            self._params, lr=self._lr, betas=(float(betas[0]), float(betas[1])), eps=eps, fused=True
        )
        self._source = {name: tensor.detach() for name, tensor in net.state_dict(keep_vars=True).items()}
        averaged = {name for name, _ in net.named_parameters()}
        self._averaged = [name for name in self._source if name in averaged]
        self._copied = [name for name in self._source if name not in averaged]
        self.ema: dict[float, dict[str, Tensor]] = {
            float(d): {name: tensor.clone() for name, tensor in self._source.items()} for d in ema_decays
        }

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        rate = self.base_lr
        if self.warmup:
            rate *= min(1.0, (self.steps + 1) / self.warmup)
        if self.decay != "constant":
            done = min(self.steps / self.total, 1.0)
            left = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
            rate *= self.floor + (1.0 - self.floor) * left
        return rate

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients, then the averages. Leaves the clipped gradients in place."""
        grads = [p.grad for p in self._params if p.grad is not None]
        if not grads:
            raise UserError("step was called without gradients: run backward first")
        self.norm = torch.nn.utils.get_total_norm(grads)
        bad = torch.isfinite(self.norm).logical_not().to(torch.float32)
        self.skipped += bad
        self._lr.fill_(self.lr)
        # Adam's kernel divides by grad_scale and does nothing where found_inf is 1: clip and skip without a pass or a
        # comparison on the host.
        scale = (self.norm / self.clip).clamp(min=1.0) if self.clip else torch.ones_like(self.norm)
        self.adam.grad_scale, self.adam.found_inf = scale.to(torch.float32), bad  # type: ignore[attr-defined]
        self.adam.step()
        source = [self._source[name] for name in self._averaged]
        for d, average in self.ema.items():
            rate = (1.0 - bad) * (1.0 - min(d, (1 + self.steps) / (10 + self.steps)))
            torch._foreach_lerp_([average[name] for name in self._averaged], source, [rate] * len(source))
            for name in self._copied:
                average[name].copy_(self._source[name])
        self.steps += 1

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward writes instead of adding."""
        for p in self._params:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Adam's own state dict, step count and averages: tensors and plain values only."""
        return {"adam": self.adam.state_dict(), "steps": self.steps, "skipped": self.skipped, "ema": self.ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises :class:`UserError` when the averages' decays differ."""
        if set(state["ema"]) != set(self.ema):
            raise UserError(f"ema_decays are {sorted(self.ema)}, the saved state has {sorted(state['ema'])}")
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:
            # Loading replaced the tensor that step() writes the rate into.
            group["lr"] = self._lr
        self.steps = int(state["steps"])
        self.skipped.copy_(state["skipped"])
        for d, average in self.ema.items():
            for name, tensor in average.items():
                tensor.copy_(state["ema"][d][name])
