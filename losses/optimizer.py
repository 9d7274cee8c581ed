"""The optimizer: Adam as the 2021 code set it up, through optax.

Two parts are our own, equal to optax's but for rounding, so that a step holds no copy of the gradients or of the state:
a value that two results are computed from is stored first (`optimization_barrier`), or cheap to compute twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import checks

SMALL = 4096  # values of an array
ADAM_BETA2 = 0.999  # the 2021 code left it at the default of its optimizer


def global_norm(tree: optax.Params) -> Float[Array, ""]:
    """Returns the root of the sum of the squares of all values.

    Small arrays, biases and scales by the hundred, are summed as one: XLA plans and loads a program for each sum.
    """
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size <= SMALL]
    arrays = [leaf for leaf in leaves if leaf.size > SMALL] + ([jnp.concatenate(small)] if small else [])
    return jnp.sqrt(sum((jnp.sum(array * array) for array in arrays), jnp.zeros(())))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of `max_norm`; one multiplication a value, fused into what uses it."""

    def update(
        grads: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        factor = max_norm / jnp.maximum(global_norm(grads), max_norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Scales gradients as Adam does (Kingma & Ba 2015, Algorithm 1); state and numbers are optax.scale_by_adam's.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        # Stored before they are used: else the update would read the old moments, too, and these be copied for it. One
        # by one: a parameter and what belongs to it stay in the cache from the moments to the average.
        mu, nu = (jax.tree.map(jax.lax.optimization_barrier, moments) for moments in (mu, nu))
        count = optax.safe_increment(state.count)
        # As numbers for all parameters: else XLA computes them for each again.
        corrections = [optax.tree.bias_correction(jnp.ones(()), decay, count) for decay in (b1, b2)]
        factor1, factor2 = jax.lax.optimization_barrier(corrections)
        updates = jax.tree.map(lambda m, v: m * factor1 / (jnp.sqrt(v * factor2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def make_optimizer(
    *, lr: float, beta1: float, eps: float, weight_decay: float, warmup: int, grad_clip: float
) -> optax.GradientTransformation:
    """Adam with linear warm-up from 0, clipping by the global norm and decoupled weight decay.

    Args:
      lr: learning rate after the warm-up.
      beta1: decay of the first moment; that of the second is 0.999.
      eps: added to the root of the second moment.
      weight_decay: fraction of a parameter, times the learning rate, taken from it at each step.
      warmup: steps of the warm-up; the first step has learning rate 0. 0: none.
      grad_clip: bound on the global norm of the gradient; negative: none.
    """
    # A schedule in either case: the optimizer's state, and so a checkpoint, has one structure for all settings.
    schedule = optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else optax.constant_schedule(lr)
    # Stored, as one number for all parameters: else XLA computes it for each again.
    learning_rate = lambda count: jax.lax.optimization_barrier(jnp.asarray(schedule(count)))  # noqa: E731
    return optax.chain(
        clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity(),
        scale_by_adam(beta1, ADAM_BETA2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Builds the optimizer that `config.optim` describes.

    Raises:
      ValueError: if the optimizer is unknown or a setting would silently train nothing.
    """
    optim = config.optim
    checks.one_of("optim.optimizer", optim.optimizer, ("Adam",))
    if optim.grad_clip == 0:
        raise ValueError("optim.grad_clip=0 would set every gradient to zero; a negative value turns clipping off")
    if optim.lr <= 0 or optim.warmup < 0:
        raise ValueError(f"optim.lr={optim.lr}, optim.warmup={optim.warmup}; expected lr > 0 and warmup >= 0 steps")
    return make_optimizer(
        lr=optim.lr,
        beta1=optim.beta1,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        grad_clip=optim.grad_clip,
    )
