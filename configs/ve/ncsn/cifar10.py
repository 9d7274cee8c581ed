"""NCSN on CIFAR-10, as Song and Ermon 2019 published it.

Song et al. 2021, Table 3, "NCSN": FID 25.32, IS 8.87 ± 0.12.

python main.py --config configs/ve/ncsn/cifar10.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ncsn(config)
    parts.ncsn_levels(config)
    parts.cifar10(config)
    return config
