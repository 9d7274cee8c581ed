"""NCSN++ with the sub-VP SDE on CIFAR-10.

No row of the paper.

python main.py --config configs/subvp/cifar10_ncsnpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.subvp, parts.ncsnpp, parts.cifar10)
