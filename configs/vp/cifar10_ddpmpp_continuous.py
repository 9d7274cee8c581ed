"""DDPM++ with the VP SDE on CIFAR-10.

Song et al. 2021, Table 3, "DDPM++ cont. (VP)": FID 2.55, IS 9.58. Table 2, "DDPM++ cont. (VP)": 3.16 bits/dim, FID by
the ODE 3.93.

python main.py --config configs/vp/cifar10_ddpmpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.vp, parts.ddpmpp, parts.cifar10)
