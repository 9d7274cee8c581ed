"""Several processes: how each learns which one it is, and what is said when one of them is gone."""
