"""The noise-conditional Wide ResNet 28-10 that guides class-conditional sampling of CIFAR-10 with the VE SDE.

Song et al. 2021, Appendix I.1; Fig. 13 shows its accuracy at each noise level, no table does. A checkpoint of the 2021
code comes in by

python main.py --config configs/classifier/cifar10_wideresnet.py --mode import --checkpoint FILE --workdir W

A classifier of one's own is trained with the configuration of the score network that it is to guide, in whose workdir
it then is; `config.classifier` has its size and schedule:

python main.py --config configs/ve/cifar10_ncsnpp_continuous.py --mode train_classifier --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ve, parts.wide_resnet, parts.cifar10)
