"""NCSN with the noise levels of Techniques 1, 2 and 4 (Song and Ermon 2020, arXiv 2006.09011) on CIFAR-10.

No row of the paper.

python main.py --config configs/ve/ncsn/cifar10_124.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ve, parts.ncsn, parts.cifar10_levels, parts.cifar10)
