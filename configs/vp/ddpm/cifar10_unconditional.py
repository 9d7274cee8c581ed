"""DDPM on CIFAR-10, its network not conditioned on the noise level.

No row of the paper.

python main.py --config configs/vp/ddpm/cifar10_unconditional.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ddpm_chain, parts.ddpm, parts.cifar10)
    config.model.conditional = False
    return config
