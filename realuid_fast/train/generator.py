"""The one-step generator: a network called once, from noise at a start time of its path."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from ..paths import Path
from ..sampling import LINEAR, default_start, starting, step_from


class Generator(nn.Module):
    """``G(z)``, on a two-sided path ``G(y, z)``: the path's data prediction at ``t0`` from noise, see
    :func:`realuid_fast.sampling.one_step`.

    Args:
        net: a network, called as the path says for its prediction; on the linear path as ``net(t, x, y)``.
        t_start: ``t0``; :func:`realuid_fast.sampling.default_start` when None.
        path, predict: what the network was trained on.
    """

    def __init__(
        self, net: nn.Module, t_start: float | None = None, path: Path = LINEAR, predict: str = "velocity"
    ) -> None:
        super().__init__()
        self.net, self.path = net, path
        self.t_start = float(default_start(path) if t_start is None else t_start)
        self._start = starting(path, predict, self.t_start)

    def forward(self, z: Tensor, labels: Tensor | None = None, endpoint: Tensor | None = None) -> Tensor:
        """Samples like ``z``, standard normal ``(B, ...)``; ``labels`` ``(B,)`` for a class-conditional network."""
        return step_from(self._start, self.net, z, labels, self.path, endpoint)


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
