"""The spread of a metric over repeated experiments, the oracle of its standard error."""

import numpy as np


def spread(measure, draw, repeats):
    """Returns (standard deviation, mean stated standard error) of a metric over repeated experiments."""
    metrics = [measure(*draw()) for _ in range(repeats)]
    return np.std([m.value for m in metrics], ddof=1), np.mean([m.stderr for m in metrics])
