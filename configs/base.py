"""Every configuration key that any code reads, with its meaning, its unit and a default.

The key names are those of the 2021 score_sde code, so that its configuration files carry over. The dictionary is
locked: a misspelt key fails at once and names the nearest right one.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": "digits",  # data source, by its name in datasets.SOURCES, or "tfds:NAME"
            "image_size": 8,  # height in pixels
            "image_width": 0,  # width in pixels; 0: as the height
            "num_channels": 1,  # values of a pixel: 1 for grey, 3 for RGB
            "num_levels": 256,  # grey levels a channel value can take; bits/dim are per such value
            "centered": False,  # the network's range is [-1, 1] if set, [0, 1] otherwise
            "random_flip": False,  # mirror each training image left to right with probability 1/2
            "uniform_dequantization": False,  # train on (level + u) / num_levels, u uniform on [0, 1)
            "path": "",  # folder of the data, or its .zip ("folder"), .npz or .npy ("npz"); empty: the default of TFDS
            "resize": "crop",  # pictures of another size: "crop" to the middle, "stretch", or "none" (left out)
            "strict": False,  # refuse pictures that cannot be used instead of leaving them out
            "test_share": 0.1,  # share of the images that is held out where no split is made
            "cache_gib": 16.0,  # prepared images that are kept, in GiB; larger data are decoded whenever they are read
            "category": "",  # LSUN: the scene, such as "bedroom" or "church_outdoor"
            "tfrecords_path": "",  # FFHQ and CelebA-HQ: the .tfrecords file, in the layout of progressive GANs
        }
    )


def _model() -> ConfigDict:
    return ConfigDict(
        {
            "name": "ncsnpp",  # network, by its name in models.factory
            "nf": 128,  # channels of the first level
            "ch_mult": (1, 2, 2, 2),  # channels of each level, in multiples of nf
            "num_res_blocks": 4,  # residual blocks of a level
            "attn_resolutions": (16,),  # heights in pixels at which attention is applied
            "resamp_with_conv": True,  # a convolution in the resampling layers of "ddpm" blocks
            "conditional": True,  # the network is told the noise level
            "fir": False,  # resample with an anti-aliasing FIR filter instead of nearest and mean
            "fir_kernel": [1, 3, 3, 1],  # the separable filter, normalized where it is used
            "skip_rescale": True,  # divide every residual sum by sqrt(2)
            "resblock_type": "biggan",  # "ddpm" or "biggan"
            "progressive": "none",  # growing output: "none", "output_skip" or "residual"
            "progressive_input": "none",  # "none", "input_skip" or "residual"
            "progressive_combine": "sum",  # join of an input skip: "sum" or "cat"
            "embedding_type": "positional",  # of the noise level: "positional" or "fourier"
            "fourier_scale": 16,  # standard deviation of the Fourier frequencies
            "init_scale": 0.0,  # scale of the last convolution of each block at the start; 0 stands for 1e-10
            "normalization": "GroupNorm",  # of the features
            "nonlinearity": "swish",  # activation: "elu", "relu", "lrelu" or "swish"
            "dropout": 0.1,  # probability that a feature is dropped in training
            "interpolation": "bilinear",  # NCSN and NCSNv2: of feature maps that are merged: "bilinear" or "nearest"
            "num_classes": 0,  # classes that a score network is told, or that the classifier tells apart; 0: none
            "blocks_per_group": 4,  # if this is a classifier of the 2021 code: residual blocks of each of its groups
            "channel_multiplier": 10,  # the same: its width, in multiples of 16, 32 and 64 channels
            "dtype": "float32",  # of the features: "float32" or "bfloat16"; parameters, norms and losses stay float32
            "remat": False,  # compute the features of a block again in the gradient, instead of keeping them
            "scale_by_sigma": False,  # divide the network's output by sigma
            "ema_rate": 0.9999,  # decay of the exponential moving average of the parameters
            "num_scales": 1000,  # N: noise levels of the discrete SDE, steps of the sampler
            "sigma_min": 0.01,  # VE: smallest noise level, in units of the network's range
            "sigma_max": 50.0,  # VE: largest noise level
            "beta_min": 0.1,  # VP and sub-VP: beta(0)
            "beta_max": 20.0,  # VP and sub-VP: beta(1)
        }
    )


def _training() -> ConfigDict:
    return ConfigDict(
        {
            "smoke": False,  # train two steps of a shrunk network on the embedded digits, to see that all is in place
            "sde": "vpsde",  # "vesde", "vpsde" or "subvpsde"
            "batch_size": 128,  # images of a step, over all devices and hosts
            "microbatches": 1,  # parts of a device's batch, one after the other in memory; the result is the same
            "n_iters": 1_300_001,  # steps
            "n_jitted_steps": 5,  # steps in one compiled call; divides the frequencies below
            "continuous": True,  # denoising score matching in continuous time; False: SMLD (VE) or DDPM (VP) losses
            "reduce_mean": True,  # mean over a pixel's squared error; False: half the sum
            "likelihood_weighting": False,  # weight the loss by g(t)^2 instead of std(t)^2
            "importance_sampling": False,  # draw t by g^2 / std^2, not uniformly; for likelihood_weighting
            "label_dropout": 0.1,  # model.num_classes: probability that an image is shown without its label
            "objective": "denoising",  # score matching: "denoising", "sliced" or "sliced_vr" (of less variance)
            "log_freq": 50,  # steps between lines of the log and points of the loss curve
            "eval_freq": 100,  # steps between losses of a batch of test images
            "snapshot_freq": 50_000,  # steps between the checkpoints that are kept
            "snapshot_freq_for_preemption": 10_000,  # steps between the checkpoints to resume from
            "snapshot_sampling": True,  # draw a grid of samples at each kept checkpoint
            "snapshot_num_samples": 64,  # samples in that grid
            "on_nan": "stop",  # if loss or gradient of a step is not finite: "stop", or "skip" the step
        }
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "optimizer": "Adam",  # the only one
            "lr": 2e-4,  # learning rate after the warm-up
            "beta1": 0.9,  # decay of the mean of the gradients; that of their squares is 0.999
            "eps": 1e-8,  # added to the root of the mean square
            "weight_decay": 0.0,  # decoupled, times the learning rate
            "warmup": 5000,  # steps over which the learning rate rises linearly from 0; 0: none
            "grad_clip": 1.0,  # bound on the gradient's global norm; negative: none
        }
    )


def _classifier() -> ConfigDict:
    return ConfigDict(
        {
            # A classifier of noisy images, for guidance; beta1, eps and grad_clip of its Adam are those of "optim".
            "blocks_per_group": 4,  # residual blocks of each of its three groups
            "channel_multiplier": 10,  # width, in multiples of 16, 32 and 64 channels
            "batch_size": 128,  # images of a step, over all devices and hosts
            "microbatches": 1,  # parts of a device's batch, one after the other in memory; the result is the same
            "n_iters": 100_000,  # steps
            "n_jitted_steps": 5,  # steps in one compiled call; divides the frequencies below
            "lr": 3e-4,  # learning rate after the warm-up
            "warmup": 1000,  # steps over which the learning rate rises linearly from 0; 0: none
            "weight_decay": 1e-2,  # decoupled, times the learning rate
            "ema_rate": 0.999,  # decay of the exponential moving average of the parameters, which guides
            "log_freq": 50,  # steps between lines of the log and points of the curves
            "eval_freq": 500,  # steps between losses and accuracies of a batch of test images
            "snapshot_freq": 10_000,  # steps between the checkpoints that are kept
            "snapshot_freq_for_preemption": 5_000,  # steps between the checkpoints to resume from
        }
    )


def _sampling() -> ConfigDict:
    return ConfigDict(
        {
            "method": "pc",  # "pc" (predictor-corrector), "ode", "adaptive_sde", or one of solvers.FIXED_GRID
            "num_steps": 0,  # steps of "pc" and of few-step solvers; 0: model.num_scales
            "labels": "",  # classes of the samples in turn: "3", "0..9", "0,2,5"; "": of any class
            "guidance_scale": 1.0,  # classifier-free: w in s(any) + w (s(class) - s(any)); 1: none
            "guidance_interval": (0.0, 0.0),  # low < sigma <= high in which there is guidance; high 0: no bound
            "clip": False,  # clip the score's predictions of clean images to their range, as DDPM's code; not the paper
            "noise_removal": True,  # end without noise: on the last step's mean, or on the data predicted at the end
            # a class by the gradient of a classifier
            "classifier_scale": 0.0,  # factor on it: 1 is Bayes' rule, more favours typical images; 0: no classifier
            "classifier": "",  # folder of the classifier; empty: "classifier" inside the workdir
            # "pc"
            "predictor": "euler_maruyama",  # "euler_maruyama", "reverse_diffusion", "ancestral_sampling" or "none"
            "corrector": "none",  # "langevin", "ald" or "none"
            "pc_order": "corrector_first",  # as the 2021 code; "predictor_first": as Algorithm 1 of the paper
            "n_steps_each": 1,  # corrector steps at each time
            "probability_flow": False,  # the predictor follows the probability-flow ODE
            "snr": 0.16,  # signal-to-noise ratio that sets the corrector's step size
            "langevin_norm": "batch",  # norms that set it: "batch" mean (the paper's) or each "sample" its own
            # few-step solvers
            "time_grid": "log_snr",  # times of their steps: even in "uniform" t, "quadratic", "log_snr" or "karras"
            "solver_order": 0,  # "deis", "unipc" (its p), 1 to 3: predictions that a step uses; 0: the method's own
            "eta": 0.0,  # "ddim": share of fresh noise, 0: the ODE, 1: ancestral sampling
            "s_churn": 0.0,  # "heun": noise added over the run, S_churn of Karras et al. 2022; 0: none
            "s_tmin": 0.0,  # "heun": smallest sigma = std / mean_coeff at which noise is added
            "s_tmax": 0.0,  # "heun": largest; 0: no bound
            "s_noise": 1.0,  # "heun": standard deviation of the noise added
            # adaptive solvers
            "rtol": 1e-5,  # "ode": relative tolerance of a step
            "atol": 1e-5,  # "ode": absolute tolerance of a step, in units of the network's range
            "step_control": "sample",  # "ode": steps of each "sample", or of the "batch" as SciPy's
            "adaptive_levels": 1.0,  # "adaptive_sde": absolute tolerance of a step, in grey levels of 256
            "adaptive_rtol": 0.02,  # "adaptive_sde": relative tolerance of a step
        }
    )


def _likelihood() -> ConfigDict:
    return ConfigDict(
        {
            "dequantization": "uniform",  # noise in the levels: "uniform", "truncated_normal" or "none" (then no bound)
            "bound_num_times": 0,  # network evaluations of the variational bound of an image, even; 0: no bound
            "trace": "rademacher",  # divergence: "rademacher" or "gaussian" probes, or "exact"
            "num_probes": 1,  # probes of an image; the standard error needs two or more
            "rtol": 1e-5,  # relative tolerance of the ODE solver
            "atol": 1e-5,  # absolute tolerance of the ODE solver, in units of the network's range
        }
    )


def _restore() -> ConfigDict:
    return ConfigDict(
        {
            # the measurement
            "operator": "inpaint",  # a name in controllable_generation.restoration.OPERATORS, or FILE.py:FUNCTION
            "noise": 0.0,  # standard deviation of the measurement's noise, the range of the data being [0, 1]
            "mask": "",  # "inpaint": what to draw: a half, box:TOP,LEFT,HEIGHT,WIDTH, random:SHARE, or a picture
            "factor": 2,  # "super_resolution": pixels of height and width that become one
            "downsampling": "box",  # "super_resolution": the "box" mean or "bicubic"
            "blur_std": 1.0,  # "gaussian_blur": in pixels
            "blur_length": 5.0,  # "motion_blur": in pixels
            "blur_angle": 0.0,  # "motion_blur": degrees counter-clockwise from the horizontal
            "fourier_share": 0.5,  # "fourier": share of the lines of frequencies that are measured
            "fourier_center": 0.15,  # "fourier": share of all lines that are the lowest frequencies
            # the method
            "method": "pigdm",  # "replacement", "projection", "dps", "pigdm" or "mmps"
            "scale": 1.0,  # factor on the guidance; "dps": its step size; "projection": share of the way
            "clip": True,  # "dps", "pigdm", "mmps": clip predictions of clean images to the range of the data
            "data_std": 0.5,  # "pigdm": standard deviation of the data, in the network's range
            "cg_steps": 5,  # "mmps": steps of conjugate gradients in an evaluation
            # the images
            "images": "",  # a picture, a folder of pictures or an .npz file of levels; empty: the test split
            "input": "image",  # each is an "image", to be measured here, or a "measurement" of one that is not known
            "resize": "none",  # pictures of another size: "none" (left out), "crop" (to the middle) or "stretch"
            "convert_channels": False,  # colour becomes grey, or grey colour, where the network's images are so
            "num_draws": 4,  # restorations of each image
        }
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        {
            "begin_ckpt": 1,  # first checkpoint to evaluate
            "end_ckpt": 1,  # last checkpoint to evaluate
            "batch_size": 1024,  # images of a batch, over all devices and hosts
            "num_samples": 50_000,  # samples drawn for FID, IS and KID, exactly
            "enable_sampling": False,  # draw samples and measure FID, IS, KID, precision and recall
            "extractor": "auto",  # of features: "auto" or a key of metrics.extractors.KEYS; docs/extractors.md
            "weights": "",  # "inception": its weights file, "tfgan": its SavedModel; empty: where they usually are
            "reference": "",  # .npz file of statistics that samples are compared with; empty: the training split
            "enable_loss": True,  # loss over the whole test split
            "enable_bpd": False,  # bits/dim
            "bpd_dataset": "test",  # split for bits/dim: "train" or "test"
            "bpd_num_draws": 1,  # dequantization draws of each image
            "wait_seconds": 0.0,  # how long to wait for a checkpoint that is not there yet
        }
    )


def get_config() -> ConfigDict:
    """Returns a locked configuration with every key at its default."""
    config = ConfigDict(
        {
            "seed": 42,  # of everything random: initial parameters, data order, noise, samples
            "data": _data(),
            "model": _model(),
            "training": _training(),
            "optim": _optim(),
            "classifier": _classifier(),
            "sampling": _sampling(),
            "likelihood": _likelihood(),
            "restore": _restore(),
            "eval": _eval(),
        }
    )
    return config.lock()
