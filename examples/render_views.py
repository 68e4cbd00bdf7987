"""A scene of coloured blobs from a teacher of its views: SparseFusion's distillation on a renderer of your own.

    python examples/render_views.py --out runs/render_views

The generator is no network but a callable: blobs in space, drawn from an angle. The teacher is a small diffusion model
of images given the number of the view, which is trained first. Its images vary, as they do where views leave something
open. Each update draws the scene from all views, noises the images, and pulls them to the data that the teacher reaches
from there in several steps (Zhou and Tulsiani, 2212.00792). With one step it is DreamFusion's score distillation. The
scene is then judged between the views, which the teacher has never seen. The defaults take at most a minute on a core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import realuid_fast as rf

SIZE, VIEWS, LEARNED = 8, 12, 0.1  # pixels of a side, views around the scene, error that a learned scene may keep


class Scene(nn.Module):
    """Blobs that are drawn from the side, turned about the vertical axis: red, green and blue in [-1, 1]."""

    def __init__(self, places: Tensor, colours: Tensor) -> None:
        super().__init__()
        self.places, self.colours = nn.Parameter(places), nn.Parameter(colours)  # [N, 3], [N, 3]

    def forward(self, angles: Tensor) -> Tensor:
        """Images ``(B, 3, SIZE, SIZE)`` from ``angles`` ``(B,)``; a scene in parameters gets their gradient."""
        x, y, z = self.places.unbind(1)
        across = angles.cos()[:, None] * x + angles.sin()[:, None] * z  # [B, N]
        grid = torch.linspace(-1, 1, SIZE)
        light = torch.exp(
            -8 * ((grid - across[..., None]) ** 2)[..., None, :] - 8 * ((grid[:, None] - y[:, None, None]) ** 2)
        )
        # Blobs of glass: each lets through what it does not colour, so their order does not matter.
        through = 1 - light[:, :, None] * self.colours.sigmoid()[:, :, None, None]  # [B, N, 3, SIZE, SIZE]
        return 1 - 2 * through.prod(1)


def true_scene() -> Scene:
    places = torch.tensor([[0.6, -0.5, 0.0], [-0.3, 0.0, 0.5], [-0.2, 0.6, -0.5]])
    return Scene(places, torch.tensor([[3.0, -3.0, -3.0], [-3.0, 3.0, -3.0], [-3.0, -3.0, 3.0]])).requires_grad_(False)


def angles_of(views: Tensor | float) -> Tensor:
    return 2 * math.pi / VIEWS * torch.as_tensor(views)


def train_teacher(path: rf.paths.Path, updates: int, batch: int) -> nn.Module:
    """A diffusion model of the images of each view, whose scenes differ a little from the true one."""
    scene, stream = true_scene(), rf.NoiseStream(seed=0)
    net = rf.networks.build({"kind": "mlp", "shape": [3, SIZE, SIZE], "width": 192, "depth": 3, "num_classes": VIEWS})
    adam = rf.optim.FusedAdam(net.parameters(), 2e-3, clip=5.0, ema_decays=(0.99,), ema_warmup=True)
    for _ in range(updates):
        views = torch.randint(VIEWS, (batch,))
        # A scene for every eighth of a batch is enough for the images to vary.
        parts = [
            Scene(scene.places + 0.05 * torch.randn(3, 3), scene.colours + 0.3 * torch.randn(3, 3))(angles_of(part))
            for part in views.chunk(8)
        ]
        draw = path.draw(torch.cat(parts).detach(), stream.next_key())
        loss = rf.matching_loss(draw, net(draw.t, draw.x_t, views))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return rf.frozen_view(net, adam.averages(0.99))


def distill(path: rf.paths.Path, teacher: nn.Module, scene: Scene, updates: int, steps: int) -> None:
    """Pull the scene, in every view, to where the teacher arrives in ``steps`` steps."""
    objective, stream, views = rf.objectives.SDS(), rf.NoiseStream(seed=1), torch.arange(VIEWS)
    adam = torch.optim.Adam(scene.parameters(), 0.03)
    weight = rf.paths.weight("noise", path)
    for _ in range(updates):
        images = scene(angles_of(views))
        draw = path.draw(images, stream.next_key(), match="x0", weight=weight)
        target = rf.sampling.multi_step(teacher, draw.t, draw.x_t, steps, views, path)
        loss = rf.generator_loss(objective, draw, target)
        adam.zero_grad()
        loss.backward()
        adam.step()


@torch.no_grad()
def error(scene: Scene) -> float:
    """The squared error between the views, as a share of that of an empty scene."""
    between = angles_of(torch.arange(VIEWS) + 0.5)
    images, true = scene(between), true_scene()(between)
    return float((images - true).square().mean() / (true + 1).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/render_views"), help="folder for the picture")
    parser.add_argument("--teacher-updates", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=200, help="of the scene")
    parser.add_argument("--steps", type=int, default=8, help="of the teacher from every noised image; 1 for SDS")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # quicker for tensors this small
    path = rf.paths.Linear(sampler="stratified")
    teacher = train_teacher(path, options.teacher_updates, batch=96)
    scene = Scene(0.4 * torch.randn(6, 3), torch.randn(6, 3) - 1)
    begun = error(scene)
    distill(path, teacher, scene, options.updates, options.steps)
    reached = error(scene)
    options.out.mkdir(parents=True, exist_ok=True)
    views = angles_of(torch.arange(VIEWS) + 0.5)
    rf.save_picture(torch.cat([true_scene()(views), scene(views).detach()]), options.out / "views.png")
    print(f"error between the views, as a share of an empty scene's: {begun:.3f} at random, {reached:.3f} distilled")
    print("the scene is learned" if reached < LEARNED else "the scene is not learned: give it more --updates")


if __name__ == "__main__":
    main()
