"""The 2015 Inception network by torch-fidelity's own code, with random weights, written as an .npz file.

  python tests/inception_oracle.py OUTPUT.npz

Run by test_inception.py if torch and torch_fidelity are installed; the output, with torch 2.13 and torch-fidelity
0.4.0, is tests/golden/inception.npz. The weights are not stored: `weights` makes them from their names alone.
"""

import importlib
import importlib.util
import pathlib
import sys
import types
import zlib

import numpy as np

CHANNELS = 3  # one in three of a block's channels is kept: every branch has more
SMALL_SIDE = 75  # the least that the network takes
BLOCKS = {  # constructor's arguments, shape of the input
    "InceptionA": ((6, 4), (1, 5, 6, 6)),
    "InceptionB": ((5,), (1, 7, 8, 5)),
    "InceptionC": ((6, 8), (1, 6, 5, 6)),
    "InceptionD": ((6,), (1, 7, 6, 6)),
    "InceptionE_1": ((6,), (1, 4, 3, 6)),
    "InceptionE_2": ((6,), (1, 4, 3, 6)),
}
RESIZES = {  # shape of the images, new size, steps of the rows and columns that are kept
    "larger": ((2, 5, 7, 3), (16, 11), (1, 1)),
    "smaller": ((2, 23, 40, 3), (9, 13), (1, 1)),
    "fid": ((1, 32, 32, 3), (299, 299), (23, 17)),
}


def weights(name, shape):
    """The array of this name in PyTorch's state: frozen, and of a size that keeps activations near 1."""
    random = np.random.RandomState(zlib.crc32(name.encode()))  # its stream never changes
    values = ((2.0 * random.random_sample(shape) - 1.0) * np.sqrt(3.0)).astype(np.float32)  # of variance 1
    if name.endswith(("bn.weight", "running_var")):
        return np.float32(0.8) + np.float32(0.1) * np.abs(values)
    if len(shape) == 1:
        return np.float32(0.1) * values
    return values * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))


def normal(name, shape):
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def levels(shape):
    """Pictures of coarse patches with some noise, by integers alone."""
    random = np.random.RandomState(7)
    num, height, width, channels = shape
    coarse = random.randint(0, 200, (num, -(-height // 4), -(-width // 4), channels))
    patches = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
    return (patches + random.randint(0, 56, shape)).astype(np.uint8)


def import_part(name):
    """Imports a module of torch_fidelity, without the package itself, which needs torchvision."""
    if "torch_fidelity" not in sys.modules:
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    return importlib.import_module(f"torch_fidelity.{name}")


def fill(module, prefix=""):
    import torch

    state = module.state_dict()
    named = {name: weights(prefix + name, tuple(old.shape)) for name, old in state.items() if old.dim()}
    module.load_state_dict(state | {name: torch.from_numpy(values) for name, values in named.items()})
    return module.eval()


def main(output):
    import torch

    inception, resizing = import_part("feature_extractor_inceptionv3"), import_part("interpolate_compat_tensorflow")

    def to_torch(x):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    def to_numpy(x):
        return x.numpy().transpose(0, 2, 3, 1)

    arrays = {}
    with torch.no_grad():
        for name, (shape, size, (down, right)) in RESIZES.items():
            x = to_torch(levels(shape).astype(np.float32))
            resized = resizing.interpolate_bilinear_2d_like_tensorflow1x(x, size=size, align_corners=False)
            arrays[f"resize/{name}"] = to_numpy(resized)[:, ::down, ::right]
        for name, (arguments, shape) in BLOCKS.items():
            block = fill(getattr(inception, name)(*arguments), f"{name}.")
            arrays[f"block/{name}"] = to_numpy(block(to_torch(normal(name, shape))))[..., ::CHANNELS]

        blank = pathlib.Path(output).with_suffix(".pth")  # the constructor wants weights: give it none
        load, inception.torch.load = inception.torch.load, lambda *_, **__: None
        inception.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        wanted = ["2048", "logits_unbiased", "logits"]
        network = inception.FeatureExtractorInceptionV3("inception", wanted, feature_extractor_weights_path=str(blank))
        del inception.FeatureExtractorInceptionV3.load_state_dict
        inception.torch.load = load
        fill(network)
        arrays["full"] = np.concatenate([x.numpy() for x in network(to_torch(levels((2, 32, 32, 3))))], axis=1)
        network.INPUT_IMAGE_SIZE = SMALL_SIDE
        arrays["small"] = np.concatenate([x.numpy() for x in network(to_torch(levels((1, 32, 32, 3))))], axis=1)
    np.savez_compressed(output, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
