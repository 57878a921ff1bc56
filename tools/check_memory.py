"""Checks that ``--offload disk`` prunes a model that is larger than its memory budget, and writes the same bytes.

    python tools/check_memory.py            # 4.5 GB of weights in 2 GB of memory, and a small model as with --small
    python tools/check_memory.py --small    # 0.4 GB of weights, from the disk and in memory: what the tests run

Each run is a separate process; its peak is read from the kernel (``VmHWM``) while it runs. Prints one JSON line. Exits
with 1 if a run exceeds its budget or the bytes differ.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_synthetic_llama import make
from program import existing_folder, one_line_errors

GB = 10**9


def run(model: Path, output: Path, *options: str) -> dict:
    """Peak resident bytes and seconds of one ``ace-prune run``."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ace_ext", "run", "--model", model, "--output", output]
    command += ["--calibration", model / "text.txt", "--nsamples", 16, "--seqlen", 64, "--device", "cpu", "--json"]
    with tempfile.TemporaryFile("w+") as stdout:
        # Outside the source tree, so that -m finds the installed package.
        child = subprocess.Popen([*map(str, command), *options], stdout=stdout, cwd=tempfile.gettempdir())
        peak = 0
        while child.poll() is None:
            peak = max(peak, _peak_of(child.pid))
            time.sleep(0.01)
        if child.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} ended with status {child.returncode}")
        stdout.seek(0)
        peak = max(peak, json.load(stdout)["peak_memory_bytes"])
    return {"peak": peak, "seconds": round(time.perf_counter() - start, 1)}


def _peak_of(pid: int) -> int:
    """Peak resident bytes of a process so far; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same safetensors files, byte for byte."""
    names = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in (one, other)]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def both_ways(place: Path, layers: int, hidden: int, intermediate: int) -> dict:
    """Prunes a model from the disk, with a budget of two blocks and 1 GB, and in memory, and compares the outputs."""
    size = make(place / "small", layers, hidden, intermediate)
    budget = 2 * size // layers + GB
    disk = run(place / "small", place / "disk", "--offload", "disk", "--max-memory", str(budget))
    memory = run(place / "small", place / "memory", "--offload", "none")
    return {
        "bytes": size,
        "budget": budget,
        "disk": disk,
        "memory": memory,
        "same": same_files(place / "disk", place / "memory"),
    }


def large(place: Path, layers: int = 11, budget: int = 2 * GB) -> dict:
    """Prunes a model that is larger than the budget from the disk."""
    size = make(place / "large", layers, 4096, 11008)
    disk = run(place / "large", place / "pruned", "--offload", "disk", "--max-memory", str(budget))
    return {"bytes": size, "budget": budget, "disk": disk}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only the small model")
    parser.add_argument("--place", type=existing_folder, help="a folder with 10 GB free (default: the temporary one)")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        return check(args)


def check(args: argparse.Namespace) -> int:
    """Runs the checks in a temporary folder; returns the exit status."""
    place = Path(tempfile.mkdtemp(prefix="ace-memory-", dir=args.place))
    try:
        found = {"small": both_ways(place, layers=7, hidden=1536, intermediate=4096)}
        if not args.small:
            found["large"] = large(place)
    finally:
        shutil.rmtree(place)
    print(json.dumps(found))
    within = all(part["disk"]["peak"] <= part["budget"] for part in found.values())
    return 0 if within and found["small"]["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
