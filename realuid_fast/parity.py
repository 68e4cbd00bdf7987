"""The settings of ``run.parity``, which follows the published procedure step for step."""

from __future__ import annotations

from typing import Any

_PARITY_LAW: dict[str, Any] = {"sampler": None, "sampler_settings": {}, "weight": None}
_PARITY_STEP = {"warmup_from_zero": True, "decay": "constant"}
# Settings that ``run.parity`` makes: docs/parity.md says where each of them comes from.
PARITY: dict[str, dict[str, Any]] = {
    "path": {
        "name": "linear",
        "settings": {},
        "predict": "velocity",
        "sampler": "uniform",
        "sampler_settings": {},
        "match": "velocity",
        "weight": "one",
        **dict.fromkeys(("fake", "generator", "guidance"), _PARITY_LAW),
    },
    "teacher": {
        **_PARITY_LAW,
        "match": None,
        "optimiser": _PARITY_STEP,
        "label_dropout": 0.0,
        "reduction": "mean",
        "ema_warmup": False,
    },
    "distill": {
        "t_start": 0.0,
        "fake_start": "fresh",
        "dropout": 0.0,
        "labels": "batch",
        "times": (),
        "states": "own",
        "guidance": 1.0,
        "generator": _PARITY_STEP,
        "fake": _PARITY_STEP,
        "ema_warmup": False,
    },
}
PARITY_OBJECTIVES = ("uid", "realuid", "general")
