"""NCSN++, deep, with the sub-VP SDE on CIFAR-10.

No row of the paper.

python main.py --config configs/subvp/cifar10_ncsnpp_deep_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.subvp(config)
    parts.ncsnpp(config)
    parts.deep(config)
    parts.cifar10(config)
    return config
