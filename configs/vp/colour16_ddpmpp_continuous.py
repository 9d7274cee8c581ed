"""DDPM++ with the VP SDE on 16x16 colour images: train.npz and test.npz of --config.data.path (see `sources.npz`).

No row of the paper: what docs/controllable.md restores colours and pixels with.

python main.py --config configs/vp/colour16_ddpmpp_continuous.py --mode train --workdir W --config.data.path=DIR
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.small_ncsnpp, parts.colour16, parts.ddpmpp, parts.vp)
    config.sampling.predictor = "reverse_diffusion"
    return config
