"""NCSN++ with discrete VE noise levels (SMLD) on CIFAR-10.

Song et al. 2021, Table 3, "NCSN++": FID 2.45, IS 9.73.

python main.py --config configs/ve/cifar10_ncsnpp.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp, parts.cifar10)
    config.training.continuous = False
    return config
