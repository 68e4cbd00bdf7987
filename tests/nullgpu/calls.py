"""The fused calls as a user makes them on a GPU, their peers in plain torch, and a loop of both turns around MLPs."""

import torch

import realuid_fast as rf
from bench import peers

from ..helpers import UNET, random_network

SHAPE = (64, 3, 32, 32)  # the shape at which the package's host times are quoted


def _differentiated(loss, *inputs):
    """A call of ``loss`` and its backward pass."""
    leaves = [each.clone().requires_grad_() for each in inputs]

    def call():
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return call


def _interpolated(x, coef, key):
    """A call of ``interpolate`` and its backward pass, whose incoming gradient is there."""
    leaf, incoming = x.clone().requires_grad_(), torch.ones_like(x)

    def call():
        leaf.grad = None
        rf.interpolate(leaf, coef, key).backward(incoming)

    return call


class _Empty(torch.autograd.Function):
    """Computes nothing, with the inputs and the memory of ``generator_loss``."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*map(torch.empty_like, inputs))
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx, _grad):
        return ctx.saved_tensors


def _step(flat):
    """One step of FusedAdam over the parameters of a small U-Net."""
    net = random_network(UNET).cuda()
    optimiser = rf.optim.FusedAdam(net.parameters(), lr=1e-3, clip=1.0, ema_decays=[0.999], flat=flat)
    _backward(net)
    return optimiser.step


def _step_of_torch():
    """The same by torch: the norm, Adam in few launches, and an average."""
    net = random_network(UNET).cuda()
    averages = [parameter.detach().clone() for parameter in net.parameters()]
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    _backward(net)

    @torch.no_grad()
    def step():
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        torch._foreach_lerp_(averages, list(net.parameters()), 0.001)

    return step


def _backward(net):
    net(torch.rand(2, device="cuda"), torch.randn(2, *UNET["dim"], device="cuda")).sum().backward()


def _loop(ours):
    """One update of a loop like the README's at batch 64, with MLPs on points; the losses compiled by hand if not ours.

    The loop by hand draws times and noise, interpolates and computes both gradients in three compiled functions, which
    is the least that torch.compile allows.
    """
    networks = [random_network({"kind": "mlp", "shape": [2], "width": 64, "depth": 2}).cuda() for _ in range(3)]
    teacher, fake, student = networks
    teacher.requires_grad_(False)
    optimisers = [torch.optim.Adam(net.parameters(), fused=True) for net in (fake, student)]
    real, z = (torch.randn(64, 2, device="cuda") for _ in range(2))
    start = torch.full((64,), 0.3, device="cuda")
    path, objective = rf.paths.Linear(), rf.objectives.RealUID(peers.ALPHA, peers.BETA)
    stream = rf.NoiseStream(0, "cuda")

    def interpolate(x, real=None):
        t, n = torch.rand(64, device=x.device), torch.randn_like(x)
        if real is not None:
            x, t, n = torch.cat([x, real]), t.repeat(2), n.repeat(2, 1)
        return t, n, t[:, None] * x + (1 - t[:, None]) * n, x

    def fake_loss(out, x, n):
        generated, real = ((a - b) for a, b in zip(x.chunk(2), n.chunk(2), strict=True))
        own, other = out.chunk(2)
        alpha, beta = peers.ALPHA, peers.BETA
        first = alpha * own**2 - 2 * beta * own * generated
        second = (1 - alpha) * other**2 - 2 * (1 - beta) * other * real
        return (first + second).sum(1).mean()

    compiled = [torch.compile(each, dynamic=False) for each in (interpolate, fake_loss, peers.generator_written_out)]

    def generated():
        return z + 0.7 * student(start, z)

    def update():
        with torch.no_grad():
            x = generated()
        if ours:
            draw = path.draw(x, stream.next_key(), real=real)
            loss = rf.fake_loss(objective, draw, fake(draw.t, draw.x_t))
        else:
            t, n, x_t, rows = compiled[0](x, real)
            loss = compiled[1](fake(t, x_t), rows, n)
        optimisers[0].zero_grad()
        loss.backward()
        optimisers[0].step()
        x = generated()
        if ours:
            draw = path.draw(x, stream.next_key())
            loss = rf.generator_loss(objective, draw, teacher(draw.t, draw.x_t), fake(draw.t, draw.x_t))
        else:
            t, n, x_t, _ = compiled[0](x)
            loss = compiled[2](teacher(t, x_t), fake(t, x_t), x, n)
        optimisers[1].zero_grad()
        loss.backward()
        optimisers[1].step()

    return update


def ways():
    """Functions without arguments, by name; ``torch.add`` is the measure of the others' host time."""
    x, out, other, given = (torch.randn(SHAPE, device="cuda") for _ in range(4))
    rows = len(x)
    path, objective = rf.paths.Linear(), rf.objectives.RealUID(peers.ALPHA, peers.BETA)
    coef = path.coefficients(torch.rand(rows, device="cuda"))
    stream = rf.NoiseStream(0, "cuda")
    key = stream.next_key()
    shared = {"x_t": None, "coef": coef, "noise": key}
    halves = {"n_real": rows // 2, "noise_rows": rows // 2}
    f = rf.functional

    def generator_grads(teacher_out, fake_out, x, coef, noise):
        return f.generator_grads(
            objective, teacher_out=teacher_out, fake_out=fake_out, x=x, x_t=None, coef=coef, noise=noise
        )

    def grads_only(*inputs):
        grads = generator_grads(*inputs)
        return grads.loss, grads.teacher_out, grads.fake_out, grads.x

    objective.generator_scalars  # noqa: B018 - worked out before torch.compile sees them
    compiled = torch.compile(grads_only, fullgraph=True, dynamic=False)
    by_hand = torch.compile(peers.generator_by_hand, dynamic=False)
    plus_one = torch.compile(lambda a: a + 1, fullgraph=True, dynamic=False)
    numbers = torch.randn(3, device="cuda").unbind()
    return {
        "torch.add": lambda: torch.add(x, out),
        "NoiseStream.next_key": stream.next_key,
        "normal": lambda: rf.noise.normal(key, x),
        "sample_time and coefficients": lambda: path.coefficients(path.sample_time(rows, device="cuda")),
        "interpolate": lambda: rf.interpolate(x, coef, key),
        "matching_grads": lambda: f.matching_grads(out=out, x=x, **shared),
        "fake_grads": lambda: f.fake_grads(objective, fake_out=out, x=x, **shared, **halves),
        "generator_grads": lambda: generator_grads(out, other, x, coef, key),
        "generator_grads inside torch.compile": lambda: compiled(out, other, x, coef, key),
        "a + 1 through torch.compile": lambda: plus_one(x),
        "gradients by hand through torch.compile, noise given": lambda: by_hand(out, other, x, given),
        "fake_loss and backward": _differentiated(
            lambda a: f.fake_loss(objective, fake_out=a, x=x, **shared, **halves), out
        ),
        "generator_loss and backward": _differentiated(
            lambda a, b, c: f.generator_loss(objective, teacher_out=a, fake_out=b, x=c, **shared), out, other, x
        ),
        "interpolate and backward": _interpolated(x, coef, key),
        "torch.addcmul on three scalars and backward": _differentiated(torch.addcmul, *numbers),
        "an empty autograd.Function and backward": _differentiated(_Empty.apply, out, other, x),
        "the formulas in torch and backward": _differentiated(
            lambda a, b, c: peers.generator_written_out(a, b, c, given), out, other, x
        ),
        "FusedAdam on flat storage": _step(flat=True),
        "FusedAdam": _step(flat=False),
        "clipping, torch.optim.Adam and an average": _step_of_torch(),
        "update of a user's loop": _loop(ours=True),
        "update of a user's loop, losses through torch.compile": _loop(ours=False),
    }
