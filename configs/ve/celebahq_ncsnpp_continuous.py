"""NCSN++ with the VE SDE on CelebA-HQ of 1024 pixels.

Samples in Fig. 12 of Song et al. 2021 (Appendix H.3); no number published.

python main.py --config configs/ve/celebahq_ncsnpp_continuous.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ve, parts.ncsnpp_1024, parts.celebahq, parts.at_1024)
