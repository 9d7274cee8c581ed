"""DDPM++ with the VP SDE on CIFAR-10 from a folder of pictures, reduced to what a CPU trains in an hour.

No row of the paper: docs/cifar10_cpu.md says how it was trained and what came out.

python main.py --config configs/vp/cifar10_cpu_ddpmpp_continuous.py --mode train --workdir W --config.data.path=DIR
"""

from ml_collections import ConfigDict

from configs import parts


def get_config() -> ConfigDict:
    return parts.compose(parts.vp, parts.ddpmpp, parts.cifar10, parts.cifar10_cpu)
