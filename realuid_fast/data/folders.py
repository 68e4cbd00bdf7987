"""Images in folders: which files are images, and the classes and the split that follow from their paths."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# The splits by the names of their folders, and the numbers that CelebA's partition gives to them.
TRAIN, LEFT_OUT, HELDOUT = 0, 1, 2
_TRAINING = ("train", "training")
_VALIDATION = ("val", "valid", "validation")
_TEST = ("test", "testing", "heldout")
HELDOUT_EVERY = 10


@dataclass(frozen=True)
class Layout:
    """The images of a folder or archive in alphabetical order, with the classes and the split from their paths.

    ``names`` are paths inside the source. ``classes`` are the names of the classes and ``numbers`` each image's class;
    both are empty without classes. ``splits`` says which of :data:`TRAIN`, :data:`LEFT_OUT` and
    :data:`HELDOUT` each image belongs to; it is empty if the folders make no split.
    """

    names: list[str]
    classes: tuple[str, ...]
    numbers: list[int]
    splits: list[int]

    def split(self, every: int | None) -> tuple[list[int], list[int]]:
        """The rows to train on and the rows to hold out: by folders, else every ``every``-th image is held out.

        Both are all rows for ``every = 0``, and, with a warning, for fewer than ``every`` images. Raises
        :class:`UserError` if ``every`` is given although folders make the split.
        """
        if self.splits:
            if every is not None:
                raise UserError("heldout_every cannot be given: the folders of the images make the split already")
            return of_splits(self.splits)
        every, rows = HELDOUT_EVERY if every is None else every, list(range(len(self.names)))
        if not every:
            return rows, rows
        if len(rows) < every:
            warnings.warn(
                f"with fewer than heldout_every = {every} images (here {len(rows)}) the training images are held out",
                stacklevel=2,
            )
            return rows, rows
        return [row for row in rows if (row + 1) % every], rows[every - 1 :: every]


def check_heldout_every(every: int | None) -> None:
    """Raise :class:`UserError` if holding out every ``every``-th image leaves none to train on."""
    if every is not None and (every < 0 or every == 1):
        raise UserError(f"heldout_every must be 0 (nothing held out) or at least 2, got {every}")


def of_splits(splits: Sequence[int]) -> tuple[list[int], list[int]]:
    """The row numbers of the split :data:`TRAIN`, and those of :data:`HELDOUT`."""
    train, heldout = ([row for row, split in enumerate(splits) if split == wanted] for wanted in (TRAIN, HELDOUT))
    return train, heldout


def is_image(name: PurePosixPath) -> bool:
    """Whether a path inside a source is an image's, by its suffix. Hidden files and those in hidden folders are not."""
    return name.suffix.lower() in IMAGE_SUFFIXES and not any(folder.startswith(".") for folder in name.parts)


def images_in(root: Path) -> list[str]:
    """The images under a folder, as paths inside it, sorted folder by folder.

    Links are followed, but for those to a folder that they lie in. A link that leads to nothing counts as an image that
    cannot be read if it is called like one; else a warning names it.

    Raises :class:`UserError` if there are none, or if a folder cannot be read.
    """
    names = [name for file in _files(root, ()) if is_image(name := PurePosixPath(os.path.relpath(file, root)))]
    if not names:
        raise UserError(f"path: the folder {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [str(name) for name in sorted(names)]


def _files(folder: Path | str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The files under a folder and the links to nothing, without hidden ones; ``above`` are the folders around it."""
    try:
        found = os.stat(folder)
        own = found.st_dev, found.st_ino
        with os.scandir(folder) as opened:
            entries = [entry for entry in opened if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"path: the folder {folder} cannot be read: {error.strerror or error}") from None
    if own in above:
        return
    for entry in entries:
        if os.path.isdir(entry):
            yield from _files(entry.path, (*above, own))
        elif entry.is_symlink() and not os.path.exists(entry):
            if not is_image(PurePosixPath(entry.name)):
                warnings.warn(f"the link {entry.path} leads to nothing that can be read", stacklevel=2)
            yield entry.path
        elif entry.is_file():
            yield entry.path


def layout(names: Sequence[str], labels: bool = True, limit: int | None = None) -> Layout:
    """Classes and split by the paths ``names``, for the first ``limit`` images (of each split, if folders make them).

    Folders make a split if the first folder in which the paths differ is ``train`` or ``test`` (or ``val``) for all
    images. With both ``test`` and ``val``, ``test`` is held out and ``val`` left out. Classes are the folders below
    those, or without a split the first folder in which the paths differ. If an image lies in none, there are no
    classes.

    Raises:
        UserError: other images lie beside the folders ``train`` and ``test``.
    """
    names = list(names)
    splits = _splits(names)
    if splits:
        rows = [row for split in sorted(set(splits)) for row in [i for i, s in enumerate(splits) if s == split][:limit]]
        names, splits = [names[row] for row in sorted(rows)], [splits[row] for row in sorted(rows)]
        shared = _shared(names)
        below = ["/".join(PurePosixPath(name).parts[shared + 1 :]) for name in names]
    else:
        names = below = names[:limit]
    classes, numbers = folder_classes(below) if labels else ((), [])
    return Layout(names, classes, numbers, splits)


def folder_classes(names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes, and each image's class number; both empty unless all images lie in folders of classes."""
    shared, folders = _shared(names), [PurePosixPath(name).parent.parts for name in names]
    if any(len(above) == shared for above in folders):
        return (), []
    classes = tuple(sorted({above[shared] for above in folders}))
    number = {name: i for i, name in enumerate(classes)}
    return classes, [number[above[shared]] for above in folders]


def _shared(names: Sequence[str]) -> int:
    """The number of leading folders that all paths have in common."""
    return len(PurePosixPath(os.path.commonpath([PurePosixPath(name).parent for name in names])).parts)


def _splits(names: Sequence[str]) -> list[int]:
    """The split of each image; empty if the folders make none."""
    shared = _shared(names)
    firsts = [PurePosixPath(name).parts[shared].lower() for name in names]
    found = set(firsts)
    held = found.intersection(_TEST) or found.intersection(_VALIDATION)
    if not found.intersection(_TRAINING) or not held:
        return []
    if others := [name for name, f in zip(names, firsts, strict=True) if f not in (*_TRAINING, *_VALIDATION, *_TEST)]:
        split = ", ".join(sorted(found.intersection((*_TRAINING, *_VALIDATION, *_TEST))))
        raise UserError(
            f"{others[0]} lies beside the folders {split}, which make a split: move what belongs to no part of it "
            "elsewhere"
        )
    return [TRAIN if first in _TRAINING else HELDOUT if first in held else LEFT_OUT for first in firsts]
