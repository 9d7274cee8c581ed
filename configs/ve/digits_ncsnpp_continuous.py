"""NCSN++ with the VE SDE on the embedded 8x8 digits; no row of the paper, trains in about two minutes on a CPU.

python main.py --config configs/ve/digits_ncsnpp_continuous.py --mode train --workdir runs/digits_ve
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.small_ncsnpp, parts.digits, parts.ncsnpp)
    config.model.embedding_type = "fourier"
    config.model.sigma_max = 10.0  # about the largest distance between two of the 64-pixel images in [0, 1]
    return config
