"""Finished networks as objects: load one by its file, its run's folder or a shipped name, and draw samples from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..choices import STUDENTS
from ..contracts import check_tensor, type_name
from ..errors import UserError
from ..noise import NoiseStream, normal
from . import files, published
from .calls import needs_endpoint
from .few_steps import FewSteps, generator_of
from .files import ROLES, SHIPPED, Model
from .solvers import SOLVERS, integrate

STEPS = 100  # default number of a teacher's steps


class Loaded:
    """A student or a teacher that is called with noise: ``model(z, labels)`` are samples like ``z``.

    Attributes:
        net: the network, in evaluation mode, without gradients.
        description: the description in its file.
        shape: the shape of one sample.
        classes: the number of classes, 0 for an unconditional network.
    """

    def __init__(self, model: Model) -> None:
        self.net, self.description = model.net.requires_grad_(False), model.description
        self._path, self._predict = self.description.interpolant(), self.description.predict
        network = self.description.network
        self.shape: tuple[int, ...] = tuple(network.get("dim", network.get("shape", (2,))))
        self.classes = int(getattr(model.net, "num_classes", 0) or 0)
        self._student = generator_of(self.net, self.description) if self.is_student else None

    @property
    def is_student(self) -> bool:
        """Whether it is a student, which makes samples in its own steps; a teacher takes the steps of a solver."""
        return self.description.role == "student"

    def to(self, device: torch.device | str) -> Loaded:
        """The same object with its network on ``device``."""
        self.net.to(device)
        if self._student is not None:
            self._student.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        endpoint: Tensor | None = None,
        *,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Samples from noise.

        Args:
            z: standard normal noise ``(B, *shape)``.
            labels: ``(B,)`` int64, for a class-conditional network.
            endpoint: ``y`` like ``z``, for a path with two endpoints.
            steps, solver, guidance: settings of a teacher, see :func:`realuid_fast.sampling.integrate`; by default 100
                Euler steps. A student takes none of them, but for a number of ``steps`` that it was trained for, where
                its description has such (SFD); by default the largest.

        Raises:
            UserError: noise, labels or the endpoint do not fit, or a student is given a setting of a teacher.
        """
        check_tensor("z", z)
        if z.dtype != (own := next(self.net.parameters()).dtype):
            raise UserError(f"z must be {own} like the network's weights, not {z.dtype}")
        if z.shape[1:] != self.shape:
            raise UserError(f"z must have shape (B, {', '.join(map(str, self.shape))}), not {tuple(z.shape)}")
        if labels is not None:
            check_tensor("labels", labels)
            if labels.dtype not in (torch.int32, torch.int64):
                raise UserError(f"labels must be int64, not {labels.dtype}")
        if self.classes and (labels is None or labels.shape != z.shape[:1]):
            raise UserError(f"labels must be given, one for each of the {len(z)} samples: 0 to {self.classes - 1}")
        # "No label" is one more, where the network knows it.
        _check_labels(self.classes + (getattr(self.net, "null_label", None) is not None), labels)
        if self._student is None:
            return integrate(
                self.net, z, STEPS if steps is None else steps, solver or "euler", labels, path=self._path,
                predict=self._predict, endpoint=endpoint, guidance=guidance,
            )  # fmt: skip
        few = isinstance(self._student, FewSteps)
        if (steps is not None and not few) or solver is not None or guidance != 1.0:
            raise UserError("steps, solver and guidance are for teachers: a student makes samples in its own steps")
        if few and steps is not None:
            return self._student(z, labels, endpoint, steps)
        return self._student(z, labels, endpoint)


def load(source: str | Path) -> Loaded:
    """A student or a teacher from a ``.safetensors`` file, a finished run's folder, or a shipped name: ``"digits"``, a
    teacher, or ``"mnist"``, a student whose samples are images of 16x16.

    ``load("student.safetensors")(z, labels)`` are samples. Nothing is downloaded, and no code in a file runs.

    Raises:
        UserError: a file that cannot be read or used, or a folder without a finished network.
    """
    return Loaded(open_model(source))


def open_model(source: str | Path) -> Model:
    """The network with its description, which :func:`load` wraps."""
    if not isinstance(source, (str, Path)):
        raise UserError(f"source must be the name of a file, a folder or a shipped network, not {type_name(source)}")
    if str(source) in SHIPPED:
        return published.load_teacher(str(source))
    if str(source) in STUDENTS:
        return files.load(STUDENTS[str(source)], role="student")
    place = Path(source)
    if not place.is_dir():
        return files.load(place)
    for role in ROLES[::-1]:
        if (place / f"{role}.safetensors").is_file():
            return files.load(place / f"{role}.safetensors")
    raise UserError(
        f"the folder {place} holds no student.safetensors or teacher.safetensors: is its run finished?{_instead(place)}"
    )


def _instead(run: Path) -> str:
    """Sentences that say how the network of a run that is not finished is had."""
    best, said = run / "best.safetensors", ""
    if best.is_file():
        said += f" {best} has the smallest distance so far."
    updates = [int(file.stem.removeprefix("update-")) for file in (run / "checkpoints").glob("update-*.pt")]
    if updates:
        said += (
            f" Its command with --resume --set distill.updates={max(updates)} (of a teacher teacher.updates) ends it "
            "where it is"
        )
    return said


def sample(
    model: Loaded | str | Path,
    count: int,
    *,
    labels: Tensor | int | None = None,
    endpoint: Tensor | None = None,
    seed: int = 0,
    steps: int | None = None,
    solver: str | None = None,
    guidance: float = 1.0,
    batch: int = 500,
) -> Tensor:
    """``count`` samples ``(count, *shape)`` on the CPU, made ``batch`` at a time where the network lies.

    Args:
        model: a model from :func:`load`, or an argument of :func:`load`.
        labels: ``(count,)`` int64, or one class for all samples; classes in turn where not given.
        endpoint: ``(count, *shape)``, for a path with two endpoints.
        seed: seed of the noise. Backends draw the same noise within 1e-4.
        steps, solver, guidance: as for a call of :class:`Loaded`.
        batch: samples made at a time, at least 1.

    Returns:
        float32 samples.

    Raises:
        UserError: a number is out of range, or tensors do not fit.
    """
    made = model if isinstance(model, Loaded) else load(model)
    for name, number in {"count": count, "batch": batch}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {number!r}")
    if solver is not None and solver not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    chosen = _labels(made.classes, count, labels)
    if needs_endpoint(made.net, made.description.interpolant()) and (endpoint is None or len(endpoint) != count):
        raise UserError(f"endpoint must be given, {count} rows: the model restores one endpoint of a bridge")
    device = next(made.net.parameters()).device
    z = normal(
        NoiseStream(seed, device).next_key(), torch.empty(count, *made.shape, device=device, dtype=torch.float32)
    )

    parts = []
    for i in range(0, count, batch):
        rows = slice(i, i + batch)
        given = [None if t is None else t[rows].to(device) for t in (chosen, endpoint)]
        parts.append(made(z[rows], *given, steps=steps, solver=solver, guidance=guidance).cpu())
    return torch.cat(parts)


def _check_labels(classes: int, labels: Tensor | int | None) -> None:
    """Refuse labels that the model does not have. Those on a device are not read: the host would wait for it."""
    if labels is not None and not classes:
        raise UserError("labels must not be given: the model is unconditional")
    given = [labels] if isinstance(labels, int) else []
    if isinstance(labels, Tensor) and labels.device.type == "cpu" and labels.numel():
        given = [int(labels.min()), int(labels.max())]
    for label in given:
        if not 0 <= label < classes:
            raise UserError(f"labels must name one of the model's {classes} classes, got {label}")


def _labels(classes: int, count: int, labels: Tensor | int | None) -> Tensor | None:
    """``(count,)`` labels from those given, from one class, or class by class; None for an unconditional network."""
    if labels is None:
        return torch.arange(count) % classes if classes else None
    if not isinstance(labels, Tensor):
        _check_labels(classes, labels)
        return torch.full((count,), labels)
    if labels.shape != (count,):
        raise UserError(f"labels must have shape ({count},), not {tuple(labels.shape)}")
    return labels
