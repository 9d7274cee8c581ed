"""NCSN++, deep, with the VE SDE on CIFAR-10: the paper's best samples.

Song et al. 2021, Table 3, "NCSN++ cont. (deep, VE)": FID 2.20, IS 9.89.

python main.py --config configs/ve/cifar10_ncsnpp_deep_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp, parts.deep, parts.cifar10)
    config.model.embedding_type = "fourier"
    return config
