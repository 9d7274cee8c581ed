"""NCSN++ with the VE SDE on CelebA-HQ of 1024 pixels.

Samples in Fig. 12 of Song et al. 2021 (Appendix H.3); no number published.

python main.py --config configs/ve/celebahq_ncsnpp_continuous.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import base, parts


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = base.get_config()
    parts.ve(config)
    parts.ncsnpp_1024(config)
    parts.celebahq(config)
    parts.at_1024(config)
    return config
