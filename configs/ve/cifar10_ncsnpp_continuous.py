"""NCSN++ with the VE SDE on CIFAR-10.

Song et al. 2021, Table 3, "NCSN++ cont. (VE)": FID 2.38, IS 9.83.

python main.py --config configs/ve/cifar10_ncsnpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp, parts.cifar10)
    config.model.embedding_type = "fourier"
    return config
