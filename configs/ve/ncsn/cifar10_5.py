"""NCSN with the averaged parameters of Technique 5 (Song and Ermon 2020, arXiv 2006.09011) on CIFAR-10.

No row of the paper.

python main.py --config configs/ve/ncsn/cifar10_5.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsn, parts.ncsn_levels, parts.cifar10)
    config.model.ema_rate = 0.999
    return config
