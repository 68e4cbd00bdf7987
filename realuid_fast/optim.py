"""One optimiser step in two passes: the global norm, then clip, Adam and every moving average of the parameters.

The first pass reads the gradients, the second reads and writes each parameter, its moments and its averages once.
Nothing waits for the device: clip, bias correction, learning rate and the averages' decays come from counters that live
there, so a replayed CUDA graph of a step goes on where the last one ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops, reference
from .errors import UserError

DECAYS = ("constant", "cosine", "linear")
# Tensors begin at multiples of this many elements: vectors of every width are aligned, on every device.
ALIGN = 64


class FlatParameters:
    """Moves parameters into one buffer. Each parameter becomes a view of it, with the shape and the strides it had.

    One kernel launch can then update all of them. Views of the parameters' old memory (a ``frozen_view``, a state dict)
    do not follow, so make them afterwards. ``net.to(...)`` and ``copy.deepcopy`` take parameters out of the buffer
    again.

    Gradients stay in autograd's own buffers at first: autograd hands those over without a copy as long as ``p.grad`` is
    None, and :meth:`gather` copies them together with a few launches. Accumulating into views from the start would cost
    a launch for every parameter and twice the memory traffic. If gradients are accumulated anyhow, :meth:`attach` makes
    the views.

    Args:
        params: parameters of one dtype and device, each without gaps in memory.

    Attributes:
        data: ``(N,)``, the parameters in order, each padded with zeros to a multiple of 64 elements.
        grad: ``(N,)``, the gradients likewise.

    Raises:
        UserError: a parameter of another dtype or device, or one with gaps in memory.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)
        _check(self.params)
        self._offsets, self._size = [], 0
        for p in self.params:
            self._offsets.append(self._size)
            self._size += _padded(p.numel())
        self.data, self.grad = self.buffer(), self.buffer()
        self._views, self._grads = self.views(self.data), self.views(self.grad)
        for p, view in zip(self.params, self._views, strict=True):
            p.data = view.copy_(p.detach())

    def buffer(self, rows: int | None = None) -> Tensor:
        """Zeros ``(N,)``, or ``(rows, N)``, with a place for every parameter, for instance for its moments."""
        first = self.params[0]
        shape = (self._size,) if rows is None else (rows, self._size)
        return torch.zeros(shape, dtype=first.dtype, device=first.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Every parameter's view of a :meth:`buffer`, laid out like the parameter; ``(rows, ...)`` of one with rows."""
        lead, strides = buffer.shape[:-1], buffer.stride()[:-1]
        return [
            buffer.as_strided((*lead, *p.shape), (*strides, *p.stride()), offset)
            for p, offset in zip(self.params, self._offsets, strict=True)
        ]

    def attach(self, part: slice = slice(None)) -> None:
        """Make every ``p.grad`` a view of :attr:`grad`, for backward to add to; clear it with ``set_to_none=False``.

        ``part`` is a slice of the list of parameters.
        """
        for p, view in zip(self.params[part], self._grads[part], strict=True):
            p.grad = view

    def gradients(self, part: slice) -> Tensor:
        """The stretch of :attr:`grad` that belongs to the parameters of ``part``, a slice of their list."""
        first, end, _ = part.indices(len(self.params))
        return self.grad[self._offsets[first] : self._offsets[end] if end < len(self.params) else self._size]

    def gather(self, part: slice = slice(None)) -> bool:
        """Copy all gradients into :attr:`grad`. Returns False, and copies nothing, if a parameter has no gradient.

        ``part`` is a slice of the list of parameters, as for :meth:`attach`.

        Raises:
            UserError: a parameter has left the buffer.
        """
        strays: list[Tensor] = []
        homes: list[Tensor] = []
        for p, view, home in zip(self.params[part], self._views[part], self._grads[part], strict=True):
            if p.data_ptr() != view.data_ptr():
                raise UserError("a parameter has left its flat buffer: it was moved or cast after it was laid there")
            if p.grad is None:
                return False
            _check_dense(p.grad)
            if p.grad.data_ptr() != home.data_ptr():
                strays.append(p.grad)
                homes.append(home)
        if strays:
            torch._foreach_copy_(homes, strays)
        return True


class _Update(NamedTuple):
    """The tensors that one call of the operator updates: parameters that have taken the same number of steps."""

    step: Tensor
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]


class FusedAdam(torch.optim.Optimizer):
    """``torch.optim.Adam`` with the clip to a global norm and moving averages of the parameters in the same pass.

    One :meth:`step`, with ``g`` all gradients of all groups as one vector, ``n`` earlier calls and ``s`` those of them
    that took a step::

        g <- +-g min(1, clip / ||g||) + weight_decay p      - to maximise; clip = 0 for none; L2, as in torch.optim.Adam
        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        p <- p - lr m / (1 - beta1^(s+1)) / (sqrt(v / (1 - beta2^(s+1))) + eps)     Kingma and Ba, 2015 (1412.6980)
        ema_d <- ema_d + (1 - d_n) (p - ema_d),   d_n = d, or min(d, (1 + n) / (10 + n)) with ema_warmup

    With ``beta1 = 0`` there is no ``m``. Where the norm is not finite nothing changes but the count in :attr:`skipped`.
    Parameters without a gradient only have their averages moved. The gradients stay as they are.

    Parameters may be sharded by FSDP2 (``fully_shard``, DTensors on a mesh of one dimension). Every rank then updates
    its own share, which is exact because everything but the norm is elementwise. The norm is that of all shares, by one
    all-reduce of a number, so all ranks clip and skip alike. The state, except the counts, is this rank's share, and
    :meth:`state_dict` gives it as DTensors.

    ``copy.deepcopy`` and pickle work as on ``torch.optim.Adam``: the copy owns copies of the parameters (those of a
    network that is copied in the same call), state and settings, and its next step gives the same numbers. Hooks,
    ``reduce`` and ``settle`` belong to the original's owner and are not copied; flat storage is laid anew. To a file
    use ``torch.save``: plain pickle writes the whole buffer of flat storage once for every parameter in it.

    torch's learning-rate schedulers work on it. A learning rate given as a number is written to the device when it
    changes; for a captured graph give it as a tensor, which schedulers fill in place, or as a schedule.

    Args:
        params: parameters or groups of them, as torch's optimisers take them; float32 or float64, all alike. ``lr``,
            ``betas``, ``eps``, ``weight_decay`` and ``maximize`` may differ between groups.
        lr: learning rate, from 0 on. A tensor of several elements, float32 or float64 on the parameters' device, is a
            schedule: call ``n`` uses element ``n``, and the last one ever after.
        betas: decay rates of the moments, in [0, 1).
        eps: positive.
        weight_decay: from 0 on.
        maximize: ascend instead.
        clip: largest global gradient norm, 0 for none.
        ema_decays: decays ``d`` in (0, 1), each once.
        ema_warmup: let the averages' decay start low, so that a short run's average is not dominated by its start.
        flat: lay every group's parameters into a :class:`FlatParameters`, which is what makes the step three launches
            on GPU. Without it, GPUs run torch's foreach functions. CPUs gain nothing. Not for sharded parameters.
        amsgrad: must be False; it is here to refuse the variant of Adam that this class does not have.

    Attributes:
        norm: the last gradient norm before clipping, ``()``.
        counts: int64 ``(2,)`` on the device: calls of :meth:`step`, and those skipped.
        flat_storage: every group's :class:`FlatParameters`, or None.
        reduce: None, or a function that :meth:`step` calls with all gradients before it reads them. It may change or
            replace them, for instance by their mean over ranks.
        settle: None, or a function that is called before gradients are changed otherwise. It must finish any work on
            them that the owner of ``reduce`` has begun in the background.

    Raises:
        UserError: a setting outside its range, or parameters that are not alike.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        clip: float = 0.0,
        ema_decays: Sequence[float] = (),
        ema_warmup: bool = False,
        flat: bool = False,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise UserError("amsgrad must be False: FusedAdam keeps no maximum of the second moments")
        if not clip >= 0:
            raise UserError(f"clip must not be negative, got {clip:g}")
        if len(set(ema_decays)) != len(ema_decays) or not all(0 < d < 1 for d in ema_decays):
            raise UserError(f"ema_decays must be different numbers in (0, 1), got {list(ema_decays)}")
        self.clip, self.ema_decays, self.ema_warmup = float(clip), tuple(map(float, ema_decays)), ema_warmup
        self._lay_flat = flat
        self._reset()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        first = self._parameters()[0]
        self.counts = torch.zeros(2, dtype=torch.int64, device=first.device)
        self._own_counts = torch.zeros_like(self.counts)
        self.norm = torch.zeros((), dtype=first.dtype, device=first.device)
        self._decays = torch.tensor(self.ema_decays, dtype=torch.float64, device=first.device)

    def _reset(self) -> None:
        """Set what a copy does not take from its original: hooks, and the memory of each group, to be laid out anew."""
        self.flat_storage: list[FlatParameters | None] = []
        self.reduce: Callable[[Sequence[Tensor]], None] | None = None
        self.settle: Callable[[], None] | None = None
        self._buffers: list[dict[str, Tensor]] = []
        self._rates: list[Tensor] = []
        self._written: list[float] = []

    def __getstate__(self) -> dict[str, Any]:
        names = ("clip", "ema_decays", "ema_warmup", "_lay_flat", "counts", "_own_counts", "norm", "_decays")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "counts" not in state:
            # torch's load_state_dict ends here with state and groups alone: hooks and memory stay this optimiser's.
            return
        self._reset()
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            self._lay_out(params)
            if self.flat_storage[index] is None:
                continue
            # The copied tensors lie apart in memory. Bring each kind of state back into one buffer.
            for name in ("exp_avg", "exp_avg_sq", "ema"):
                if name in self.state[params[0]]:
                    rows = len(self.ema_decays) if name == "ema" else None
                    for p, home in zip(params, self._room(name, index, rows), strict=True):
                        self.state[p][name] = home.copy_(self.state[p][name])

    @property
    def skipped(self) -> Tensor:
        """Steps skipped so far, an int64 tensor ``()``."""
        return self.counts[1]

    def averages(self, decay: float) -> dict[Tensor, Tensor]:
        """Every parameter's moving average with ``decay``: the memory itself, laid out like the parameter.

        For a sharded parameter it is this rank's share. ``rf.frozen_view(net, optimiser.averages(decay))`` is the
        network with them.
        """
        if decay not in self.ema_decays:
            raise UserError(f"decay must be one of {list(self.ema_decays)}, got {decay:g}")
        row = self.ema_decays.index(decay)
        return {p: self.state[p]["ema"][row] for p in self._parameters()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does. Its state is made here and keeps its place in memory."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            _check(self._parameters())
            if self._lay_flat and is_sharded(group["params"][0]):
                raise UserError("flat storage is for parameters that a process holds whole, these are sharded")
        except UserError:
            self.param_groups.pop()
            raise
        params = group["params"]
        self._lay_out(params)
        step = torch.zeros((), dtype=torch.float32, device=params[0].device)
        for p in params:
            self.state[p]["step"] = step
        self._make_moments(len(self.param_groups) - 1)
        if self.ema_decays:
            for p, average in zip(params, self._room("ema", -1, len(self.ema_decays)), strict=True):
                self.state[p]["ema"] = average.copy_(_local(p).detach().expand_as(average))

    def _lay_out(self, params: list[nn.Parameter]) -> None:
        """Give a new group its flat storage, if it gets one, and the memory of its learning rate."""
        self.flat_storage.append(FlatParameters(params) if self._lay_flat else None)
        self._buffers.append({})
        # The learning rate on the device. NaN differs from any number, so the first rate will be written to it.
        self._rates.append(torch.full((), float("nan"), dtype=torch.float64, device=params[0].device))
        self._written.append(float("nan"))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters from their gradients, then the averages; the closure's loss, if there is one.

        Raises:
            UserError: no parameter has a gradient, or one has a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # `reduce` may replace gradients, so collect the tensors to update afterwards.
        if self.reduce and (present := [_local(p.grad) for p in self._parameters() if p.grad is not None]):
            self.reduce(present)
        updates = [(i, update) for i in range(len(self.param_groups)) for update in self._updates(i)]
        if not updates:
            raise UserError("step was called without gradients: run backward first")
        gradients = [grad for _, update in updates for grad in update.grads]
        run = ops.current(self.counts.device)
        if is_sharded(first := self._parameters()[0]):
            # All ranks take or skip the step alike, because all decide by one number: the norm of all ranks' gradients.
            squared = run.begin_step_(gradients, [], self._own_counts).double().square()
            dist.all_reduce(squared, group=first.device_mesh.get_group())  # type: ignore[attr-defined]
            gradients = [squared.sqrt().to(self.norm.dtype)[None]]
        self.norm = run.begin_step_(gradients, [update.step for _, update in updates], self.counts)
        for i, update in updates:
            group = self.param_groups[i]
            run.adam_(
                update.params,
                update.grads,
                update.exp_avgs,
                update.exp_avg_sqs,
                update.emas,
                self.norm,
                update.step,
                self._rate(i),
                self.counts,
                self._decays,
                self.clip,
                *map(float, group["betas"]),
                group["eps"],
                group["weight_decay"],
                group["maximize"],
                self.ema_warmup,
            )
            # The operator has overwritten the parameters. Tell autograd, which then refuses a backward pass that needs
            # their old values, as it does after torch's own optimisers.
            torch.autograd.graph.increment_version(update.params)
        idle: list[Tensor] = [p for p in self._parameters() if p.grad is None]
        if idle and self.ema_decays:
            averages = [self.state[p]["ema"] for p in idle]
            reference.average_([*map(_local, idle)], averages, self.norm, self.counts, self._decays, self.ema_warmup)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State as torch's optimisers give it, with ``counts`` beside it.

        Per parameter ``step``, ``exp_avg`` (unless ``beta1 = 0``), ``exp_avg_sq`` and ``ema`` ``(E, ...)``. The
        learning rate is a number; of a schedule it is the next step's. Sharded parameters have DTensors.
        """
        state = super().state_dict()
        params = self._parameters()
        state["state"] = {
            k: {name: value if name == "step" else spread(value, params[k]) for name, value in values.items()}
            for k, values in state["state"].items()
        }
        for group in state["param_groups"]:
            if isinstance(lr := group["lr"], Tensor):
                group["lr"] = float(lr.flatten()[min(int(self.counts[0]), lr.numel() - 1)])
        # Parameters share a counter here; torch's Adam counts each for itself.
        state["state"] = {k: {**values, "step": values["step"].clone()} for k, values in state["state"].items()}
        return {**state, "counts": self.counts}

    def adam_state_dict(self) -> dict[str, Any]:
        """A copy of the state for ``torch.optim.Adam.load_state_dict``, to go on without clip and averages."""
        state = self.state_dict()
        entries = {}
        for k, values in state["state"].items():
            second = values["exp_avg_sq"].clone()
            # torch's Adam with beta1 = 0 never uses the first moment's old value, but expects the tensor.
            first = values["exp_avg"].clone() if "exp_avg" in values else torch.zeros_like(second)
            entries[k] = {"step": values["step"], "exp_avg": first, "exp_avg_sq": second}
        return {"state": entries, "param_groups": state["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, or from ``torch.optim.Adam``'s; everything stays where it is in memory.

        After loading Adam's state the averages are unchanged, and the count of calls is the parameters' number of
        steps. A schedule is kept; a learning rate that is a number is replaced by the loaded one.

        Raises:
            UserError: state of Adam with ``amsgrad`` or ``decoupled_weight_decay``, or another number of averages.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "decoupled_weight_decay"):
                if group.get(name):
                    raise UserError(f"state_dict was made with {name}, which FusedAdam does not have")
        for values in state_dict["state"].values():
            if "ema" in values and len(values["ema"]) != len(self.ema_decays):
                raise UserError(f"state_dict has {len(values['ema'])} averages, this has {len(self.ema_decays)}")
        mine, own_lr = self.state, [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        theirs, self.state = self.state, mine
        most = 0.0
        for i, group in enumerate(self.param_groups):
            lr = own_lr[i]
            if not isinstance(lr, Tensor):
                lr = float(group["lr"])
            elif lr.numel() == 1:
                lr.fill_(float(group["lr"]))
            group["lr"] = lr
            self._make_moments(i)
            # Parameters of a group that have taken as many steps share their counter.
            counters: dict[float, Tensor] = {}
            for p in group["params"]:
                state, saved = self.state[p], theirs.get(p, {})
                for name, value in state.items():
                    if name in saved and name != "step":
                        if is_sharded(p) and not is_sharded(saved[name]):
                            raise UserError(f"state_dict holds a whole {name}, the parameters are sharded")
                        value.copy_(_local(saved[name]))
                    elif name.startswith("exp_avg"):
                        value.zero_()
                taken = float(saved.get("step", 0.0))
                if taken not in counters:
                    used = any(state["step"] is counter for counter in counters.values())
                    counters[taken] = (state["step"].clone() if used else state["step"]).fill_(taken)
                state["step"] = counters[taken]
            most = max(most, *counters)
        self.counts.copy_(state_dict.get("counts", torch.tensor([int(most), 0])))

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _room(self, name: str, index: int, rows: int | None = None) -> list[Tensor]:
        """Zeros laid out like each parameter of a group; with ``rows``, ``(rows, ...)`` for each."""
        flat, params = self.flat_storage[index], self.param_groups[index]["params"]
        if flat is not None:
            self._buffers[index][name] = flat.buffer(rows)
            return flat.views(self._buffers[index][name])
        if rows is None:
            return [torch.zeros_like(_local(p)) for p in params]
        room = []
        for p in map(_local, params):
            size = _padded(p.numel())
            memory = torch.zeros(rows * size, dtype=p.dtype, device=p.device)
            room.append(memory.as_strided((rows, *p.shape), (size, *p.stride())))
        return room

    def _make_moments(self, index: int) -> None:
        """Give a group the moments its betas need, and drop those they do not."""
        group = self.param_groups[index]
        for name, wanted in (("exp_avg", group["betas"][0] > 0), ("exp_avg_sq", True)):
            there = name in self.state[group["params"][0]]
            if wanted and not there:
                for p, moment in zip(group["params"], self._room(name, index), strict=True):
                    self.state[p][name] = moment
            elif there and not wanted:
                self._buffers[index].pop(name, None)
                for p in group["params"]:
                    del self.state[p][name]

    def _rate(self, index: int) -> Tensor:
        lr = self.param_groups[index]["lr"]
        if isinstance(lr, Tensor):
            return lr
        if self._written[index] != lr:
            self._rates[index].fill_(lr)
            self._written[index] = lr
        return self._rates[index]

    def _updates(self, index: int) -> Iterator[_Update]:
        """The updates of a group: one for all parameters with a gradient that have taken the same number of steps.

        A flat group is one update over its whole buffer, if all its parameters have gradients and the same step count.
        """
        params = self.param_groups[index]["params"]
        states = [self.state[p] for p in params]
        flat = self.flat_storage[index]
        if flat is not None and len({id(state["step"]) for state in states}) == 1 and flat.gather():
            buffers = self._buffers[index]
            lists = [[buffers[name]] if name in buffers else [] for name in ("exp_avg", "exp_avg_sq", "ema")]
            yield _Update(states[0]["step"], [flat.data], [flat.grad], *lists)
            return
        together: dict[int, list[tuple[nn.Parameter, dict[str, Tensor]]]] = {}
        idle: list[dict[str, Tensor]] = []
        for p, state in zip(params, states, strict=True):
            if p.grad is None:
                idle.append(state)
            else:
                together.setdefault(id(state["step"]), []).append((p, state))
        # A parameter without a gradient is not stepped, so its step count falls behind the others' and it needs a
        # counter of its own.
        stay: dict[int, Tensor] = {}
        for state in idle:
            counter = id(state["step"])
            if counter in together:
                if counter not in stay:
                    stay[counter] = state["step"].clone()
                state["step"] = stay[counter]
        for members in together.values():
            first = members[0][1]
            lists = [
                [s[name] for _, s in members] if name in first else [] for name in ("exp_avg", "exp_avg_sq", "ema")
            ]
            yield _Update(first["step"], [_local(p) for p, _ in members], [_like(p) for p, _ in members], *lists)


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
        if not lr > 0:
            raise UserError(f"lr must be positive, got {lr:g}")
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
        grads = [_local(p.grad) for group in self.adam.param_groups for p in group["params"] if p.grad is not None]
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
                tensor.copy_(_local(state["ema"][d][name]))


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


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold only a share."""
    return hasattr(tensor, "to_local")


def spread(local: Tensor, p: Tensor) -> Tensor:
    """``local``, this rank's share of a moment or average of ``p``, as a DTensor on the same memory if ``p`` is one.

    It is sharded as ``p`` is; any dimensions beyond those of ``p`` come first.
    """
    if not is_sharded(p):
        return local
    # Imported here, because this module takes longer to import than all of this package.
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(p, DTensor)
    rows = local.dim() - p.dim()
    shape = torch.Size((*local.shape[:rows], *p.shape))
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(rows + each.dim) if isinstance(each, Shard) else each for each in p.placements]
    return DTensor.from_local(local, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _local(tensor: Tensor) -> Tensor:
    """The tensor's memory on this rank, without gradient: of a sharded tensor this rank's share."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _check(params: Sequence[Tensor]) -> None:
    if not params:
        raise UserError("params must have at least one parameter")
    first = params[0]
    if first.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"params must be float32 or float64, got {first.dtype}: keep the parameters in float32 and run the network "
            "under torch.autocast"
        )
    for p in params:
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise UserError(f"params must be alike, got {first.dtype} on {first.device} and {p.dtype} on {p.device}")
        if is_sharded(p) != is_sharded(first):
            raise UserError("params must be alike, got sharded and whole ones")
        if is_sharded(p):
            if p.device_mesh.ndim != 1 or not p.placements[0].is_shard():  # type: ignore[attr-defined]
                raise UserError("params that are sharded must be so over all ranks of a mesh of one dimension")
            p = _local(p)
        if torch.empty_like(p, device="meta").stride() != p.stride():
            raise UserError(f"params must have no gaps in memory, got one of shape {tuple(p.shape)} with {p.stride()}")


def _check_group(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        device = group["params"][0].device if group["params"] else lr.device
        if lr.device != device or lr.dtype not in (torch.float32, torch.float64):
            raise UserError(f"lr as a tensor must be float32 or float64 on {device}, got {lr.dtype} on {lr.device}")
        if not lr.numel() or not lr.is_contiguous():
            raise UserError(f"lr as a tensor must be contiguous with at least one element, got shape {tuple(lr.shape)}")
    elif not lr >= 0:
        raise UserError(f"lr must not be negative, got {lr:g}")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise UserError(f"betas must be two numbers in [0, 1), got {tuple(betas)}")
    if not group["eps"] > 0:
        raise UserError(f"eps must be positive, got {group['eps']:g}")
    if not group["weight_decay"] >= 0:
        raise UserError(f"weight_decay must not be negative, got {group['weight_decay']:g}")


def _check_dense(grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise UserError("a gradient is sparse, and FusedAdam takes dense ones only: build embeddings with sparse=False")


def _like(p: nn.Parameter) -> Tensor:
    """The gradient of ``p`` with its elements in the order that ``p`` has them in memory."""
    assert p.grad is not None
    _check_dense(p.grad)
    own, grad = _local(p), _local(p.grad)
    if (here := grad.stride()) == (there := own.stride()):
        return grad
    # The stride of a dimension of size 1 has no meaning, so it is not compared.
    same = all(a == b or size < 2 for a, b, size in zip(here, there, own.shape, strict=True))
    return grad if same else torch.empty_like(own).copy_(grad)
