"""Any network of a user's own as a teacher: :func:`wrap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..contracts import check_whole
from ..errors import UserError
from .calls import follows_flow
from .files import Description, Model


class Called(nn.Module):
    """A network of any signature as ``net(t, x, y)``, see :func:`wrap`."""

    def __init__(
        self, net: nn.Module, call: Callable[..., Tensor] | None = None, num_classes: int = 0, null_label: bool = False
    ) -> None:
        super().__init__()
        self.net, self._call = net, call
        self.num_classes = num_classes or None
        self.null_label = num_classes if null_label else None

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(t, x, y) if self._call is None else self._call(self.net, t, x, y)


def wrap(
    net: nn.Module,
    dim: Sequence[int],
    path: str = "linear",
    predict: str = "velocity",
    path_settings: Mapping[str, Any] | None = None,
    call: Callable[..., Tensor] | None = None,
    num_classes: int = 0,
    null_label: bool = False,
    preprocessing: str = "",
    teacher: Callable[..., Tensor] | None = None,
) -> Model:
    """Any network of yours as a teacher that :class:`realuid_fast.train.distill.Distiller` takes.

    Its student is saved like every other; :func:`load` fills ``wrap(...).net`` with it, given as ``net``.

    Args:
        net: the network; student and fake model start from copies of it.
        dim: shape of one sample, such as ``(3, 32, 32)``.
        path, path_settings: the path that it was trained on, as :func:`realuid_fast.paths.build` takes them.
        predict: its prediction, one of :data:`realuid_fast.paths.PREDICTIONS`.
        call: ``call(net, t, x, y)`` for a network of another signature: ``t`` ``(B,)`` as
            :meth:`realuid_fast.paths.Path.network_time` gives it, ``x`` ``(B, *dim)``, ``y`` ``(B,)`` int64 labels or
            None; it returns the prediction, shaped like ``x``. By default the network is called as ``net(t, x, y)``.
        num_classes, null_label: the number of labels, and whether the network knows the one after them as "no label".
        preprocessing: a description of its samples, in words.
        teacher: ``teacher(t, x, y)``, any function to use as the teacher in place of ``net``. Student and fake model
            still start from ``net``. If an objective's gradient flows through the teacher, autograd must go through it.

    Raises:
        UserError: ``net`` is not a module, or this version does not have the path or the prediction.
    """
    if not isinstance(net, nn.Module):
        raise UserError(f"net must be a torch.nn.Module, whose weights a student can start from, not {net!r:.60}")
    for name, function in {"call": call, "teacher": teacher}.items():
        if function is not None and not callable(function):
            raise UserError(f"{name} must be a function, not {function!r:.60}")
    if not isinstance(dim, (tuple, list)):
        raise UserError(f"dim must be the shape of one sample, such as (3, 32, 32), not {dim!r:.60}")
    for size in dim:
        check_whole("dim", size)
    check_whole("num_classes", num_classes)
    if null_label and not num_classes:
        raise UserError("null_label needs num_classes")
    description = Description(
        network={"kind": "yours", "dim": [int(v) for v in dim]},
        path=path,
        path_settings=dict(path_settings or {}),
        predict=predict,
        preprocessing=preprocessing,
    )
    follows_flow(description.interpolant(), predict)
    function = None
    if teacher is not None:
        # Wrapped in a module, so that it is called, asked for its labels and compiled like a network.
        asked = teacher
        function = Called(nn.Identity(), lambda _, t, x, y: asked(t, x, y), num_classes, null_label).eval()
    return Model(Called(net, call, num_classes, null_label).eval(), description, function)
