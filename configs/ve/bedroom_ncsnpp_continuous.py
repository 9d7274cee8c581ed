"""NCSN++ with the VE SDE on LSUN bedrooms of 256 pixels.

Samples in Fig. 9 of Song et al. 2021; no number published.

python main.py --config configs/ve/bedroom_ncsnpp_continuous.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ncsnpp_256(config)
    parts.lsun(config, "bedroom")
    return config
