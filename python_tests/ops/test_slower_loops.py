"""torch's environment variable ``ATEN_CPU_CAPABILITY`` also selects the loops of older processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import OLDER_PROCESSORS

TESTS = ("test_packed.py", "test_quantized.py")
CHOSEN = "within_the_bound or every_bit or nothing_outside or every_code"


@pytest.mark.parametrize("capability", OLDER_PROCESSORS)
def test_products_of_packed_matrices(capability, tmp_path):
    """The same tests pass."""
    files = [str(Path(__file__).with_name(name)) for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", CHOSEN, "-p", "no:cacheprovider", "-q", *files],
        cwd=tmp_path,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
