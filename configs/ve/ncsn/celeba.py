"""NCSN on CelebA of 64 pixels, as Song and Ermon 2019 published it.

No row of Song et al. 2021. Song and Ermon 2020, arXiv 2006.09011, Table 1, "NCSN" without denoising: FID 26.89.

python main.py --config configs/ve/ncsn/celeba.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.ve, parts.ncsn, parts.ncsn_levels, parts.celeba)
