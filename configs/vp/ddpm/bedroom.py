"""DDPM on LSUN bedrooms of 256 pixels.

No row of the paper.

python main.py --config configs/vp/ddpm/bedroom.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ddpm_chain(config)
    parts.ddpm_256(config)
    parts.lsun(config, "bedroom")
    return config
