"""Settings for every test: the CPU, the checkout on the path, errors where JAX would only be lenient."""

import gc
import os
import runpy
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "tests" / "offline" / "sitecustomize.py"))  # from here on nothing reaches the network
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiling is what the tests spend their time on, and what they run is tiny: half of it is optimization.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
# Compiled programs are kept between runs; the folder is the checkout's own, so that a fresh clone starts cold.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
# Tests change code at run time, of which a stored program knows nothing.
os.environ["SCORE_SDE_KEEP_PROGRAMS"] = "0"
# Weights and prepared images that the user has must not change what a test does.
os.environ["SCORE_SDE_CACHE"] = str(ROOT / ".cache" / "score_sde")


def _once(tmp_path_factory, name, make):
    """Return the folder `name`, which the first worker that needs it makes for all: `make(folder)`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(Path(f"{folder}.part"))
            Path(f"{folder}.part").rename(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The workdir of a tiny run that nothing disturbed, trained without TensorFlow. Copy it."""
    import tiny

    train = lambda workdir: tiny.succeed(tiny.without_tensorflow(tiny.command("train", workdir)))  # noqa: E731
    return _once(tmp_path_factory, "finished", train)


@pytest.fixture(scope="session")
def digits_features(tmp_path_factory):
    """A folder that holds the trained classifier of the digits, as `features` of a tiny run would. Copy it."""
    import datasets
    from metrics.classifier import build_feature_extractor

    def train(folder):
        train, test = (datasets.load_digits(split) for split in ("train", "test"))
        arrays = train.levels, train.classes, test.levels, test.classes
        build_feature_extractor(*arrays, num_levels=17, folder=folder, seed=42)

    return _once(tmp_path_factory, "features", train)


SLOWEST = ("test_end_to_end.py", "test_hosts.py", "test_faults_runs.py", "test_models.py", "test_likelihood.py")


def pytest_collection_modifyitems(items):
    """Runs the slowest files first, one on each worker, so that none is left to run alone at the end."""
    gc.freeze()  # tracing makes millions of small objects, nearly none of them garbage: see experiment/startup.py
    gc.set_threshold(100_000)
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
