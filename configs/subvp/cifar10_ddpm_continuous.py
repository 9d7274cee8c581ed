"""DDPM with the sub-VP SDE on CIFAR-10.

Song et al. 2021, Table 2, "DDPM cont. (sub-VP)": 3.05 bits/dim, FID by the ODE 3.56.

python main.py --config configs/subvp/cifar10_ddpm_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.subvp, parts.ddpm, parts.cifar10)
