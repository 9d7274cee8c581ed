"""The smoke run: any experiment, shrunk until two training steps take seconds and need no files."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.settings import check
from parallel import distributed

# Of the first level. The groups of the normalization fix the smallest: DDPM's has 32 of them, whatever the width.
CHANNELS = {"ddpm": 32}
FEWEST_CHANNELS = 8
IMAGES = 8  # of a batch and of the sample grid, at the least
TEST_IMAGES = 304  # the 297 test digits in one batch that 1, 2, 4, 8 or 16 devices divide
FEWEST_STEPS = 8  # of the sampler
NUM_CLASSES = 10  # of the digits
TOLERANCE = 1e-2  # of the ODE solvers


def _data() -> dict[str, Any]:
    """Returns the settings of the embedded digits."""
    digits = {"dataset": "digits", "image_size": 8, "image_width": 0, "num_channels": 1, "num_levels": 17}
    return digits | {"path": "", "category": "", "tfrecords_path": ""}


def _model(model: ConfigDict) -> dict[str, Any]:
    """Returns the sizes of the network; what makes it one of its family is not among them."""
    return {
        "nf": min(model.nf, CHANNELS.get(model.name, FEWEST_CHANNELS)),
        "ch_mult": (1, 2)[: len(model.ch_mult)],
        "num_res_blocks": min(model.num_res_blocks, 1),
        "attn_resolutions": (4,) if model.attn_resolutions else (),
        "blocks_per_group": 1,
        "channel_multiplier": 1,
        "num_classes": NUM_CLASSES if model.num_classes else 0,
    }


def _schedule() -> dict[str, Any]:
    """Returns a schedule of two steps: a state to resume from after the first, a snapshot after the second."""
    schedule = {"n_iters": 2, "n_jitted_steps": 1, "log_freq": 1, "eval_freq": 2}
    schedule |= {"snapshot_freq": 2, "snapshot_freq_for_preemption": 1}
    return schedule | {"batch_size": distributed.round_up(IMAGES)}


def _training() -> dict[str, Any]:
    """Returns the schedule of the score network and the size of its sample grid."""
    return _schedule() | {"snapshot_sampling": True, "snapshot_num_samples": IMAGES}


def _classifier(classifier: ConfigDict) -> dict[str, Any]:
    """Returns the schedule and the size of the classifier."""
    return _schedule() | {"blocks_per_group": 1, "channel_multiplier": 1, "warmup": min(classifier.warmup, 1)}


def _sampling(config: ConfigDict) -> dict[str, Any]:
    """Returns a sampler of few steps; ancestral sampling of the VP SDE needs more of them than beta_max."""
    steps = max(FEWEST_STEPS, int(config.model.beta_max) + 1)
    steps = min(steps, config.sampling.num_steps or config.model.num_scales)
    labels = config.sampling.labels if config.model.num_classes <= NUM_CLASSES else f"0..{NUM_CLASSES - 1}"
    return {"labels": labels} | {"num_steps": steps, "n_steps_each": 1, "rtol": TOLERANCE, "atol": TOLERANCE}


def _eval() -> dict[str, Any]:
    """Returns an evaluation of the only snapshot: the loss of the test images."""
    batch_size = distributed.round_up(TEST_IMAGES)
    only_loss = {"enable_loss": True, "enable_bpd": False, "enable_sampling": False}
    of_the_digits = {"extractor": "auto", "weights": "", "reference": ""}
    counts = {"begin_ckpt": 1, "end_ckpt": 1, "batch_size": batch_size, "num_samples": IMAGES}
    return counts | only_loss | of_the_digits


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every setting; return the smoke run of an experiment whose training.smoke is set, any other as it is."""
    check(config)
    return shrink(config) if config.training.smoke else config


def shrink(config: ConfigDict) -> ConfigDict:
    """Shrinks an experiment to two steps on the embedded digits; shrinking it again changes nothing.

    Everything else is kept: the SDE, the noise levels, the loss, the kind of network and sampler. Warm-up is cut to one
    step, so that the second one moves the parameters by the whole learning rate.

    Args:
      config: any experiment; not changed.

    Returns:
      A new locked configuration.
    """
    small = ConfigDict(config.to_dict())
    small.data.update(_data())
    small.model.update(_model(config.model))
    small.training.update(_training())
    small.optim.warmup = min(config.optim.warmup, 1)
    small.classifier.update(_classifier(config.classifier))
    small.sampling.update(_sampling(config))
    small.likelihood.update(rtol=TOLERANCE, atol=TOLERANCE)
    small.eval.update(_eval())
    return small.lock()
