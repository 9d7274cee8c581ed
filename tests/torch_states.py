"""States as PyTorch holds them, for networks of ours: its names and layouts, the oracle's random weights."""

import inception_oracle

from metrics.inception import torch_layer

NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _torch_shape(array, shape):
    if array != "kernel":
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def inception_state(shapes, prefix=""):
    """Returns the state of a network with these shapes; `prefix` is what the oracle puts before its names."""
    state = {}
    for path, shape in shapes.items():
        layer, array = path.rsplit("/", 1)
        part = ("conv" if array == "kernel" else "norm") if f"{layer}/mean" in shapes else "dense"
        name = f"{torch_layer(layer, part)}.{NAMES[array]}"
        state[name] = inception_oracle.weights(prefix + name, _torch_shape(array, shape))
    return state
