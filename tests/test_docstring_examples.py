"""The examples in docstrings run and print what they state."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["classifier", "controllable_generation"])
def test_the_examples_of_a_room_work(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert (failed, attempted > 10) == (0, True)
