"""DDPM on CelebA-HQ of 256 pixels.

Samples in Figs. 3 and 6 of Song et al. 2021; no number published.

python main.py --config configs/vp/ddpm/celebahq.py --mode train --workdir W
with --config.data.tfrecords_path FILE, the images in the layout of progressive GANs
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ddpm_chain, parts.ddpm_256, parts.celebahq)
