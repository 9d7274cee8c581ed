"""The network of DDPM with discrete VE noise levels (SMLD) on CIFAR-10.

Song et al. 2021, Table 1, VE, "reverse diffusion", PC1000: FID 3.60 ± 0.02.

python main.py --config configs/ve/cifar10_ddpm.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ddpm(config)
    parts.cifar10(config)
    config.training.continuous = False
    return config
