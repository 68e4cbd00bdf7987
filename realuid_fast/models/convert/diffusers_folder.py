"""Models and pipelines of diffusers in a local folder: JSON and safetensors, no hub and no pickle."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import UserError
from ...files import read_regular
from ...networks.diffusers import CLASSES
from ..files import Description, read_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("unet", "transformer")
# Classes of the first releases, with their names today.
RENAMED = {"Transformer2DModel": "DiTTransformer2DModel"}
# Names of attention layers in U-Nets of the first releases, with their names today.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}
# A last step of pure noise is given this share of the signal of the step before, so that its logarithm is finite.
LEAST = 2.0**-10
MOST_BYTES = 2**24  # the largest file of JSON that is read


def read(folder: Path) -> tuple[dict[str, Tensor], Description]:
    """State and description of the model in ``folder``, or in its subfolder ``unet`` or ``transformer``.

    Path and prediction come from the scheduler in the subfolder ``scheduler``:

    =======================================  ============================================================
    FlowMatch...                             ``linear`` with data at 0 and its ``shift``, ``velocity``
    ``use_flow_sigmas``                      the same, with the prediction that it names and ``flow_shift``
    ``sigma_data`` (EDM...)                  ``ve``, ``edm``
    ScoreSdeVe...                            ``ve``, ``score``
    ``beta_schedule`` or ``trained_betas``   ``vp-discrete``, ``noise``, ``v`` or ``x0``
    =======================================  ============================================================

    Without a scheduler the description's path is empty, for the caller to fill.

    Raises:
        UserError: a file is missing or damaged, or a class or setting is not supported; the error names it.
    """
    model = next((folder / part for part in PARTS if (folder / part / "config.json").is_file()), folder)
    config = _json(model / "config.json")
    name = RENAMED.get(str(config.get("_class_name")), config.get("_class_name"))
    if name not in CLASSES:
        raise UserError(f"{model} holds a {name}, which is none of {', '.join(CLASSES)}")
    side = config.get("sample_size")
    sides = [side, side] if isinstance(side, int) else side
    channels = config.get("in_channels")
    if not isinstance(sides, list) or len(sides) != 2 or not isinstance(channels, int):
        raise UserError(f"{model / 'config.json'} does not say sample_size and in_channels")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    network: dict[str, Any] = {"kind": "diffusers", "class_name": name, "config": settings, "dim": [channels, *sides]}
    path: tuple[str, dict[str, Any], str] = ("", {}, "")
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = _json(folder / "scheduler" / "scheduler_config.json")
        try:
            *path_and_settings, predict = _path(scheduler)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{folder / 'scheduler'} has a value that is not a number: {error}") from None
        path = (*path_and_settings, predict.removeprefix("-"))  # type: ignore[assignment]
        if predict.startswith("-"):
            network["negate"] = True
    latent = " of latents" if (folder / "vae").is_dir() else ""
    description = Description(
        network=network,
        path=path[0],
        path_settings=path[1],
        predict=path[2],
        preprocessing=f"as the pipeline's{latent}" if latent else "pixels / 127.5 - 1",
    )
    state = {f"net.{_renamed(key)}": value for key, value in _weights(model).items()}
    return state, description


def _weights(model: Path) -> dict[str, Tensor]:
    if (model / WEIGHTS).is_file():
        return read_safetensors(model / WEIGHTS)[0]
    index = model / f"{WEIGHTS}.index.json"
    if not index.is_file():
        there = ", ".join(sorted(file.name for file in model.iterdir())) or "nothing"
        raise UserError(f"{model} has no {WEIGHTS}: there is {there}; other formats are not read")
    where = _json(index).get("weight_map")
    if not isinstance(where, Mapping) or any(
        not isinstance(name, str) or Path(name).name != name for name in where.values()
    ):
        raise UserError(f"{index} has no map from weights to files beside it")
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        state |= read_safetensors(model / name)[0]
    return state


def _renamed(key: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", key)


def _path(scheduler: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """The path, its settings and the prediction of a scheduler's configuration; ``-edm`` is the negative prediction."""
    name = str(scheduler.get("_class_name"))
    steps = int(scheduler.get("num_train_timesteps", 1000))
    asked = scheduler.get("prediction_type")
    if name.startswith("FlowMatch") or scheduler.get("use_flow_sigmas"):
        predict = "velocity" if name.startswith("FlowMatch") else PREDICTIONS.get(str(asked), "")
        if not predict or predict == "v":
            raise UserError(f"the scheduler {name} has the prediction_type {asked!r} on a flow, which is not supported")
        if scheduler.get("use_dynamic_shifting"):
            warnings.warn(f"the scheduler {name} has a shift by the image's size: it is left out", stacklevel=2)
        shift = float(scheduler.get("shift" if name.startswith("FlowMatch") else "flow_shift") or 1.0)
        shift = 1.0 if scheduler.get("use_dynamic_shifting") else shift
        numbers = {"time_scale": float(steps), "shift": shift}
        usual = {"time_scale": 1000.0, "shift": 1.0}
        return "linear", {"data_at": 0, **{k: v for k, v in numbers.items() if v != usual[k]}}, predict
    if name.startswith("EDM"):
        if asked not in ("epsilon", "v_prediction"):
            raise UserError(f"the scheduler {name} has the prediction_type {asked!r}, which is not supported")
        numbers = {key: float(scheduler[key]) for key in ("sigma_min", "sigma_max", "sigma_data") if key in scheduler}
        # This scheduler's v_prediction is the same preconditioning with the opposite sign of c_out.
        return "ve", numbers, "edm" if asked == "epsilon" else "-edm"
    if name.startswith("ScoreSdeVe"):
        return "ve", {key: float(scheduler[key]) for key in ("sigma_min", "sigma_max") if key in scheduler}, "score"
    if scheduler.get("timestep_type", "discrete") != "discrete":
        raise UserError(f"the scheduler {name} has the timestep_type {scheduler['timestep_type']!r}, not discrete")
    predict = PREDICTIONS.get(str(scheduler.get("prediction_type", "epsilon")), "")
    if not predict or predict == "velocity":
        raise UserError(f"the scheduler {name} has the prediction_type {asked!r}, which is not supported")
    betas = scheduler.get("trained_betas")
    if betas is not None:
        settings: dict[str, Any] = {"alphas_cumprod": np.cumprod(1 - np.array(betas, dtype=np.float64)).tolist()}
    elif "beta_schedule" in scheduler:
        settings = {
            "schedule": str(scheduler["beta_schedule"]),
            "beta_start": float(scheduler.get("beta_start", 1e-4)),
            "beta_end": float(scheduler.get("beta_end", 0.02)),
            "steps": steps,
        }
    else:
        raise UserError(f"the scheduler {name} is none that is supported: it has no betas and is no flow")
    if scheduler.get("rescale_betas_zero_snr"):
        settings = {"alphas_cumprod": _without_signal(settings)}
    return "vp-discrete", settings, predict


def _without_signal(settings: Mapping[str, Any]) -> list[float]:
    """The table moved and stretched so that its last step holds no signal: Lin et al. (2305.08891), algorithm 1."""
    from ...paths import DiscreteVP

    root = np.sqrt(DiscreteVP(**settings).table())
    table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    table[-1] = LEAST * table[-2]
    return table.tolist()


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"there is no file {file}")
    try:
        content = json.loads(read_regular(file, MOST_BYTES))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is no JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no mapping")
    return content
