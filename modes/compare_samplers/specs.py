"""The list of samplers on the command line: "pc:250,ode,ddim:10,dpmpp_2m:10:time_grid=karras"."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from errors import UserError
from experiment.build import Experiment, check_sampling
from solvers import ADAPTIVE

FORM = "expected METHOD[:STEPS][:KEY=VALUE...]"
# What is compared if nothing is said: what the configuration samples with at its own steps, the adaptive methods, and
# the fast solvers at about 10, 20 and 50 network evaluations: one a step (Heun's methods two, Runge-Kutta's four) and
# one that predicts the data at the end.
DEFAULT = (
    *("pc", "ode", "adaptive_sde"),
    *("ddim:9", "ddim:19", "ddim:49", "deis:9", "deis:19", "unipc:9", "unipc:19"),
    *("dpmpp_2m:9", "dpmpp_2m:19", "dpmpp_2m:49", "dpmpp_3m:9", "dpmpp_3m:19"),
    *("heun:4", "heun:9", "heun:24", "rk4:4", "rk4:12"),
    *("dpmpp_sde:9", "dpmpp_sde:19", "dpmpp_sde:49", "stochastic_heun:9", "stochastic_heun:24"),
)
_TRUTH = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """A sampler of the list.

    Attributes:
      text: as it was given.
      family: its text without the number of steps: samplers of one family are a line in the figure.
      changes: {key of config.sampling: value}.
    """

    text: str
    family: str
    changes: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Name of its folder of samples."""
        return re.sub(r"[^\w.=+-]", "_", self.text)

    @property
    def is_adaptive(self) -> bool:
        """Whether it chooses its steps itself."""
        return self.changes["method"] in ADAPTIVE


def _refuse(text: str, reason: object) -> UserError:
    return UserError(f"--samplers: {text!r}: {reason}")


def _value(text: str, key: str, value: str, present: Any) -> Any:
    """Turns a value's text into the type that the key's present value has."""
    try:
        if isinstance(present, bool):
            return _TRUTH[value.lower()]
        if isinstance(present, (int, float, str)):
            return type(present)(value)
    except (KeyError, ValueError):
        pass
    kind = "True or False" if isinstance(present, bool) else f"a value of type {type(present).__name__}"
    raise _refuse(text, f"{key}={value} is not {kind}")


def _pairs(text: str) -> list[tuple[str, str]]:
    """Splits a sampler's text into (key of config.sampling, text of its value)."""
    method, *parts = text.split(":")
    if not method or "=" in method:
        raise _refuse(text, FORM)
    pairs = [("method", method)]
    for place, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if not equals and place > 0:
            raise _refuse(text, f"{part!r} is no KEY=VALUE; {FORM}")
        pairs.append((key, value) if equals else ("num_steps", part))
    return pairs


def parse_sampler(text: str, sampling: ConfigDict) -> SamplerSpec:
    """Parses the text of one sampler.

    Args:
      text: METHOD[:STEPS][:KEY=VALUE...], keys of config.sampling.
      sampling: config.sampling, whose keys and types are the ones allowed.

    Raises:
      UserError: naming the sampler and what is wrong with it.
    """
    changes: dict[str, Any] = {}
    for key, value in _pairs(text):
        if key not in sampling:
            raise _refuse(text, f"config.sampling has no key {key!r}; known: {', '.join(sorted(sampling))}")
        if key in changes:
            raise _refuse(text, f"sampling.{key} is given twice")
        changes[key] = _value(text, f"sampling.{key}", value, sampling[key])
    if changes["method"] in ADAPTIVE and "num_steps" in changes:
        raise _refuse(text, f"{changes['method']} chooses its steps itself; leave them out")
    parts = [part for part in text.split(":")[1:] if "=" in part and not part.startswith("num_steps=")]
    return SamplerSpec(text, " ".join([changes["method"], *parts]), changes)


def apply_sampler(experiment: Experiment, spec: SamplerSpec) -> Experiment:
    """Returns the experiment with this sampler, which is built once so that it is checked; nothing is compiled.

    Raises:
      UserError: naming the sampler, if its settings are wrong or it is not defined for the SDE.
    """
    config = ConfigDict(experiment.config.to_dict())
    config.sampling.update(spec.changes)
    try:
        check_sampling(config, experiment.sde)
    except UserError as error:
        raise _refuse(spec.text, error) from error
    return dataclasses.replace(experiment, config=config.lock())


def _parse(experiment: Experiment, texts: Iterable[str]) -> list[tuple[SamplerSpec, Experiment]]:
    specs = [parse_sampler(text, experiment.config.sampling) for text in texts]
    return [(spec, apply_sampler(experiment, spec)) for spec in specs]


def _check_distinct(chosen: Sequence[tuple[SamplerSpec, Experiment]]) -> None:
    seen: dict[str, str] = {}
    for spec, experiment in chosen:
        settings = str(sorted(experiment.sampler_settings().items()))
        if settings in seen:
            raise _refuse(spec.text, f"the same sampler as {seen[settings]!r}; leave one of them out")
        seen[settings] = spec.text


def choose_samplers(
    experiment: Experiment, samplers: str = ""
) -> tuple[list[tuple[SamplerSpec, Experiment]], dict[str, str]]:
    """Parses a list of samplers and builds each, so that every mistake comes to light before anything is compiled.

    Args:
      experiment: with the settings of config.sampling that a sampler does not change.
      samplers: separated by commas; empty: `DEFAULT`, without those that are not defined for this SDE.

    Returns:
      The samplers, each with the experiment that has it; and of the default ones that are left out {text: reason}.

    Raises:
      UserError: naming the first sampler that is wrong, not defined, or there twice.
    """
    if samplers:
        chosen = _parse(experiment, [text.strip() for text in samplers.split(",")])
        _check_distinct(chosen)
        return chosen, {}
    chosen, skipped = [], {}
    for text in DEFAULT:
        try:
            chosen += _parse(experiment, [text])
        except UserError as error:
            skipped[text] = str(error).partition(": ")[2].partition(": ")[2]
            logging.warning("left out: %s", str(error).partition(": ")[2])
    return chosen, skipped
