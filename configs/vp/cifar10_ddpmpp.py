"""DDPM++ with the discrete steps of DDPM on CIFAR-10.

Song et al. 2021, Table 3, "DDPM++": FID 2.78, IS 9.64.

python main.py --config configs/vp/cifar10_ddpmpp.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ddpm_chain, parts.ddpmpp, parts.cifar10)
