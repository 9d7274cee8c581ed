"""Parameters and checkpoints of the 2021 programs, score_sde (JAX) and score_sde_pytorch, in our terms."""

from legacy.checkpoint import GROUPS, LegacyCheckpoint, Row, read_checkpoint, write_score_sde
from legacy.parameters import Leaf, match_layers, match_parameters, params_from_score_sde, params_to_score_sde
from legacy.torch_names import match_torch_parameters

__all__ = [
    "GROUPS",
    "Leaf",
    "LegacyCheckpoint",
    "Row",
    "match_layers",
    "match_parameters",
    "match_torch_parameters",
    "params_from_score_sde",
    "params_to_score_sde",
    "read_checkpoint",
    "write_score_sde",
]
