"""Training objectives (`objectives`), the optimizer (`optimizer`), and the train and eval steps (`steps`).

A loss is `(key, params, x, train) -> float[B]`, one value for each image; the steps average it over the global batch.
"""

from losses.objectives import (
    TRAINING_EPS,
    LossFn,
    Params,
    build_loss,
    make_continuous_loss,
    make_ddpm_loss,
    make_smld_loss,
)
from losses.optimizer import ADAM_BETA2, build_optimizer, make_optimizer
from losses.steps import TrainState, init_state, make_train_step, make_train_steps, update_ema

__all__ = [
    "ADAM_BETA2",
    "TRAINING_EPS",
    "LossFn",
    "Params",
    "TrainState",
    "build_loss",
    "build_optimizer",
    "init_state",
    "make_continuous_loss",
    "make_ddpm_loss",
    "make_optimizer",
    "make_smld_loss",
    "make_train_step",
    "make_train_steps",
    "update_ema",
]
