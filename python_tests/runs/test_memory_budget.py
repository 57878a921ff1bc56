"""Peak memory of runs, measured on separate processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "tools" / "check_memory.py"


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak")
def test_a_run_from_the_disk_holds_no_more_than_some_blocks():
    """A scaled-down ``make check-memory``: 0.4 GB of weights in 7 blocks, pruned from the disk and in memory."""
    done = subprocess.run([sys.executable, CHECK, "--small"], capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["small"]
    assert found["same"]
    assert found["disk"]["peak"] <= found["budget"] == 2 * found["bytes"] // 7 + 10**9
    # In memory all 7 blocks are held, and from the disk at most two: more than half of the model must have stayed out.
    assert found["memory"]["peak"] - found["disk"]["peak"] > found["bytes"] / 2
