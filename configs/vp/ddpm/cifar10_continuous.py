"""DDPM with the VP SDE on CIFAR-10.

Song et al. 2021, Table 2, "DDPM cont. (VP)": 3.21 bits/dim, FID by the ODE 3.69.

python main.py --config configs/vp/ddpm/cifar10_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.vp, parts.ddpm, parts.cifar10)
