"""DDPM as published: its network, its discrete steps, its ancestral sampling, on CIFAR-10.

Song et al. 2021, Table 1, VP, "ancestral sampling", P1000: FID 3.24 ± 0.02. Table 2, "DDPM": 3.28 bits/dim, FID by
the ODE 3.37.

python main.py --config configs/vp/ddpm/cifar10.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ddpm_chain, parts.ddpm, parts.cifar10)
