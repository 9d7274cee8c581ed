"""DDPM with the VP SDE on CIFAR-10.

Song et al. 2021, Table 2, "DDPM cont. (VP)": 3.21 bits/dim, FID by the ODE 3.69.

python main.py --config configs/vp/ddpm/cifar10_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.vp(config)
    parts.ddpm(config)
    parts.cifar10(config)
    return config
