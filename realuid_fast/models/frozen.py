"""A copy of a network that shares its memory and takes no gradient: :func:`frozen_view`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError


def frozen_view(net: nn.Module, state: Mapping[str, Tensor] | Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """A copy of ``net`` that shares the memory of its parameters, or of other tensors, without gradients for them.

    It is made once: later in-place updates of that memory show in it, and a training step switches no flag. So
    ``frozen_view(fake)`` is the fake model of the generator's turn, and ``frozen_view(student, optimiser.averages(d))``
    is the student at its moving average.

    Args:
        net: any module. The copy is in its mode, training or evaluation.
        state: the tensors in the place of the parameters: all of them by name, or by parameter as
            :meth:`realuid_fast.optim.FusedAdam.averages` gives them; a parameter without one keeps its own.

    Raises:
        UserError: ``state`` holds tensors of none of the network's parameters, lacks a name, or has a tensor of
            another shape.
    """
    own = net.state_dict(keep_vars=True)
    given: Mapping[Any, Tensor] = own if state is None else state
    by_name = all(isinstance(key, str) for key in given)
    if not by_name and not any(tensor in given for tensor in own.values()):
        raise UserError("state must hold tensors of this network's parameters: these are another network's")
    shared = given if by_name else {name: given.get(tensor, tensor) for name, tensor in own.items()}
    # The tensors replaced below are not copied first: a network's memory is not taken twice, not even for a moment.
    view = copy.deepcopy(net, {id(tensor): tensor for tensor in own.values()})
    for prefix, module in view.named_modules():
        if isinstance(module, nn.Dropout) and module.p == 0:
            # It drops nothing in either mode. In this one torch.compile has the same code for the view as for a copy in
            # evaluation.
            module.training = False
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                key = f"{prefix}.{name}" if prefix else name
                tensor = shared.get(key)
                if tensor is None or tensor.shape != parameter.shape:
                    found = "nothing" if tensor is None else f"a tensor {tuple(tensor.shape)}"
                    raise UserError(f"state has {found} for the parameter {key} of shape {tuple(parameter.shape)}")
                module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        for name in list(module._buffers):
            if (key := f"{prefix}.{name}" if prefix else name) in shared:
                module._buffers[name] = shared[key].detach()
    return view
