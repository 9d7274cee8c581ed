"""NCSNv2 on LSUN bedrooms of 128 pixels.

No row of Song et al. 2021, and no number in Song and Ermon 2020, arXiv 2006.09011.

python main.py --config configs/ve/ncsnv2/bedroom.py --mode train --workdir W
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.ve)
    parts.ncsnv2(config, "ncsnv2_128")
    parts.lsun(config, "bedroom", image_size=128)
    parts.annealing(config, sigma_max=190.0, num_scales=1086, n_steps_each=3, snr=0.095)
    config.model.ema_rate = 0.9999
    config.training.batch_size = 128
    return config
