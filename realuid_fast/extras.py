"""Packages of the extra ``train``: the code that uses one imports it inside ``with extra():``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .errors import UserError

# Modules and the packages that bring them.
PACKAGES = {
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}


class MissingPackage(UserError, ImportError):
    """A package of the extra ``train`` is not installed; the message has the command that installs it."""


@contextlib.contextmanager
def extra() -> Iterator[None]:
    """Turn a failed import of a package of the extra into a sentence.

    Raises:
        MissingPackage: one of :data:`PACKAGES` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise MissingPackage(f"{package} is not installed: run pip install 'realuid-fast[train]'") from None
