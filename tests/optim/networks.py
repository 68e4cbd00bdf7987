"""Parameters and gradients for the optimisers' tests."""

import torch
from torch import nn

# Sizes that are no multiple of any vector, a scalar, nothing, several pieces for threads to share.
SHAPES = [(3, 5), (), (0, 4), (67,), (4, 3, 3, 3), (90, 101)]
# Relative to the tensor's size, after tens of steps: float32 rounds each of them by 6e-8.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def set_gradients(net: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator).to(p.device)


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params, n):
    generator = torch.Generator().manual_seed(1000 + n)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def assert_close(mine, theirs, dtype):
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * (1 + b.double().norm())


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(28, 3))
    return net.to(memory_format=torch.channels_last)
