"""Networks on disk: safetensors files that describe their network, and checkpoints as others publish them."""

from .models.files import (
    FORMAT,
    KEY,
    MOST_MISSING,
    MOST_UNSAVED,
    ROLES,
    SHIPPED,
    Description,
    Model,
    filled,
    load,
    load_exactly,
    read_safetensors,
    save,
)
from .models.published import (
    CHECKPOINTS,
    HEAD,
    PUBLISHED,
    load_teacher,
    plain_names,
    published,
    published_state,
    settled,
)
from .models.wrap import (
    Called,
    wrap,
)

__all__ = [
    "CHECKPOINTS",
    "FORMAT",
    "HEAD",
    "KEY",
    "MOST_MISSING",
    "MOST_UNSAVED",
    "PUBLISHED",
    "ROLES",
    "SHIPPED",
    "Called",
    "Description",
    "Model",
    "filled",
    "load",
    "load_exactly",
    "load_teacher",
    "plain_names",
    "published",
    "published_state",
    "read_safetensors",
    "save",
    "settled",
    "wrap",
]
