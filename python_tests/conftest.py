"""Fixtures that several test files share; a fixture for one file stays in that file."""

import pytest
import torch
from helpers import DTYPES
from network_guard import pytest_configure, pytest_runtest_call, pytest_runtest_setup, pytest_unconfigure  # noqa: F401

# Devices, dtypes, random numbers, threads


def _devices() -> list[str]:
    from ace_ext import build_info

    return ["cpu", "cuda"] if torch.cuda.is_available() and build_info()["cuda"] else ["cpu"]


@pytest.fixture(params=_devices())
def device(request) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def random() -> torch.Generator:
    """Seeds the random numbers before each test, so that they do not depend on other tests."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def threads():
    """``torch.set_num_threads``; the old number is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
