"""DDPM on CIFAR-10, its network not told the noise level.

No row of the paper.

python main.py --config configs/vp/ddpm/cifar10_unconditional.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ddpm_chain(config)
    parts.ddpm(config)
    parts.cifar10(config)
    config.model.conditional = False
    return config
