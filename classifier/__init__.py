"""The noise-conditional classifier, whose gradient guides samples to classes (Song et al. 2021, Appendix I.1).

`--mode train_classifier` trains one beside a score network; `load_classifier` reads it from there. From Python, with
any network model(x, sigmas) -> logits and any score:

>>> import flax.linen as nn, jax, jax.numpy as jnp
>>> import losses, sampling
>>> from configs import base
>>> from sde_lib import VPSDE
>>> class Linear(nn.Module):
...     @nn.compact
...     def __call__(self, x, sigmas):
...         return nn.Dense(2)(x.reshape(len(x), 4)) / (1 + sigmas[:, None] ** 2)
>>> labels = jnp.arange(64) % 2
>>> images = jnp.broadcast_to(labels[:, None, None, None] - 0.5, (64, 2, 2, 1))
>>> sde, model, normalization = VPSDE(), Linear(), Normalization(mean=(0.0,), std=(0.5,))
>>> loss_fn = make_classifier_loss(sde, model, mean=normalization.mean, std=normalization.std)
>>> optimizer = losses.make_optimizer(lr=0.05, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=0, grad_clip=1.0)
>>> state = losses.init_state(model.init(jax.random.key(0), images, jnp.ones(64))["params"], optimizer)
>>> step = jax.jit(losses.make_train_step(loss_fn, optimizer, ema_rate=0.9))
>>> for _ in range(100):
...     state, metrics = step(jax.random.key(1), state, (images, labels))
>>> classifier = Classifier(state.params_ema, model, normalization, sde, num_classes=2, scale=1.0)

>>> def score_fn(x, t):  # of images N(0, 0.5^2), of any class
...     return -x / (0.25 * sde.mean_coeff(t) ** 2 + sde.std(t) ** 2)[:, None, None, None]
>>> config = base.get_config()
>>> config.sampling.update(method="ddim", num_steps=20)
>>> sample = sampling.build_sampler(config, sde, (8, 2, 2, 1))
>>> x, nfe = jax.jit(lambda key: sample(key, classifier.guide(score_fn, labels[:8])))(jax.random.key(2))
>>> bool(x[1::2].mean() > 0.2 > -0.2 > x[::2].mean())
True
"""

from classifier.experiment import Normalization
from classifier.guidance import Classifier, condition_on_class, load_classifier
from classifier.loss import classify_noisy, make_classifier_loss

__all__ = [
    "Classifier",
    "Normalization",
    "classify_noisy",
    "condition_on_class",
    "load_classifier",
    "make_classifier_loss",
]
