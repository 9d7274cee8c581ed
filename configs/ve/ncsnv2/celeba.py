"""NCSNv2 on CelebA of 64 pixels.

No row of Song et al. 2021. Song and Ermon 2020, arXiv 2006.09011, Table 1, "NCSNv2": FID 10.23 with a last denoising
step; the predictor "none" has none: 28.86.

python main.py --config configs/ve/ncsnv2/celeba.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve)
    parts.ncsnv2(config, "ncsnv2_64")
    parts.celeba_levels(config)
    parts.celeba(config)
    return config
