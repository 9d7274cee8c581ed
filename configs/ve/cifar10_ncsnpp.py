"""NCSN++ with discrete VE noise levels (SMLD) on CIFAR-10: Song et al. 2021, Table 1 ("NCSN++").

python main.py --config configs/ve/cifar10_ncsnpp.py --mode train --workdir runs/cifar10_ncsnpp
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.cifar10(config)
    parts.ncsnpp(config)
    parts.ve(config)
    config.training.continuous = False
    return config
