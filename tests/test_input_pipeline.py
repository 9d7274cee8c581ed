"""The benchmark of the input pipeline: what it counts is what was read, and mapped data are not memory of its own."""

import itertools
import json
import sys

import jax
import numpy as np
import pytest
import tiny

import datasets
from benchmarks import input_pipeline, measure
from sources.base import ArraySource


class CountingSource(ArraySource):
    """Counts the images that are read."""

    def images(self, indices):
        self.levels_read.append(len(indices))
        return super().images(indices)


def count_reads(monkeypatch):
    read, open_digits = [], datasets.load_digits
    CountingSource.levels_read = read

    def load(config, split):
        digits = open_digits(split)
        return CountingSource(digits.levels, digits.classes, digits.num_levels, digits.num_classes)

    monkeypatch.setitem(datasets.SOURCES, "digits", load)
    return read


def test_counts_are_those_of_the_images_that_were_read(monkeypatch):
    """By a clock that goes on by a second at each look: at 0, before each of four calls, and at 5 after the last."""
    read = count_reads(monkeypatch)
    clock = itertools.count().__next__
    result = input_pipeline.measure(tiny.make_config(), batch_size=16, seconds=5, clock=clock)
    assert (result["calls"], result["seconds"], result["steps_per_call"]) == (4, 5, 2)
    assert result["images"] == 4 * 2 * 16
    assert result["images_per_second"] == result["images"] / result["seconds"]
    steps = [size for size in read if size == 16]
    taken, ahead = input_pipeline.WARM_UP + result["calls"], 2
    assert 2 * taken <= len(steps) <= 2 * (taken + ahead)
    assert (result["num_images"], result["image_shape"]) == (1500, (8, 8, 1))
    assert result["data_mib"] == 1500 * 64 / 2**20
    assert result["anonymous_mib"] >= 0
    json.dumps(result, allow_nan=False)


def test_labels_are_read_where_the_network_is_told_them(monkeypatch):
    batches = []
    original = datasets.training_batches

    def spy(*arguments, **options):
        for batch in original(*arguments, **options):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(datasets, "training_batches", spy)
    config = tiny.make_config(model__num_classes=10)
    input_pipeline.measure(config, batch_size=8, seconds=1, clock=itertools.count().__next__)
    levels, labels = batches[-1]
    assert (levels.shape[1:4], labels.shape[1:]) == ((2, 8, 8), (2, 8))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"batch_size": 0, "seconds": 1}, "--batch_size=0: expected a positive number"),
        ({"batch_size": 8, "seconds": 0}, "--seconds=0: expected a positive number"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        input_pipeline.measure(tiny.make_config(), **numbers)


def test_devices_must_divide_the_batch(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(ValueError, match="--batch_size=8 is not divided by the 3 devices"):
        input_pipeline.measure(tiny.make_config(), batch_size=8, seconds=1)


# How memory grows while all images are read batch by batch, and while they are loaded, MiB: own and mapped. It runs in
# a process of its own: one that has run other tests loads into memory that it has freed.
GROWTH = """
import json, sys
import numpy as np
sys.path.insert(0, "tests")
import datasets, tiny
from benchmarks import input_pipeline

folder = sys.argv[1]
config = tiny.make_config(data__dataset="npz", data__path=folder, data__image_size=64)

def read_all():
    source = datasets.build_source(config, "train")
    for start in range(0, len(source), 256):
        source.images(np.arange(start, start + 256))
    return source

def growth(read):
    before = input_pipeline.memory()
    held = read()
    after = input_pipeline.memory()
    return [after[name] - before[name] for name in ("anonymous_mib", "file_mapped_mib")]

print(json.dumps([growth(read_all), growth(lambda: np.load(f"{folder}/train.npy"))]))
"""


@pytest.mark.skipif(not measure.STATUS.exists(), reason="memory is read from Linux's /proc")
def test_mapped_data_are_not_memory_of_the_process(tmp_path):
    """An array that is loaded shows the contrary. 64 MiB, half as margin."""
    images = np.zeros((16384, 64, 64, 1), np.uint8)
    images[:, 0] = 1
    np.save(tmp_path / "train.npy", images)
    np.save(tmp_path / "test.npy", images[:1])
    (own, mapped), (loaded, _) = json.loads(tiny.succeed([sys.executable, "-c", GROWTH, tmp_path]).stdout)
    assert own < 32 < mapped
    assert loaded > 32
