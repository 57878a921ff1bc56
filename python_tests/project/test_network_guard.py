"""The tests reach no other machine: the guard of ``network_guard.py`` refuses it and fails the test."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ELSEWHERE = "192.0.2.1"
"""An address for documentation (RFC 5737), which no machine has."""


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """What was refused, written to a file of this test's, so that the test does not fail."""
    log = tmp_path / "log"
    monkeypatch.setenv("ACE_TEST_CONNECTIONS", str(log))
    return lambda: log.read_text().splitlines() if log.exists() else []


def connect(address: tuple) -> None:
    with socket.socket() as one:
        one.settimeout(1)
        one.connect(address)


def test_another_machine_is_refused(tried):
    with pytest.raises(ConnectionRefusedError, match="the tests may not use the network"):
        connect((ELSEWHERE, 80))
    with pytest.raises(ConnectionRefusedError):
        socket.getaddrinfo("example.org", 443)
    with pytest.raises(ConnectionRefusedError), socket.socket(type=socket.SOCK_DGRAM) as one:
        one.sendto(b"x", (ELSEWHERE, 53))
    assert tried() == [f"socket.connect {ELSEWHERE}", "socket.getaddrinfo example.org", f"socket.sendto {ELSEWHERE}"]


def test_a_child_is_refused_too(tried):
    program = f"import socket; socket.create_connection(('{ELSEWHERE}', 80), 1)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False
    )
    assert "the tests may not use the network" in done.stderr
    assert tried() == [f"socket.getaddrinfo {ELSEWHERE}"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_not(host, tried):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect((host, server.getsockname()[1]))
    assert tried() == []


TESTS = """
import contextlib, socket, pytest
def reach():
    with contextlib.suppress(OSError), socket.socket() as one:
        one.settimeout(0.01)
        one.connect(("192.0.2.1", 80))
def test_one(): reach()
@pytest.mark.network
def test_other(): reach()
@pytest.fixture(scope="module")
def reached(): reach()
def test_fixture(reached): pass
"""


def test_a_test_that_hides_the_error_fails(tmp_path):
    here = Path(__file__).parents[1]
    (tmp_path / "conftest.py").write_text("from network_guard import *")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {here}\nmarkers = network\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"].partition(os.pathsep)[2]}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "PASSED test_it.py::test_other" in done.stdout
    for name in ("one", "fixture"):
        assert f"FAILED test_it.py::test_{name} - Failed: connections to other machines" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("2 failed, 1 passed")
