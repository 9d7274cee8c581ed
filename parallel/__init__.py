"""Devices, processes, and randomness that does not depend on either."""
