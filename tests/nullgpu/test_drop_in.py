"""Other frameworks' losses and the tripwires in a loop of one's own, captured as a CUDA graph."""

from types import SimpleNamespace

import torch

import realuid_fast as rf
from realuid_fast.compat import dmd2, fastgen, modelopt, sid

from . import device
from .alone import alone


def turn(x, teacher, fake, model, wires, stream):
    """Every loss with its backward pass, and a generator's turn of the tripwires."""
    t = torch.full((len(x),), 0.3, device="cuda")
    h = fastgen.get_f_div_weighting_h(model, x.detach().flatten(1), t)
    losses = [fastgen.variational_score_distillation_loss(x, teacher, fake, h)]
    losses += [
        modelopt.dsm_loss(kind, x, x0=teacher, eps=fake, t=t, alpha_fn=torch.cos, sigma_fn=torch.sin)
        for kind in ("x0", "eps", "v", "flow")
    ]
    nets = [lambda x_t, *_, out=out, **__: out + 0.1 * x_t for out in (teacher, fake)]
    losses.append(sid.SID_EDMLoss().generator_loss(*nets, x).sum())
    losses.append(dmd2.compute_distribution_matching_loss(model, x, None)[0]["loss_dm"])
    for loss in losses:
        loss.backward()
    wires.update(rf.paths.Linear().draw(x.detach(), stream.next_key()), teacher, fake)


def captured():
    """The launches of one capture after two turns, what was refused, and that a reading has come."""
    x = torch.randn(8, 3, 8, 8, device="cuda", requires_grad=True)
    teacher, fake, held = torch.randn(3, 8, 3, 8, 8, device="cuda")
    model = SimpleNamespace(
        config=SimpleNamespace(
            f_distill=SimpleNamespace(
                ratio_lower=0.1, ratio_upper=20.0, ratio_normalization=True, ratio_ema_rate=0.3
            )
        ),
        f_div_weighting_function=fastgen.all_f_div_weighting_function["js"],
        net=SimpleNamespace(noise_scheduler=SimpleNamespace(min_t=0.0, max_t=1.0), bins=torch.ones(4, device="cuda")),
        bin_num=4, real_unet=lambda *_: teacher, fake_unet=lambda *_: fake, min_step=2, max_step=98,
        num_train_timesteps=100, karras_sigmas=torch.linspace(0.1, 80, 100, device="cuda"),
    )  # fmt: skip
    wires = rf.Tripwires("cuda", heldout=held, batch=8)
    stream, graph, side = rf.NoiseStream(0, "cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            turn(x, teacher, fake, model, wires, stream)
    torch.cuda.synchronize()
    x.grad = torch.zeros_like(x)
    device.reset()
    with torch.cuda.graph(graph):
        turn(x, teacher, fake, model, wires, stream)
    seen = device.counts()
    graph.replay()
    reading = wires.fetch()
    return seen.recorded, seen.violations + device.counts().violations, len(reading.values())


def test_drop_in_losses_and_tripwires_are_captured():
    recorded, violations, numbers = alone(captured)
    assert not violations
    assert recorded.total() > 100
    assert numbers == 7
