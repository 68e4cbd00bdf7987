"""Pictures as PNG files: grids of images, scatter plots of points, distances over updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..data import to_bytes
from ..errors import UserError
from ..extras import extra


def save_picture(samples: Tensor, file: str | Path) -> None:
    """Write samples as a PNG file: a grid of images ``(N, C, H, W)`` in ``[-1, 1]``, or a plot of points ``(N, 2)``.

    Images are clipped to that range.

    Raises:
        UserError: samples of another shape, or a file that cannot be written.
    """
    if samples.dim() not in (2, 4) or not len(samples):
        raise UserError(f"samples must be images (N, C, H, W) or points (N, 2), not {tuple(samples.shape)}")
    try:
        save_png(picture(samples), Path(file))
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None


def grid(images: Tensor, columns: int = 0, enlarge: int = 0) -> np.ndarray:
    """Images ``(N, C, H, W)`` in ``[-1, 1]`` side by side as bytes ``(rows, columns, 3)``.

    ``columns`` and ``enlarge`` (every pixel repeated) are chosen when 0: a square grid, tiles of at least 32 pixels.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    enlarge = enlarge or max(1, 32 // max(height, width))
    pixels = to_bytes(images.detach().float().cpu().nan_to_num(0.0)).expand(-1, max(channels, 3), -1, -1)[:, :3]
    pixels = pixels.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    height, width = pixels.shape[2:]
    rows = -(-count // columns)
    sheet = torch.full((3, rows * (height + 1) + 1, columns * (width + 1) + 1), 96, dtype=torch.uint8)
    for i in range(count):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = pixels[i]
    return sheet.permute(1, 2, 0).contiguous().numpy()


def picture(samples: Tensor) -> np.ndarray:
    """Samples as an RGB picture ``(H, W, 3)``: a grid of images, or a scatter plot of points ``(N, 2)``."""
    if samples.dim() == 4:
        return grid(samples)
    with extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    points = samples.detach().float().cpu().flatten(1)
    axes.scatter(points[:, 0], points[:, -1], s=2, alpha=0.5)
    axes.set_aspect("equal", adjustable="datalim")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(pixels: np.ndarray, file: Path | BinaryIO) -> None:
    """Write an RGB picture ``(H, W, 3)`` of bytes."""
    with extra():
        from PIL import Image

    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, format="PNG")


def convergence_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    lines: Mapping[str, float],
    metric: str,
    file: Path | BinaryIO,
    spread: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Distance over updates on a logarithmic axis.

    Args:
        curves: name to ``(update, distance)`` pairs.
        lines: name to a horizontal line, such as the teacher and the floor.
        metric: what the distance is, with the samples it was measured on.
        file: the PNG to write.
        spread: name to ``(lowest, highest)`` at each point of that curve.
    """
    with extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(curves.items()):
        shown = [(x, y) for x, y in points if math.isfinite(y)]
        axes.plot([x for x, _ in shown], [y for _, y in shown], marker=".", color=f"C{index}", label=name)
        if spread and name in spread:
            lowest, highest = zip(*spread[name], strict=True)
            axes.fill_between([x for x, _ in points], lowest, highest, color=f"C{index}", alpha=0.2, linewidth=0)
    for index, (name, value) in enumerate(lines.items()):
        axes.axhline(value, linestyle=("--", ":", "-.")[index % 3], color="0.3", label=f"{name}: {value:.3g}")
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.set_xlabel("updates")
    axes.set_ylabel(metric)
    figure.legend(loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file, format="png")
