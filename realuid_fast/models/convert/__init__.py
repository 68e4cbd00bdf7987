"""Networks of others as teachers of this package: one safetensors file with everything that distilling needs.

======================  =================================================================================
``.pt .pth .ckpt .bin``  published checkpoints, torchcfm U-Nets (:func:`realuid_fast.teachers.published_state`)
``.safetensors``        a state dict without a description (:func:`realuid_fast.teachers.plain_names`)
``.pkl``                pickled EDM networks (:mod:`.edm_pickle`, which runs nothing in them)
a folder                a diffusers model or pipeline (:mod:`.diffusers_folder`)
======================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from .. import files, published
from ..calls import follows_flow
from ..files import Description, Model
from ..one_step import starting
from ..published import CHECKPOINTS
from . import diffusers_folder, edm_pickle


def convert(
    source: str | Path,
    out: str | Path,
    network: Mapping[str, Any] | None = None,
    path: str | None = None,
    path_settings: Mapping[str, Any] | None = None,
    predict: str | None = None,
    decay: float | None = None,
    data: Mapping[str, Any] | None = None,
    preprocessing: str = "",
    command: str = "",
    student: bool = False,
    t_start: float = 0.0,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Model:
    """Write ``source`` as ``out``, a file that :func:`realuid_fast.teachers.load_teacher` reads, and return it loaded.

    Args:
        source: a file or folder of a kind in the table above.
        out: the safetensors file to write.
        network: settings of the network, which replace those that the source has. A checkpoint has none, but see
            :func:`realuid_fast.teachers.published` for ``time_scale`` and ``norm_groups`` of a published one.
        path, path_settings, predict: the path and the prediction, if the source does not say them, or to overrule it.
            For a checkpoint the default is the linear path and the velocity.
        decay: the decay of the checkpoint's average to take, 0 for the last weights; the largest by default.
        data, preprocessing, command: for the description, see :class:`realuid_fast.teachers.Description`.
        student, t_start: the checkpoint is a one-step generator from that start time.
        allow_missing, allow_unexpected: names of parameters, or patterns, that need not be in the source or in the
            network; every other difference is an error.

    Raises:
        UserError: the source cannot be read or does not describe its network, or parameters are missing, unexpected, of
            another shape or not finite; the error names each. Nothing is written then.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"the converted file {out} must end in .safetensors")
    state, described = _read(source, decay, dict(network or {}))
    described = replace(
        described,
        path=path or described.path,
        path_settings=dict(path_settings or ({} if path else described.path_settings)),
        predict=predict or described.predict,
        data=dict(data or {}),
        preprocessing=preprocessing or described.preprocessing,
        command=command,
        role="student" if student else "teacher",
        t_start=t_start,
        decay=decay,
    )
    if not described.path or not described.predict:
        raise UserError(f"{source} has no scheduler: say the path and the prediction")
    follows_flow(described.interpolant(), described.predict)
    if student:
        starting(described.interpolant(), described.predict, t_start)
    net = files.filled(described.network, state, str(source), allow_missing, allow_unexpected)
    files.save(out, net.state_dict(), described)
    return Model(net, described)


def _read(source: Path, decay: float | None, network: dict[str, Any]) -> tuple[dict[str, Tensor], Description]:
    if not source.exists():
        raise UserError(f"there is no file or folder {source}")
    if decay is not None and source.suffix not in CHECKPOINTS:
        raise UserError(f"{source} has no averages by decay")
    if source.is_dir() or source.suffix == ".pkl":
        state, described = diffusers_folder.read(source) if source.is_dir() else edm_pickle.read(source)
        return state, replace(described, network={**described.network, **network})
    if source.suffix in CHECKPOINTS:
        network, state = published.published(source, network, decay)
    elif source.suffix == ".safetensors":
        state, metadata = files.read_safetensors(source)
        if files.KEY in metadata:
            raise UserError(f"{source} is a file of this package already")
        state = published.plain_names(state)
        network = published.settled(network, state, str(source), recognised=False)
    else:
        known = ", ".join((*CHECKPOINTS, ".safetensors", ".pkl"))
        raise UserError(f"{source} is neither a folder nor a file that ends in one of {known}")
    if not network:
        raise UserError(f"{source} does not say which network it holds: give its configuration")
    return state, Description(network=network, preprocessing="pixels / 127.5 - 1")
