"""One optimiser step in two passes: the global norm, then clip, Adam and every moving average of the parameters.

The first pass reads the gradients, the second reads and writes each parameter, its moments and its averages once.
Nothing waits for the device: clip, bias correction, learning rate and the averages' decays come from counters that live
there, so a replayed CUDA graph of a step goes on where the last one ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from ..ops.reference import average_
from .checks import check_decays, check_group, check_setting, check_state, check_unmoved
from .flat import FlatParameters, check_parameters, is_sharded, like_parameter, local, padded, spread


class _Update(NamedTuple):
    """The tensors that one call of the operator updates: parameters that have taken the same number of steps."""

    step: Tensor
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor]


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimisers, without the decorator that hides it from torch.compile.

    The decorator imports torch.compile at its first call, which takes longer than all else that a short command does.
    Where torch.compile has been imported, the decorator costs nothing and stays.
    """
    return method if "torch._dynamo" in sys.modules else getattr(method, "__wrapped__", method)


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
        flat: lay every group's parameters into a :class:`FlatParameters`. On GPU the step is then three launches
            beside those that gather the gradients. Without it, GPUs run torch's foreach functions. CPUs gain nothing.
            Not for sharded parameters.
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
        check_setting("clip", clip, "be a number that is not negative", lambda norm: norm >= 0)
        check_decays(ema_decays)
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

    def __setattr__(self, name: str, value: Any) -> None:
        # torch's schedulers wrap `step` when they are made. They would fill a table of rates with a table.
        tables = getattr(value, "_wrapped_by_lr_sched", False) and [group["lr"] for group in self.param_groups]
        if tables and any(isinstance(lr, Tensor) and lr.numel() > 1 for lr in tables):
            raise UserError("lr is a table, a schedule of its own: give one rate to use a scheduler of torch")
        super().__setattr__(name, value)

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
        _plain(torch.optim.Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_parameters(self._parameters())
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
                self.state[p]["ema"] = average.copy_(local(p).detach().expand_as(average))

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
            UserError: no parameter has a gradient, one has a sparse gradient, or a parameter has another type, device
                or layout in memory than when the optimiser was built.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step()
        except RuntimeError:
            params = self._parameters()
            check_unmoved(params, [self.state[p]["exp_avg_sq"] for p in params])
            raise
        return loss

    def _step(self) -> None:
        # `reduce` may replace gradients, so collect the tensors to update afterwards.
        if self.reduce and (present := [local(p.grad) for p in self._parameters() if p.grad is not None]):
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
            average_([*map(local, idle)], averages, self.norm, self.counts, self._decays, self.ema_warmup)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero, as ``torch.optim.Optimizer`` does."""
        _plain(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State as torch's optimisers give it, with ``counts`` beside it.

        Per parameter ``step``, ``exp_avg`` (unless ``beta1 = 0``), ``exp_avg_sq`` and ``ema`` ``(E, ...)``. The
        learning rate is a number; of a schedule it is the next step's. Sharded parameters have DTensors.
        """
        state: dict[str, Any] = _plain(torch.optim.Optimizer.state_dict)(self)
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
        return {**state, "counts": self.counts.clone()}

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
            UserError: state of Adam with ``amsgrad`` or ``decoupled_weight_decay``, another number of averages, or a
                tensor of another shape. Nothing has been loaded then.
        """
        check_state(state_dict, self._parameters(), len(self.ema_decays))
        mine, own_lr = self.state, [group["lr"] for group in self.param_groups]
        _plain(torch.optim.Optimizer.load_state_dict)(self, state_dict)
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
                        value.copy_(local(saved[name]))
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
            return [torch.zeros_like(local(p)) for p in params]
        room = []
        for p in map(local, params):
            size = padded(p.numel())
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
            yield _Update(
                first["step"], [local(p) for p, _ in members], [like_parameter(p) for p, _ in members], *lists
            )
