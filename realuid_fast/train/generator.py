"""The one-step generator: a velocity network called once, from a start time on the linear path."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import UserError
from ..sampling import one_step


class Generator(nn.Module):
    """``G(z) = x + (1 - t0) net(t0, x)`` with ``x = (1 - t0) z``: the path's data prediction at ``t0`` from noise.

    Args:
        net: a velocity network, called as ``net(t, x, y)``.
        t_start: ``t0`` in [0, 1). See :func:`realuid_fast.sampling.one_step` for the choice.
    """

    def __init__(self, net: nn.Module, t_start: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= t_start < 1.0:
            raise UserError(f"t_start must lie in [0, 1), got {t_start}")
        self.net = net
        self.t_start = float(t_start)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples like ``z``, standard normal ``(B, ...)``; ``labels`` ``(B,)`` for a class-conditional network."""
        return one_step(self.net, z, self.t_start, labels)


def frozen_view(net: nn.Module, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of ``net`` on the memory of its own parameters, or of ``state``'s tensors, without gradients for them.

    Made once: later in-place updates of that memory show in it, and no flag is switched inside the training step.
    """
    shared = net.state_dict(keep_vars=True) if state is None else state
    view = copy.deepcopy(net)
    for prefix, module in view.named_modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                tensor = shared[f"{prefix}.{name}" if prefix else name]
                module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        for name in list(module._buffers):
            if (key := f"{prefix}.{name}" if prefix else name) in shared:
                module._buffers[name] = shared[key].detach()
    return view
