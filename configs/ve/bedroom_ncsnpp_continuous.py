"""NCSN++ with the VE SDE on LSUN bedrooms of 256 pixels.

Samples in Fig. 9 of Song et al. 2021; no number published.

python main.py --config configs/ve/bedroom_ncsnpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp_256)
    parts.lsun(config, "bedroom")
    return config
