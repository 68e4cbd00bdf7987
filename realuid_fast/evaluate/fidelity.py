"""Fréchet and kernel Inception distance, precision and recall of a generator, with the protocol they were measured by.

Images and features are streamed: only running moments of all samples are kept, and the features of a limited number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import choices
from ..data import Dataset
from ..errors import UserError
from ..files import check_regular, replacing
from ..models.checksums import CHECKSUM, matches, with_checksum
from ..models.files import Model
from ..models.solvers import evaluations
from ..noise import NoiseStream, normal
from ..progress import bar
from .distances import Moments, Statistics, frechet_from_root, kernel_distance, precision_recall, root_of
from .inception import Inception
from .measure import NOISE_SEED, Sampler
from .table import sampler

LABELS = choices.LABELS
CACHE = choices.CACHE
NEIGHBOURS = 3
SUBSETS, SUBSET_SIZE = 100, 1000
_CACHE_FORMAT = 2


@dataclass(frozen=True)
class Scores:
    """Distances of one set of generated samples to real ones; ``kernel_error`` is the standard error of ``kernel``.

    It is NaN, an empty cell of the table and null in JSON, where :func:`.distances.kernel_distance` cannot give one.
    """

    frechet: float
    kernel: float
    kernel_error: float
    precision: float
    recall: float


class Fidelity:
    """Measures generators of one data set in Inception features.

    Args:
        dataset: images without endpoints.
        inception: the features.
        split: the real images that generated ones are compared with; published distances take all of ``train``.
        labels: how a class-conditional generator's labels are chosen: ``empirical``, drawn from the training labels, or
            ``balanced``, one class after another.
        keep: samples of either side that kernel distance, precision and recall use: the first of the generated ones,
            and real ones at even distances.
        batch: images at a time. The noise is drawn batch by batch, so ``batch`` is part of the protocol.
        cache: a folder that keeps the real images' statistics; None keeps none. Their key is the images' checksum with
            every entry of the protocol that they depend on.
        progress: whether to show bars.

    Raises:
        UserError: the data set has no images or has endpoints, or a setting cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset,
        inception: Inception,
        split: str = "train",
        labels: str = "empirical",
        keep: int = 10_000,
        batch: int = 100,
        cache: Path | None = CACHE,
        progress: bool = False,
    ) -> None:
        if len(dataset.shape) != 3 or dataset.train_endpoints is not None:
            raise UserError(
                f"Inception distances are for images without endpoints, which '{dataset.name}' does not hold"
            )
        if split not in ("train", "heldout"):
            raise UserError(f"real split must be train or heldout, got {split!r}")
        if labels not in LABELS:
            raise UserError(f"labels must be one of {', '.join(LABELS)}; got {labels!r}")
        if keep <= NEIGHBOURS or batch < 1:
            raise UserError(f"keep must be more than {NEIGHBOURS} and batch at least 1, got {keep} and {batch}")
        self._dataset, self._inception, self.split, self.labels = dataset, inception, split, labels
        self._keep, self._batch, self._cache, self._progress = keep, batch, cache, progress
        self.real = self.of_split(split)

    def __call__(self, sample: Sampler, net: nn.Module, count: int, seed: int = 0) -> Scores:
        """Scores of ``count`` samples that ``sample(noise, labels)`` makes; ``net`` says whether it takes labels.

        ``seed`` draws noise and empirical labels; one seed draws the same for every generator.
        """
        parts = self._generated(sample, net, count, seed)
        return self.scores(self._statistics(parts, count, torch.arange(min(count, self._keep)), "generated"))

    def scores(self, found: Statistics) -> Scores:
        """Scores of features against the real ones."""
        real, device = self.real, self._inception.device
        moments = (each.to(device) for each in (real.mean, real.covariance, self._root, found.mean, found.covariance))
        ours, theirs = found.features.to(device), real.features.to(device)
        precision, recall = precision_recall(theirs, ours, NEIGHBOURS)
        kernel, error = kernel_distance(ours, theirs, SUBSETS, SUBSET_SIZE)
        return Scores(frechet_from_root(*moments), kernel, error, precision, recall)

    @functools.cached_property
    def _root(self) -> Tensor:
        """The real images' covariance, decomposed once for all scores."""
        return root_of(self.real.covariance.to(self._inception.device))

    def of_split(self, split: str) -> Statistics:
        """Statistics of all real images of a split, from the cache if it has them."""
        rows = self._dataset.train if split == "train" else self._dataset.heldout
        keep = min(self._keep, len(rows))
        # Everything that the statistics depend on, and nothing else.
        key = {
            "format": _CACHE_FORMAT,
            "images": self._dataset.fingerprint(split),
            "count": len(rows),
            "keep": keep,
            **self._inception.protocol(),
        }
        del key["weights"]  # the file's name; its checksum is in the key already
        described = json.dumps(key, sort_keys=True)
        file = (
            self._cache and self._cache / f"inception-{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"
        )
        if file is not None and (cached := _read(file, described)) is not None:
            return cached
        kept = torch.arange(keep) * len(rows) // keep

        def parts() -> Iterator[Tensor]:
            for index in torch.arange(len(rows)).split(self._batch):
                yield rows[index]

        found = self._statistics(parts(), len(rows), kept, f"real {split}")
        if file is not None:
            _write(file, found, described)
        return found

    def protocol(self, count: int, repeats: int, precision: str = "float32") -> dict[str, Any]:
        """How the scores are measured, in plain values. Distances of different protocols cannot be compared.

        ``precision`` is what the networks make the samples in.
        """
        real, conditional = self.real, self._dataset.classes
        return {
            **self._inception.protocol(),
            "generated_samples": count,
            "precision": precision,
            "noise": f"{repeats} seed(s) from {NOISE_SEED} up, drawn in batches of {self._batch}",
            "labels": f"{self.labels}, of class-conditional networks" if conditional else "none",
            "real_split": self.split,
            "real_images": real.count,
            "real_sha256": self._dataset.fingerprint(self.split),
            "preprocessing": self._dataset.preprocessing,
            "kernel_distance": f"(x.y / {real.features.shape[1]} + 1)^3, {SUBSETS} subsets of at most {SUBSET_SIZE}, "
            f"of {min(count, self._keep):,} generated and {len(real.features):,} real images",
            "precision_recall": f"k = {NEIGHBOURS}, of the same images",
            "moments": "float64, unbiased covariance",
        }

    def _generated(self, sample: Sampler, net: nn.Module, count: int, seed: int) -> Iterator[Tensor]:
        device, stream = self._inception.device, NoiseStream(NOISE_SEED + seed, self._inception.device)
        generator = torch.Generator().manual_seed(seed)
        for first in range(0, count, self._batch):
            n = min(self._batch, count - first)
            z = normal(stream.next_key(), torch.empty(n, *self._dataset.shape, device=device))
            labels = self._labels(net, first, n, generator)
            yield sample(z) if labels is None else sample(z, labels.to(device))

    def _labels(self, net: nn.Module, first: int, count: int, generator: torch.Generator) -> Tensor | None:
        classes, known = int(getattr(net, "num_classes", 0) or 0), self._dataset.train_labels
        if not classes:
            return None
        if self.labels == "balanced":
            return (first + torch.arange(count)) % classes
        if known is None:
            raise UserError("the network is class-conditional, the data set has no labels: give labels balanced")
        return known[torch.randint(len(known), (count,), generator=generator)]

    def _statistics(self, parts: Iterator[Tensor], count: int, kept: Tensor, name: str) -> Statistics:
        moments, features, first = Moments(), [], 0
        with bar(count, "image", self._progress, desc=name) as shown:
            for images in parts:
                found = self._inception(images)
                if not bool(torch.isfinite(found).all()):
                    raise UserError(f"the features of the {name} images are not finite: look at the images first")
                moments.add(found)
                within = kept[(kept >= first) & (kept < first + len(images))] - first
                features.append(found[within.to(found.device)].cpu())
                first += len(images)
                shown.update(len(images))
        return Statistics(moments.mean.cpu(), moments.covariance.cpu(), torch.cat(features), count)


def _read(file: Path, described: str) -> Statistics | None:
    """The statistics in a file of the cache; None if there is no such file, or it is damaged or has another key."""
    from safetensors import safe_open

    try:
        check_regular(file)
        with safe_open(str(file), framework="pt") as opened:
            content = json.loads((opened.metadata() or {}).get("key", "{}"))
            checksum = content.pop(CHECKSUM, None)
            if json.dumps(content, sort_keys=True) != described:
                raise ValueError("it is of another protocol")
            if not matches(file, checksum):
                raise ValueError("its checksum is wrong")
            tensors = {name: opened.get_tensor(name) for name in ("mean", "covariance", "features")}
        return Statistics(**tensors, count=json.loads(described)["count"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        warnings.warn(f"{file} is damaged ({error}): its statistics are computed again", stacklevel=2)
        return None


def _write(file: Path, found: Statistics, described: str) -> None:
    tensors = {name: getattr(found, name).contiguous() for name in ("mean", "covariance", "features")}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(with_checksum(tensors, "key", json.loads(described)))
    except OSError as error:
        warnings.warn(f"{file} cannot be written ({error.strerror or error}): nothing is cached", stacklevel=2)


@dataclass(frozen=True)
class Row:
    """One line of the table: a generator's scores by seed; ``evaluations`` of the network a sample, None for data."""

    name: str
    scores: Sequence[Scores]
    evaluations: int | None = None

    def spread(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over the seeds of every score, the latter 0 for one seed."""
        found = {}
        for name in (field.name for field in fields(Scores)):
            values = [getattr(each, name) for each in self.scores]
            # The standard library has no deviation of NaN.
            known = len(values) > 1 and not any(map(math.isnan, values))
            found[name] = statistics.mean(values), statistics.stdev(values) if known else 0.0
        return found


def rows(
    fidelity: Fidelity,
    teacher: Model | None,
    student: Model | None,
    count: int,
    steps: Sequence[int],
    repeats: int,
    precision: str = "float32",
) -> Iterator[Row]:
    """The table's rows one by one: the real images of the other split, a teacher in each of ``steps``, a student.

    Each is measured on ``count`` samples of every one of ``repeats`` seeds, which the networks make in ``precision``.
    """
    other = "heldout" if fidelity.split == "train" else "train"
    real = fidelity.of_split(other)
    yield Row(f"real {other} images ({real.count:,})", [fidelity.scores(real)])
    if teacher is not None:
        for number in steps:
            draw = sampler(teacher, number, precision=precision)
            scores = [fidelity(draw, teacher.net, count, seed) for seed in range(repeats)]
            yield Row(f"teacher, {number} Euler step{'s' if number > 1 else ''}", scores, evaluations(number))
    if student is not None:
        for number in student.description.steps or (student.description.evaluations,):
            draw = sampler(student, number, precision=precision)
            scores = [fidelity(draw, student.net, count, seed) for seed in range(repeats)]
            yield Row(f"student, {'one step' if number == 1 else f'{number} steps'}", scores, number)


def markdown(table: Sequence[Row], protocol: dict[str, Any]) -> str:
    """The table as Markdown, and the protocol below it."""
    lines = [
        "| | Fréchet Inception distance | kernel distance x 1000, ± standard error | precision | recall "
        "| network evaluations |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        found = row.spread()
        error = found["kernel_error"][0]
        kernel = f"{1000 * found['kernel'][0]:.4g}" + ("" if math.isnan(error) else f" ± {1000 * error:.2g}")
        cells = [_cell(row, "frechet", ".4g"), kernel, _cell(row, "precision", ".3f"), _cell(row, "recall", ".3f")]
        lines.append(f"| {' | '.join([row.name, *cells, str(row.evaluations or '')])} |")
    lines += [
        "",
        "Protocol: " + "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in protocol.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: Row, name: str, digits: str) -> str:
    """A score; with several seeds its mean, its standard deviation and every seed's value."""
    mean, deviation = row.spread()[name]
    if len(row.scores) == 1:
        return f"{mean:{digits}}"
    return f"{mean:{digits}} ± {deviation:{digits}} ({', '.join(f'{getattr(s, name):{digits}}' for s in row.scores)})"


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    """``values`` with None in the place of NaN, which JSON does not have."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def write(folder: Path, table: Sequence[Row], protocol: dict[str, Any], **context: Any) -> None:
    """``evaluation.json`` and ``table.md`` in ``folder``; ``context`` (threads, versions) joins the former."""
    found = [
        {
            "name": row.name,
            "network_evaluations": row.evaluations,
            **_plain({name: mean for name, (mean, _) in row.spread().items()}),
            "seeds": [_plain(asdict(each)) for each in row.scores],
        }
        for row in table
    ]
    content = {"metric": "inception", "protocol": protocol, **context, "rows": found}
    written = {"evaluation.json": json.dumps(content, indent=1) + "\n", "table.md": markdown(table, protocol)}
    for name, text in written.items():
        with replacing(folder / name) as stream:
            stream.write(text.encode())
