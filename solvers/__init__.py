"""Few-step and adaptive solvers for the probability-flow ODE and the reverse SDE, for any SDE with a Gaussian kernel.

Each uses an SDE through its mean_coeff(t) and std(t) alone (the adaptive ones through its drift and diffusion), so that
VE, VP, sub-VP and any new SDE have all of them. `SOLVERS` lists them by the name that `config.sampling.method` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from sde_lib import SDE
from solvers import fixed_grid, multistep, noise_levels, runge_kutta
from solvers.adaptive import sample_adaptive_sde, sample_ode
from solvers.fixed_grid import Solver
from solvers.interface import Sampler, StepResult, StepTransform

__all__ = ["ADAPTIVE", "FIXED_GRID", "SOLVERS", "Sampler", "Solver", "StepResult", "StepTransform"]

GREY_LEVELS = 256  # that `sampling.adaptive_levels` counts in, whatever the data's number of levels is
DEIS_ORDER, UNIPC_ORDER = 3, 2  # with `sampling.solver_order=0`


def _build_heun(settings: ConfigDict, sde: SDE, grid: noise_levels.NoiseLevels) -> Solver:
    return runge_kutta.heun(
        grid,
        sde,
        s_churn=settings.s_churn,
        s_tmin=settings.s_tmin,
        s_tmax=settings.s_tmax or float("inf"),
        s_noise=settings.s_noise,
    )


FIXED_GRID: dict[str, Callable[[ConfigDict, SDE, noise_levels.NoiseLevels], Solver]] = {
    "ddim": lambda settings, sde, grid: multistep.ddim(grid, eta=settings.eta),
    "deis": lambda settings, sde, grid: multistep.deis(grid, sde, order=settings.solver_order or DEIS_ORDER),
    "dpmpp_2m": lambda settings, sde, grid: multistep.dpmpp_2m(grid),
    "dpmpp_3m": lambda settings, sde, grid: multistep.dpmpp_3m(grid),
    "dpmpp_sde": lambda settings, sde, grid: multistep.dpmpp_sde(grid),
    "heun": _build_heun,
    "rk4": lambda settings, sde, grid: runge_kutta.rk4(grid, sde),
    "stochastic_heun": lambda settings, sde, grid: runge_kutta.stochastic_heun(grid),
    "unipc": lambda settings, sde, grid: multistep.unipc(grid, order=settings.solver_order or UNIPC_ORDER),
}


def _build_fixed_grid(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    settings = config.sampling
    grid = noise_levels.noise_levels(
        sde, noise_levels.time_grid(sde, settings.num_steps or config.model.num_scales, settings.time_grid)
    )
    solver = FIXED_GRID[settings.method](settings, sde, grid)
    return functools.partial(
        fixed_grid.sample, solver=solver, grid=grid, sde=sde, shape=shape, noise_removal=settings.noise_removal
    )


def _build_ode(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    settings = config.sampling
    if settings.noise_removal:
        sde.check_steps()
    return functools.partial(
        sample_ode,
        sde=sde,
        shape=shape,
        noise_removal=settings.noise_removal,
        rtol=settings.rtol,
        atol=settings.atol,
        step_control=settings.step_control,
    )


def _build_adaptive_sde(config: ConfigDict, sde: SDE, shape: tuple[int, ...]) -> Sampler:
    settings = config.sampling
    width = 2.0 if config.data.centered else 1.0  # of the network's range
    return functools.partial(
        sample_adaptive_sde,
        sde=sde,
        shape=shape,
        noise_removal=settings.noise_removal,
        rtol=settings.adaptive_rtol,
        atol=settings.adaptive_levels * width / GREY_LEVELS,
    )


Builder = Callable[[ConfigDict, SDE, tuple[int, ...]], Sampler]
# Methods that choose their steps themselves, whatever `sampling.num_steps` and `sampling.time_grid` are.
ADAPTIVE: dict[str, Builder] = {"adaptive_sde": _build_adaptive_sde, "ode": _build_ode}
SOLVERS: dict[str, Builder] = {**dict.fromkeys(FIXED_GRID, _build_fixed_grid), **ADAPTIVE}
