"""NCSNv2 on CIFAR-10.

Song et al. 2021, Table 3, "NCSNv2": FID 10.87, IS 8.40 ± 0.07, with a last denoising step. The predictor "none" has
none: FID 31.75, IS 8.73 ± 0.13 (Song and Ermon 2020, arXiv 2006.09011, Table 1).

python main.py --config configs/ve/ncsnv2/cifar10.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve)
    parts.ncsnv2(config, "ncsnv2_64")
    parts.cifar10_levels(config)
    parts.cifar10(config)
    return config
