"""Repeats what another library computed for a golden file."""

import subprocess
import sys

import numpy as np
import tiny


def assert_repeated(script, golden, folder):
    """Runs an oracle's script in a process of its own and compares its arrays with a golden file's."""
    output = folder / "again.npz"
    run = subprocess.run([sys.executable, tiny.ROOT / "tests" / script, output], capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    with np.load(output) as again:
        assert set(again) == set(golden)
        for name, expected in golden.items():
            np.testing.assert_allclose(again[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
