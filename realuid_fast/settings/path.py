"""The settings of the path, of the laws of times and of the distance."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import paths
from ..errors import UserError
from ..matching import Matching
from ..teachers import Description
from .field import setting

# A view, so that a sampler that somebody adds can be named too.
SAMPLERS: Mapping[str, Any] = ChainMap({"beta": None, "discrete": None}, paths.samplers.SAMPLERS)


@dataclass(frozen=True)
class LawConfig:
    """A law of times and a time weight in ``distill`` where they differ from those of ``path``."""

    sampler: str | None = setting(None, "as path.sampler, which holds if this is null", choices=SAMPLERS)
    sampler_settings: dict[str, Any] = setting(dict, "the numbers of this sampler")
    weight: str | None = setting(None, "as path.weight, which holds if this is null", choices=paths.WEIGHTS)


@dataclass(frozen=True)
class PathConfig:
    """The interpolant, what networks predict on it, and the law of times and the distance that they are trained with.

    ``distill`` takes from its teacher the path, its settings and the prediction where they are not given.
    ``train-teacher`` then trains a velocity on the linear path.
    """

    name: str | None = setting(None, "the path from noise to data", choices=paths.PATHS)
    settings: dict[str, Any] = setting(dict, "the path's own numbers, the arguments of its class in realuid_fast.paths")
    predict: str | None = setting(None, "what the network's output is", choices=paths.PREDICTIONS)
    sampler: str = setting("stratified", "the law of the times", choices=SAMPLERS)
    sampler_settings: dict[str, Any] = setting(dict, "the sampler's own numbers")
    match: str = setting(
        "velocity",
        "the space in which distances are taken; the objectives sds, dmd, sid and realsid need x0",
        choices=paths.MATCH_SPACES,
    )
    weight: str = setting("one", "the weight of a time in the loss", choices=paths.WEIGHTS)
    fake: LawConfig = setting(LawConfig, "the times of the fake model's turn and their weight")
    generator: LawConfig = setting(LawConfig, "the times of the generator's turn and their weight")
    guidance: LawConfig = setting(
        LawConfig, "the times and the weight of what distill.guidance adds to a gradient in the samples alone"
    )

    def turns(self, teacher: Description | None = None) -> dict[str, Matching]:
        """:meth:`build` for each turn, or the guidance, that has a law of times or a weight of its own.

        Raises:
            UserError: as :meth:`build`, with the turn's key, or numbers of a sampler that the turn does not name.
        """
        found = {}
        for turn in ("fake", "generator", "guidance"):
            law: LawConfig = getattr(self, turn)
            if law == LawConfig():
                continue
            given: dict[str, Any] = {} if law.weight is None else {"weight": law.weight}
            if law.sampler is not None:
                given |= {"sampler": law.sampler, "sampler_settings": law.sampler_settings}
            elif law.sampler_settings:
                raise UserError(f"path.{turn}.sampler_settings is given, but path.{turn}.sampler is null")
            try:
                found[turn] = replace(self, **given).build(teacher)
            except UserError as error:
                raise UserError(re.sub(r"^path\.(sampler|weight)", rf"path.{turn}.\1", str(error))) from None
        return found

    def build(self, teacher: Description | None = None) -> Matching:
        """The path with its sampler, prediction and weight; ``teacher`` fills in what is not given.

        Raises:
            UserError: an unknown name, settings or numbers that the path or the sampler refuses, a pair of match space
                and prediction without a conversion, or a path or prediction other than the teacher's.
        """
        try:
            sampler = paths.samplers.build(self.sampler, self.sampler_settings)
        except UserError as error:
            raise UserError(f"path.sampler: {error}") from None
        name, settings, predict = self.name or "linear", self.settings, self.predict or "velocity"
        if teacher is not None:
            name, predict = self.name or teacher.path, self.predict or teacher.predict
            settings = self.settings or (teacher.path_settings if name == teacher.path else {})
        path = paths.build(name, settings, sampler)
        if teacher is not None:
            if name != teacher.path:
                raise UserError(f"the teacher was trained on the path '{teacher.path}', not on path.name '{name}'")
            if paths.build(name, settings) != teacher.interpolant():
                raise UserError(
                    f"the teacher was trained on the path '{name}' with the settings {teacher.path_settings}, not with "
                    f"path.settings {settings}"
                )
            if predict != teacher.predict:
                raise UserError(f"the teacher predicts {teacher.predict}, not path.predict {predict}")
        try:
            weight = paths.weight(self.weight, path)
        except UserError as error:
            raise UserError(f"path.weight: {error}") from None
        try:
            return Matching(path, predict, self.match, weight)
        except UserError as error:
            raise UserError(f"path.match and path.predict: {error}") from None
