"""NCSN++ with the VP SDE on CIFAR-10.

No row of the paper.

python main.py --config configs/vp/cifar10_ncsnpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.vp, parts.ncsnpp, parts.cifar10)
