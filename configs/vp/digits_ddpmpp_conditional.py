"""Class-conditional DDPM++ with the VP SDE on the embedded 8x8 digits: samples of a class.

No row of the paper. One image in ten is shown without its label, so that the network is unconditional, too, and guides
itself: docs/controllable.md has pictures and numbers.

  python main.py --config configs/vp/digits_ddpmpp_conditional.py --mode train --workdir runs/digits_conditional
"""

from ml_collections import ConfigDict

from configs.vp import digits_ddpmpp_continuous


def get_config() -> ConfigDict:
    config = digits_ddpmpp_continuous.get_config()
    config.model.num_classes = 10
    config.training.label_dropout = 0.1
    config.sampling.labels = "0..9"
    return config
