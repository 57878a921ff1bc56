"""Peak memory of runs, measured on processes of their own; and what is said of it beforehand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from ace_ext import PruneConfig
from ace_ext.memory import estimate
from ace_ext.model_walk import find_blocks

CHECK = Path(__file__).parent.parent / "tools" / "check_memory.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak")
def test_a_run_from_the_disk_holds_no_more_than_some_blocks():
    """A scaled-down ``make check-memory``: 0.4 GB of weights in 7 blocks, pruned both ways."""
    done = subprocess.run([sys.executable, CHECK, "--small"], capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["small"]
    assert found["same"]
    assert found["disk"]["peak"] <= found["budget"] == 2 * found["bytes"] // 7 + 10**9
    # In memory all 7 blocks are held, and from the disk at most two: more than half of the model must have stayed out.
    assert found["memory"]["peak"] - found["disk"]["peak"] > found["bytes"] / 2


def blocks_of(family: str = "llama"):
    return find_blocks(make_model(family, torch.bfloat16))


def guess(config: PruneConfig, **changed):
    given = {"process": 0, "model_bytes": 10**6, "offload": False, **changed}
    return estimate(blocks_of(), None, config, 8, 16, **given)


def test_the_estimate_counts_what_is_held():
    block = sum(p.numel() for p in blocks_of()[0].module.parameters()) * 2
    config = PruneConfig("wanda")
    assert guess(config).model == 10**6
    assert guess(config, offload=True, model_bytes=3 * block + 1000).model == block + 1000
    assert guess(config, offload=True, model_bytes=3 * block + 1000, head_bytes=400).model == block + 600
    assert guess(config).hidden == 8 * 16 * 32 * 2
    assert guess(config, resident_hidden=False).hidden == 0
    assert guess(config, process=7).total - guess(config).total == 7
    assert guess(PruneConfig("wanda", batch_tokens=16)).forward == guess(config).forward / 8


@pytest.mark.parametrize(("group", "blocks"), [("row", 1), ("model", 3)])
def test_the_estimate_counts_cross_moments_of_all_that_wait(group, blocks):
    """A block's statistics wait for its last Linear; the group model's for the last block's."""
    numbers = sum(linear.weight.numel() for linear in blocks_of()[0].linears.values())
    with_moment, without = (guess(PruneConfig(metric, group=group)).statistics for metric in ("cosp", "wanda"))
    assert with_moment - without == blocks * numbers * 4
