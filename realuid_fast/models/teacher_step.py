"""Moment matching in parameter space: the teacher after an infinitesimal step of its weights is the fake model.

The step goes down the teacher's own loss on generated samples ``x~``. Its effect on the prediction at other samples is
the teacher's Jacobian ``J`` in its weights times the step::

    nu = mean of d/dtheta w(s) ||f*(z_s) - x~||^2        on one batch
    f(z_s) = f*(z_s) - J(z_s) Lambda nu                  on another one

``Lambda = 1 / (sqrt(v) + eps)`` is Adam's, with ``v`` the second moments of the same gradient on real data. At the
teacher's optimum the mean of that gradient on real data is zero, and the generator's ``w <x~, f - f*>`` descends
``||E nu||^2_Lambda / 4``: the batches are independent, so the product of their gradients has no bias. Source: Salimans
et al., Multistep Distillation of Diffusion Models via Moment Matching (2406.04103), its form in parameter space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import backends
from ..networks.calling import takes_endpoint
from ..optim import Optimiser


class TeacherStep(nn.Module):
    """``net`` where gradients are enabled, and where they are not ``net`` after the step :attr:`direction`.

    Args:
        net: a copy of the teacher, whose parameters require gradients and never change.

    Attributes:
        direction: the step of each parameter by name, empty before the first one. The output after it is that of
            ``net`` and its directional derivative, which is exact.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.direction = net, dict[str, Tensor]()
        # Callers read these two attributes to learn the arguments that the network takes.
        self.num_classes, self.endpoint = getattr(net, "num_classes", None), takes_endpoint(net)

    def forward(self, *seen: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() or not self.direction:
            out: Tensor = self.net(*seen)
            return out
        # The package's layers and fused attention have no second derivative: both run as plain torch here.
        with torch.enable_grad(), backends.backend("torch"), sdpa_kernel(SDPBackend.MATH):
            out = self.net(*seen)
            # J^T u is linear in u, so the gradient in u of <J^T u, direction> is J times the direction, for any u.
            u = torch.zeros_like(out, requires_grad=True)
            names, parameters = zip(*self.net.named_parameters(), strict=True)
            products = torch.autograd.grad(out, parameters, u, create_graph=True, allow_unused=True)
            used = [(p, self.direction[n]) for n, p in zip(names, products, strict=True) if p is not None]
            (moved,) = torch.autograd.grad([p for p, _ in used], u, [d for _, d in used])
        return (out + moved).detach()


class StepDirection(Optimiser):
    """The optimiser of a :class:`TeacherStep`: :meth:`step` sets its direction, ``-Lambda`` times the gradient.

    The second moments are kept where Adam's are, and are saved and loaded with them.
    """

    def __init__(self, net: TeacherStep) -> None:
        super().__init__(net, lr=1.0, clip=0.0)
        self._net, self._unmeasured = net, lambda: None

    @torch.no_grad()
    def step(self) -> None:
        """Set the direction; no parameter moves."""
        self._unmeasured()
        grads = self._gradients()
        self.adam.norm = torch.nn.utils.get_total_norm(grads.values())
        self.adam.counts[0] += 1
        state, eps = self.adam.state, self.adam.param_groups[0]["eps"]
        scales = {p: state[p]["exp_avg_sq"].sqrt() + eps for p in grads}
        self._net.direction = {
            name: -grads[p] / scales[p] if p in grads else torch.zeros_like(p)
            for name, p in self._net.net.named_parameters()
        }

    def measure_first(self, backward: Callable[[], Any], count: int, parts: int = 1) -> None:
        """Have the first :meth:`step` set the second moments, unless they were loaded by then.

        They are the mean square of ``count`` gradients, of ``parts`` calls of ``backward`` each.
        """

        def measure() -> None:
            self._unmeasured = lambda: None
            if self.adam.counts[0]:
                return
            own = [(p, p.grad) for p in self._net.parameters()]
            for _ in range(count):
                for p, _ in own:
                    p.grad = None
                with torch.enable_grad():
                    for _ in range(parts):
                        backward()
                for p, grad in self._gradients().items():
                    self.adam.state[p]["exp_avg_sq"].addcmul_(grad, grad, value=1 / count)
            for p, before in own:
                p.grad = before

        self._unmeasured = measure

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """The gradients that are there, their mean over ranks and passes."""
        trained = [p for p in self._net.parameters() if p.grad is not None]
        if self.adam.reduce is not None:
            self.adam.reduce([p.grad for p in trained if p.grad is not None])
        return {p: p.grad for p in trained if p.grad is not None}
