"""The smoke run: any experiment, shrunk until two training steps take seconds and need no files."""

from __future__ import annotations

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


def resolve(config: ConfigDict) -> ConfigDict:
    """Check every setting; return the smoke run of an experiment whose training.smoke is set, any other as it is."""
    check(config)
    return shrink(config) if config.training.smoke else config


def shrink(config: ConfigDict) -> ConfigDict:
    """Return an experiment shrunk to two steps on the embedded digits; shrinking it again changes nothing.

    Everything else is kept: the SDE, the noise levels, the loss, the kind of network and sampler. Warm-up is cut to one
    step, so that the second one moves the parameters by the whole learning rate.
    """
    small = ConfigDict(config.to_dict())
    model, num_classes = config.model, NUM_CLASSES if config.model.num_classes else 0
    # A state to resume from after the first step, a snapshot after the second.
    schedule = {"n_iters": 2, "n_jitted_steps": 1, "log_freq": 1, "eval_freq": 2, "snapshot_freq": 2}
    schedule |= {"snapshot_freq_for_preemption": 1, "batch_size": distributed.round_up(IMAGES)}
    # Ancestral sampling of the VP SDE needs more steps than beta_max.
    steps = max(FEWEST_STEPS, int(model.beta_max) + 1)
    labels = config.sampling.labels if model.num_classes <= NUM_CLASSES else f"0..{NUM_CLASSES - 1}"

    small.data.update(dataset="digits", image_size=8, image_width=0, num_channels=1, num_levels=17)
    small.data.update(path="", category="", tfrecords_path="")
    small.model.update(
        nf=min(model.nf, CHANNELS.get(model.name, FEWEST_CHANNELS)),
        ch_mult=(1, 2)[: len(model.ch_mult)],
        num_res_blocks=min(model.num_res_blocks, 1),
        attn_resolutions=(4,) if model.attn_resolutions else (),
        blocks_per_group=1,
        channel_multiplier=1,
        num_classes=num_classes,
    )
    small.training.update(schedule, snapshot_sampling=True, snapshot_num_samples=IMAGES)
    small.optim.warmup = min(config.optim.warmup, 1)
    small.classifier.update(schedule, blocks_per_group=1, channel_multiplier=1, warmup=min(config.classifier.warmup, 1))
    small.sampling.update(
        labels=labels,
        num_steps=min(steps, config.sampling.num_steps or model.num_scales),
        n_steps_each=1,
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )
    small.likelihood.update(rtol=TOLERANCE, atol=TOLERANCE)
    small.eval.update(begin_ckpt=1, end_ckpt=1, batch_size=distributed.round_up(TEST_IMAGES), num_samples=IMAGES)
    small.eval.update(enable_loss=True, enable_bpd=False, enable_sampling=False)
    small.eval.update(extractor="auto", weights="", reference="")
    return small.lock()
