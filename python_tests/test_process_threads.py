"""How OpenMP threads wait, and how many there are."""

import os
import subprocess
import sys

import pytest

from ace_ext.process_threads import SPINS, WAITING, allowed_cpus

POLICY = """
import os, sys, types
import ace_ext
cli = types.ModuleType("ace_ext.cli.main")
cli.load = lambda argv: None
cli.main = lambda: print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
sys.modules["ace_ext.cli.main"] = cli
from ace_ext.__main__ import main
main()
"""
"""What the command line has set when it begins; importing ace_ext alone sets nothing."""


def printed(program, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    return subprocess.run(
        [sys.executable, "-c", program], env={**kept, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_threads_sleep_after_a_moment():
    assert printed(POLICY) == f"passive {SPINS}"


def test_the_import_sets_nothing():
    assert printed(POLICY.replace("main()", "cli.main()")) == "None None"


@pytest.mark.parametrize("name", WAITING)
def test_the_user_decides(name):
    value = "active" if name == "OMP_WAIT_POLICY" else "7"
    expected = {"OMP_WAIT_POLICY": "active None", "GOMP_SPINCOUNT": "None 7", "KMP_BLOCKTIME": "None None"}
    assert printed(POLICY, **{name: value}) == expected[name]


def test_too_late_once_torch_is_loaded():
    assert printed(f"import torch\n{POLICY}") == "None None"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu.max": "200000 0"}, 64),
        ({"cpu.max": "nonsense"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
    ids=str,
)
def test_the_share_of_a_control_group(files, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert allowed_cpus(tmp_path) == cpus


def test_the_command_line_keeps_to_it():
    program = (
        "import torch, ace_ext.cli.main as m; torch.set_num_threads(3); m.allowed_cpus = lambda: 2; m._limit_threads();"
        "print(torch.get_num_threads())"
    )
    assert printed(program.replace("import", "import os; os.environ.pop('OMP_NUM_THREADS', None); import", 1)) == "2"
    assert printed(program, OMP_NUM_THREADS="3") == "3"
