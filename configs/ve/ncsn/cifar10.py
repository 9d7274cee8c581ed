"""NCSN on CIFAR-10, as Song and Ermon 2019 published it.

Song et al. 2021, Table 3, "NCSN": FID 25.32, IS 8.87 ± 0.12.

python main.py --config configs/ve/ncsn/cifar10.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ve, parts.ncsn, parts.ncsn_levels, parts.cifar10)
