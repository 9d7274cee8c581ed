"""NCSN++ with the VE SDE on FFHQ of 1024 pixels.

No row of the paper.

python main.py --config configs/ve/ffhq_ncsnpp_continuous.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ncsnpp_1024(config)
    parts.ffhq(config)
    parts.at_1024(config)
    config.training.reduce_mean = True
    return config
