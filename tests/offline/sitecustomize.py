"""Ends the Python process's way to the network: looking up or connecting to another machine raises an error.

Python imports a module of this name when it starts: with this folder on PYTHONPATH a run is offline, whatever it
imports. conftest.py does the same for the tests themselves. Sockets that C++ opens by itself are not seen.
"""

import sys

OWN = ("localhost", "127.0.0.1", "::1", "", None)


def refuse(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in OWN:
        raise RuntimeError(f"{event} of {host}: the tests have no network")


sys.addaudithook(refuse)
