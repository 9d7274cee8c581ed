"""What process 0 decides, all processes get: results, arrays of any kind, errors. Two processes are played in turn."""

import ml_dtypes
import numpy as np
import pytest
from jax.experimental import multihost_utils

from parallel import distributed
from parallel.distributed import ProcessError, divide, once, once_arrays, once_tree, require_same


class Wire:
    """What process 0 published and sent, for process 1 to receive in the same order."""

    def __init__(self, monkeypatch):
        self.strings, self.chunks, self.index, self._monkeypatch = {}, [], 0, monkeypatch
        monkeypatch.setattr(distributed, "_membership", self)
        monkeypatch.setattr(distributed, "CHUNK_BYTES", 64)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", self.broadcast)
        self.play(0)

    def play(self, index):
        self.index, self._chunks = index, iter(self.chunks)
        self._monkeypatch.setattr(distributed, "_onces", iter(range(100)))

    def publish(self, key, value):
        assert self.index == 0
        assert key not in self.strings
        self.strings[key] = value

    def wait_for(self, key):
        assert self.index == 1
        return self.strings[key]

    def broadcast(self, chunk):
        if self.index == 0:
            self.chunks.append(chunk)
            return chunk
        assert not chunk.any()
        sent = next(self._chunks)
        assert sent.shape == chunk.shape
        return sent


@pytest.fixture
def wire(monkeypatch):
    return Wire(monkeypatch)


def never():
    raise AssertionError("only process 0 does this")


def test_a_result_reaches_all(wire):
    given = [{"number": 3, "pair": (1, 2.5)}, None, "text"]
    first = [once(lambda value=value: value) for value in given]
    wire.play(1)
    assert [once(never) for _ in given] == first == [{"number": 3, "pair": [1, 2.5]}, None, "text"]


def test_an_error_reaches_all(wire):
    def fail():
        raise FileNotFoundError("no such checkpoint")

    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        once(fail)
    assert once(lambda: 1) == 1  # and the next one is decided as ever
    wire.play(1)
    with pytest.raises(ProcessError, match="process 0 stopped: no such checkpoint"):
        once(never)
    assert once(never) == 1


def test_decisions_within_a_decision_are_those_of_process_0_alone(wire):
    inner = distributed.on_main(lambda: 2)
    assert once(lambda: inner() + once(lambda: 3)) == 5
    assert once_arrays(lambda: {"x": once_arrays(lambda: {"y": np.ones(2)})["y"]})["x"].tolist() == [1, 1]
    wire.play(1)
    assert once(never) == 5
    assert once_arrays(never)["x"].tolist() == [1, 1]


ARRAYS = {
    "float64": np.random.default_rng(0).normal(size=(7, 3)),  # more than one chunk
    "bool": np.array([True, False]),
    "scalar": np.asarray(3, np.int32),
    "bfloat16": np.arange(5, dtype=ml_dtypes.bfloat16),
    "text": np.asarray("a hash"),
    "empty": np.zeros((0, 4), np.uint8),
    "strided": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
}


def test_arrays_of_any_kind_reach_all_bit_for_bit(wire):
    first = once_arrays(lambda: ARRAYS)
    assert once_arrays(lambda: None) is None
    wire.play(1)
    for found in (first, once_arrays(never)):
        assert found.keys() == ARRAYS.keys()
        for name, expected in ARRAYS.items():
            assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
            assert found[name].tobytes() == expected.tobytes()
            assert found[name].flags.writeable
    assert once_arrays(never) is None
    assert max(len(chunk) for chunk in wire.chunks) == 64


def test_a_tree_keeps_its_structure(wire):
    tree, template = {"a": (np.arange(3.0), np.ones((2, 2)))}, {"a": (np.zeros(3), np.zeros((2, 2)))}
    once_tree(lambda: tree, template)
    wire.play(1)
    found = once_tree(never, template)
    np.testing.assert_array_equal(found["a"][0], tree["a"][0])
    np.testing.assert_array_equal(found["a"][1], tree["a"][1])


def test_what_differs_is_named(wire):
    require_same({"--config.sampling.snr": float("nan"), "--config.seed": 1, "pair": (1, 2)})
    wire.play(1)
    with pytest.raises(
        ValueError, match=r"--config.seed: 2 on process 0, but 1 on process 0; it must be the same on all"
    ):
        require_same({"--config.sampling.snr": float("nan"), "--config.seed": 2, "pair": [1, 2]})


def test_rows_are_divided_and_joined_in_order(monkeypatch):
    rows = np.arange(7.0)[:, None] + np.arange(2.0) / 3
    double = lambda part: (2 * part, part.sum(axis=1))  # noqa: E731
    shares = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(distributed.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda part, tiled: part)
        shares.append(divide(double, rows))
    assert [len(share[0]) for share in shares] == [3, 3, 3]
    joined = np.concatenate([share[0] for share in shares])[:7]
    np.testing.assert_array_equal(joined, double(rows)[0])  # float64 to the last bit
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda part, tiled: np.concatenate([part] * 3))
    assert [len(part) for part in divide(double, rows)] == [7, 7]
