"""Groups of settings that experiments share. Each function changes a configuration in place.

Apply them in the order of this file, from the SDE to the data: each one may change what an earlier one chose.
"""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import base


def compose(*parts: Callable[[ConfigDict], None]) -> ConfigDict:
    """Return the base configuration, changed by each of the parts in turn."""
    config = base.get_config()
    for part in parts:
        part(config)
    return config


# --- SDEs ------------------------------------------------------------------------------------------------------------


def vp(config: ConfigDict) -> None:
    """VP SDE; sampled by Euler-Maruyama on data in [-1, 1]."""
    config.data.centered = True
    config.training.update(sde="vpsde", reduce_mean=True)
    config.sampling.update(predictor="euler_maruyama", corrector="none")


def ddpm_chain(config: ConfigDict) -> None:
    """VP SDE in the discrete steps of DDPM: their loss, sampled by their ancestral chain."""
    vp(config)
    config.training.continuous = False
    config.sampling.predictor = "ancestral_sampling"


def subvp(config: ConfigDict) -> None:
    """Sub-VP SDE; otherwise as the VP SDE."""
    vp(config)
    config.training.sde = "subvpsde"


def ve(config: ConfigDict) -> None:
    """VE SDE; sampled by reverse diffusion and one Langevin step on data in [0, 1]."""
    config.data.centered = False
    config.model.update(ema_rate=0.999, scale_by_sigma=True, sigma_min=0.01, sigma_max=50.0)
    config.training.update(sde="vesde", reduce_mean=False)
    config.sampling.update(predictor="reverse_diffusion", corrector="langevin", snr=0.16)


# --- networks --------------------------------------------------------------------------------------------------------


def ddpmpp(config: ConfigDict) -> None:
    """DDPM++ (Song et al. 2021, Appendix H): BigGAN blocks, no FIR filter, no growing input, positional embedding."""
    config.model.update(fir=False, progressive_input="none", embedding_type="positional", scale_by_sigma=False)


def ncsnpp(config: ConfigDict) -> None:
    """NCSN++ (Song et al. 2021, Appendix H): BigGAN blocks, FIR filter, growing residual input."""
    config.model.update(fir=True, progressive_input="residual")


def deep(config: ConfigDict) -> None:
    """Twice the residual blocks, and fewer steps against overfitting (Song et al. 2021, Appendix H.2)."""
    config.model.num_res_blocks = 8
    config.training.n_iters = 950_001


def ncsnpp_skips(config: ConfigDict) -> None:
    """NCSN++ for large images: growing input and output by skips, conditioned on log(sigma), sampled in 2,000 steps."""
    ncsnpp(config)
    config.model.update(progressive="output_skip", progressive_input="input_skip")
    config.model.update(embedding_type="fourier", num_scales=2000)


def ncsnpp_256(config: ConfigDict) -> None:
    """NCSN++ for images of 256 pixels, 65.6 million parameters."""
    ncsnpp_skips(config)
    config.model.update(ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2)


def ncsnpp_1024(config: ConfigDict) -> None:
    """NCSN++ for images of 1024 pixels, 105.8 million parameters."""
    ncsnpp_skips(config)
    config.model.update(nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1)


def ddpm(config: ConfigDict) -> None:
    """The network of DDPM (Ho et al. 2020)."""
    # The network ignores embedding_type; the original's files say "fourier".
    config.model.update(name="ddpm", num_res_blocks=2, embedding_type="fourier")


def ddpm_256(config: ConfigDict) -> None:
    """The network of DDPM for images of 256 pixels, 111.6 million parameters."""
    ddpm(config)
    config.model.ch_mult = (1, 1, 2, 2, 4, 4)
    config.optim.lr = 2e-5


def _refinenet(config: ConfigDict, name: str) -> None:
    """What NCSN and NCSNv2 share: discrete noise levels, plain Adam, sampling by annealed Langevin dynamics alone."""
    # The networks ignore embedding_type; the original's files say "fourier".
    config.model.update(name=name, normalization="InstanceNorm++", nonlinearity="elu", embedding_type="fourier")
    config.optim.update(warmup=0, grad_clip=-1.0)
    config.training.continuous = False
    config.sampling.update(predictor="none", corrector="ald")


def ncsn(config: ConfigDict) -> None:
    """NCSN (Song and Ermon 2019): conditioned on the noise level by its norms, parameters not averaged."""
    _refinenet(config, "ncsn")
    config.model.update(scale_by_sigma=False, ema_rate=0.0)
    config.optim.lr = 1e-3


def ncsnv2(config: ConfigDict, name: str) -> None:
    """NCSNv2 (Song and Ermon 2020): not conditioned on noise, its output divided by sigma (their Technique 3)."""
    _refinenet(config, name)
    config.optim.lr = 1e-4


def wide_resnet(config: ConfigDict) -> None:
    """The classifier Wide ResNet 28-10, conditioned on log(sigma)."""
    config.model.update(name="wideresnet_noise_conditional", blocks_per_group=4, channel_multiplier=10, num_classes=10)
    config.model.update(embedding_type="fourier", scale_by_sigma=False)


# --- noise levels of NCSN and NCSNv2 ---------------------------------------------------------------------------------


def annealing(config: ConfigDict, *, sigma_max: float, num_scales: int, n_steps_each: int, snr: float) -> None:
    """Set the noise levels, and the Langevin steps at each of them."""
    config.model.update(sigma_max=sigma_max, num_scales=num_scales)
    config.sampling.update(n_steps_each=n_steps_each, snr=snr)


def ncsn_levels(config: ConfigDict) -> None:
    """The ten levels of Song and Ermon 2019."""
    annealing(config, sigma_max=1.0, num_scales=10, n_steps_each=100, snr=0.316)


def cifar10_levels(config: ConfigDict) -> None:
    """The levels that Techniques 1, 2 and 4 of Song and Ermon 2020 find for CIFAR-10."""
    annealing(config, sigma_max=50.0, num_scales=232, n_steps_each=5, snr=0.176)


def celeba_levels(config: ConfigDict) -> None:
    """The levels that Techniques 1, 2 and 4 of Song and Ermon 2020 find for CelebA."""
    annealing(config, sigma_max=90.0, num_scales=500, n_steps_each=5, snr=0.128)


# --- data ------------------------------------------------------------------------------------------------------------


def _images(config: ConfigDict, dataset: str, image_size: int) -> None:
    config.data.update(dataset=dataset, image_size=image_size, num_channels=3, num_levels=256, random_flip=True)


def cifar10(config: ConfigDict) -> None:
    """CIFAR-10: 32x32 RGB, 50,000 training images, mirrored at random."""
    _images(config, "CIFAR10", 32)
    config.eval.update(begin_ckpt=9, end_ckpt=26, num_samples=50_000)


def celeba(config: ConfigDict) -> None:
    """CelebA, cropped to the faces: 64x64 RGB, mirrored at random."""
    _images(config, "CELEBA", 64)
    config.eval.update(begin_ckpt=1, end_ckpt=26, enable_sampling=True)


def _large_images(config: ConfigDict, dataset: str, image_size: int) -> None:
    """Images of 128 pixels or more: smaller batches, more steps, no dropout."""
    _images(config, dataset, image_size)
    config.model.update(dropout=0.0, sigma_max=378.0)
    config.training.update(batch_size=64, n_iters=2_400_001, snapshot_freq_for_preemption=5000)
    config.sampling.snr = 0.075
    config.eval.update(begin_ckpt=50, end_ckpt=96, batch_size=512, enable_sampling=True)


def lsun(config: ConfigDict, category: str, image_size: int = 256) -> None:
    """One scene of LSUN."""
    _large_images(config, "LSUN", image_size)
    config.data.category = category


def celebahq(config: ConfigDict) -> None:
    """CelebA-HQ at 256 pixels; give its file with --config.data.tfrecords_path."""
    _large_images(config, "CelebAHQ", 256)


def ffhq(config: ConfigDict) -> None:
    """FFHQ at 256 pixels; give its file with --config.data.tfrecords_path."""
    _large_images(config, "FFHQ", 256)


def at_1024(config: ConfigDict) -> None:
    """The same faces at 1024 pixels: batches of 8 (Song et al. 2021, Appendix H.3)."""
    config.data.image_size = 1024
    config.model.update(ema_rate=0.9999, sigma_max=1348.0)
    config.training.batch_size = 8
    config.sampling.snr = 0.15
    config.eval.update(begin_ckpt=1, batch_size=1024)


def digits(config: ConfigDict) -> None:
    """The embedded 8x8 grey digits: 17 levels, so the data are dequantized in training and for bits/dim."""
    config.data.update(dataset="digits", image_size=8, num_channels=1, num_levels=17, uniform_dequantization=True)


def small_ncsnpp(config: ConfigDict) -> None:
    """A network of about 0.2 million parameters and a schedule that fit a few minutes of a laptop CPU."""
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, ema_rate=0.995)
    config.optim.update(lr=2e-3, warmup=100)
    config.training.update(batch_size=128, n_iters=1600, n_jitted_steps=10, log_freq=50, eval_freq=100)
    config.training.update(snapshot_freq=800, snapshot_freq_for_preemption=400)
    config.classifier.update(blocks_per_group=1, channel_multiplier=1, batch_size=128, n_iters=1000, n_jitted_steps=10)
    config.classifier.update(lr=2e-3, warmup=100, ema_rate=0.995, log_freq=50, eval_freq=100)
    config.classifier.update(snapshot_freq=500, snapshot_freq_for_preemption=250)
    config.sampling.update(num_steps=250)
    # Tolerances of 1e-3 were 0.08 bits/dim off on the digits, 1e-5 moved the mean by 1e-4 at twice the cost.
    config.likelihood.update(num_probes=1, rtol=1e-4, atol=1e-4, bound_num_times=50)
    # 304: the 297 test images in one batch that 1, 2, 4, 8 or 16 devices divide.
    config.eval.update(begin_ckpt=1, end_ckpt=2, batch_size=304, num_samples=600)
    config.eval.update(enable_sampling=True, enable_bpd=True)


def colour16(config: ConfigDict) -> None:
    """16x16 colour images of one's own, and a network of 1.3 million parameters that a CPU trains in about an hour."""
    config.data.update(dataset="npz", image_size=16, num_channels=3, random_flip=True, uniform_dequantization=True)
    config.model.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), ema_rate=0.998)
    config.optim.lr = 1e-3
    config.training.update(batch_size=64, n_iters=4000, snapshot_freq=2000, snapshot_freq_for_preemption=500)
    config.eval.update(end_ckpt=2, batch_size=64, num_samples=1000)


def cifar10_cpu(config: ConfigDict) -> None:
    """CIFAR-10 from a folder of pictures, and a network of 1.3 million parameters that a CPU trains for an hour."""
    config.data.update(dataset="folder", uniform_dequantization=True)
    config.model.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, dropout=0.0, ema_rate=0.995)
    config.optim.update(lr=1e-3, warmup=500)
    config.training.update(batch_size=64, n_iters=4500, n_jitted_steps=10, log_freq=50, eval_freq=100)
    config.training.update(snapshot_freq=500, snapshot_freq_for_preemption=200)
    # A network so young hardly knows how bright a noisy image is; noise on the way and clipping keep samples in range.
    config.sampling.update(method="dpmpp_sde", num_steps=50, clip=True)
    config.likelihood.update(rtol=1e-4, atol=1e-4)
    config.eval.update(begin_ckpt=9, end_ckpt=9, batch_size=100, num_samples=1000, enable_sampling=True)
    config.eval.extractor = "classifier"  # the features of 50,000 images by an ImageNet network take half an hour here
