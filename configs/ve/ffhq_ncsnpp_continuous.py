"""NCSN++ with the VE SDE on FFHQ of 1024 pixels.

No row of the paper.

python main.py --config configs/ve/ffhq_ncsnpp_continuous.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp_1024, parts.ffhq, parts.at_1024)
    config.training.reduce_mean = True
    return config
