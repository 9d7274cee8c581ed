"""DDPM++ with the VP SDE on the embedded 8x8 digits: what `make demo` runs.

No row of the paper: a small real problem that a laptop CPU trains in about two minutes. The numbers that it reached,
with machine and seed, are in the README.

  python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode train --workdir runs/digits_vp
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.small_ncsnpp(config)
    parts.digits(config)
    parts.ddpmpp(config)
    parts.vp(config)
    config.sampling.predictor = "reverse_diffusion"
    return config
