"""The generator: a network that turns noise at a time of its path into samples, in one call or in a few."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as rf
from ..errors import UserError
from ..networks.calling import like
from ..paths import COLUMNS, Coefficients, OneSidedPath, Path
from .calls import LINEAR, arguments, ends, needs_endpoint
from .one_step import default_start, starting, state_from, step_at, step_from


class Generator(nn.Module):
    """``G(z)``, on a two-sided path ``G(y, z)``: the path's data prediction at ``t0`` from noise, see
    :func:`realuid_fast.sampling.one_step`.

    With further ``times`` ``t1, t2, ...`` the sample is interpolated to each of them with fresh noise, ``x_t = a x + b
    y + c n``, and predicted again: ``1 + len(times)`` evaluations. The noise is a function of ``z``, and so are a
    batch's samples. Source: Song et al., Consistency Models (2303.01469), algorithm 1. ``ancestral``, each further
    state is drawn from the posterior ``q(z_s | z_t, x)`` and so keeps noise of the one before. Source: Salimans et al.,
    Moment Matching (2406.04103), its ancestral sampler.

    Args:
        net: a network, called as the path says for its prediction; on the linear path as ``net(t, x, y)``.
        t_start: ``t0``; :func:`realuid_fast.sampling.default_start` when None.
        path, predict: the path and the prediction that the network was trained on.
        times: further times, each nearer to the data than the one before.
        ancestral: whether states are drawn from the posterior, on a one-sided path.
        noised: whether it is trained on noised real data, with their labels, in place of its own states.

    Raises:
        UserError: a time is out of the path's range, or not nearer to the data than the one before; ancestral on a
            two-sided path; noised without further times, or with an endpoint.
    """

    numbers: tuple[int, ...] = ()  # FewSteps has the numbers of steps that it is trained for
    _numbers: Tensor
    _rows: Tensor

    def __init__(
        self,
        net: nn.Module,
        t_start: float | None = None,
        path: Path = LINEAR,
        predict: str = "velocity",
        times: Sequence[float] = (),
        ancestral: bool = False,
        noised: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.path, self.predict = net, path, predict
        self.ancestral, self.noised = ancestral, noised
        self.t_start = float(default_start(path) if t_start is None else t_start)
        self.times = tuple(float(t) for t in times)
        data = ends(path).data
        left = [abs(data - t) for t in (self.t_start, *self.times)]
        if any(after >= before for before, after in itertools.pairwise(left)):
            raise UserError(f"times must come nearer to the data after t_start = {self.t_start:g}, got {self.times}")
        if noised and (not self.times or needs_endpoint(net, path)):
            raise UserError("states that are noised need further times, and a generator without an endpoint")
        self._starts = tuple(starting(path, predict, t) for t in (self.t_start, *self.times))
        numbers = torch.tensor([(s.t, s.c_in, s.k_out, s.k_x) for s in self._starts], dtype=torch.float32)
        later = torch.tensor(self.times, dtype=torch.float32)
        rows = path.coefficients(later, "x0", "x0") if self.times else later.new_zeros(0, len(COLUMNS))
        if ancestral:
            if not isinstance(path, OneSidedPath):
                raise UserError(f"ancestral states are for one-sided paths, not {type(path).__name__}")
            row, before = Coefficients(rows), later.new_tensor((self.t_start, *self.times[:-1])[: len(later)])
            for column, value in zip((row.a, row.b, row.c), path.posterior(later, before), strict=True):
                column.copy_(value)
        # Tables are made here and on the device: a captured step cannot copy from the host, and a compiled one cannot
        # make tables.
        device = next(net.parameters()).device
        self.register_buffer("_numbers", numbers.to(device), persistent=False)
        self.register_buffer("_rows", rows.to(device), persistent=False)

    def on(self, net: nn.Module) -> Generator:
        """The same steps of another network of its kind."""
        return Generator(net, self.t_start, self.path, self.predict, self.times, self.ancestral, self.noised)

    @property
    def steps(self) -> int:
        """Network evaluations a sample."""
        return len(self._starts)

    def draw_steps(self, count: int, draws: torch.Generator) -> Tensor | None:
        """The step that each of ``count`` rows comes from in training, ``(count,)``; None for one step."""
        if self.steps == 1:
            return None
        return torch.randint(self.steps, (count,), generator=draws, device=draws.device)

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        endpoint: Tensor | None = None,
        step: Tensor | None = None,
        data: Tensor | None = None,
    ) -> Tensor:
        """Samples like ``z``, standard normal ``(B, ...)``; ``labels`` ``(B,)`` for a class-conditional network.

        With ``step``, int64 ``(B,)`` in ``[0, steps)``, each row is the prediction of that step, with a gradient
        through its last evaluation alone. A generator of several steps is trained on these, so that each step sees the
        states that the generator's own earlier steps make. Source: Yin et al., DMD2 (2405.14867), section 4.5
        ("backward simulation"). With ``data`` like ``z``, real samples, each step but the first starts from ``a x + c
        n`` for the sample ``x`` of its row in their place. Source: Sauer et al., Adversarial Diffusion Distillation
        (2311.17042), section 3.
        """
        first, *later = self._starts
        if not later:
            return step_from(first, self.net, z, labels, self.path, endpoint)
        state = state_from(first, z, endpoint)
        if step is None:
            x = step_at(first, self.net, state, labels, endpoint)
            for number, start in enumerate(later, 1):
                state = self._noised(number, x, z, state if self.ancestral else endpoint)
                x = step_at(start, self.net, state, labels, endpoint)
            return x
        with torch.no_grad():
            states = [state]
            for number in range(1, self.steps):
                clean = data
                if clean is None:
                    clean = step_at(self._starts[number - 1], self.net, states[-1], labels, endpoint)
                states.append(self._noised(number, clean, z, states[-1] if self.ancestral else endpoint))
            state = torch.stack(states)[step, torch.arange(len(z), device=z.device)]
            t, *scales = self._numbers[step].unbind(1)
            c_in, k_out, k_x = (scale.view(-1, *[1] * (z.dim() - 1)) for scale in scales)
        out = like(self.net(*arguments(self.net, t, state * c_in, labels, endpoint)), z)
        return torch.addcmul(k_x * state, k_out, out.to(state.dtype))

    def _noised(self, number: int, x: Tensor, z: Tensor, endpoint: Tensor | None) -> Tensor:
        coef = self._rows[number - 1].repeat(x.shape[0], 1)
        # Networks may return any memory layout, and the fused call takes one layout for all tensors.
        layout = torch.contiguous_format if z.is_contiguous() else torch.channels_last
        end = None if endpoint is None else endpoint.contiguous(memory_format=layout)
        x = x.to(z.dtype).contiguous(memory_format=layout)
        return rf.interpolate(x, coef, _key(z, number), end)


def _key(z: Tensor, number: int) -> Tensor:
    """A noise key made of the bits of ``z``, on its device."""
    if not z.numel():
        return torch.zeros(2, dtype=torch.int64, device=z.device)
    first, last = (z[(i,) * z.dim()].float().view(torch.int32).long() for i in (0, -1))
    seed = ((first & 0x7FFFFFFF) << 32) | (last & 0xFFFFFFFF)
    return torch.stack((seed, torch.full_like(seed, number)))
