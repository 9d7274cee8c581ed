"""DDPM++ with the VP SDE on the embedded 8x8 digits: what `make demo` runs.

No row of the paper: a small real problem that a laptop CPU trains in about two minutes. The numbers that it reached,
with machine and seed, are in the README.

  python main.py --config configs/vp/digits_ddpmpp_continuous.py --mode train --workdir runs/digits_vp
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    config = parts.compose(parts.small_ncsnpp, parts.digits, parts.ddpmpp, parts.vp)
    config.sampling.predictor = "reverse_diffusion"
    return config
