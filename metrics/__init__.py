"""Metrics with their uncertainty and the features they compare; evaluation.py is the door."""
