"""Experiment configurations: `base.py` has every key, `parts.py` the groups, each other file one experiment."""
