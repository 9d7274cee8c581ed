"""NCSN++ with the discrete steps of DDPM on CIFAR-10.

No row of the paper: the fourth best of the 144 architectures that Song et al. 2021, Appendix H.2, tried with the VP
SDE.

python main.py --config configs/vp/cifar10_ncsnpp.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ddpm_chain, parts.ncsnpp, parts.cifar10)
    config.sampling.predictor = "reverse_diffusion"
    return config
