"""NCSN++ with the VE SDE on FFHQ of 256 pixels.

No row of the paper.

python main.py --config configs/ve/ffhq_256_ncsnpp_continuous.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve, parts.ncsnpp_256, parts.ffhq)
    config.model.sigma_max = 348.0
    return config
