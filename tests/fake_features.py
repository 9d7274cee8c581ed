"""An extractor whose features are known by hand: linear in the levels, in float32 as those of networks."""

import dataclasses

import numpy as np

from sources.base import ArraySource


@dataclasses.dataclass
class LinearExtractor:
    """Features levels @ matrix; class scores are the first of them."""

    key: str = "efficientnet_lite0"
    num_features: int = 5
    seed: int = 0
    name: str = "linear features"
    resize: str = "none"
    accuracy: float | None = None

    def __post_init__(self):
        self.images = 0  # that went through

    @property
    def hash(self):
        return f"{self.seed:064d}"

    def features(self, levels):
        flat = levels.reshape(len(levels), -1).astype(np.float64)
        matrix = np.random.default_rng(self.seed).standard_normal((flat.shape[1], self.num_features))
        return (flat @ matrix / 100).astype(np.float32).astype(np.float64)

    def __call__(self, levels):
        self.images += len(levels)
        features = self.features(levels)
        return features, features[:, :3] / 10


class CountingSource(ArraySource):
    """Images that remember how many were asked for at a time."""

    def images(self, indices):
        self.asked.append(len(indices))
        return super().images(indices)


def make_source(num_images=60, shape=(4, 5, 3), num_levels=256, seed=1):
    """Random images without labels."""
    levels = np.random.default_rng(seed).integers(0, num_levels, (num_images, *shape), dtype=np.uint8)
    source = CountingSource(levels, np.zeros(num_images, np.int64), num_levels, 0)
    object.__setattr__(source, "asked", [])
    return source
