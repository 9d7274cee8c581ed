"""What the 2021 score_sde code wrote, in our terms: its parameters by name and shape."""

from legacy.parameters import Leaf, match_layers, match_parameters, params_from_score_sde, params_to_score_sde

__all__ = ["Leaf", "match_layers", "match_parameters", "params_from_score_sde", "params_to_score_sde"]
