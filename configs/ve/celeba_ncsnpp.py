"""NCSN++ with discrete VE noise levels (SMLD) on CelebA of 64 pixels.

No row of the paper: one of the data sets on which Song et al. 2021, Appendix H.1, chose the architecture.

python main.py --config configs/ve/celeba_ncsnpp.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp, parts.celeba)
    config.training.continuous = False
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    return config
