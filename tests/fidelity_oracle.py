"""Metrics of fixed random features by torch-fidelity and prdc, printed as JSON.

Run by test_metric_peers.py in a process of its own, so that no other test has PyTorch loaded; its output, with
torch-fidelity 0.4.0 (torch 2.13.0) and prdc 0.2, is tests/golden/fidelity_metrics.json.
"""

import contextlib
import json
import sys
import unittest.mock

import numpy as np
import tfgan_oracle

NUM_PAIRED = 401  # images of each side for KID, which torch-fidelity measures of as many
NUM_SCORED = 500  # images of the Inception Score: ten splits of one size


def stand_in_for_torchvision():
    # torch_fidelity reads images with it, which is not wanted here, and builds of PyTorch without a GPU have none.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = unittest.mock.MagicMock()


def values():
    stand_in_for_torchvision()
    import torch
    from prdc import compute_prdc
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    generated, reference, logits = tfgan_oracle.features()
    x, y = torch.from_numpy(generated), torch.from_numpy(reference)
    statistics = [metric_fid.fid_features_to_statistics(z) for z in (x, y)]
    # One subset of all images is the mean over all pairs.
    kid = metric_kid.kid_features_to_metric(
        x[:NUM_PAIRED], y[:NUM_PAIRED], kid_subsets=1, kid_subset_size=NUM_PAIRED, verbose=False
    )
    scores = metric_isc.isc_features_to_metric(torch.from_numpy(logits[:NUM_SCORED]), splits=10, shuffle=False)
    prc = metric_prc.prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    prdc = compute_prdc(reference, generated, nearest_k=5)
    return {
        "frechet_distance": metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[
            "frechet_inception_distance"
        ],
        "kernel_distance": kid["kernel_inception_distance_mean"],
        "inception_score_10": scores["inception_score_mean"],
        "inception_score_10_std": scores["inception_score_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
        "precision_5": prdc["precision"],
        "recall_5": prdc["recall"],
        "density": prdc["density"],
        "coverage": prdc["coverage"],
    }


def main():
    with contextlib.redirect_stdout(sys.stderr):
        found = values()
    print(json.dumps({name: float(np.float64(value)) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
