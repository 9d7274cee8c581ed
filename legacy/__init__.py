"""What the 2021 programs wrote, in our terms: parameters by name and shape, checkpoints of JAX and of PyTorch."""

from legacy.checkpoint import GROUPS, LegacyCheckpoint, Row, read_checkpoint, write_score_sde
from legacy.parameters import Leaf, match_layers, match_parameters, params_from_score_sde, params_to_score_sde

__all__ = [
    "GROUPS",
    "Leaf",
    "LegacyCheckpoint",
    "Row",
    "match_layers",
    "match_parameters",
    "params_from_score_sde",
    "params_to_score_sde",
    "read_checkpoint",
    "write_score_sde",
]
