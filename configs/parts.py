"""Groups of settings that experiments share. Each function changes a configuration in place."""

from __future__ import annotations

from ml_collections import ConfigDict


def cifar10(config: ConfigDict) -> None:
    """CIFAR-10: 32x32 RGB, 50,000 training images, mirrored at random."""
    config.data.update(dataset="CIFAR10", image_size=32, num_channels=3, num_levels=256, random_flip=True)
    config.eval.update(begin_ckpt=9, end_ckpt=26, num_samples=50_000)


def digits(config: ConfigDict) -> None:
    """The embedded 8x8 grey digits: 17 levels, so the data are dequantized in training and for bits/dim."""
    config.data.update(dataset="digits", image_size=8, num_channels=1, num_levels=17, uniform_dequantization=True)


def small_ncsnpp(config: ConfigDict) -> None:
    """A network of about 0.2 million parameters and a schedule that fit a few minutes of a laptop CPU."""
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, ema_rate=0.995)
    config.optim.update(lr=2e-3, warmup=100)
    config.training.update(batch_size=128, n_iters=1600, n_jitted_steps=10, log_freq=50, eval_freq=100)
    config.training.update(snapshot_freq=800, snapshot_freq_for_preemption=400)
    config.sampling.update(num_steps=250)
    # Tolerances of 1e-3 were 0.08 bits/dim off on the digits, 1e-5 moved the mean by 1e-4 at twice the cost.
    config.likelihood.update(num_probes=1, rtol=1e-4, atol=1e-4)
    # 304: the 297 test images in one batch that 1, 2, 4, 8 or 16 devices divide.
    config.eval.update(begin_ckpt=1, end_ckpt=2, batch_size=304, num_samples=600)
    config.eval.update(enable_sampling=True, enable_bpd=True)


def ddpmpp(config: ConfigDict) -> None:
    """DDPM++ (Song et al. 2021, Appendix H): BigGAN blocks, no FIR filter, no growing input, positional embedding."""
    config.model.update(fir=False, progressive_input="none", embedding_type="positional", scale_by_sigma=False)


def ncsnpp(config: ConfigDict) -> None:
    """NCSN++ (Song et al. 2021, Appendix H): BigGAN blocks, FIR filter, growing residual input."""
    config.model.update(fir=True, progressive_input="residual")


def vp(config: ConfigDict) -> None:
    """VP SDE; sampled by Euler-Maruyama on data in [-1, 1]."""
    config.data.centered = True
    config.training.update(sde="vpsde", reduce_mean=True)
    config.sampling.update(predictor="euler_maruyama", corrector="none")


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
