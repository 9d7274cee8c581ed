"""Training objectives (`objectives`) at times drawn from a density (`times`), the optimizer, and the train step.

A loss is `(key, params, x, train) -> float[B]`, one value for each image; the steps average it over the global batch.
"""

from losses.classification import classify_noisy, make_classifier_loss
from losses.objectives import (
    OBJECTIVES,
    LossFn,
    Params,
    build_loss,
    make_continuous_loss,
    make_ddpm_loss,
    make_smld_loss,
    with_label_dropout,
)
from losses.optimizer import ADAM_BETA2, build_optimizer, make_optimizer
from losses.skipping import skip_nonfinite
from losses.steps import TrainState, init_state, make_train_step, make_train_steps, update_ema
from losses.times import TRAINING_EPS, DrawTimes, make_importance_times, make_uniform_times

__all__ = [
    "ADAM_BETA2",
    "OBJECTIVES",
    "TRAINING_EPS",
    "DrawTimes",
    "LossFn",
    "Params",
    "TrainState",
    "build_loss",
    "build_optimizer",
    "classify_noisy",
    "init_state",
    "make_classifier_loss",
    "make_continuous_loss",
    "make_ddpm_loss",
    "make_importance_times",
    "make_optimizer",
    "make_smld_loss",
    "make_train_step",
    "make_train_steps",
    "make_uniform_times",
    "skip_nonfinite",
    "update_ema",
    "with_label_dropout",
]
