"""DDPM++ with the sub-VP SDE on the embedded 8x8 digits; no row of the paper, trains in about two minutes on a CPU.

python main.py --config configs/subvp/digits_ddpmpp_continuous.py --mode train --workdir runs/digits_subvp
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.small_ncsnpp, parts.digits, parts.ddpmpp, parts.subvp)
