"""DDPM (Ho et al. 2020): the U-Net of NCSN++ with plain residual blocks and a normalization of one's choice."""

from models.ncsnpp import NCSNpp


class DDPM(NCSNpp):
    """DDPM: no filter, no rescaled sums, no growing input or output; the label is embedded by sines and cosines.

    As in the 2021 code, and unlike DDPM's first code, the way up attends once at each resolution, not after each block.
    """
