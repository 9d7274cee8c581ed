"""Settings for every test: the CPU, the checkout on the path, errors where JAX would only be lenient."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiled programs are kept between runs; the folder is the checkout's own, so that a fresh clone starts cold.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))


def pytest_collection_modifyitems(items):
    """Runs the slowest file first, so that the other worker does all the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")
