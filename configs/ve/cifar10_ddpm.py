"""The network of DDPM with discrete VE noise levels (SMLD) on CIFAR-10.

Song et al. 2021, Table 1, VE, "reverse diffusion", PC1000: FID 3.60 ± 0.02.

python main.py --config configs/ve/cifar10_ddpm.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ddpm, parts.cifar10)
    config.training.continuous = False
    return config
