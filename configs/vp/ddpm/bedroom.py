"""DDPM on LSUN bedrooms of 256 pixels.

No row of the paper.

python main.py --config configs/vp/ddpm/bedroom.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ddpm_chain, parts.ddpm_256)
    parts.lsun(config, "bedroom")
    return config
