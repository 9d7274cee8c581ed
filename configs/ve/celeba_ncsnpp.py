"""NCSN++ with discrete VE noise levels (SMLD) on CelebA of 64 pixels.

No row of the paper: one of the data sets on which Song et al. 2021, Appendix H.1, chose the architecture.

python main.py --config configs/ve/celeba_ncsnpp.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ncsnpp(config)
    parts.celeba(config)
    config.training.continuous = False
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    return config
