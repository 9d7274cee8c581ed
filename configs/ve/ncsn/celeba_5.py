"""NCSN with the averaged parameters of Technique 5 (Song and Ermon 2020, arXiv 2006.09011) on CelebA of 64 pixels.

No row of the paper.

python main.py --config configs/ve/ncsn/celeba_5.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsn, parts.ncsn_levels, parts.celeba)
    config.model.ema_rate = 0.999
    return config
