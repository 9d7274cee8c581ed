"""The noise-conditional Wide ResNet 28-10 that guides class-conditional sampling of CIFAR-10 with the VE SDE.

Song et al. 2021, Appendix I.1; Fig. 13 shows its accuracy at each noise level, no table does. It cannot be trained here
yet; a checkpoint of the 2021 code comes in by

python main.py --config configs/classifier/cifar10_wideresnet.py --mode import --checkpoint FILE --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.wide_resnet(config)
    parts.cifar10(config)
    return config
