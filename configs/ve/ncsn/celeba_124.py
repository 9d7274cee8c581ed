"""NCSN with the noise levels of Techniques 1, 2 and 4 (Song and Ermon 2020, arXiv 2006.09011) on CelebA of 64 pixels.

No row of the paper.

python main.py --config configs/ve/ncsn/celeba_124.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ve, parts.ncsn, parts.celeba_levels, parts.celeba)
