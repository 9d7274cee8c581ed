"""NCSN++ with the VE SDE on LSUN churches of 256 pixels.

Samples in Fig. 9 of Song et al. 2021; no number published.

python main.py --config configs/ve/church_ncsnpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp_256)
    parts.lsun(config, "church_outdoor")
    config.model.sigma_max = 380.0
    return config
