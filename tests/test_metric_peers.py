"""Metrics against torch-fidelity, prdc and scipy on the same features: equal to 1e-6. TF-GAN: test_evaluation.py."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import fidelity_oracle
import numpy as np
import pytest
import scipy.linalg
import tfgan_oracle

import evaluation

TESTS = Path(__file__).parent
GOLDEN = json.loads((TESTS / "golden" / "fidelity_metrics.json").read_text())


def our_values():
    x, y, logits = tfgan_oracle.features()
    paired = fidelity_oracle.NUM_PAIRED
    scores = evaluation.inception_score_from_logits(logits[: fidelity_oracle.NUM_SCORED], num_splits=10)
    found = {
        "frechet_distance": evaluation.frechet_distance(x, y).value,
        "kernel_distance": evaluation.kernel_distance(x[:paired], y[:paired]).value,
        "inception_score_10": scores.value,
        "inception_score_10_std": scores.stderr * math.sqrt(9),  # of the splits, by 10 and not by 9 of them
    }
    for suffix, k in (("", 3), ("_5", 5)):
        precision, recall = evaluation.precision_recall(x, y, num_neighbors=k)
        found |= {f"precision{suffix}": precision.value, f"recall{suffix}": recall.value}
    density, coverage = evaluation.density_coverage(x, y)
    return found | {"density": density.value, "coverage": coverage.value}


def test_metrics_are_those_of_torch_fidelity_and_prdc():
    assert our_values() == pytest.approx(GOLDEN, rel=1e-6)


def test_the_frechet_distance_of_features_is_that_of_scipys_matrix_square_root():
    x, y, _ = tfgan_oracle.features()
    covs = [np.cov(z, rowvar=False) for z in (x, y)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(covs[0] + covs[1] - 2.0 * root)
    assert evaluation.frechet_distance(x, y).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch_fidelity", "prdc")),
    reason="torch-fidelity and prdc are not installed",
)
def test_the_recorded_values_are_what_torch_fidelity_and_prdc_compute():
    command = [sys.executable, TESTS / "fidelity_oracle.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == pytest.approx(GOLDEN, rel=1e-9)
