"""Readers of users' files under inputs that were changed at random, see tests/fuzz; whether the fuzzer sees faults."""

import json
import subprocess
import sys

import pytest
import tiny
from fuzz import readers

COUNT = 15  # of the default test; 10,000 of the exhaustive one


def run(arguments, timeout):
    environment = tiny.environment() | {"PYTHONPATH": f"{tiny.ROOT}:{tiny.ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def fuzz(names, count, seed, keep):
    """Returns what was measured of each reader; fails if one did."""
    result = run(
        ["-m", "fuzz", "--reader", *names, "--count", str(count), "--seed", str(seed), "--keep", str(keep)], 3600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(measured):
    """Both outcomes came up, so that the changes are neither too small nor too large."""
    assert set(measured["outcomes"]) == {"read", "refused"}, measured


@pytest.mark.slow
def test_changed_inputs_are_read_or_refused(tmp_path):
    found = fuzz(list(readers.READERS), COUNT, 1, tmp_path)
    assert [each["reader"] for each in found] == list(readers.READERS)
    for measured in found:
        assert measured["failures"] == 0
        assert measured["reader"] == "orbax" or sum(measured["outcomes"].values()) == COUNT
    # So few need not be of both kinds for each reader.
    assert set().union(*(measured["outcomes"] for measured in found)) == {"read", "refused"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", readers.READERS)
def test_ten_thousand_changed_inputs_are_read_or_refused(tmp_path, name):
    [measured] = fuzz([name], 10_000, 11, tmp_path)
    check(measured)
    assert sum(measured["outcomes"].values()) == (1000 if name == "orbax" else 10_000)


FAULTS = """
import json, os, signal, sys, time
from pathlib import Path
from errors import UserError
from fuzz import engine

def refuse(path): raise UserError(f"{path} is wrong")
def unnamed(path): raise UserError("wrong")
def library(path): raise ValueError(f"{path} is wrong")
def other(path): raise KeyError(path.name)
def swallow(path):
    try:
        raise MemoryError
    except Exception:
        raise UserError(f"{path} is wrong")
def hang(path):
    while True: time.sleep(0.01)
def busy(path):
    while True: pass
def deaf(path):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)
def grow(path): bytearray(2**27)
def reserve(path): bytearray(2**31)
def crash(path): os.abort()

engine.SECONDS, engine.WAITING = 0.2, 0.8
for read in (refuse, unnamed, library, other, swallow, hang, busy, deaf, grow, reserve, crash):
    reader = engine.Reader(read.__name__, "file.bin", (b"good",), lambda random, inputs: b"bad", read, memory=2**26)
    summary, failures = engine.run(reader, 1, 1, sys.argv[1])
    print(json.dumps([read.__name__, failures[0]["wrong"] if failures else ""]))
    assert all(Path(each["input"]).read_bytes() == b"bad" for each in failures)
"""


def test_the_fuzzer_sees_faults(tmp_path):
    """Wrong kinds of errors, hangs with and without a way to end them, memory that is used or asked for, crashes."""
    result = run(["-c", FAULTS, str(tmp_path)], 120)
    assert result.returncode == 0, result.stderr[-2000:]
    found = dict(json.loads(line) for line in result.stdout.splitlines())
    expected = {
        "refuse": "",
        "unnamed": "does not name file.bin",
        "library": "ValueError",
        "other": "KeyError",
        "swallow": "",
        "hang": "took more than 0.2 s, or 0.8 s in all",
        "busy": "took more than 0.2 s, or 0.8 s in all",
        "deaf": "the process ended with status 9",
        "grow": "took 128 MiB",
        "reserve": "MemoryError",
        "crash": "the process ended with status 6",
    }
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert text in found[name]
        assert bool(text) == bool(found[name])
