"""DDPM++, deep, with the sub-VP SDE on CIFAR-10: the paper's best likelihood.

Song et al. 2021, Table 3, "DDPM++ cont. (deep, sub-VP)": FID 2.41, IS 9.57. Table 2, "DDPM++ cont. (deep, sub-VP)":
2.99 bits/dim, FID by the ODE 2.92.

python main.py --config configs/subvp/cifar10_ddpmpp_deep_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.subvp, parts.ddpmpp, parts.deep, parts.cifar10)
