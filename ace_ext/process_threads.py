"""Threads of this process: how OpenMP threads wait, and how many there should be.

It does not import torch, so that it can run before torch loads its OpenMP library, which reads the environment once.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how threads wait."""


SPINS = 5000
"""Spin iterations before a thread of GNU's OpenMP library sleeps; enough from one product to the next of a small model.
Measured with 0, 3,000 and 10,000 iterations, two threads of an AMD EPYC: a token of a packed model of a billion weights
takes 116, 80 and 74 ms (``benchmarks/decode_step.py``). ``ace-prune run --nsamples 16`` on SmolLM2-135M takes 34, 25
and 25 s; beside two busy processes it takes 48 s with 0 and 57 s with 10,000."""


def wait_passively() -> None:
    """Makes threads that wait for work sleep after a moment. By default they spin.

    If other processes use the CPUs too, spinning threads keep others from working. The function does nothing if the
    environment says how to wait, or if torch is already loaded.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def without_own_waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what :func:`wait_passively` sets, for a program whose threads should wait in their own
    way."""
    own = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}
    kept = all(environment.get(name) == value for name, value in own.items())
    return {name: value for name, value in environment.items() if not (kept and name in own)}


def allowed_cpus(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many CPUs this process may use: those that it may run on, limited to its control group's share of time
    (``docker run --cpus``), rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share_of_version_2(cgroups) or _share_of_version_1(cgroups / "cpu")
    return cpus if share is None else min(cpus, max(1, -int(-share // 1)))


def _share_of_version_2(folder: Path) -> float | None:
    """The number of CPUs in ``cpu.max``. That file holds ``max`` or a quota, and a period."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _share_of_version_1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
