"""Nothing here reaches the network: neither the tests nor the runs that they start."""

import socket
import sys
import urllib.request

import pytest
import tiny

ELSEWHERE = "203.0.113.1"  # RFC 5737: an address for documents, nobody's


@pytest.mark.parametrize("host", ["example.org", ELSEWHERE])
def test_the_tests_are_offline(host):
    with pytest.raises(RuntimeError, match=rf"of {host}: the tests have no network"):
        socket.create_connection((host, 80), timeout=1)
    with pytest.raises(RuntimeError, match="no network"):
        urllib.request.urlopen(f"http://{host}/")


def test_this_machine_may_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()


def test_the_runs_are_offline():
    """Train, sample and eval run so in test_end_to_end.py and test_sample_mode.py."""
    program = f"import socket; socket.create_connection(('{ELSEWHERE}', 80), timeout=1)"
    result = tiny.run([sys.executable, "-c", program])
    assert f"RuntimeError: socket.getaddrinfo of {ELSEWHERE}: the tests have no network" in result.stderr
