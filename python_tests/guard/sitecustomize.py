"""Refuses connections to other machines. ``conftest.py`` puts this folder on PYTHONPATH, so that every Python process
that a test starts loads this file as it starts; the tests' own process imports it.

A refused name or address is also a line of the file that ``ACE_TEST_CONNECTIONS`` names: the test fails, even if what
it calls goes on without the network. ``ACE_TEST_NETWORK=1`` allows everything (the marker ``network`` sets it).
"""

import ipaddress
import os
import socket
import sys

LOG = "ACE_TEST_CONNECTIONS"
ALLOW = "ACE_TEST_NETWORK"


def _is_this_machine(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if not host or host in ("localhost", socket.gethostname()):  # None and "": any address of this machine
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _hook(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto"):
        if not isinstance(arguments[1], tuple):  # a socket in the file system
            return
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if os.environ.get(ALLOW) == "1" or _is_this_machine(host):
        return
    if LOG in os.environ:
        with open(os.environ[LOG], "a") as log:
            log.write(f"{event} {host}\n")
    raise ConnectionRefusedError(f"{event} {host!r}: the tests may not use the network")


sys.addaudithook(_hook)
