"""DDPM++ with the sub-VP SDE on CIFAR-10.

Song et al. 2021, Table 3, "DDPM++ cont. (sub-VP)": FID 2.61, IS 9.56. Table 2, "DDPM++ cont. (sub-VP)": 3.02
bits/dim, FID by the ODE 3.16.

python main.py --config configs/subvp/cifar10_ddpmpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.subvp, parts.ddpmpp, parts.cifar10)
