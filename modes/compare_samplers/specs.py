"""The value of --samplers: "pc:250,ode,ddim:10,dpmpp_2m:10:time_grid=karras"."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from errors import UserError
from experiment.build import Experiment, check_sampling
from solvers import ADAPTIVE

FORM = "expected METHOD[:STEPS][:KEY=VALUE...]"
# Compared without --samplers: the predictor-corrector sampler with the configured steps, the adaptive methods, and the
# fast solvers at about 10, 20 and 50 network evaluations: one per step (Heun's methods two, Runge-Kutta's four), and
# one that predicts the data at the end.
DEFAULT = (
    *("pc", "ode", "adaptive_sde"),
    *("ddim:9", "ddim:19", "ddim:49", "deis:9", "deis:19", "unipc:9", "unipc:19"),
    *("dpmpp_2m:9", "dpmpp_2m:19", "dpmpp_2m:49", "dpmpp_3m:9", "dpmpp_3m:19"),
    *("heun:4", "heun:9", "heun:24", "rk4:4", "rk4:12"),
    *("dpmpp_sde:9", "dpmpp_sde:19", "dpmpp_sde:49", "stochastic_heun:9", "stochastic_heun:24"),
)


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """A sampler of the list."""

    text: str  # as given
    family: str  # the text without the number of steps: a line in the figure
    changes: Mapping[str, Any]  # {key of config.sampling: value}

    @property
    def folder(self) -> str:
        """Name of the folder of its samples."""
        return re.sub(r"[^\w.=+-]", "_", self.text)

    @property
    def is_adaptive(self) -> bool:
        """Whether it chooses its own steps."""
        return self.changes["method"] in ADAPTIVE


def _refuse(text: str, reason: object) -> UserError:
    return UserError(f"--samplers: {text!r}: {reason}")


def _value(text: str, key: str, value: str, present: Any) -> Any:
    """Convert the text of a value to the type of the key's present value."""
    try:
        if isinstance(present, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(present, (int, float, str)):
            return type(present)(value)
    except (KeyError, ValueError):
        pass
    kind = "True or False" if isinstance(present, bool) else f"a value of type {type(present).__name__}"
    raise _refuse(text, f"{key}={value} is not {kind}")


def parse_sampler(text: str, sampling: ConfigDict) -> SamplerSpec:
    """Parse METHOD[:STEPS][:KEY=VALUE...]; the keys and types are those of `sampling`, config.sampling.

    Raises:
      UserError: naming the sampler and what is wrong with it.
    """
    method, *parts = text.split(":")
    if not method or "=" in method:
        raise _refuse(text, FORM)
    pairs, family = [("method", method)], [method]
    for place, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if not equals and place > 0:
            raise _refuse(text, f"{part!r} is no KEY=VALUE; {FORM}")
        pairs.append((key, value) if equals else ("num_steps", part))
        family += [part] if equals and key != "num_steps" else []
    changes: dict[str, Any] = {}
    for key, value in pairs:
        if key not in sampling:
            raise _refuse(text, f"config.sampling has no key {key!r}; known: {', '.join(sorted(sampling))}")
        if key in changes:
            raise _refuse(text, f"sampling.{key} is given twice")
        changes[key] = _value(text, f"sampling.{key}", value, sampling[key])
    if method in ADAPTIVE and "num_steps" in changes:
        raise _refuse(text, f"{method} chooses its steps itself; leave them out")
    return SamplerSpec(text, " ".join(family), changes)


def choose_samplers(
    experiment: Experiment, samplers: str = ""
) -> tuple[list[tuple[SamplerSpec, Experiment]], dict[str, str]]:
    """Parse a list of samplers and check each, so that every mistake shows before anything is compiled.

    Args:
      experiment: with the settings of config.sampling that a sampler does not change.
      samplers: separated by commas; empty: `DEFAULT`, without those that are not defined for this SDE.

    Returns:
      Each sampler with its experiment; and {text: reason} of the default ones that are left out.

    Raises:
      UserError: naming the first sampler that is wrong, not defined, or listed twice.
    """
    chosen: list[tuple[SamplerSpec, Experiment]] = []
    skipped: dict[str, str] = {}
    seen: dict[str, str] = {}
    texts = samplers.split(",") if samplers else DEFAULT
    for spec in [parse_sampler(text.strip(), experiment.config.sampling) for text in texts]:
        config = ConfigDict(experiment.config.to_dict())
        config.sampling.update(spec.changes)
        try:
            check_sampling(config, experiment.sde)
        except UserError as error:
            if samplers:
                raise _refuse(spec.text, error) from error
            logging.warning("left out: %r: %s", spec.text, error)
            skipped[spec.text] = str(error)
            continue
        chosen.append((spec, dataclasses.replace(experiment, config=config.lock())))
        settings = str(sorted(chosen[-1][1].sampler_settings().items()))
        if samplers and settings in seen:
            raise _refuse(spec.text, f"the same sampler as {seen[settings]!r}; leave one of them out")
        seen[settings] = spec.text
    return chosen, skipped
