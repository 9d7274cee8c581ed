"""DDPM on LSUN churches of 256 pixels.

No row of the paper.

python main.py --config configs/vp/ddpm/church.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ddpm_chain, parts.ddpm_256)
    parts.lsun(config, "church_outdoor")
    return config
