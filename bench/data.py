"""Times reading images on CPU: ``python -m bench.data``; ``--quick`` few of them.

Random images of CIFAR-10's size and of 64x64 are packed as ``realuid-fast pack`` does, and a pass over them is made in
random order, to float32 batches in [-1, 1] with labels: by the trainer's batches from the packed files and from memory,
and by a plain torch DataLoader over the same files, mapped, without workers and with two, which each pass starts anew.
There are three cases: a pass with the files in the page cache; a pass with the files dropped from it; and the time that
a consumer waits for a batch if it is busy for 10 ms between batches, as with a GPU. Writes data.json and data.md.

The clock is the wall's, since other threads and processes do the reading; all ways run in turn (:mod:`bench.timing`).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from realuid_fast import data
from realuid_fast.data import Dataset
from realuid_fast.data.packing import ArrayWriter
from realuid_fast.data.stored import MANIFEST, Manifest, Split
from realuid_fast.train.batches import Batches

from . import machine, report, timing
from .report import OURS
from .timing import Case, Way

# Images, side, batch: a pass is a whole number of batches, so that all ways visit all images.
SETS, QUICK_SETS = ((51_200, 32, 256), (12_800, 64, 128)), ((2_048, 32, 256),)
WORKERS = 2
WORK = 0.01  # seconds that a consumer is busy between two batches
MEMORY, MAPPED, WORKING = "in memory", "DataLoader, mapped", f"DataLoader, mapped, {WORKERS} workers"
PASS, COLD, WAIT = "a pass", "a pass, files not cached", "waiting for a batch, 10 ms busy in between"
Pass = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]


class Mapped(TorchDataset[Any]):
    """The packed files as the obvious torch data set: one mapping, one image an item."""

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "train_images.npy", mmap_mode="r")
        self.labels = np.load(folder / "train_labels.npy").astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[row].copy()), int(self.labels[row])


def packed(folder: Path, count: int, side: int) -> Dataset:
    """A packed set of random images in ten classes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    shape = (3, side, side)
    splits = []
    for split, rows in (("train", count), ("heldout", 2)):
        with ArrayWriter(folder / f"{split}_images.npy", (rows, *shape), np.dtype(np.uint8)) as images:
            images.add(generator.integers(0, 256, (rows, *shape), dtype=np.uint8))
        with ArrayWriter(folder / f"{split}_labels.npy", (rows,), np.dtype(np.int32)) as labels:
            labels.add(generator.integers(0, 10, rows, dtype=np.int32))
        splits.append(Split(rows, images.entry, labels.entry))
    names = tuple(map(str, range(10)))
    (folder / MANIFEST).write_text(Manifest(shape, names, "random bytes", "random bytes", *splits).text())
    return data.packed(folder)


def passes(folder: Path, dataset: Dataset, batch: int) -> dict[str, Pass]:
    """A pass over all images by every way."""
    memory = Dataset("memory", dataset.train[torch.arange(len(dataset))], dataset.heldout, dataset.train_labels)
    cpu = torch.device("cpu")

    def ours(batches: Batches) -> Pass:
        return lambda: (batches.next() for _ in range(len(dataset) // batch))

    def loader(workers: int) -> Pass:
        def one_pass() -> Iterator[tuple[Tensor, Tensor | None]]:
            # The mapping lives for one pass only, because mapped pages cannot be dropped from the cache.
            for images, labels in DataLoader(Mapped(folder), batch, shuffle=True, num_workers=workers):
                yield data.to_float(images), labels

        return one_pass

    return {
        OURS: ours(Batches(dataset, batch, 0, cpu)),
        MEMORY: ours(Batches(memory, batch, 0, cpu)),
        MAPPED: loader(0),
        WORKING: loader(WORKERS),
    }


def check(ways: dict[str, Pass], batch: int) -> None:
    """Check, by sums over pixels, that every way visits the same images once.

    Raises:
        AssertionError: two ways differ.
    """
    sums = {}
    for name, one_pass in ways.items():
        totals = []
        for images, labels in one_pass():
            assert images.dtype == torch.float32, name
            assert labels is not None, name
            assert len(images) == len(labels) == batch, name
            totals.append(images.double().flatten(1).sum(1))
        sums[name] = torch.cat(totals).sort().values
        torch.testing.assert_close(sums[name], sums[OURS], rtol=1e-12, atol=1e-9)


def cases(folder: Path, ways: dict[str, Pass], shape: tuple[int, ...]) -> list[Case]:
    """The three cases of one set."""

    def whole(one_pass: Pass) -> float:
        start = time.perf_counter()
        for _ in one_pass():
            pass
        return time.perf_counter() - start

    def cold(one_pass: Pass) -> float:
        for file in folder.glob("*.npy"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return whole(one_pass)

    def waiting(one_pass: Pass) -> float:
        waited, count, batches = 0.0, 0, one_pass()
        while True:
            start = time.perf_counter()
            if next(batches, None) is None:
                return waited / count
            waited, count = waited + time.perf_counter() - start, count + 1
            time.sleep(WORK)

    def case(name: str, run: Callable[[Pass], float], chosen: Sequence[str]) -> Case:
        made = [Way(way, lambda p=ways[way]: run(p), way == OURS, times_itself=True) for way in chosen]  # type: ignore[misc]
        return Case(name, shape, made, "uint8")

    everything = list(ways)
    return [case(PASS, whole, everything), case(COLD, cold, [OURS, MAPPED, WORKING]), case(WAIT, waiting, everything)]


def table(rows: Sequence[report.Row], described: dict[str, Any]) -> str:
    """Images a second of the passes and milliseconds of waiting, by way."""
    lines = []
    for ways in report.by_case(rows):
        for name, row in ways.items():
            count, case = row["shape"][0], row["case"]
            speed = "" if case == WAIT else f"{count / row['median_ms'] * 1e3:,.0f}"
            waited = f"{row['median_ms']:.3g}" if case == WAIT else ""
            lines.append([case, report.shape(row), name, speed, waited, f"{row['ratio']:.2f}"])
    header = ["case", "images", "way", "images/s", "ms a batch", f"time by {OURS}'s"]
    text = report.markdown(header, lines, words=3)
    return (
        f"{text}\n`{described['command']}` on {machine.sentence(described)}. {OURS} reads packed files. Medians of the "
        "wall's time; the ratio is the median over rounds of the ratio inside the round.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser("bench.data", __doc__, "time of a case (default 40, quick 2)")
    args = parser.parse_args(argv)
    described = report.start("bench.data", argv, 1) | {"clock": "wall time"}
    rows: list[report.Row] = []
    for count, side, batch in QUICK_SETS if args.quick else SETS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "packed"
            dataset = packed(folder, count, side)
            ways = passes(folder, dataset, batch)
            check(ways, batch)
            for case in cases(folder, ways, (count, 3, side, side)):
                if args.only in case.name:
                    rows += timing.measure(case, calls=1, seconds=report.seconds(args, 40.0, quick=2.0), least=3)
    if not rows:
        parser.error(f"no case has {args.only!r} in its name")
    text = table(rows, described)
    report.write(report.Results("data", described, rows), args.out, {"data": text})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
