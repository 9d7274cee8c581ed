"""Inverse problems: images given measurements y = A x + noise, by an unconditional network (Song et al. 2021, Sec. 5).

The measurement enters as a transform of a sampling step (`sampling.StepTransform`) or as a change of the score; the
sampling loop is that of `sampling` and `solvers`. `build_operator` and `build_restoration` make both from
`config.restore`. From Python, with any score:

>>> import jax, jax.numpy as jnp, numpy as np
>>> import sampling
>>> from configs import base
>>> from sde_lib import VPSDE
>>> sde = VPSDE()
>>> def score_fn(x, t):  # of images whose pixels are one normal value: N(0, J), J of ones
...     m, variance = (coef[:, None, None, None] for coef in (sde.mean_coeff(t), sde.std(t) ** 2))
...     projected = x.mean((1, 2, 3), keepdims=True) / (16 * m**2 + variance)
...     return -(x - x.mean((1, 2, 3), keepdims=True)) / variance - projected
>>> config = base.get_config()
>>> config.sampling.update(method="pc", predictor="euler_maruyama", num_steps=200)
>>> sample = sampling.build_sampler(config, sde, (2, 4, 4, 1))
>>> left_half = np.repeat([1.0, 0.0], 2)[None, :, None] * np.ones((4, 1, 1))
>>> operator = operators.inpainting(left_half)
>>> y = operator.apply(jnp.stack([jnp.full((4, 4, 1), value) for value in (-0.5, 0.8)]))

>>> keep_known = projection.put_in_each_step(operator, y, sde, noise=0.0, strength=1.0)
>>> x, nfe = jax.jit(lambda key: sample(key, score_fn, transform=keep_known))(jax.random.key(0))
>>> bool(jnp.abs(x[:, 0, 3, 0] - jnp.array([-0.5, 0.8])).max() < 0.2)  # a pixel that was not measured
True

>>> weighting = guidance.mmps_weighting(operator, sde, noise=0.1, scale=1.0, num_steps=2)
>>> guided = guidance.guide(score_fn, operator, y, sde, weighting)
>>> x, nfe = jax.jit(lambda key: sample(key, guided))(jax.random.key(0))
>>> bool(jnp.abs(x[:, 0, 3, 0] - jnp.array([-0.5, 0.8])).max() < 0.2)
True
"""

from controllable_generation import guidance, operators, projection
from controllable_generation.operators import Operator, from_functions
from controllable_generation.restoration import Conditional, Restoration, build_operator, build_restoration

__all__ = [
    "Conditional",
    "Operator",
    "Restoration",
    "build_operator",
    "build_restoration",
    "from_functions",
    "guidance",
    "operators",
    "projection",
]
