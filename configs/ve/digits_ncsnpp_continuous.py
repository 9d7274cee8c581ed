"""NCSN++ with the VE SDE on the embedded 8x8 digits; no row of the paper, trains in about two minutes on a CPU.

python main.py --config configs/ve/digits_ncsnpp_continuous.py --mode train --workdir runs/digits_ve
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.small_ncsnpp(config)
    parts.digits(config)
    parts.ncsnpp(config)
    config.model.embedding_type = "fourier"
    config.model.sigma_max = 10.0  # about the largest distance between two of the 64-pixel images in [0, 1]
    return config
