"""The optimizer: Adam as the 2021 code set it up, through optax."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict

import checks

ADAM_BETA2 = 0.999  # the 2021 code left it at the default of its optimizer


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
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=ADAM_BETA2, eps=eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
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
