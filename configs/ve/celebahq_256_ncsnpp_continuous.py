"""NCSN++ with the VE SDE on CelebA-HQ of 256 pixels.

No row of the paper.

python main.py --config configs/ve/celebahq_256_ncsnpp_continuous.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ncsnpp_256(config)
    parts.celebahq(config)
    config.model.sigma_max = 348.0
    return config
