"""Every setting, once: name, default, meaning with its unit, allowed values, and the results that it affects.

`base.get_config()` is made of this table, `check` validates a configuration against it, and `affecting` answers from it
whether results may be continued or mixed. The names are those of the 2021 score_sde code, so that its configuration
files carry over. A default's type is the setting's type.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

from ml_collections import ConfigDict

from checks import (
    Choice,
    Rule,
    anything,
    at_least,
    below_one,
    between,
    choice,
    inside_unit,
    key_of,
    positive,
    up_to_one,
)
from errors import UserError

# --- kinds of results ------------------------------------------------------------------------------------------------

# "run"          a workdir: fixed from the first step of its training
# "training"     the steps to come: may change when a training resumes
# "checkpoints"  what a trained network computes: the same wherever a workdir's checkpoints are used
# "samples", "loss", "likelihood", "latents", "restorations"  what is computed with a checkpoint
# "batches"      samples that depend on the others of their batch
# "metrics"      the numbers of a report, which are computed again each time
# "classifier"   the folder of a noise-conditional classifier
# "noise"        the noisy images that a classifier and a score network must share
# "statistics"   those of a data set
# What depends on the content of the data compares their hash besides: `data.path` may change, the images may not.
RESULTS = frozenset({"samples", "loss", "likelihood", "latents", "restorations"})
NONE: frozenset[str] = frozenset()
NETWORK = RESULTS | {"run", "checkpoints"}
NOISE = NETWORK | {"classifier", "noise"}
IMAGES = NOISE | {"statistics"}
LEVELS = IMAGES - {"noise"}
DATA = frozenset({"run", "checkpoints", "classifier", "statistics"})
SCENE = DATA | {"noise"}
RUN = frozenset({"run"})
TRAINING = frozenset({"training"})
RANDOM = frozenset({"training", "samples", "loss", "likelihood", "restorations", "statistics"})
PRECISION = RESULTS | {"training"}
OBJECTIVE = frozenset({"training", "loss"})
SCHEDULE = frozenset({"run", "checkpoints"})
CLASSIFIER = frozenset({"classifier"})
SAMPLES = frozenset({"samples", "restorations"})
FLOW = SAMPLES | {"latents"}
LIKELIHOOD = frozenset({"likelihood"})
RESTORE = frozenset({"restorations"})
METRICS = frozenset({"metrics"})
EXTRACTOR = frozenset({"metrics", "statistics"})
WITHOUT_JAX = frozenset({"checkpoints", "noise"})  # kinds on which what JAX is set to has no say


# --- rules of single settings ----------------------------------------------------------------------------------------


def _are_numbers(values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _are_whole(values: Any) -> bool:
    return _are_numbers(values) and not any(isinstance(v, float) for v in values)


_whole_numbers = Rule("whole numbers", _are_whole)
_widths = Rule(
    "a positive multiple of model.nf for each level",
    lambda values: len(values) > 0 and _are_whole(values) and min(values) > 0,
)
_taps = Rule(
    "a list of numbers, at least 2 taps with a positive sum, such as [1, 3, 3, 1]",
    lambda taps: _are_numbers(taps) and len(taps) > 1 and sum(taps) > 0,
)
_interval = Rule(
    "(low, high), noise levels sigma with 0 <= low < high, or high = 0 for no bound",
    lambda ends: _are_numbers(ends) and len(ends) == 2 and 0 <= ends[0] < (ends[1] or math.inf),
)
_not_zero = Rule("a positive bound, or a negative number for none; 0 would stop training", lambda value: value != 0)
_even = Rule("an even number, 0 or more", lambda value: value >= 0 and value % 2 == 0)

_data_set = key_of("datasets.SOURCES", form="tfds:NAME", pattern="tfds:.+")
_sde = Choice(table="sde_lib.SDES", pattern="(?i)vesde|vpsde|subvpsde")
_operator = key_of("controllable_generation.restoration.OPERATORS", form="FILE.py:FUNCTION", pattern=r".+\.py:.*")
_resize = key_of("sources.pictures.RESIZE")


# --- the table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str  # "group.key"
    default: Any  # value, whose type is the setting's
    meaning: str  # with the unit
    rule: Rule | Choice  # values that are allowed
    affects: frozenset[str]  # kinds of results that depend on it, see above


# fmt: off
TABLE: tuple[tuple[str, Any, str, Rule | Choice, frozenset[str]], ...] = (
    ("seed", 42, "of everything random: initial parameters, data order, noise, samples",
     between(0, 2**32 - 1), RANDOM),  # JAX would use the last 32 bits of others

    ("data.dataset", "digits", "data set", _data_set, SCENE),
    ("data.image_size", 8, "height, in pixels", at_least(1), IMAGES),
    ("data.image_width", 0, "width, in pixels; 0: as the height", at_least(0), IMAGES),
    ("data.num_channels", 1, "values of a pixel: 1 for grey, 3 for RGB", at_least(1), IMAGES),
    ("data.num_levels", 256, "grey levels of a channel value; bits/dim are per such value", between(2, 256), IMAGES),
    ("data.centered", False, "the network's range is [-1, 1]; otherwise [0, 1]", anything, IMAGES),
    ("data.random_flip", False, "mirror each training image left to right with probability 1/2",
     anything, RUN | CLASSIFIER),
    ("data.uniform_dequantization", False,
     "train on (level + u) / num_levels, u uniform on [0, 1)", anything, LEVELS),
    ("data.path", "", 'folder of the data, or its .zip ("folder"), .npz or .npy ("npz"); empty: the default of TFDS',
     anything, NONE),
    ("data.resize", "crop", 'pictures of another size: "crop" to the middle, "stretch", or "none" (left out)',
     _resize, DATA),
    ("data.strict", False, "refuse pictures that cannot be used instead of leaving them out", anything, NONE),
    ("data.test_share", 0.1, "fraction of the images that is held out where there is no split", inside_unit, DATA),
    ("data.cache_gib", 16.0, "prepared images to keep, in GiB; larger data are decoded at each reading",
     at_least(0), NONE),
    ("data.category", "", 'LSUN: the scene, such as "bedroom" or "church_outdoor"', anything, SCENE),
    ("data.tfrecords_path", "", "FFHQ and CelebA-HQ: the .tfrecords file, in the layout of progressive GANs",
     anything, NONE),

    ("model.name", "ncsnpp", "network", key_of("models.factory.NETWORKS"), NETWORK | CLASSIFIER),
    ("model.nf", 128, "channels of the first level", at_least(4), NETWORK),
    ("model.ch_mult", (1, 2, 2, 2), "channels of each level, in multiples of nf", _widths, NETWORK),
    ("model.num_res_blocks", 4, "residual blocks of a level", at_least(0), NETWORK),
    ("model.attn_resolutions", (16,), "heights at which attention is applied, in pixels", _whole_numbers, NETWORK),
    ("model.resamp_with_conv", True, 'a convolution in the resampling layers of "ddpm" blocks', anything, NETWORK),
    ("model.conditional", True, "condition the network on the noise level", anything, NETWORK),
    ("model.fir", False, "resample with an anti-aliasing FIR filter instead of nearest and mean", anything, NETWORK),
    ("model.fir_kernel", [1, 3, 3, 1], "the separable filter, normalized where it is used", _taps, NETWORK),
    ("model.skip_rescale", True, "divide every residual sum by sqrt(2)", anything, NETWORK),
    ("model.resblock_type", "biggan", "kind of residual block", key_of("models.ncsnpp.BLOCKS"), NETWORK),
    ("model.progressive", "none", "growing output", choice("none", "output_skip", "residual"), NETWORK),
    ("model.progressive_input", "none", "growing input", choice("none", "input_skip", "residual"), NETWORK),
    ("model.progressive_combine", "sum", "join of an input skip", choice("sum", "cat"), NETWORK),
    ("model.embedding_type", "positional", "of the noise level", choice("positional", "fourier"), NETWORK),
    ("model.fourier_scale", 16, "standard deviation of the Fourier frequencies", positive, NETWORK),
    ("model.init_scale", 0.0, "initial scale of the last convolution of each block; 0 stands for 1e-10",
     at_least(0), RUN),
    ("model.normalization", "GroupNorm", "of the features", key_of("models.normalization.NORMS"), NETWORK),
    ("model.nonlinearity", "swish", "activation", key_of("models.layers.ACTIVATIONS"), NETWORK),
    ("model.dropout", 0.1, "probability of dropping a feature in training", below_one, RUN),
    ("model.interpolation", "bilinear", "NCSN and NCSNv2: of feature maps that are merged",
     choice("bilinear", "nearest"), NETWORK),
    ("model.num_classes", 0, "classes that condition a score network, or that the classifier tells apart; 0: none",
     at_least(0), NETWORK | CLASSIFIER),
    ("model.blocks_per_group", 4, "the classifier as a network of its own: residual blocks of each group",
     at_least(1), RUN | CLASSIFIER),
    ("model.channel_multiplier", 10, "the same: width, in multiples of 16, 32 and 64 channels",
     at_least(1), RUN | CLASSIFIER),
    ("model.dtype", "float32", "of the features; parameters, norms and losses stay float32",
     key_of("models.precision.DTYPES"), PRECISION),
    ("model.remat", False, "compute the features of a block again in the gradient instead of keeping them",
     anything, NONE),
    ("model.scale_by_sigma", False, "divide the network's output by sigma", anything, NETWORK),
    ("model.ema_rate", 0.9999, "decay of the exponential moving average of the parameters", below_one, TRAINING),
    ("model.num_scales", 1000, "N: noise levels of the discrete SDE, steps of the sampler", at_least(1), NETWORK),
    ("model.sigma_min", 0.01, "VE: smallest noise level, in units of the network's range", positive, NOISE),
    ("model.sigma_max", 50.0, "VE: largest noise level, in units of the network's range", positive, NOISE),
    ("model.beta_min", 0.1, "VP and sub-VP: beta(0)", positive, NOISE),
    ("model.beta_max", 20.0, "VP and sub-VP: beta(1)", positive, NOISE),

    ("training.smoke", False, "train two steps of a shrunk network on the embedded digits, as a quick check",
     anything, NONE),
    ("training.sde", "vpsde", "SDE", _sde, NOISE),
    ("training.batch_size", 128, "images of a step, over all devices and hosts", at_least(1), TRAINING),
    ("training.microbatches", 1, "parts of a device's batch, computed in turn to save memory; same result",
     at_least(1), NONE),
    ("training.n_iters", 1_300_001, "steps", at_least(1), TRAINING),
    ("training.n_jitted_steps", 5, "steps of one compiled call; divides the frequencies below", at_least(1), NONE),
    ("training.continuous", True, "denoising score matching in continuous time; False: SMLD (VE) or DDPM (VP) losses",
     anything, NETWORK),
    ("training.reduce_mean", True, "mean over a pixel's squared error; False: half the sum", anything, OBJECTIVE),
    ("training.likelihood_weighting", False, "weight the loss by g(t)^2 instead of std(t)^2", anything, OBJECTIVE),
    ("training.importance_sampling", False, "draw t by g^2 / std^2, not uniformly; for likelihood_weighting",
     anything, OBJECTIVE),
    ("training.label_dropout", 0.1, "model.num_classes: probability that an image is shown without its label",
     between(0, 1), TRAINING),
    ("training.objective", "denoising", 'score matching; "sliced_vr" has less variance than "sliced"',
     key_of("losses.OBJECTIVES"), OBJECTIVE),
    ("training.log_freq", 50, "steps between lines of the log and points of the loss curve", at_least(1), NONE),
    ("training.eval_freq", 100, "steps between losses of a batch of test images", at_least(1), NONE),
    ("training.snapshot_freq", 50_000, "steps between the checkpoints that are kept; number k is of step k * this",
     at_least(1), SCHEDULE),
    ("training.snapshot_freq_for_preemption", 10_000, "steps between the checkpoints to resume from",
     at_least(1), NONE),
    ("training.snapshot_sampling", True, "draw a grid of samples at each kept checkpoint", anything, NONE),
    ("training.snapshot_num_samples", 64, "samples of that grid", at_least(1), NONE),
    ("training.on_nan", "stop", "if loss or gradient of a step is not finite: stop, or skip the step",
     choice("stop", "skip"), TRAINING),

    ("optim.optimizer", "Adam", "optimizer", choice("Adam"), TRAINING),
    ("optim.lr", 2e-4, "learning rate after the warm-up", positive, TRAINING),
    ("optim.beta1", 0.9, "decay of the mean of the gradients; that of their squares is 0.999", below_one, TRAINING),
    ("optim.eps", 1e-8, "added to the root of the mean square", at_least(0), TRAINING),
    ("optim.weight_decay", 0.0, "decoupled, times the learning rate", at_least(0), TRAINING),
    ("optim.warmup", 5000, "steps over which the learning rate rises linearly from 0; 0: none", at_least(0), TRAINING),
    ("optim.grad_clip", 1.0, "bound on the gradient's global norm; negative: none", _not_zero, TRAINING),

    # The classifier of noisy images, for guidance; beta1, eps and grad_clip of its Adam are those of "optim".
    ("classifier.blocks_per_group", 4, "residual blocks of each of its three groups", at_least(1), CLASSIFIER),
    ("classifier.channel_multiplier", 10, "width, in multiples of 16, 32 and 64 channels", at_least(1), CLASSIFIER),
    ("classifier.batch_size", 128, "images of a step, over all devices and hosts", at_least(1), TRAINING),
    ("classifier.microbatches", 1, "parts of a device's batch, computed in turn to save memory; same result",
     at_least(1), NONE),
    ("classifier.n_iters", 100_000, "steps", at_least(1), TRAINING),
    ("classifier.n_jitted_steps", 5, "steps of one compiled call; divides the frequencies below", at_least(1), NONE),
    ("classifier.lr", 3e-4, "learning rate after the warm-up", positive, TRAINING),
    ("classifier.warmup", 1000, "steps over which the learning rate rises linearly from 0; 0: none",
     at_least(0), TRAINING),
    ("classifier.weight_decay", 1e-2, "decoupled, times the learning rate", at_least(0), TRAINING),
    ("classifier.ema_rate", 0.999, "decay of the average of the parameters, which guides", below_one, TRAINING),
    ("classifier.log_freq", 50, "steps between lines of the log and points of the curves", at_least(1), NONE),
    ("classifier.eval_freq", 500, "steps between losses and accuracies of a batch of test images", at_least(1), NONE),
    ("classifier.snapshot_freq", 10_000, "steps between the checkpoints that are kept", at_least(1), CLASSIFIER),
    ("classifier.snapshot_freq_for_preemption", 5_000, "steps between the checkpoints to resume from",
     at_least(1), NONE),

    ("sampling.method", "pc", 'sampler: "pc" (predictor-corrector), or a solver', key_of("sampling.METHODS"), SAMPLES),
    ("sampling.num_steps", 0, 'steps of "pc" and of few-step solvers; 0: model.num_scales', at_least(0), SAMPLES),
    ("sampling.labels", "", 'classes of the samples in turn: "3", "0..9", "0,2,5"; empty: any class',
     anything, SAMPLES),
    ("sampling.guidance_scale", 1.0, "classifier-free: w in s(any) + w (s(class) - s(any)); 1: none",
     at_least(0), SAMPLES),
    ("sampling.guidance_interval", (0.0, 0.0), "guide where low < sigma <= high; high 0: no bound",
     _interval, SAMPLES),
    ("sampling.clip", False, "clip the score's predictions of clean images, as DDPM's code does; not the paper",
     anything, SAMPLES),
    ("sampling.noise_removal", True, "end on the last step's mean, or on the data predicted at the end",
     anything, SAMPLES),
    ("sampling.classifier_scale", 0.0, "factor on a classifier's gradient; 1: Bayes' rule; 0: no classifier",
     at_least(0), SAMPLES),
    ("sampling.classifier", "", 'folder of the classifier; empty: "classifier" in the workdir', anything, NONE),
    ("sampling.predictor", "euler_maruyama", '"pc": predictor', key_of("sampling.PREDICTORS"), SAMPLES),
    ("sampling.corrector", "none", '"pc": corrector', key_of("sampling.CORRECTORS"), SAMPLES),
    ("sampling.pc_order", "corrector_first", '"pc": as the 2021 code, or "predictor_first" as the paper\'s Algorithm 1',
     choice("corrector_first", "predictor_first"), SAMPLES),
    ("sampling.n_steps_each", 1, '"pc": corrector steps at each time', at_least(1), SAMPLES),
    ("sampling.probability_flow", False, '"pc": the predictor follows the probability-flow ODE', anything, SAMPLES),
    ("sampling.snr", 0.16, "signal-to-noise ratio that sets the corrector's step size", positive, SAMPLES),
    ("sampling.langevin_norm", "batch", 'norms that set it: the mean of the "batch" (the paper), or of each "sample"',
     choice("batch", "sample"), SAMPLES),
    ("sampling.time_grid", "log_snr", "few-step solvers: times of the steps",
     key_of("solvers.noise_levels.TIME_GRIDS"), SAMPLES),
    ("sampling.solver_order", 0, '"deis", "unipc" (its p): predictions that a step uses; 0: the method\'s own',
     between(0, 3), SAMPLES),
    ("sampling.eta", 0.0, '"ddim": fraction of fresh noise, 0: the ODE, 1: ancestral sampling', at_least(0), SAMPLES),
    ("sampling.s_churn", 0.0, '"heun": noise added over the run, S_churn of Karras et al. 2022; 0: none',
     at_least(0), SAMPLES),
    ("sampling.s_tmin", 0.0, '"heun": smallest sigma = std / mean_coeff at which noise is added', at_least(0), SAMPLES),
    ("sampling.s_tmax", 0.0, '"heun": largest sigma at which noise is added; 0: no bound', at_least(0), SAMPLES),
    ("sampling.s_noise", 1.0, '"heun": standard deviation of the noise added', at_least(0), SAMPLES),
    ("sampling.rtol", 1e-5, '"ode": relative tolerance of a step', positive, FLOW),
    ("sampling.atol", 1e-5, '"ode": absolute tolerance of a step, in units of the network\'s range', positive, FLOW),
    ("sampling.step_control", "sample", '"ode": steps of each "sample", or of the "batch" as SciPy\'s',
     choice("batch", "sample"), SAMPLES),
    ("sampling.adaptive_levels", 1.0, '"adaptive_sde": absolute tolerance of a step, in grey levels of 256',
     positive, SAMPLES),
    ("sampling.adaptive_rtol", 0.02, '"adaptive_sde": relative tolerance of a step', at_least(0), SAMPLES),

    ("likelihood.dequantization", "uniform", 'noise in the levels; "none" gives no bound',
     key_of("dequantization.PROTOCOLS"), LIKELIHOOD),
    ("likelihood.bound_num_times", 0, "network evaluations of an image's variational bound, in pairs; 0: no bound",
     _even, LIKELIHOOD),
    ("likelihood.trace", "rademacher", "divergence: random probes, or exact", key_of("likelihood.TRACES"), LIKELIHOOD),
    ("likelihood.num_probes", 1, "probes of an image; the standard error needs two or more", at_least(1), LIKELIHOOD),
    ("likelihood.rtol", 1e-5, "relative tolerance of the ODE solver", positive, LIKELIHOOD),
    ("likelihood.atol", 1e-5, "absolute tolerance of the ODE solver, in units of the network's range",
     positive, LIKELIHOOD),

    ("restore.operator", "inpaint", "the measurement, or a function of one's own", _operator, RESTORE),
    ("restore.noise", 0.0, "standard deviation of the measurement's noise, the range of the data being [0, 1]",
     at_least(0), RESTORE),
    ("restore.mask", "", '"inpaint": what to draw: a half, box:TOP,LEFT,HEIGHT,WIDTH, random:FRACTION, or a picture',
     anything, RESTORE),
    ("restore.factor", 2, '"super_resolution": pixels of height and width that become one', at_least(2), RESTORE),
    ("restore.downsampling", "box", '"super_resolution": the mean over a box, or bicubic', choice("box", "bicubic"),
     RESTORE),
    ("restore.blur_std", 1.0, '"gaussian_blur": in pixels', positive, RESTORE),
    ("restore.blur_length", 5.0, '"motion_blur": in pixels; 1: no blur', at_least(1), RESTORE),
    ("restore.blur_angle", 0.0, '"motion_blur": degrees counter-clockwise from the horizontal', anything, RESTORE),
    ("restore.fourier_share", 0.5, '"fourier": fraction of the lines of frequencies that are measured',
     up_to_one, RESTORE),
    ("restore.fourier_center", 0.15, '"fourier": fraction of all lines that are the lowest frequencies',
     up_to_one, RESTORE),
    ("restore.method", "pigdm", "of restoring", key_of("controllable_generation.restoration.METHODS"), RESTORE),
    ("restore.scale", 1.0, 'factor on the guidance; "dps": its step size; "projection": fraction of the way',
     positive, RESTORE),
    ("restore.clip", True, '"dps", "pigdm", "mmps": clip predictions of clean images to the range of the data',
     anything, RESTORE),
    ("restore.data_std", 0.5, '"pigdm": standard deviation of the data, in the network\'s range', positive, RESTORE),
    ("restore.cg_steps", 5, '"mmps": steps of conjugate gradients in an evaluation', at_least(1), RESTORE),
    ("restore.images", "", "a picture, a folder of pictures or an .npz file of levels; empty: the test split",
     anything, NONE),
    ("restore.input", "image", 'each is an "image", to be measured here, or a "measurement" of an unknown one',
     choice("image", "measurement"), RESTORE),
    ("restore.resize", "none", 'pictures of another size: "none" (left out), "crop" (to the middle) or "stretch"',
     _resize, RESTORE),
    ("restore.convert_channels", False, "turn colour into grey, or grey into colour, as the network's images are",
     anything, RESTORE),
    ("restore.num_draws", 4, "restorations of each image", at_least(1), RESTORE),

    ("eval.begin_ckpt", 1, "first checkpoint to evaluate", at_least(0), NONE),
    ("eval.end_ckpt", 1, "last checkpoint to evaluate", at_least(0), NONE),
    ("eval.batch_size", 1024, "images of a batch, over all devices and hosts", at_least(1), LIKELIHOOD | {"batches"}),
    ("eval.num_samples", 50_000, "samples drawn for FID, IS and KID, exactly", at_least(1), METRICS),
    ("eval.enable_sampling", False, "draw samples and measure FID, IS, KID, precision and recall", anything, NONE),
    ("eval.extractor", "auto", "of features, see docs/extractors.md", key_of("metrics.extractors.KEYS", "auto"),
     EXTRACTOR),
    ("eval.weights", "", '"inception": its weights file, "tfgan": its SavedModel; empty: where they usually are',
     anything, EXTRACTOR),
    ("eval.reference", "", ".npz file of statistics that samples are compared with; empty: the training split",
     anything, METRICS),
    ("eval.enable_loss", True, "loss over the whole test split", anything, NONE),
    ("eval.enable_bpd", False, "bits/dim", anything, NONE),
    ("eval.bpd_dataset", "test", "split for bits/dim", choice("train", "test"), LIKELIHOOD),
    ("eval.bpd_num_draws", 1, "dequantization draws of each image", at_least(1), METRICS),
    ("eval.wait_seconds", 0.0, "time to wait for a checkpoint that is not there yet", at_least(0), NONE),
)
# fmt: on
SETTINGS: dict[str, Setting] = {row[0]: Setting(*row) for row in TABLE}

_TYPES: dict[type, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: ((int, float), "a finite number"),
    str: (str, "a text"),
    tuple: ((tuple, list), "a list"),
    list: ((tuple, list), "a list"),
}


def defaults() -> ConfigDict:
    """Return an unlocked configuration with every setting at its default."""
    tree: dict[str, Any] = {}
    for setting in SETTINGS.values():
        group, _, key = setting.name.rpartition(".")
        of_group = tree.setdefault(group, {}) if group else tree
        of_group[key] = copy.copy(setting.default)
    return ConfigDict(tree)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Return a configuration as {dotted name: value}, tuples as lists, as it reads back from JSON."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Return (height, width, channels) of the configured images."""
    return config.data.image_size, config.data.image_width or config.data.image_size, config.data.num_channels


# --- checking --------------------------------------------------------------------------------------------------------


def _check_type(setting: Setting, value: Any) -> None:
    types, words = _TYPES[type(setting.default)]
    is_bool = isinstance(value, bool)
    fits = isinstance(value, types) and is_bool == isinstance(setting.default, bool)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{setting.name}={value!r}: expected {words}")


def check(config: ConfigDict, *groups: str) -> None:
    """Check that each setting has the right type and an allowed value.

    What relates several settings is checked by the builder concerned.

    Args:
      config: experiment configuration.
      groups: to check, such as "sampling"; none: every setting.

    Raises:
      UserError: naming the first setting that is wrong, its value and what is expected.
    """
    for setting in SETTINGS.values():
        group, _, key = setting.name.rpartition(".")
        if groups and group not in groups:
            continue
        of_group = config.get(group, {}) if group else config
        if key not in of_group:
            raise UserError(f"the configuration has no {setting.name}; start from configs.base.get_config()")
        _check_type(setting, of_group[key])
        setting.rule(setting.name, of_group[key])


# --- what results depend on ------------------------------------------------------------------------------------------


def of_jax() -> dict[str, Any]:
    """Return what JAX itself is set to, as far as numbers depend on it: {"jax.enable_x64": False, ...}."""
    import jax

    names = ("enable_x64", "default_prng_impl", "threefry_partitionable", "default_matmul_precision")
    return {f"jax.{name}": getattr(jax.config, f"jax_{name}") for name in names}


def affecting(config: ConfigDict, *kinds: str) -> dict[str, Any]:
    """Return {name: value} of the settings on which results of these kinds depend, JAX's own among them.

    Args:
      config: experiment configuration.
      kinds: of results, see the top of this file.
    """
    flat = flatten(config)
    chosen = {name: flat[name] for name, setting in SETTINGS.items() if setting.affects.intersection(kinds)}
    return chosen if WITHOUT_JAX.issuperset(kinds) else chosen | of_jax()


def of_group(config: ConfigDict, group: str) -> dict[str, Any]:
    """Return {name: value} of one group."""
    return {name: value for name, value in flatten(config).items() if name.startswith(f"{group}.")}
