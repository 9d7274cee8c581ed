"""DDPM++, deep, with the VP SDE on CIFAR-10.

Song et al. 2021, Table 3, "DDPM++ cont. (deep, VP)": FID 2.41, IS 9.68. Table 2, "DDPM++ cont. (deep, VP)": 3.13
bits/dim, FID by the ODE 3.08.

python main.py --config configs/vp/cifar10_ddpmpp_deep_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.vp, parts.ddpmpp, parts.deep, parts.cifar10)
