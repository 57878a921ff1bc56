"""Hooks of pytest, which ``conftest.py`` takes over: a test that connects to another machine fails.

``guard/sitecustomize.py`` refuses the connection, here and in the processes that tests start.
"""

import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

GUARD = Path(__file__).parent / "guard" / "sitecustomize.py"
LOG = pytest.StashKey[Path]()
"""What was refused, one line each."""


def pytest_configure(config: pytest.Config) -> None:
    handle, name = tempfile.mkstemp(prefix="ace-connections-")
    os.close(handle)
    config.stash[LOG] = Path(name)
    os.environ["ACE_TEST_CONNECTIONS"] = name
    folders = [str(GUARD.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    if getattr(sys.modules.get("sitecustomize"), "__file__", None) != str(GUARD):  # a worker of pytest-xdist has it
        runpy.run_path(str(GUARD))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[LOG].unlink()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    os.environ["ACE_TEST_NETWORK"] = "0" if item.get_closest_marker("network") is None else "1"
    item.config.stash[LOG].write_text("")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test that tried to connect, in its fixtures too, whatever came of it."""
    yield
    tried = item.config.stash[LOG].read_text().splitlines()
    if tried:
        pytest.fail(f"connections to other machines, in a test without the marker network: {', '.join(tried)}")
