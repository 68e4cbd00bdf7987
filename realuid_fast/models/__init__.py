"""Finished networks: their files, their sampling, conversions from others, pictures of what they make.

:func:`load` and :func:`sample` are all that a user of a finished network needs; :mod:`.hub` exchanges networks
with the Hugging Face hub.
"""

from . import hub
from .loaded import STEPS, Loaded, load, open_model, sample

__all__ = ["STEPS", "Loaded", "hub", "load", "open_model", "sample"]
