"""Adam with a learning-rate schedule that lies on the device, and averages of a network by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adam import FusedAdam
from .checks import check_setting
from .flat import is_sharded, local, spread

DECAYS = ("constant", "cosine", "linear")


class Optimiser:
    """:class:`FusedAdam` on the parameters of ``net`` with a learning-rate schedule and averages by name.

    One :meth:`step` does, with ``g`` all gradients as one vector and ``n`` the number of steps so far::

        g <- g min(1, clip / ||g||)                     clip to a global norm; clip = 0 leaves g alone
        lr_n = lr min(1, (n + 1) / warmup) fall(n / total)      warmup_from_zero: n in place of n + 1
        parameters <- Adam(lr_n, betas, eps)            Kingma and Ba, 2015 (1412.6980), algorithm 1
        ema_d <- ema_d + (1 - d_n) (parameters - ema_d),  d_n = min(d, (1 + n) / (10 + n))

    ``fall(u)`` is ``floor + (1 - floor) h(u)`` with ``h`` 1 (constant), ``1 - u`` (linear) or ``(1 + cos(pi u)) / 2``
    (cosine). The averages' decay starts low so that a short run's average is not dominated by its starting point. A
    gradient with a norm that is not finite changes neither parameters nor averages: the step is skipped, counted in
    :attr:`skipped`, and the schedule goes on. Parameters without a gradient stay as they are.

    The schedule is a table on the device, one float64 for each of its steps, and the step count is there too: no rate
    is computed or sent while training, and a replayed CUDA graph of :meth:`step` advances through it.

    On a GPU the parameters are laid into one buffer (:class:`FlatParameters`): make frozen views of ``net`` afterwards.

    Args:
        net: the network. Its parameters that require gradients are trained and averaged; its other parameters and its
            buffers are copied into every average.
        lr: peak learning rate, positive.
        betas: Adam's decay rates, in [0, 1).
        clip: largest global gradient norm, 0 for none.
        ema_decays: decays ``d`` in (0, 1), each once.
        warmup: steps of linear warm-up, 0 for none.
        total: steps until the learning rate has fallen to its floor; needed unless ``decay="constant"``.
        decay: ``"constant"``, ``"linear"`` or ``"cosine"``.
        floor: share of ``lr`` that is left at the end, in [0, 1].
        eps: Adam's epsilon.
        ema_warmup: ``False`` keeps ``d_n = d`` from the first step on, for a network that does not start untrained.
        warmup_from_zero: the first step has rate zero, also where ``warmup`` is 0; it only begins Adam's moments.

    Attributes:
        adam: the :class:`FusedAdam`.
        ema: for every decay, a state dict of ``net`` with the averaged parameters; of sharded ones, this rank's shares.

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
        ema_warmup: bool = True,
        warmup_from_zero: bool = False,
    ) -> None:
        check_setting("lr", lr, "be a positive number", lambda rate: 0 < rate < math.inf)
        if warmup < 0 or total < 0:
            raise UserError(f"warmup and total must not be negative, got {warmup} and {total}")
        if not 0 <= floor <= 1:
            raise UserError(f"floor must lie in [0, 1], got {floor:g}")
        if decay not in DECAYS:
            raise UserError(f"decay must be one of {', '.join(DECAYS)}; got {decay!r}")
        if decay != "constant" and total < 1:
            raise UserError(f"total must be positive for a {decay} decay of the learning rate")
        params = [p for p in net.parameters() if p.requires_grad]
        if not params:
            raise UserError("net has no parameters that require gradients")
        self._rates = _schedule(float(lr), warmup, total, decay, floor, warmup_from_zero)
        device = params[0].device
        self.adam = FusedAdam(
            params,
            self._rates.to(device, copy=True),
            betas,
            eps,
            clip=clip,
            ema_decays=ema_decays,
            ema_warmup=ema_warmup,
            flat=device.type == "cuda" and not is_sharded(params[0]),
        )
        # Read the state dict only now: Adam may have moved the parameters to their final place.
        tensors = net.state_dict(keep_vars=True)
        trained = set(params)
        self._trained = {name: tensor for name, tensor in tensors.items() if tensor in trained}
        self._copied = [(name, tensor) for name, tensor in tensors.items() if tensor not in trained]
        self.ema: dict[float, dict[str, Tensor]] = {}
        for d in self.adam.ema_decays:
            averages = self.adam.averages(d)
            self.ema[d] = {
                name: averages[tensor] if tensor in trained else tensor.detach().clone()
                for name, tensor in tensors.items()
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, by ``copy.deepcopy`` or pickle: its averages are those that its own Adam moves."""
        self.__dict__.update(state)
        for decay, average in self.ema.items():
            moved = self.adam.averages(decay)
            average.update({name: moved[p] for name, p in self._trained.items()})

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones too; reading it waits for the device."""
        return int(self.adam.counts[0])

    @steps.setter
    def steps(self, value: int) -> None:
        self.adam.counts[0] = value

    @property
    def lr(self) -> float:
        """Learning rate of the next step; reading it waits for the device."""
        return float(self._rates[min(self.steps, len(self._rates) - 1)])

    @property
    def norm(self) -> Tensor:
        """The last gradient norm before clipping, a tensor ``()``."""
        return self.adam.norm

    @property
    def skipped(self) -> Tensor:
        """Steps skipped so far, an int64 tensor ``()``."""
        return self.adam.skipped

    @property
    def progress(self) -> Tensor:
        """Float64 ``(3,)``, made on the device: steps so far, skipped steps among them, and the next step's rate."""
        rates = self.adam.param_groups[0]["lr"]
        following = self.adam.counts[:1].clamp(max=len(rates) - 1)
        return torch.cat([self.adam.counts.double(), rates.index_select(0, following).double()])

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients, then the averages. Leaves the gradients as they are."""
        self.adam.step()
        if self._copied:
            sources = [source for _, source in self._copied]
            for average in self.ema.values():
                torch._foreach_copy_([average[name] for name, _ in self._copied], sources)

    @torch.no_grad()
    def scale_grads(self, factor: float) -> None:
        """Multiply all gradients by a number."""
        if self.adam.settle is not None:
            self.adam.settle()
        grads = [local(p.grad) for group in self.adam.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(grads, factor)

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward writes instead of adding."""
        self.adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Adam's own state dict, step count and averages: tensors and plain values only."""
        adam = self.adam.state_dict()
        # Leave the averages out of Adam's state: they are saved under "ema", by name.
        adam["state"] = {k: {n: v for n, v in s.items() if n != "ema"} for k, s in adam["state"].items()}
        ema = {
            d: {name: spread(value, self._trained.get(name, value)) for name, value in average.items()}
            for d, average in self.ema.items()
        }
        return {"adam": adam, "steps": self.steps, "skipped": self.skipped, "ema": ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises :class:`UserError` when the averages' decays differ."""
        if set(state["ema"]) != set(self.ema):
            raise UserError(f"ema_decays are {sorted(self.ema)}, the saved state has {sorted(state['ema'])}")
        self.adam.load_state_dict(state["adam"])
        # Keep this run's schedule, even if it is a single rate, which loading has replaced.
        self.adam.param_groups[0]["lr"].copy_(self._rates)
        self.adam.counts.copy_(torch.tensor([int(state["steps"]), int(state["skipped"])]))
        for d, average in self.ema.items():
            for name, tensor in average.items():
                tensor.copy_(local(state["ema"][d][name]))


def _schedule(lr: float, warmup: int, total: int, decay: str, floor: float, from_zero: bool = False) -> Tensor:
    """Learning rates of steps 0, 1, ... up to the first one that stays the same ever after, float64."""
    falls, warmup = decay != "constant", max(warmup, 1)
    n = torch.arange(max(warmup + from_zero, total + 1 if falls else 1), dtype=torch.float64)
    rate = lr * ((n + (not from_zero)) / warmup).clamp(max=1.0)
    if falls:
        done = (n / total).clamp(max=1.0)
        left = 1.0 - done if decay == "linear" else 0.5 * (1.0 + torch.cos(torch.pi * done))
        rate = rate * (floor + (1.0 - floor) * left)
    return rate
