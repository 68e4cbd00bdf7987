"""The effect of real data if the teacher is wrong, in closed form: ``python -m bench.real_data_bias``, seconds.

One-dimensional Gaussians on the linear path, uniform time. The data are N(0, 1), the teacher's field belongs to
N(m, s^2), and the student is the Gaussian that minimises the exact inner maximum, the integral over x_t and t of

    (W f* - N)^2 / W,   W = alpha p_g + (1 - alpha) p_d,   N = beta p_g f_g + (1 - beta) p_d f_d.

Writes bench/results/real_data_bias.md, the error of the best student beside the teacher's for several (alpha, beta),
and real_data_bias.png, their ratio over the paper's domain.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

RESULTS = Path(__file__).resolve().parent / "results"
PAIRS = [(1, 1), (0.98, 0.96), (0.94, 0.92), (0.92, 0.94), (0.90, 0.88)]
PAIRS += [(0.9, 1.1), (0.8, 1.0), (0.8, 1.2), (0.5, 1.0), (0.5, 1.5)]
MEAN_ERROR, STD_ERROR = 0.15, -0.10
STUDIED = [(1, 1), (0.92, 0.94), (0.98, 0.96), (0.92, 0.92), (0.8, 1.0), (0.5, 1.0)]  # by the study on MNIST
LEAST, POINTS = 0.4, 31  # of both axes of the plot

X = np.linspace(-8, 8, 1601)[None]
T, T_WEIGHTS = (v[:, None] for v in np.polynomial.legendre.leggauss(40))
T, T_WEIGHTS = (T + 1) / 2, T_WEIGHTS / 2


def density(mean: float, std: float) -> np.ndarray:
    """Density of x_t, [times, points]."""
    variance = (T * std) ** 2 + (1 - T) ** 2
    return np.exp(-0.5 * (X - T * mean) ** 2 / variance) / np.sqrt(2 * math.pi * variance)


def field(mean: float, std: float) -> np.ndarray:
    """E[x - n | x_t], [times, points]."""
    variance = (T * std) ** 2 + (1 - T) ** 2
    return mean + (T * std**2 - (1 - T)) / variance * (X - T * mean)


def inner_maximum(student: tuple[float, float], teacher: tuple[float, float], alpha: float, beta: float) -> float:
    """The distance that the generator minimises, for Gaussians given as (mean, standard deviation)."""
    p_g, p_d = density(*student), density(0, 1)
    weight = alpha * p_g + (1 - alpha) * p_d
    target = beta * p_g * field(*student) + (1 - beta) * p_d * field(0, 1)
    gap = (weight * field(*teacher) - target) ** 2 / np.maximum(weight, 1e-300)
    return float((T_WEIGHTS * gap).sum() * (X[0, 1] - X[0, 0]))


def student_errors(alpha: float, beta: float) -> tuple[float, float]:
    """The best student's errors: in mean where the teacher's is wrong, in deviation where the teacher's is wrong."""
    mean = minimize_scalar(
        lambda m: inner_maximum((m, 1.0), (MEAN_ERROR, 1.0), alpha, beta),
        bounds=(-0.5, 0.5),
        method="bounded",
    )
    std = minimize_scalar(
        lambda s: inner_maximum((0.0, s), (0.0, 1 + STD_ERROR), alpha, beta),
        bounds=(0.5, 1.5),
        method="bounded",
    )
    return float(mean.x), float(std.x) - 1


def ratios(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The student's error over the teacher's, in mean and in deviation: arrays ``[beta, alpha]`` of ``values``."""
    found = np.array([[student_errors(alpha, beta) for alpha in values] for beta in values])
    return found[..., 0] / MEAN_ERROR, found[..., 1] / STD_ERROR


def draw(file: Path, points: int = POINTS) -> None:
    """The plot of :func:`ratios` in size: below the line of 1, real data repairs the teacher's error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.linspace(LEAST, 1, points)
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, ratio) in enumerate(zip(("mean", "standard deviation"), ratios(values), strict=True)):
        axes = figure.add_subplot(1, 2, place + 1)
        size, levels = abs(ratio), np.linspace(0.5, 1.5, 21)
        shade = axes.contourf(values, values, size, levels=levels, cmap="RdBu_r", extend="both")
        axes.contour(values, values, size, levels=[1.0], colors="black")
        axes.plot(values, values, ":", color="0.3", linewidth=1)
        for alpha, beta in STUDIED:
            axes.plot(alpha, beta, "o", color="black", markersize=4, clip_on=False)
        axes.set(title=f"error in {title}", xlabel="alpha", ylabel="beta", aspect="equal")
    figure.colorbar(shade, ax=figure.axes, label="the student's error over the teacher's")
    figure.savefig(file, format="png")


def main() -> int:
    lines = [
        f"| alpha, beta | student's error in mean (teacher's: {MEAN_ERROR:g}) | in standard deviation "
        f"(teacher's: {STD_ERROR:g}) |",
        "|---|---:|---:|",
    ]
    for alpha, beta in PAIRS:
        mean, std = student_errors(alpha, beta)
        outside = " (beta outside the paper's (0, 1])" if beta > 1 else ""
        lines.append(f"| {alpha:g}, {beta:g}{outside} | {mean:.3f} | {std:.3f} |")
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_data_bias.md").write_text(text)
    draw(RESULTS / "real_data_bias.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
